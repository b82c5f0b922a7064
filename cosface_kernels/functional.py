"""The public losses: validation, precision, the margin on N-vectors, reduction. What is N x C happens in ops.py."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from . import validation
from .margins import CosFace
from .ops import negative_lse, snapshot


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
    lse, unit, target, counted = _negatives_and_target(
        features, weight, labels, scale=scale, ignore_index=ignore_index, memory_budget=memory_budget, backend=backend
    )
    return torch.where(counted, lse, 0.0), (unit * target).sum(1)


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
    validation.check_scale(scale)
    validation.check_margin(margin)
    return margin_softmax_loss(
        features,
        weight,
        labels,
        margin=CosFace(margin),
        scale=scale,
        reduction=reduction,
        ignore_index=ignore_index,
        memory_budget=memory_budget,
        backend=backend,
    )


def margin_softmax_loss(
    features,
    weight,
    labels,
    *,
    margin,
    scale=None,
    bias=None,
    normalize_features=None,
    centers_per_class=1,
    reduction="mean",
    ignore_index=-100,
    memory_budget="auto",
    backend="auto",
):
    """Softmax cross-entropy with any margin over any number of classes, without an N x C matrix.

        loss_n = -log( e^{s t_n} / ( e^{s t_n} + Σ_{j≠y_n} e^{s x̃_n·w̃_j} ) ),    t_n = ‖x̃_n‖ ‖w̃_{y_n}‖ ψ(cos θ_{n,y_n})

    x̃ and w̃ are unit rows, or the rows as they are; a margin is its ψ, see `cosface_kernels.margins`.

    Args:
        features, weight, labels, ignore_index, memory_budget, backend: as in `cosine_lse`.
        margin: CosFace(), ArcFace(), NormSoftmax(), SphereFace(), Combined(), AdaFace(), MagFace(), Softmax() or LSoftmax() of
            `cosface_kernels.margins`, or one of your own. What AdaFace, and SphereFace when annealed, carry from step to step is
            for `MarginSoftmaxLoss` to keep; here AdaFace takes the batch's own statistics.
        scale: s > 0. None: 64 for cosines, and 1 where logits depend on the norms of the features or of the table.
        bias: (C,), or (C K,) with sub-centres, for Softmax() alone: the logits are s (x_n·w_j + b_j).
        normalize_features: whether x̃ = x / ‖x‖ or x. None: True, but for Softmax() and LSoftmax(). The table's rows are
            normalised but for those two.
        centers_per_class: K sub-centres to a class, K consecutive rows of weight (C K, D): the largest of the K cosines counts.
        reduction: as in `cosface_loss`.

    Logits that are no cosines have no bound, so each row's largest one is found first: 2 N C D flops more.

    Returns:
        As `cosface_loss`.

    Raises:
        As `cosface_loss`; ValueError also for a bias with a margin, and for rows of weight that are not whole classes.

    Source: CosFace, arXiv 1801.09414, section 3; the margins' own papers; sub-centres: J. Deng et al., ECCV 2020.
    """
    return stateful_loss(
        features,
        weight,
        labels,
        margin=margin,
        scale=scale,
        bias=bias,
        normalize_features=normalize_features,
        centers_per_class=centers_per_class,
        reduction=reduction,
        ignore_index=ignore_index,
        memory_budget=memory_budget,
        backend=backend,
    )


def stateful_loss(
    features,
    weight,
    labels,
    *,
    margin,
    scale,
    bias,
    normalize_features,
    reduction,
    state=None,
    training=False,
    shards=None,
    **options,
):
    """`margin_softmax_loss` with the running statistics of a module in `state`, brought up to date first when training.

    shards: a sharded.Batch, where the table is one of several shards and features are those of all ranks.
    """
    validation.check_margin_object(margin, bias is not None, normalize_features)
    validation.check_reduction(reduction)
    if normalize_features is None:
        normalize_features = margin.normalize_features
    scale = default_scale(margin, normalize_features) if scale is None else scale
    lse, unit, target, counted = _negatives_and_target(
        features,
        weight,
        labels,
        scale=scale,
        bias=bias,
        normalize_features=normalize_features,
        normalize_weight=margin.normalize_weight,
        **options,
    )
    product = (unit * target).sum(1)
    feature_length = None if normalize_features else unit.norm(dim=1)
    target_length = None if margin.normalize_weight else target.norm(dim=1)
    norm = None
    if margin.needs_norm:
        rows = torch.where(counted[:, None], features, 0.0).to(unit.dtype)
        # ‖x‖ as x·x̂, its derivative being x̂: NaN where a GPU made x̂ NaN for a label that is no class.
        norm = (rows * F.normalize(unit.detach())).sum(1)
    if shards is not None:
        largest = float(scale) if normalize_features and margin.normalize_weight else math.inf
        lse, product, target_length = shards.combine(largest, lse, product, target_length)
        feature_length, norm = shards.own(feature_length), shards.own(norm)
    lengths = [length for length in (feature_length, target_length) if length is not None]
    length = math.prod(lengths) if lengths else None
    state = state or {}
    if training:
        with torch.no_grad():
            margin.update(norm, counted, state)
    state = {name: snapshot(value) for name, value in state.items()}
    terms = margin.terms(norm, counted, state)
    if not isinstance(terms, tuple):
        raise TypeError(f"terms of {type(margin).__name__} must return a tuple, got {type(terms).__name__}")
    logit = float(scale) * margin.target_logit(product, length, *terms)
    if logit.shape != lse.shape:
        raise ValueError(f"psi of {type(margin).__name__} must return shape (N,) = {tuple(lse.shape)}, got {tuple(logit.shape)}")
    # -log σ(-z) = softplus(z): 1 - p_y is never formed by subtraction, so a converged row keeps its relative accuracy. F.softplus
    # would multiply the upstream gradient by e^z, z <= its threshold, and overflow with it.
    losses = -F.logsigmoid(logit - lse)
    penalty = margin.penalty(norm)
    losses = torch.where(counted, losses if penalty is None else losses + penalty, 0.0)
    if reduction == "none":
        return losses if shards is None else shards.own_rows(losses)
    return losses.sum() / counted.sum().clamp(min=1) if reduction == "mean" else losses.sum()


def default_scale(margin, normalize_features):
    """The scale where none is given."""
    return 64.0 if normalize_features and margin.normalize_weight else 1.0


def _negatives_and_target(
    features,
    weight,
    labels,
    *,
    scale,
    bias=None,
    normalize_features=True,
    normalize_weight=True,
    centers_per_class=1,
    ignore_index,
    memory_budget,
    backend,
    foreign_index=None,
):
    """(negative lse (N,), x̃ (N, D), w̃_y of the nearest centre (N, D), which rows are not ignored).

    The lse of an ignored row is that of all classes.
    """
    validation.check_tensors(features, weight, labels, bias, centers_per_class)
    validation.check_options(scale=scale, ignore_index=ignore_index, memory_budget=memory_budget, backend=backend)
    if not torch.compiler.is_compiling():
        _refuse_forward_mode(features, weight, *([] if bias is None else [bias]))
    labels, ignore_index = _class_indices(labels), int(ignore_index)
    grad_mode = torch.is_grad_enabled()
    lse, target_rows, unit, *_ = negative_lse(
        features,
        weight,
        bias,
        labels,
        float(scale),
        ignore_index,
        bool(normalize_features),
        normalize_weight,
        int(centers_per_class),
        _product_dtype(features, weight),
        None if memory_budget == "auto" else min(int(memory_budget), 2**62),  # an operator takes 64-bit integers
        backend,
        grad_mode and features.requires_grad,
        grad_mode and (weight.requires_grad or (bias is not None and bias.requires_grad)),
        foreign_index,
    )
    if centers_per_class > 1:  # the gradient goes to the nearest centre alone
        nearest = (unit[:, None] * target_rows).sum(2).argmax(1)
        target_rows = target_rows.take_along_dim(nearest[:, None, None], 1)
    return lse, unit, target_rows.squeeze(1), labels != ignore_index


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
