"""One loss of a class table: validation, precision, the margin on N-vectors, reduction.

features, table  ->  A_n, t_n, lengths          ops: N x C, slab by slab, no margin
                 ->  t'_n = l_n ψ(t_n / l_n)    margins: N-vectors, plain autograd
                 ->  softplus(A_n - s t'_n)     reduced
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import margins, positives, validation
from .margins import HardNegatives, Margin
from .ops import recording
from .ops.batch_rows import reduced
from .ops.normalize import direction
from .ops.operands import Largest, Needs, Options, Problem, Ranked, Reduction, RowLogits
from .ops.operators import FirstDerivative, margin_losses, snapshot, target_products
from .ops.slabs import wide_dtype
from .positives import class_indices


class Inputs(NamedTuple):
    """The tensors of a loss, as `margin_softmax_loss` says."""

    features: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    bias: torch.Tensor | None = None
    classes: torch.Tensor | None = None
    label_weights: torch.Tensor | None = None  # (N, K), with labels (N, K) as positives.merged gives them
    class_weight: torch.Tensor | None = None  # (C,) of the whole table
    parameters: tuple | None = None  # the nn.Parameters (weight, bias) that own these rows; None: the two above
    row_scale: torch.Tensor | None = None  # (C K,) float32 beside a float8 weight, which heads alone have


def replaced(fields, **others):
    """A copy of a NamedTuple with other values in some fields. Not _replace, whose result PyTorch 2.11 makes empty, or fails to
    make, where a compiled graph breaks, as it does at a sample of unknown size.
    """
    return type(fields)(*(others.get(name, value) for name, value in zip(fields._fields, fields, strict=True)))


class Statistics(NamedTuple):
    """Statistics of each row (N,) from the pass over the table, before the margin and without gradient.

    A product is x̃_n·w̃_j, the cosine where both are normalised; with a bias x_n·w_j + b_j; of sub-centres the class's largest.
    It is a logit over s. Of sampled classes those that take part count. Rows that are ignored, or hold NaN, have NaN, -1, False.
    """

    target_cosine: Tensor  # the product with the row's own class
    negative_cosine: Tensor  # the largest product with another class; -inf where there is none
    negative_class: Tensor  # int64: that class, the lowest of equal ones; -1 where there is none
    correct: Tensor  # bool: whether the own class has the larger product: top-1 without a margin; of equal ones rounding decides
    probability: Tensor  # of the own class, by a softmax without a margin: σ(s target_cosine_n - A_n)


class LossOptions(NamedTuple):
    """The options of a loss, as in `margin_softmax_loss`."""

    margin: Margin
    scale: float | torch.Tensor | None
    normalize_features: bool | None
    centers_per_class: int
    reduction: str = "mean"
    sample_correction: bool | Tensor = False
    ignore_index: int = -100
    memory_budget: int | str = "auto"
    backend: str = "auto"
    return_statistics: bool = False
    label_smoothing: float = 0.0
    negatives: HardNegatives | None = None

    def checked(self, has_bias):
        """These options, validated, with the margin's defaults in place of None."""
        margins.check(self.margin, has_bias, self.normalize_features)
        validation.check_reduction(self.reduction)
        if not isinstance(self.sample_correction, Tensor):
            validation.check_flag("sample_correction", self.sample_correction)
        validation.check_flag("return_statistics", self.return_statistics)
        validation.check_label_smoothing(self.label_smoothing, self.centers_per_class)
        normalize_features = self.margin.normalize_features if self.normalize_features is None else self.normalize_features
        scale = default_scale(self.margin, normalize_features) if self.scale is None else self.scale
        cosines = normalize_features and self.margin.normalize_weight
        margins.hard_negatives.check(self.negatives, cosines, scale, self.label_smoothing)
        return self._replace(scale=_tensor_if_it_moves(scale), normalize_features=normalize_features)

    def check_values(self, features):
        validation.check_options(
            scale=self.scale,
            ignore_index=self.ignore_index,
            memory_budget=self.memory_budget,
            backend=self.backend,
            features=features,
        )

    @property
    def bound(self):
        """Upper bound of |logit|; infinity where it is not known without reading a tensor."""
        is_number = not isinstance(self.scale, torch.Tensor)
        known = is_number and self.normalize_features and self.margin.normalize_weight
        return float(self.scale) * self.largest_cosine if known else math.inf

    @property
    def largest_cosine(self):
        """Upper bound of what takes a cosine's place in a logit."""
        return 1.0 if self.negatives is None else max(float(self.negatives.bound), 1.0)


