"""Several classes to a row: mixup, clusters, multi-label, the classes that a teacher names. N x K numbers, plain autograd.

    loss_n = Σ_k v_nk (log Z_n - z_nk),    Z_n = e^{A_n} + Σ_k e^{z_nk},    z_nk = s l_nk ψ(t_nk / l_nk)

v: the weights. A_n: the log-sum-exp over the classes that are none of the row's. Each term is
softplus(log(Z_n - e^{z_nk}) - z_nk), so that 1 - p is never formed by subtraction.
"""

import torch

from . import validation

MOST = 32  # classes to a row


def class_indices(labels):
    """Labels as int64. A uint64 beyond that range becomes the largest int64: it must not wrap to a class or ignore_index."""
    if labels.dtype != torch.uint64:
        return labels if labels.dtype == torch.int64 else labels.long()
    wrapped = labels.view(torch.int64)
    return torch.where(wrapped < 0, torch.iinfo(torch.int64).max, wrapped)


def merged(labels, weights, ignore_index, features):
    """(labels (N, K) int64 with ignore_index for none, weights (N, K)), each class of a row once, with the sum of its weights.

    The sums are float64: weights of 16 bits would round them. Labels (N,) without weights stay as they are.
    """
    if weights is None:
        return labels, None
    validation.check_ignore_index(ignore_index)
    validation.check_positives(labels, weights, features, MOST)
    labels = class_indices(labels)
    labels = torch.where(labels == -1, ignore_index, labels)
    same = labels[:, :, None] == labels[:, None]  # (N, K, K)
    first = same.int().argmax(2) == torch.arange(labels.shape[1], dtype=torch.int64, device=labels.device)
    present = first & (labels != ignore_index)
    weights = (same * weights.double()[:, None]).sum(2)
    return torch.where(present, labels, ignore_index), torch.where(present, weights, 0.0)


def losses(lse, logits, labels, weights, ignore_index):
    """The losses (N,) of A (N,), z (N, K), labels and weights as `merged` gives them."""
    lowest = torch.finfo(logits.dtype).min / 4  # e^lowest is 0, and unlike -inf has a derivative
    present = labels != ignore_index
    logits = torch.where(present, logits, lowest)
    terms = torch.cat([lse.clamp(min=lowest)[:, None], logits], 1)
    own = torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    own = torch.cat([own.new_zeros(len(own), 1), own], 1)  # (K, K + 1)
    others = torch.where(own, lowest, terms[:, None]).logsumexp(2)
    exponent = others - logits
    each = torch.logaddexp(exponent, torch.zeros_like(exponent))
    return torch.where(present, weights.to(each.dtype) * each, 0.0).sum(1)
