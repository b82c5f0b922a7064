"""One loss of a class table: the margin on N-vectors, what is added to it, reduction.

A_n, t_n, lengths  ->  t'_n = l_n ψ(t_n / l_n)    margins: N-vectors, plain autograd
                   ->  softplus(A_n - s t'_n)     reduced
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import margins, positives, validation
from .before_margin import OneShard, check_inputs, differentiable_in_scale, negatives, problem_of, refuse_transforms
from .margins import Margin
from .ops.batch_rows import reduced
from .ops.normalize import direction
from .ops.operands import Ranked, Reduction, RowLogits
from .ops.operators import margin_losses, snapshot, target_products
from .positives import class_indices


class Statistics(NamedTuple):
    """Statistics of each row (N,) from the pass over the table, before the margin and without gradient.

    A product is x̃_n·w̃_j, the cosine where both are normalised; with a bias x_n·w_j + b_j; of sub-centres the class's largest.
    It is a logit over s. Of sampled classes those that take part count. Rows that are ignored, or hold NaN, have NaN, -1, False.
    """

    target_cosine: Tensor  # the product with the row's own class
    negative_cosine: Tensor  # the largest product with another class; -inf where there is none
    negative_class: Tensor  # int64: that class, the lowest of equal ones; -1 where there is none
    correct: Tensor  # bool: the own class has the larger product: top-1 without a margin; of equal ones rounding decides
    probability: Tensor  # of the own class, by a softmax without a margin: σ(s target_cosine_n - A_n)


def loss_of_table(inputs, options, *, shards=OneShard(), state=None, training=False):  # noqa: B008 (it has no state)
    """`margin_softmax_loss`. state: a module's running statistics, brought up to date first when training."""
    options, hard, state = options.checked(inputs.bias is not None), None, state or {}
    if inputs.label_weights is not None:
        _refuse_with_positives(inputs, options)
    check_inputs(inputs, options)
    if inputs.label_weights is not None:
        return _loss_of_positives(inputs, options, shards, state, training)
    own_classes, num_classes = shards.classes(inputs, options)
    margin = _margin_of_rows(options.margin, own_classes, num_classes)
    if options.negatives is not None:
        hard, state = _hard(inputs, options, shards, margin, state, training)
        training = False  # the statistics have moved
    found, norm = _of_whole_table(inputs, options, shards, margin, hard)
    state = _up_to_date(state, margin, norm, found.counted, training)
    terms = _terms(margin, norm, found.counted, state)
    logit, scale = _target_logit(margin, found.product, (found.feature_length, found.target_length), terms), options.scale
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
    labels, margin = inputs.labels, options.margin
    found, norm = _of_whole_table(inputs, options, shards, margin)
    lse = differentiable_in_scale(found.lse, options.scale, found.slope)
    state = _up_to_date(state, margin, norm, found.counted, training)

    def of_each(value):
        """A vector (N,) once for each of a row's K classes, (N K,)."""
        return value if value is None or not value.dim() else value.repeat_interleave(labels.shape[1], 0)

    terms = [of_each(term) for term in _terms(margin, norm, found.counted, state)]
    lengths = of_each(found.feature_length), None if found.target_length is None else found.target_length.flatten()
    classes, num_classes = shards.classes(inputs, options)
    per_row = {name: of_each(value) for name, value in margins.row_tensors(margin, len(labels)).items()}
    margin_of_each = _margin_of_rows(margins.replaced(margin, per_row), classes.flatten(), num_classes)
    logits = options.scale * _target_logit(margin_of_each, found.product.flatten(), lengths, terms).view(labels.shape)
    losses = positives.losses(lse, logits, labels, inputs.label_weights, int(options.ignore_index))
    penalty = margin.penalty(norm)
    losses = losses if penalty is None else losses + torch.where(found.counted, penalty, 0.0)
    losses = reduced(losses, found.counted, options.reduction)
    return shards.own_rows(losses) if options.reduction == "none" else losses


def _of_whole_table(inputs, options, shards, margin, hard=None):
    """(Negatives of the whole table, ‖x‖ (N,) or None where the margin needs none)."""
    found = negatives(inputs, options, shards.foreign_index, hard)
    found = found._replace(lse=_corrected_for_sampling(found.lse, inputs, options, shards))
    norm = shards.own(_feature_norm(inputs.features, found.unit, found.counted) if margin.needs_norm else None)
    found = shards.combine(options.bound, found)
    return found._replace(feature_length=shards.own(found.feature_length)), norm


def _up_to_date(state, margin, norm, counted, training):
    """The running statistics, in training after this step's, as the loss reads them."""
    if training:
        with torch.no_grad():
            margin.update(norm, counted, state)
    return {name: snapshot(value) for name, value in state.items()}


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
def _hard(inputs, options, shards, margin, state, training):
    """((τ, p0, p1, p2) of each row (N, 4), the running statistics). Like the loss, it needs the margin, but before the slabs."""
    ranked = Ranked(int(options.negatives.num_nearest))
    ((products, unit, nearest),) = target_products(*problem_of(inputs, options, shards.foreign_index), ranked)
    labels, cosine = class_indices(inputs.labels), shards.total(products.amax(1))
    counted = labels != int(options.ignore_index)
    norm = _feature_norm(inputs.features, unit, counted) if margin.needs_norm else None
    if training:
        margin.update(norm, counted, state)
        options.negatives.update(cosine, counted, state)
    state = {name: snapshot(value) for name, value in state.items()}
    target = _target_logit(margin, cosine, (), _terms(margin, norm, counted, state))
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


def _corrected_for_sampling(lse, inputs, options, shards):
    """lse (N,) plus log((C - 1) / (M - 1)), negatives over summed negatives; unchanged where none was summed."""
    if isinstance(options.sample_correction, Tensor) or not options.sample_correction or inputs.classes is None:
        return lse
    here = inputs.weight.shape[0] // options.centers_per_class, inputs.classes.shape[0]
    num_classes, num_sampled = shards.of_all_shards(*here)
    return lse + (math.log((num_classes - 1) / (num_sampled - 1)) if num_sampled > 1 else 0.0)


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
        _, num_classes = shards.of_all_shards(0, len(inputs.classes))
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


def _target_logit(margin, product, lengths, terms):
    """l ψ(product / l) (N,); l: the product of the lengths, of which None is 1."""
    lengths = [length for length in lengths if length is not None]
    length = math.prod(lengths) if lengths else None
    logit = _called(margin, product, length, terms)
    _check_rows("psi", margin, logit, product.shape)
    logit = logit if logit.dtype == product.dtype else logit.to(product.dtype)
    refuse_transforms(logit)
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