class Negatives(NamedTuple):
    """N-vectors of a batch before the margin is applied. w̃_y is the nearest of the class's centres."""

    lse: torch.Tensor  # log Σ_{j≠y} e^{s x̃·w̃_j} (N,), of an ignored row over all classes
    product: torch.Tensor  # x̃·w̃_y (N,)
    target_length: torch.Tensor | None  # ‖w̃_y‖ (N,); None where they are 1
    feature_length: torch.Tensor | None  # ‖x̃‖ (N,); None where they are 1
    product_sum: torch.Tensor | None  # Σ_j x̃·w̃_j (N,) over all classes; None where it is not wanted
    slope: torch.Tensor | None  # ∂lse/∂s (N,) without gradient; None where it is not needed
    unit: torch.Tensor  # x̃ (N, D) without gradient
    counted: torch.Tensor  # bool (N,): False for ignored rows
    largest: Largest  # the largest x̃·w̃_j and its class, if return_statistics

    def known_largest(self):
        """Largest, NaN and -1 for rows that are ignored or hold NaN."""
        known = self.counted & ~self.product.isnan()
        return Largest(torch.where(known, self.largest.value, torch.nan), torch.where(known, self.largest.place, -1))


class WholeTable:
    """The table of a process that holds all rows and classes. heads.gathered.Batch has the same methods for a sharded one."""

    foreign_index = None

    def combine(self, bound, found):
        """Negatives of the whole table. bound: of |logits|."""
        return found

    def classes(self, inputs, options):
        """(the class of each row (N,), the number of classes) in the whole table."""
        return class_indices(inputs.labels), len(inputs.weight) // options.centers_per_class

    def largest(self, found):
        """Largest of the whole table."""
        return found

    def nearest(self, products):
        """The largest products (N, k), descending, of the whole table from those of this process."""
        return products

    def total(self, vector):
        """The sum over the processes of a vector (N,) without gradient, 0 for rows whose class another one holds."""
        return vector

    def of_all_shards(self, num_classes, num_sampled, device):
        """(number of classes in the whole table, number of them that take part)."""
        return num_classes, num_sampled

    def own(self, vector):
        """A vector (N,) that depends on the features alone, or None: only the process of the row computes its gradient."""
        return vector

    def own_rows(self, losses):
        return losses


def loss_of_table(inputs, options, *, shards=WholeTable(), state=None, training=False):  # noqa: B008 (it has no state)
    """`margin_softmax_loss`. state: a module's running statistics, brought up to date first when training."""
    options, hard, state = options.checked(inputs.bias is not None), None, state or {}
    if inputs.label_weights is not None:
        return _loss_of_positives(inputs, options, shards, state, training)
    if options.negatives is not None:
        hard, state = _hard(inputs, options, shards, state, training)
        training = False  # the statistics have moved
    found = negatives(inputs, options, shards.foreign_index, hard)
    own_classes, num_classes = shards.classes(inputs, options)
    margin = _margin_of_rows(options.margin, own_classes, num_classes)
    found = found._replace(lse=_corrected_for_sampling(found.lse, inputs, options, shards))
    norm = _feature_norm(inputs.features, found.unit, found.counted) if margin.needs_norm else None
    found = shards.combine(options.bound, found)
    feature_length, norm = shards.own(found.feature_length), shards.own(norm)
    lengths = [length for length in (feature_length, found.target_length) if length is not None]
    if training:
        with torch.no_grad():
            margin.update(norm, found.counted, state)
    state = {name: snapshot(value) for name, value in state.items()}
    length, terms = math.prod(lengths) if lengths else None, _terms(margin, norm, found.counted, state)
    logit, scale = _target_logit(margin, found.product, length, terms), options.scale
    penalty = margin.penalty(norm)
    if penalty is not None:
        _check_rows("penalty", margin, penalty, logit.shape)
    smoothing = _smoothing(logit, found, inputs, options, shards) if options.label_smoothing else None
    if isinstance(scale, torch.Tensor):
        logit, scale = scale * logit, 1.0
    lse = differentiable_in_scale(found.lse, options.scale, found.slope)
    reduction = options.reduction if inputs.class_weight is None else "none"
    (losses,), _ = margin_losses(RowLogits(lse, logit, found.counted), Reduction(float(scale), reduction, options.backend))
    for extra in (penalty, smoothing):
        if extra is not None:
            losses = losses + reduced(torch.where(found.counted, extra, 0.0), found.counted, reduction)
    if inputs.class_weight is not None:
        validation.check_class_weight(inputs.class_weight, num_classes, losses.device, options.label_smoothing)
        losses = _weighted(losses, inputs.class_weight[own_classes.clamp(0, num_classes - 1)], found.counted, options.reduction)
    losses = shards.own_rows(losses) if options.reduction == "none" else losses
    if not options.return_statistics:
        return losses
    return losses, _statistics(lse, found.product, shards.largest(found.largest), found.counted, options.scale, shards)


