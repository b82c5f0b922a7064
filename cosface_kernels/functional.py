"""The public losses: validation, precision, the margin on N-vectors, reduction. What is N x C happens in ops/."""

import math

import torch
from torch.autograd import forward_ad

from . import margins, validation
from .ops import recording
from .ops.batch_rows import reduced
from .ops.normalize import direction
from .ops.operators import Options, margin_losses, negative_lse, snapshot


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
    lse, cosine, *_, counted = _negatives_and_target(
        features, weight, labels, scale=scale, ignore_index=ignore_index, memory_budget=memory_budget, backend=backend
    )
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
    classes=None,
    sample_correction=False,
):
    """Large Margin Cosine Loss (CosFace) over any number of classes, without an N x C matrix.

        loss_n = -log( e^{s(cos_ny - m)} / ( e^{s(cos_ny - m)} + Σ_{j≠y} e^{s cos_nj} ) ),    cos_nj = x_n·w_j / (‖x_n‖ ‖w_j‖)

    The same loss and gradients as
    `F.cross_entropy(s * (F.normalize(x) @ F.normalize(w).T - m * F.one_hot(y, C)), y)`.

    Args:
        features, weight, labels, scale, ignore_index, memory_budget, backend: as in `cosine_lse`.
        margin: m, a finite number in units of cosine.
        reduction: "mean" over the rows that are not ignored (0 with zero gradients if there are none), "sum", or "none".
        classes, sample_correction: as in `margin_softmax_loss`.

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
        margin=margins.CosFace(margin),
        scale=scale,
        reduction=reduction,
        ignore_index=ignore_index,
        memory_budget=memory_budget,
        backend=backend,
        classes=classes,
        sample_correction=sample_correction,
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
    classes=None,
    sample_correction=False,
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
        classes: (M,), any integer dtype, ascending: the classes that take part, among them every row's own, as
            `sampling.sample_classes` draws them; labels stay class numbers of the whole table. The gradients of weight and bias
            are then sparse tensors of those rows, as nn.Embedding(sparse=True) gives. None: all.
        sample_correction: whether to add log((C - 1) / (M - 1)) to the log-sum-exp of the M - 1 negatives, an estimate of that of
            all C - 1.

    Logits that are no cosines have no bound, so each row's largest one is found first: 2 N C D flops more.

    Returns:
        As `cosface_loss`.

    Raises:
        As `cosface_loss`; ValueError also for a bias with a margin, for rows of weight that are not whole classes, and for
        classes that do not ascend; IndexError also for one of them that is no class, and for a label that is not among them.

    Source: CosFace, arXiv 1801.09414, section 3; the margins' own papers; sub-centres: J. Deng et al., ECCV 2020; sampled
    classes: Partial FC, X. An et al., arXiv 2010.05222.
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
        classes=classes,
        sample_correction=sample_correction,
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
    centers_per_class,
    reduction,
    backend,
    classes=None,
    sample_correction=False,
    state=None,
    training=False,
    batch=None,
    **options,
):
    """`margin_softmax_loss` with the running statistics of a module in `state`, brought up to date first when training.

    batch: a sharded.Batch, where the table is one of several shards and features are those of all ranks.
    """
    margins.check(margin, bias is not None, normalize_features)
    validation.check_reduction(reduction)
    validation.check_flag("sample_correction", sample_correction)
    if normalize_features is None:
        normalize_features = margin.normalize_features
    scale = default_scale(margin, normalize_features) if scale is None else scale
    lse, product, target_length, feature_length, unit, counted = _negatives_and_target(
        features,
        weight,
        labels,
        scale=scale,
        bias=bias,
        normalize_features=normalize_features,
        normalize_weight=margin.normalize_weight,
        centers_per_class=centers_per_class,
        classes=classes,
        backend=backend,
        **options,
    )
    if sample_correction and classes is not None:
        numbers = weight.shape[0] // centers_per_class, classes.shape[0]
        lse = lse + _log_of_inverse_rate(*(numbers if batch is None else batch.of_all_shards(*numbers, weight.device)))
    norm = None
    if margin.needs_norm:
        # ‖x‖ as x·x̂, its derivative being x̂: NaN where a GPU made x̂ NaN for a label that is no class.
        norm = (torch.where(counted[:, None], features, 0.0).to(unit.dtype) * direction(unit)).sum(1)
    if batch is not None:
        largest = float(scale) if normalize_features and margin.normalize_weight else math.inf
        lse, product, target_length = batch.combine(largest, lse, product, target_length)
        feature_length, norm = batch.own(feature_length), batch.own(norm)
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
    for position, term in enumerate(terms):
        _check_rows(f"terms[{position}]", margin, term, lse.shape, torch.Size([]))
    logit = margin.target_logit(product, length, *terms)
    _check_rows("psi", margin, logit, lse.shape)
    logit = logit.to(lse.dtype)
    _refuse_transforms(logit)
    losses, _ = margin_losses(lse, logit, counted, float(scale), reduction, backend)
    penalty = margin.penalty(norm)
    if penalty is not None:
        _check_rows("penalty", margin, penalty, lse.shape)
        losses = losses + reduced(torch.where(counted, penalty, 0.0), counted, reduction)
    return batch.own_rows(losses) if batch is not None and reduction == "none" else losses


def _check_rows(name, margin, value, *shapes):
    """What a margin returned: (N, 1) would be broadcast to N x N numbers."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} of {type(margin).__name__} must be a tensor, got {type(value).__name__}")
    if value.shape not in shapes:
        wanted = f"(N,) = {tuple(shapes[0])}" + (" or ()" if len(shapes) > 1 else "")
        raise ValueError(f"{name} of {type(margin).__name__} must return shape {wanted}, got {tuple(value.shape)}")


