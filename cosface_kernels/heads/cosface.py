"""CosFaceLoss: the head with the one margin CosFace, whose margin is a number; and the options that such heads pass on."""

from typing import TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import margins, validation
from ..margins.hard_negatives import HardNegatives
from ..validation import Backend, Device, MemoryBudget, Reduction, TableFormat
from .plain import MarginSoftmaxLoss


class HeadOptions(TypedDict, total=False):
    """Options of `MarginSoftmaxLoss` that the other heads take too, for a type checker."""

    negatives: HardNegatives | None
    normalize_features: bool | None
    centers_per_class: int
    learnable_scale: bool
    reduction: Reduction
    ignore_index: int
    memory_budget: MemoryBudget
    backend: Backend
    table_format: TableFormat
    sample_rate: float
    sample_seed: int
    sample_correction: bool
    hard_classes: Tensor | None
    label_smoothing: float
    class_weight: Tensor | None
    dtype: torch.dtype | None


# The options that a constructor passes on: bias too, which MarginSoftmaxLoss refuses with a sentence of its own.
OPTIONS = {*HeadOptions.__annotations__, "scale", "margin", "device", "bias", "placement"}


class CosFaceLoss(MarginSoftmaxLoss):
    """`cosface_loss` with a learned class table: `MarginSoftmaxLoss` with the one margin CosFace, ψ_n = cos_ny - m.

        head = CosFaceLoss(512, 1_000_000)
        loss = head(features, labels)  # (N, 512), (N,) -> scalar

    Args:
        embedding_size, num_classes, **options: as for `MarginSoftmaxLoss`.
        scale, margin: s and m, as in `cosface_loss`. `head.margin = 0.4` changes m, `head.scale = 32.0` s, at any time.

    Raises, and warns: as `MarginSoftmaxLoss`.
    """

    margin: float  # type: ignore[assignment]

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        *,
        scale: float | Tensor = 64.0,
        margin: float | Tensor = 0.35,
        device: Device = None,
        **options: Unpack[HeadOptions],
    ) -> None:
        validation.check_names(type(self).__name__, options, OPTIONS)
        validation.check_scale(scale)
        super().__init__(embedding_size, num_classes, margin=margin, scale=scale, device=device, **options)

    @staticmethod
    def _as_margin(given):
        if isinstance(given, margins.Margin):
            raise TypeError(
                f"the margin of a CosFaceLoss is the number m, got {validation.shown(given)}: MarginSoftmaxLoss takes objects"
            )
        validation.check_margins(given)
        return margins.CosFace(given)

    @staticmethod
    def _as_given(margin):
        return margin.m
