"""The public losses, flat and explicit. loss.py computes them; the N x C work is in ops/."""

from typing import Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Required, Unpack

from . import positives, validation
from .before_margin import Inputs, LossOptions, check_inputs, differentiable_in_scale, negatives
from .loss import Statistics, loss_of_table
from .margins import CosFace, HardNegatives, Margin, NormSoftmax
from .validation import Backend, MemoryBudget, Reduction


class Common(TypedDict, total=False):
    """Options of every function, for a type checker."""

    ignore_index: int
    memory_budget: MemoryBudget
    backend: Backend


class LseArguments(Common, total=False):
    scale: float | Tensor


class LossArguments(Common, total=False):
    reduction: Reduction
    classes: Tensor | None
    sample_correction: bool | Tensor
    label_smoothing: float
    class_weight: Tensor | None
    negatives: HardNegatives | None


class CosFaceArguments(LossArguments, total=False):
    scale: float | Tensor
    margin: float | Tensor


class MarginArguments(LossArguments, total=False):
    margin: Required[Margin]
    scale: float | Tensor | None
    bias: Tensor | None
    normalize_features: bool | None
    centers_per_class: int
    label_weights: Tensor | None


@overload
def cosine_lse(
    features: Tensor, weight: Tensor, labels: Tensor, *, return_largest: Literal[False] = ..., **options: Unpack[LseArguments]
) -> tuple[Tensor, Tensor]: ...
@overload
def cosine_lse(
    features: Tensor, weight: Tensor, labels: Tensor, *, return_largest: Literal[True], **options: Unpack[LseArguments]
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


def cosine_lse(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor = 64.0,
    ignore_index: int = -100,
    memory_budget: MemoryBudget = "auto",
    backend: Backend = "auto",
    return_largest: bool = False,
) -> tuple[Tensor, ...]:
    """The margin-free core of every cosine softmax loss, without an N x C matrix.

        negative_lse_n = log Σ_{j≠y_n} e^{s cos_nj},    target_cosine_n = cos_{n,y_n},    cos_nj = x_n·w_j / (‖x_n‖ ‖w_j‖)

    With a margin function ψ the loss is softplus(negative_lse - s ψ(target_cosine)); CosFace's is ψ(c) = c - m. Both results are
    differentiable in features and weight, once.

    Args:
        features: (N, D), float16, bfloat16, float32 or float64, any strides.
        weight: (C, D), the class table, on the same device; its dtype may differ. Rows need not be normalised.
        labels: (N,), any integer dtype.
        scale: s > 0, a finite number, or a 0-dim tensor of one, which gets its gradient: ∂A_n/∂s = x̂_n · Σ_j p_nj ŵ_j of the
            negatives. On a GPU the host waits for its number; a tensor on the CPU saves that.
        ignore_index: rows with this label give (0, 0) and no gradient, whatever their features hold.
        memory_budget: bytes for exponentials kept from forward for backward: 0 recomputes them all. "auto": at most what the
            weight's gradient takes, or 8 MiB, and at most an eighth of the device's memory. All of them are 2 N C bytes where
            products read bfloat16, 4 N C in float32. Results do not depend on it beyond rounding.
        backend: "auto", "torch" (any device), "cpu" (native CPU kernels) or "triton" (GPU).
        return_largest: whether to return each row's largest cosine with another class, and that class, from the same pass.

    Precision follows PyTorch's switches: products read the autocast dtype where autocast is on, else bfloat16 where the features
    have 16 bits, else float32 (on a GPU under `torch.backends.cuda.matmul.fp32_precision`); float64 if an input is. 16 bits
    always means bfloat16 there, because exponentials need its range. Sums are float32. A row shorter than 1e-12 counts as zero,
    with zero gradient.

    Returns:
        (negative_lse, target_cosine): two (N,) float32 tensors (float64 for float64). With C = 1 negative_lse is -inf. With
        return_largest also negative_cosine (N,), without gradient, and negative_class (N,) int64, as `Statistics` has them.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
        IndexError: a label that is neither in [0, C) nor ignore_index. On a GPU, where that check would wait for the device, such
            a row's results are NaN instead, and with them its row of dX and all of dW, unless COSFACE_CHECK_LABELS=1 is set.
        RuntimeError: a second derivative, or a forward-mode one.

    Source: CosFace, arXiv 1801.09414, eq. 4.
    """
    validation.check_flag("return_largest", return_largest)
    options = LossOptions(
        margin=NormSoftmax(),
        scale=scale,
        normalize_features=True,
        ignore_index=ignore_index,
        memory_budget=memory_budget,
        backend=backend,
        return_statistics=return_largest,
    )
    inputs = Inputs(features, weight, labels)
    check_inputs(inputs, options)
    found = negatives(inputs, options)
    lse = differentiable_in_scale(found.lse, scale, found.slope)
    vectors = torch.where(found.counted, lse, 0.0), found.product
    return (*vectors, *found.known_largest()) if return_largest else vectors


@overload
def cosface_loss(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_statistics: Literal[False] = ...,
    **options: Unpack[CosFaceArguments],
) -> Tensor: ...
@overload
def cosface_loss(
    features: Tensor, weight: Tensor, labels: Tensor, *, return_statistics: Literal[True], **options: Unpack[CosFaceArguments]
) -> tuple[Tensor, Statistics]: ...


def cosface_loss(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor = 64.0,
    margin: float | Tensor = 0.35,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    memory_budget: MemoryBudget = "auto",
    backend: Backend = "auto",
    classes: Tensor | None = None,
    sample_correction: bool | Tensor = False,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    return_statistics: bool = False,
    negatives: HardNegatives | None = None,
) -> Tensor | tuple[Tensor, Statistics]:
    """Large Margin Cosine Loss (CosFace) over any number of classes, without an N x C matrix.

        loss_n = -log( e^{s(cos_ny - m)} / ( e^{s(cos_ny - m)} + Σ_{j≠y} e^{s cos_nj} ) ),    cos_nj = x_n·w_j / (‖x_n‖ ‖w_j‖)

    The same loss and gradients as
    `F.cross_entropy(s * (F.normalize(x) @ F.normalize(w).T - m * F.one_hot(y, C)), y)`.

    Args:
        features, weight, labels, scale, ignore_index, memory_budget, backend: as in `cosine_lse`.
        margin: m, a finite number in units of cosine, or a tensor (C,) with one for each class.
        reduction: "mean" over the rows that are not ignored (0 with zero gradients if there are none), "sum", or "none".
        classes, sample_correction, label_smoothing, class_weight, return_statistics, negatives: as in `margin_softmax_loss`.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or (N,) for "none" with 0 at ignored rows; with return_statistics
        (loss, Statistics).

    Raises:
        As `cosine_lse`.

    Source: CosFace, arXiv 1801.09414, eq. 4; s = 64 and m = 0.35 are the paper's.
    """
    validation.check_scale(scale)
    validation.check_margins(margin)
    options = LossOptions(
        margin=CosFace(margin),
        scale=scale,
        reduction=reduction,
        sample_correction=sample_correction,
        ignore_index=ignore_index,
        memory_budget=memory_budget,
        backend=backend,
        return_statistics=return_statistics,
        label_smoothing=label_smoothing,
        negatives=negatives,
    )
    return loss_of_table(Inputs(features, weight, labels, classes=classes, class_weight=class_weight), options)


@overload
def margin_softmax_loss(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_statistics: Literal[False] = ...,
    **options: Unpack[MarginArguments],
) -> Tensor: ...
@overload
def margin_softmax_loss(
    features: Tensor, weight: Tensor, labels: Tensor, *, return_statistics: Literal[True], **options: Unpack[MarginArguments]
) -> tuple[Tensor, Statistics]: ...


def margin_softmax_loss(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: Margin,
    scale: float | Tensor | None = None,
    bias: Tensor | None = None,
    normalize_features: bool | None = None,
    centers_per_class: int = 1,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    memory_budget: MemoryBudget = "auto",
    backend: Backend = "auto",
    classes: Tensor | None = None,
    sample_correction: bool | Tensor = False,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    return_statistics: bool = False,
    label_weights: Tensor | None = None,
    negatives: HardNegatives | None = None,
) -> Tensor | tuple[Tensor, Statistics]:
    """Softmax cross-entropy with any margin over any number of classes, without an N x C matrix.

        loss_n = -log( e^{s t_n} / ( e^{s t_n} + Σ_{j≠y_n} e^{s x̃_n·w̃_j} ) ),    t_n = ‖x̃_n‖ ‖w̃_{y_n}‖ ψ(cos θ_{n,y_n})

    x̃ and w̃ are unit rows, or the rows as they are; a margin is its ψ, see `cosface_kernels.margins`.

    Args:
        features, weight, labels, ignore_index, memory_budget, backend: as in `cosine_lse`.
        margin: CosFace(), ArcFace(), NormSoftmax(), SphereFace(), Combined(), AdaFace(), MagFace(), Softmax() or LSoftmax() of
            `cosface_kernels.margins`, or one of your own. Its numbers may be tensors (C,), one for each class. Running
            statistics need `MarginSoftmaxLoss`: here AdaFace takes the batch's own, and annealing stays at its first step.
        scale: s > 0. None: 64 for cosines, and 1 where logits depend on the norms of the features or of the table.
        bias: (C,), or (C K,) with sub-centres, for Softmax() alone: the logits are s (x_n·w_j + b_j).
        normalize_features: True: x̃ = x / ‖x‖, False: x̃ = x. None: True, except for Softmax() and LSoftmax(). The table's rows
            are normalised, except for those two.
        centers_per_class: K sub-centres for each class, K consecutive rows of weight (C K, D). The largest of the K cosines
            counts.
        reduction: as in `cosface_loss`.
        classes: (M,), any integer dtype, ascending: the classes that take part, among them every row's own, as
            `sampling.sample_classes` draws them; labels stay class numbers of the whole table. The gradients of weight and bias
            are then sparse tensors of those rows, as nn.Embedding(sparse=True) gives. None: all.
        sample_correction: whether to add log((C - 1) / (M - 1)) to the log-sum-exp of the M - 1 negatives, an estimate of that of
            all C - 1. Or a tensor (M,), from 0 to 20: what is added to the logits of each of `classes` where it is a negative,
            -log of the probability that it was drawn with, such as `sampling.correction` gives.
        label_smoothing: ε, from 0 to 1: ε (z_y - mean_j z_j) is added to each row's loss, z being the logits with the margin, as
            `F.cross_entropy(z, labels, label_smoothing=ε)` has it. The mean is over the classes that take part. Not with
            sub-centres.
        class_weight: (C,), the weight of each class's rows, as `F.cross_entropy` has it: the mean divides by the sum of the rows'
            weights. Not with label_smoothing. For weights of rows take reduction="none".
        return_statistics: whether to return, beside the loss, what the same pass finds about each row: the `Statistics`, vectors
            (N,) without gradient, such as the training accuracy's. The loss keeps its bits (on a GPU: where
            triton_forms.json asks for no kernel that attends).
        label_weights: (N, K), K from 1 to 32, any float dtype, for labels (N, K), -1 for none: several classes to a row, as mixup
            and clusters have them. loss_n = Σ_k v_nk (log Z_n - s t_nk), Z_n the sum over the row's classes, with their margins,
            and all others. A class that is named twice counts once, with the sum of its weights. None: labels (N,).
        negatives: CurricularFace(), MVSoftmax(), InterTopK() or InterclassFiltering() of `cosface_kernels.margins`, or one of
            your own: what becomes of the cosines that pass a row's threshold, see `hard_negatives`. Without a module there are
            no running statistics. None: they stay.

    Logits that are no cosines have no bound, so each row's largest one is found first: 2 N C D flops more.

    Returns:
        As `cosface_loss`.

    Raises:
        As `cosface_loss`; ValueError also for a bias with a margin, for rows of weight that are not whole classes, and for
        classes that do not ascend; IndexError also for one of them outside [0, C), and for a label that is not among them.

    Source: CosFace, arXiv 1801.09414, section 3; the margins' own papers; sub-centres: J. Deng et al., ECCV 2020; sampled
    classes: Partial FC, X. An et al., arXiv 2010.05222.
    """
    options = LossOptions(
        margin=margin,
        scale=scale,
        normalize_features=normalize_features,
        centers_per_class=centers_per_class,
        reduction=reduction,
        sample_correction=sample_correction,
        ignore_index=ignore_index,
        memory_budget=memory_budget,
        backend=backend,
        return_statistics=return_statistics,
        label_smoothing=label_smoothing,
        negatives=negatives,
    )
    labels, label_weights = positives.merged(labels, label_weights, ignore_index, features)
    return loss_of_table(
        Inputs(features, weight, labels, bias, classes=classes, label_weights=label_weights, class_weight=class_weight), options
    )
