"""CosFaceLoss: the class table and its loss as a module."""

import torch
from torch import nn

from . import validation
from .functional import cosface_loss
from .plan import slab_classes, wide_dtype
from .unit import unit_rows


class CosFaceLoss(nn.Module):
    """`cosface_loss` with a learned class table, weight (num_classes, embedding_size) drawn from N(0, 0.01²).

    Args:
        embedding_size: D.
        num_classes: C, the number of identities.
        scale, margin, reduction, ignore_index, memory_budget, backend: as in `cosface_loss`.
        device, dtype: of the table.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, at construction.
    """

    def __init__(
        self,
        embedding_size,
        num_classes,
        *,
        scale=64.0,
        margin=0.35,
        reduction="mean",
        ignore_index=-100,
        memory_budget="auto",
        backend="auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        validation.check_size("embedding_size", embedding_size)
        validation.check_size("num_classes", num_classes)
        options = {
            "scale": scale,
            "margin": margin,
            "reduction": reduction,
            "ignore_index": ignore_index,
            "memory_budget": memory_budget,
            "backend": backend,
        }
        validation.check_options(**options)
        for name, value in options.items():
            setattr(self, name, value)
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, features, labels):
        """The loss of features (N, D) with labels (N,)."""
        return cosface_loss(
            features,
            self.weight,
            labels,
            scale=self.scale,
            margin=self.margin,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            memory_budget=self.memory_budget,
            backend=self.backend,
        )

    def logits(self, features):
        """s cos_nj without margin, (N, C) float32 (float64), materialised and differentiable: for small C."""
        return self._logits(self._unit(features), 0, len(self.weight))

    @torch.no_grad()
    def topk(self, features, k):
        """(values, indices), each (N, k): the k largest of `logits(features)`, descending, slab by slab, never N x C.

        Raises:
            TypeError, ValueError: k is no int, negative, or larger than the number of classes.
        """
        unit = self._unit(features)
        validation.check_k(k, len(self.weight))
        values = unit.new_empty(len(unit), 0)
        indices = torch.empty(len(unit), 0, dtype=torch.int64, device=unit.device)
        slab = slab_classes(features, self.weight)
        for start in range(0, len(self.weight), slab):
            found = self._logits(unit, start, start + slab)
            best = found.topk(min(k, found.shape[1]))
            candidates = torch.cat([values, best.values], 1)
            values, order = candidates.topk(min(k, candidates.shape[1]))
            indices = torch.cat([indices, best.indices + start], 1).gather(1, order)
        return values, indices

    def _unit(self, features):
        validation.check_features(features, self.weight)
        return unit_rows(features.to(wide_dtype(torch.promote_types(features.dtype, self.weight.dtype))))[0]

    def _logits(self, unit, start, stop):
        """Outside autocast: rounded to 16 bits, many of a million cosines would be equal."""
        with torch.autocast(unit.device.type, enabled=False):
            return self.scale * (unit @ unit_rows(self.weight[start:stop].to(unit.dtype))[0].T)

    def extra_repr(self):
        num_classes, embedding_size = self.weight.shape
        return f"{embedding_size}, {num_classes}, scale={self.scale}, margin={self.margin}, reduction={self.reduction!r}"