def _loss_of_positives(inputs, options, shards, state, training):
    """loss_of_table for labels (N, K): the margin on N K numbers, and positives.losses."""
    _refuse_with_positives(inputs, options)
    labels, weights = inputs.labels, inputs.label_weights
    whole, found = options.margin, negatives(inputs, options, shards.foreign_index)
    found = found._replace(lse=_corrected_for_sampling(found.lse, inputs, options, shards))
    norm = shards.own(_feature_norm(inputs.features, found.unit, found.counted) if whole.needs_norm else None)
    found = shards.combine(options.bound, found)
    lse = differentiable_in_scale(found.lse, options.scale, found.slope)
    feature_length = shards.own(found.feature_length)
    if training:
        with torch.no_grad():
            whole.update(norm, found.counted, state)
    state = {name: snapshot(value) for name, value in state.items()}
    width = labels.shape[1]
    terms = (term.repeat_interleave(width) if term.dim() else term for term in _terms(whole, norm, found.counted, state))
    lengths = [] if feature_length is None else [feature_length.repeat_interleave(width)]
    lengths += [] if found.target_length is None else [found.target_length.flatten()]
    classes, num_classes = shards.classes(inputs, options)
    per_row = margins.row_tensors(whole, len(labels))
    whole = margins.replaced(whole, {name: each.repeat_interleave(width, 0) for name, each in per_row.items()})
    margin = _margin_of_rows(whole, classes.flatten(), num_classes)
    logits = _target_logit(margin, found.product.flatten(), math.prod(lengths) if lengths else None, (*terms,))
    losses = positives.losses(lse, options.scale * logits.view(labels.shape), labels, weights, int(options.ignore_index))
    penalty = whole.penalty(norm)
    losses = losses if penalty is None else losses + torch.where(found.counted, penalty, 0.0)
    losses = reduced(losses, found.counted, options.reduction)
    return shards.own_rows(losses) if options.reduction == "none" else losses


def _refuse_with_positives(inputs, options):
    """Raise for what several classes to a row do not go with."""
    if inputs.class_weight is not None:
        raise ValueError("label_weights and class_weight exclude each other: give label_weights times class_weight[labels]")
    if options.centers_per_class > 1:
        raise ValueError(f"label_weights go with one centre to a class, got centers_per_class = {options.centers_per_class}")
    if options.label_smoothing:
        raise ValueError(
            "label_weights and label_smoothing exclude each other: weights can spread over classes what smoothing does"
        )
    if options.negatives is not None:
        raise ValueError(f"label_weights go with negatives as they are, got negatives = {options.negatives}")
    if options.return_statistics:
        raise ValueError(
            "label_weights and return_statistics=True exclude each other: which class of a row should be the own one?"
        )
    if options.margin.needs_norm and any(each.dim() for each in margins.class_tensors(options.margin).values()):
        raise ValueError(f"label_weights go with numbers by class of margins without norms, got {options.margin}")