def _log_of_inverse_rate(num_classes, num_sampled):
    """log of how many negatives there are over how many were summed; 0 where none was, of which nothing can be estimated."""
    return math.log((num_classes - 1) / (num_sampled - 1)) if num_sampled > 1 else 0.0


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
    classes=None,
    ignore_index,
    memory_budget,
    backend,
    foreign_index=None,
    parameters=None,
):
    """(negative lse (N,), x̃·w̃_y (N,), ‖w̃_y‖ and ‖x̃‖ (N,) or None where they are 1, x̃ (N, D) without gradient, which rows are not
    ignored).

    w̃_y is the nearest centre. The lse of an ignored row is that of all classes. parameters: whose rows weight and bias are, where
    they are not theirs.
    """
    validation.check_tensors(features, weight, labels, bias, centers_per_class, classes)
    validation.check_options(scale=scale, ignore_index=ignore_index, memory_budget=memory_budget, backend=backend)
    _refuse_transforms(features, weight, *([] if bias is None else [bias]))
    labels, ignore_index = class_indices(labels), int(ignore_index)
    parameters = (weight, bias) if parameters is None else parameters
    trained = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in parameters)
    recorded = trained and recording.pending(parameters[0]) is not None
    options = Options(
        *(float(scale), ignore_index, bool(normalize_features), normalize_weight, int(centers_per_class)),
        *(product_dtype(features, weight), _bytes_to_keep(memory_budget, weight, recorded), backend),
    )
    index = None if classes is None else _rows_of(class_indices(classes), centers_per_class, weight.shape[0])
    lse, product, target_length, feature_length, unit, _, _, _, shift, total, kept = negative_lse(
        features,
        weight.detach() if recorded else weight,
        bias.detach() if recorded and bias is not None else bias,
        labels,
        index,
        *options,
        False,  # what needs a gradient is seen by the operator, but for a table that is detached
        recorded,
        foreign_index,
    )
    if recorded:
        lse, product, target_length = recording.record(
            parameters, (lse, product, target_length), (unit, labels, shift, total, kept), index, options
        )
    vectors = [product, None if normalize_weight else target_length]
    if centers_per_class > 1:  # the gradient goes to the nearest centre alone
        nearest = product.argmax(1, keepdim=True)
        vectors = [None if vector is None else vector.gather(1, nearest) for vector in vectors]
    product, target_length = (None if vector is None else vector.squeeze(1) for vector in vectors)
    return lse, product, target_length, None if normalize_features else feature_length, unit, labels != ignore_index


def _bytes_to_keep(memory_budget, weight, recorded):
    """What an operator takes for memory_budget: 64 bits, or None for its own "auto". Where a fused optimiser makes no gradient of
    the table's size, "auto" is a tenth of the table.
    """
    if memory_budget == "auto":
        return weight.nbytes // 10 if recorded else None
    return min(int(memory_budget), 2**62)


def _rows_of(classes, centers, num_rows):
    """(M K,) the rows of the table that make up the classes; a number that is no class stays none, however large."""
    if centers > 1:
        rows = classes.clamp(-1, num_rows // centers)[:, None] * centers + torch.arange(
            centers, dtype=torch.int64, device=classes.device
        )
        return rows.flatten()
    return classes.contiguous()


def _refuse_transforms(*tensors):
    """The operators would silently drop the tangents; torch.func's gradients they do not have."""
    if not torch.compiler.is_compiling() and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError("cosface_kernels has no forward-mode derivative; use reverse mode, or cosface_kernels.reference")
    validation.check_transforms(*tensors)


def class_indices(labels):
    """labels as int64. A uint64 past its range becomes the largest int64, which is no class either, not a negative number."""
    if labels.dtype != torch.uint64:
        return labels.long()
    wrapped = labels.view(torch.int64)
    return torch.where(wrapped < 0, torch.iinfo(torch.int64).max, wrapped)


def product_dtype(features, weight):
    """What the matrix products read: see `cosine_lse`."""
    device_type = features.device.type
    if torch.float64 in (features.dtype, weight.dtype):
        return torch.float64
    wanted = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else features.dtype
    return torch.float32 if wanted == torch.float32 else torch.bfloat16
