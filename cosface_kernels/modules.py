"""CosFaceLoss: the class table and its loss as a module."""

import torch
from torch import nn

from . import reference, validation
from .functional import cosface_loss
from .plan import slab_classes


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
        validation.check_scale(scale)
        validation.check_margin(margin)
        validation.check_reduction(reduction)
        validation.check_ignore_index(ignore_index)
        validation.check_memory_budget(memory_budget)
        validation.check_backend(backend)
        self.scale = scale
        self.margin = margin
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.memory_budget = memory_budget
        self.backend = backend
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
        """s cos_nj without margin, (N, C), materialised and differentiable: for small C."""
        validation.check_features(features, self.weight)
        dtype = torch.promote_types(features.dtype, self.weight.dtype)
        return reference.logits(features.to(dtype), self.weight.to(dtype), scale=self.scale)

    @torch.no_grad()
    def topk(self, features, k):
        """(values, indices), each (N, k): the k largest of `logits(features)`, descending, slab by slab, never N x C.

        Raises:
            ValueError: k is negative or larger than the number of classes.
        """
        validation.check_features(features, self.weight)
        num_classes = self.weight.shape[0]
        validation.check_k(k, num_classes)
        dtype = torch.promote_types(features.dtype, self.weight.dtype)
        values = torch.empty(features.shape[0], 0, dtype=dtype, device=features.device)
        indices = torch.empty(features.shape[0], 0, dtype=torch.int64, device=features.device)
        slab = slab_classes(features, self.weight)
        for start in range(0, num_classes, slab):
            rows = self.weight[start : start + slab].to(dtype)
            found = reference.logits(features.to(dtype), rows, scale=self.scale)
            best = found.topk(min(k, found.shape[1]))
            candidates = torch.cat([values, best.values.to(dtype)], 1)
            values, order = candidates.topk(min(k, candidates.shape[1]))
            indices = torch.cat([indices, best.indices + start], 1).gather(1, order)
        return values, indices

    def extra_repr(self):
        num_classes, embedding_size = self.weight.shape
        return f"{embedding_size}, {num_classes}, scale={self.scale}, margin={self.margin}, reduction={self.reduction!r}"