@torch.no_grad()
def _hard(inputs, options, shards, state, training):
    """((τ, p0, p1, p2) of each row (N, 4), the running statistics). Like the loss, it needs the margin, but before the slabs."""
    _check_inputs(inputs, options)
    ranked = Ranked(int(options.negatives.num_nearest))
    ((products, unit, nearest),) = target_products(*_problem(inputs, options, shards.foreign_index), ranked)
    labels, cosine = class_indices(inputs.labels), shards.total(products.amax(1))
    counted, margin = labels != int(options.ignore_index), _margin_of_rows(options.margin, *shards.classes(inputs, options))
    norm = _feature_norm(inputs.features, unit, counted) if margin.needs_norm else None
    if training:
        margin.update(norm, counted, state)
        options.negatives.update(cosine, counted, state)
    state = {name: snapshot(value) for name, value in state.items()}
    target = _target_logit(margin, cosine, None, _terms(margin, norm, counted, state))
    known = {**state, "nearest": shards.nearest(nearest)} if ranked.count else state
    numbers = options.negatives.polynomial(cosine, target, known)
    columns = [each if isinstance(each, Tensor) else cosine.new_full((), each) for each in numbers]
    for name, column in zip(("threshold", "p0", "p1", "p2"), columns, strict=True):
        _check_rows(name, options.negatives, column, cosine.shape, torch.Size([]))
    return torch.stack([column.to(cosine.dtype).expand(cosine.shape) for column in columns], 1), state


@torch.no_grad()
def _statistics(lse, product, largest, counted, scale, shards):
    """Statistics of this process's rows."""
    known = counted & ~product.isnan() & ~lse.isnan()
    value, place, nan = largest.value, torch.where(known, largest.place, -1), torch.nan
    probability = (scale * product - lse).sigmoid()
    cosines = (torch.where(known, each, nan) for each in (product, value))
    every = *cosines, place, known & (product > value), torch.where(known, probability, nan)
    return Statistics(*(shards.own_rows(each) for each in every))


def _check_inputs(inputs, options):
    features, weight, labels, bias = inputs.features, inputs.weight, inputs.labels, inputs.bias
    several = inputs.label_weights is not None
    validation.check_tensors(features, weight, labels, bias, options.centers_per_class, inputs.classes, several)
    validation.check_row_scale(inputs.weight, inputs.row_scale)
    options.check_values(inputs.features)
    validation.check_correction(options.sample_correction, inputs.classes, inputs.weight.device)
    _refuse_transforms(*(each for each in (features, weight, bias, options.scale) if isinstance(each, Tensor)))


def _problem(inputs, options, foreign_index, hard=None):
    """(Problem, Options) of the operator."""
    features, weight, bias, classes = inputs.features, inputs.weight, inputs.bias, inputs.classes
    centers, scale = options.centers_per_class, options.scale
    is_tensor, dtype = isinstance(scale, Tensor), product_dtype(features, weight)
    return (
        Problem(
            x=features,
            weight=weight,
            bias=bias,
            labels=class_indices(inputs.labels),
            index=_rows_of(classes, centers, len(weight)),
            own_scale=scale.detach().to("cpu", torch.float64) if is_tensor else None,
            hard=hard,
            correction=_correction_of_rows(options.sample_correction, centers, wide_dtype(dtype)),
            row_scale=inputs.row_scale,
        ),
        Options(
            scale=1.0 if is_tensor else float(scale),
            ignore_index=int(options.ignore_index),
            normalize_features=bool(options.normalize_features),
            normalize_weight=options.margin.normalize_weight,
            centers=int(centers),
            dtype=dtype,
            memory_budget=None if options.memory_budget == "auto" else min(int(options.memory_budget), 2**62),
            backend=options.backend,
            foreign_index=foreign_index,
            sums_products=options.label_smoothing > 0,
            bound=options.largest_cosine,
        ),
    )


