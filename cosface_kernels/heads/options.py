"""The options of MarginSoftmaxLoss that a head made of it passes on."""

from typing import TypedDict

import torch
from torch import Tensor

from ..margins.hard_negatives import HardNegatives
from ..validation import Backend, MemoryBudget, Reduction, TableFormat


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
