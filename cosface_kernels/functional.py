"""The public losses: validation, precision, the margin on N-vectors, reduction. What is N x C happens in ops.py."""

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from . import validation
from .ops import negative_lse


def cosine_lse(features, weight, labels, *, scale=64.0, ignore_index=-100, memory_budget="auto", backend="auto"):
    """The margin-free core of every cosine softmax loss, without an N x C matrix.

        negative_lse_n = log Σ_{j≠y_n} e^{s cos_nj},    target_cosine_n = cos_{n,y_n},    cos_nj = x_n·w_j / (‖x_n‖ ‖w_j‖)

    With a margin function ψ the loss is softplus(negative_lse - s ψ(target_cosine)); CosFace's is ψ(c) = c - m. Both results are
    differentiable in features and weight, once.

    Args:
        features: (N, D), float16, bfloat16, float32 or float64, any strides.
        weight: (C, D), the class table, on the same device; its dtype may differ. Rows need not be normalised.
        labels: (N,), any integer dtype.
        scale: s > 0, a finite number.
        ignore_index: rows with this label give (0, 0) and no gradient, whatever their features hold.
        memory_budget: bytes for exponentials kept from forward for backward: 0 recomputes them all. "auto": at most what the
            weight's gradient takes and at most an eighth of the device's memory. Results do not depend on it beyond rounding.
        backend: "auto", "torch" (any device), "cpu" (native CPU kernels) or "triton" (GPU).

    Precision follows PyTorch's switches: products read the autocast dtype where autocast is on, else bfloat16 where the features
    have 16 bits, else float32 (on a GPU under `torch.backends.cuda.matmul.fp32_precision`); float64 if an input is. 16 bits
    always means bfloat16 there, because exponentials need its range. Sums are float32. A row shorter than 1e-12 counts as zero,
    with zero gradient.

    Returns:
        (negative_lse, target_cosine): two (N,) float32 tensors (float64 for float64). With C = 1 negative_lse is -inf.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
        IndexError: a label that is neither in [0, C) nor ignore_index. On a GPU, where that check would wait for the device, such
            a row's results are NaN instead, and with them its row of dX and all of dW, unless COSFACE_CHECK_LABELS=1 is set.
        RuntimeError: a second derivative, or a forward-mode one.

    Source: CosFace, arXiv 1801.09414, eq. 4.
    """
    lse, cosine, counted = _negatives_and_target(features, weight, labels, scale, ignore_index, memory_budget, backend)
    return torch.where(counted, lse, 0.0), cosine


def cosface_loss(
    features,
    weight,
    labels,
    *,
    scale=64.0,
    margin=0.35,
    reduction="mean",
    ignore_index=-100,
    memory_budget="auto",
    backend="auto",
):
    """Large Margin Cosine Loss (CosFace) over any number of classes, without an N x C matrix.

        loss_n = -log( e^{s(cos_ny - m)} / ( e^{s(cos_ny - m)} + Σ_{j≠y} e^{s cos_nj} ) ),    cos_nj = x_n·w_j / (‖x_n‖ ‖w_j‖)

    The same loss and gradients as
    `F.cross_entropy(s * (F.normalize(x) @ F.normalize(w).T - m * F.one_hot(y, C)), y)`.

    Args:
        features, weight, labels, scale, ignore_index, memory_budget, backend: as in `cosine_lse`.
        margin: m, a finite number in units of cosine.
        reduction: "mean" over the rows that are not ignored (0 with zero gradients if there are none), "sum", or "none".

    Returns:
        float32 (float64 for float64 inputs): a scalar, or (N,) for "none" with 0 at ignored rows.

    Raises:
        As `cosine_lse`.

    Source: CosFace, arXiv 1801.09414, eq. 4; s = 64 and m = 0.35 are the paper's.
    """
    validation.check_margin(margin)
    validation.check_reduction(reduction)
    lse, cosine, counted = _negatives_and_target(features, weight, labels, scale, ignore_index, memory_budget, backend)
    # -log σ(-z) = softplus(z): 1 - p_y is never formed by subtraction, so a converged row keeps its relative accuracy. F.softplus
    # would multiply the upstream gradient by e^z, z <= its threshold, and overflow with it.
    losses = torch.where(counted, -F.logsigmoid(float(scale) * (cosine - float(margin)) - lse), 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / counted.sum().clamp(min=1) if reduction == "mean" else losses.sum()


def _negatives_and_target(features, weight, labels, scale, ignore_index, memory_budget, backend):
    """`cosine_lse`, but for the lse of an ignored row, and which rows are not ignored."""
    validation.check_tensors(features, weight, labels)
    validation.check_options(scale=scale, ignore_index=ignore_index, memory_budget=memory_budget, backend=backend)
    if not torch.compiler.is_compiling():
        _refuse_forward_mode(features, weight)
    labels, ignore_index = _class_indices(labels), int(ignore_index)
    grad_mode = torch.is_grad_enabled()
    lse, target_unit, unit, *_ = negative_lse(
        features,
        weight,
        labels,
        float(scale),
        ignore_index,
        _product_dtype(features, weight),
        None if memory_budget == "auto" else min(int(memory_budget), 2**62),  # an operator takes 64-bit integers
        backend,
        grad_mode and features.requires_grad,
        grad_mode and weight.requires_grad,
    )
    return lse, (unit * target_unit).sum(1), labels != ignore_index


def _refuse_forward_mode(*tensors):
    """A custom operator would silently drop the tangents."""
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError("cosface_kernels has no forward-mode derivative; use reverse mode, or cosface_kernels.reference")


def _class_indices(labels):
    """labels as int64. A uint64 past its range becomes the largest int64, which is no class either, not a negative number."""
    if labels.dtype != torch.uint64:
        return labels.long()
    wrapped = labels.view(torch.int64)
    return torch.where(wrapped < 0, torch.iinfo(torch.int64).max, wrapped)


def _product_dtype(features, weight):
    """What the matrix products read: see `cosine_lse`."""
    device_type = features.device.type
    if torch.float64 in (features.dtype, weight.dtype):
        return torch.float64
    wanted = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else features.dtype
    return torch.float32 if wanted == torch.float32 else torch.bfloat16