def negatives(inputs, options, foreign_index=None, hard=None):
    """The Negatives of a batch. hard: (N, 4), what `_hard` returns."""
    _check_inputs(inputs, options)
    weight, bias, scale, margin = inputs.weight, inputs.bias, options.scale, options.margin
    needs_slope = isinstance(scale, Tensor) and scale.requires_grad and torch.is_grad_enabled()
    vectors, saved, largest = recording.negative_lse(
        *_problem(inputs, options, foreign_index, hard),
        (weight, bias) if inputs.parameters is None else inputs.parameters,
        Needs(needs_slope, False, options.return_statistics),
    )
    product, target_length = vectors.product, None if margin.normalize_weight else vectors.target_length
    feature_length = None if options.normalize_features else vectors.feature_length
    slope = (saved.unit * saved.pull).sum(1) if needs_slope else None
    counted = class_indices(inputs.labels) != int(options.ignore_index)
    if counted.dim() == 2:
        return Negatives(vectors.lse, product, target_length, feature_length, None, slope, saved.unit, counted.any(1), largest)
    if options.centers_per_class > 1:  # the gradient goes to the nearest centre alone
        nearest = product.argmax(1, keepdim=True)
        product = product.gather(1, nearest)
        target_length = None if target_length is None else target_length.gather(1, nearest)
    return Negatives(
        lse=vectors.lse,
        product=product.squeeze(1),
        target_length=None if target_length is None else target_length.squeeze(1),
        feature_length=feature_length,
        product_sum=vectors.product_sum if options.label_smoothing else None,
        slope=slope,
        unit=saved.unit,
        counted=counted,
        largest=largest,
    )


def _corrected_for_sampling(lse, inputs, options, shards):
    """lse (N,) plus log((C - 1) / (M - 1)), negatives over summed negatives; unchanged where none was summed."""
    if isinstance(options.sample_correction, Tensor) or not options.sample_correction or inputs.classes is None:
        return lse
    weight, classes = inputs.weight, inputs.classes
    num_classes = weight.shape[0] // options.centers_per_class
    num_classes, num_sampled = shards.of_all_shards(num_classes, classes.shape[0], weight.device)
    return lse + (math.log((num_classes - 1) / (num_sampled - 1)) if num_sampled > 1 else 0.0)


def differentiable_in_scale(lse, scale, slope):
    """lse (N,), whose derivative by a scale that is learnt is slope (N,)."""
    if slope is None:
        return lse
    if torch.compiler.is_compiling():  # PyTorch 2.13 traces _InScale to a wrong gradient; and compiles no second derivative
        return lse + (scale - scale.detach()) * slope
    return _InScale.apply(lse, scale, slope)


class _InScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lse, scale, slope):
        ctx.save_for_backward(lse, scale, slope)
        return lse.view_as(lse)

    @staticmethod
    def backward(ctx, grad):
        lse, scale, slope = ctx.saved_tensors
        return grad, FirstDerivative.apply((grad * slope).sum().to(scale), scale, lse), None


def _weighted(losses, weights, counted, reduction):
    """Losses (N,), each times its weight (N,), reduced; the mean is over the weights' sum, 0 where that is 0."""
    weights = torch.where(counted, weights.to(losses.dtype), 0.0)
    losses = torch.where(counted, losses * weights, 0.0)
    if reduction == "none":
        return losses
    total = weights.sum() if reduction == "mean" else weights.new_ones(())
    return losses.sum() / torch.where(total == 0, 1.0, total)


def _smoothing(logit, found, inputs, options, shards):
    """ε (z_y - mean_j z_j) (N,), as F.cross_entropy's label_smoothing = ε; z: the logits of the classes that take part."""
    if inputs.classes is None:
        _, num_classes = shards.classes(inputs, options)
    else:
        _, num_classes = shards.of_all_shards(0, len(inputs.classes), logit.device)
    mean = (found.product_sum - found.product + logit) / num_classes
    return options.label_smoothing * (options.scale * (logit - mean))  # ε s would be rounded to a scale of 16 bits


def _feature_norm(features, unit, counted):
    """‖x‖ (N,), computed as x·x̂ so that its derivative is x̂. NaN where a GPU made x̂ NaN for a label outside [0, C)."""
    return (torch.where(counted[:, None], features, 0.0).to(unit.dtype) * direction(unit)).sum(1)


def _margin_of_rows(margin, labels, num_classes):
    """The margin for the rows' classes; an ignored row's is that of any class."""
    margins.check_classes(margin, num_classes, labels.device)
    own = type(margin).for_labels is not Margin.for_labels
    if not own and all(value.dim() == 0 for value in margins.class_tensors(margin).values()):
        return margin
    margin = margin.for_labels(labels.clamp(0, num_classes - 1))
    margins.check_kind(margin)
    return margin


