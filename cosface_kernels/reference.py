"""LMCL written plainly: the specification of the package, and the oracle that every backend is tested against.

    loss_n = -log( e^{s(cos_ny - m)} / ( e^{s(cos_ny - m)} + Σ_{j≠y} e^{s cos_nj} ) ),    cos_nj = x̂_n · ŵ_j

Large Margin Cosine Loss, CosFace, arXiv 1801.09414, eq. 4; any other margin is another function of cos_ny. Holds several N x C
matrices, so it is for small C. Runs in any float dtype; in float64 it is exact enough to judge the others. Arguments and results
are those of the public functions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def unit_rows(rows: Tensor) -> Tensor:
    """rows / ‖rows‖. A row shorter than 1e-12 becomes zero with zero gradient (F.normalize would return 1e12 times it)."""
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    tiny = norm < 1e-12
    return torch.where(tiny, 0.0, rows / torch.where(tiny, 1.0, norm))


def logits(
    features: Tensor,
    weight: Tensor,
    *,
    scale: float = 64.0,
    bias: Tensor | None = None,
    normalize_features: bool = True,
    normalize_weight: bool = True,
    centers_per_class: int = 1,
) -> Tensor:
    """s cos_nj, (N, C); not normalised, s (x_n·w_j + b_j); the largest of each class's centres."""
    features = unit_rows(features) if normalize_features else features
    weight = unit_rows(weight) if normalize_weight else weight
    return scale * F.linear(features, weight, bias).unflatten(1, (-1, centers_per_class)).max(2).values


def cosine_lse(
    features: Tensor, weight: Tensor, labels: Tensor, *, scale: float = 64.0, ignore_index: int = -100, **form: Any
) -> tuple[Tensor, Tensor]:
    """(log Σ_{j≠y} e^{s cos_nj}, cos_ny), two (N,) tensors; ignored rows give (0, 0) and take no part in any gradient.

    form: the other options of `logits`, for logits that are not cosines.
    """
    counted = labels.long() != ignore_index
    features = torch.where(counted[:, None], features, 0.0)
    target = torch.where(counted, labels.long(), 0)
    scaled = logits(features, weight, scale=scale, **form)
    negatives = scaled.scatter(1, target[:, None], -torch.inf).logsumexp(1)
    cosines = scaled.gather(1, target[:, None]).squeeze(1) / scale
    return torch.where(counted, negatives, 0.0), torch.where(counted, cosines, 0.0)


def cosface_loss(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float = 64.0,
    margin: float = 0.35,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """The loss above; the mean is over the rows that are not ignored, and 0 over none."""
    negatives, cosines = cosine_lse(features, weight, labels, scale=scale, ignore_index=ignore_index)
    counted = labels.long() != ignore_index
    losses = torch.where(counted, F.softplus(negatives - scale * (cosines - margin), threshold=40), 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / counted.sum().clamp(min=1) if reduction == "mean" else losses.sum()


def topk(features: Tensor, weight: Tensor, k: int, *, scale: float = 64.0) -> tuple[Tensor, Tensor]:
    """(values, indices) of each row's k largest logits, descending."""
    return logits(features, weight, scale=scale).topk(k)