def _terms(margin, norm, counted, state):
    """The terms of ψ: a tuple of tensors (N,) or ()."""
    terms = margin.terms(norm, counted, state)
    if not isinstance(terms, tuple):
        raise TypeError(f"terms of {type(margin).__name__} must return a tuple, got {type(terms).__name__}")
    for position, term in enumerate(terms):
        _check_rows(f"terms[{position}]", margin, term, counted.shape, torch.Size([]))
    return terms


def _target_logit(margin, product, length, terms):
    """l ψ(product / l) (N,)."""
    logit = _called(margin, product, length, terms)
    _check_rows("psi", margin, logit, product.shape)
    logit = logit.to(product.dtype)
    _refuse_transforms(logit)
    return logit


def _called(margin, product, length, terms):
    """margin.target_logit; what PyTorch says of a margin whose tensors have other lengths than the batch, with their names."""
    if torch.compiler.is_compiling():
        return margin.target_logit(product, length, *terms)
    try:
        return margin.target_logit(product, length, *terms)
    except RuntimeError as error:
        others = margins.other_lengths(margin, len(product))
        if not others:
            raise
        raise ValueError(
            f"psi of {type(margin).__name__} failed ({error}); a batch of N = {len(product)} rows needs N numbers where each row "
            f"has its own: {', '.join(f'{name} has shape {tuple(shape)}' for name, shape in others.items())}"
        ) from error


def _check_rows(name, margin, value, *shapes):
    """Check the shape of a margin's result: (N, 1) would be broadcast to N x N numbers."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} of {type(margin).__name__} must be a tensor, got {type(value).__name__}")
    if value.shape not in shapes:
        wanted = f"(N,) = {tuple(shapes[0])}" + (" or ()" if len(shapes) > 1 else "")
        raise ValueError(f"{name} of {type(margin).__name__} must return shape {wanted}, got {tuple(value.shape)}")


def default_scale(margin, normalize_features):
    """The scale where none is given."""
    return 64.0 if normalize_features and margin.normalize_weight else 1.0


def _tensor_if_it_moves(scale):
    """A scale that moves from call to call as a tensor () where torch.compile traces, which would compile for each number anew.

    A number of an operator is a constant to it.
    """
    if not torch.compiler.is_compiling() or isinstance(scale, torch.Tensor):
        return scale
    if torch.fx.experimental.symbolic_shapes.has_static_value(scale):
        return scale
    return torch.scalar_tensor(scale, dtype=torch.float64, device="cpu")


def _rows_of(classes, centers, num_rows):
    """(M K,) the rows of the table of classes (M,), None for all. A number outside [0, C) gives rows outside the table."""
    if classes is None:
        return None
    classes = class_indices(classes)
    if centers > 1:
        offsets = torch.arange(centers, dtype=torch.int64, device=classes.device)
        rows = classes.clamp(-1, num_rows // centers)[:, None] * centers + offsets
        return rows.flatten()
    return classes.contiguous()


def _correction_of_rows(correction, centers, dtype):
    """(M K,) what the binary exponents of the sampled rows get: log2 e times the correction (M,) of their classes, or None."""
    if not isinstance(correction, Tensor):
        return None
    return (correction.detach().to(dtype) * math.log2(math.e)).repeat_interleave(centers)


def _refuse_transforms(*tensors):
    """Raise under forward-mode autograd, whose tangents the operators would drop, and under torch.func's gradients."""
    if torch.compiler.is_compiling():
        return
    # Outside dual_level no tensor has a tangent.
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError("cosface_kernels has no forward-mode derivative; use reverse mode, or cosface_kernels.reference")
    validation.check_transforms(*tensors)


def product_dtype(features, weight):
    """The dtype of the matrix products' operands: see `cosine_lse`."""
    device_type = features.device.type
    if torch.float64 in (features.dtype, weight.dtype):
        return torch.float64
    wanted = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else features.dtype
    return torch.float32 if wanted == torch.float32 else torch.bfloat16
