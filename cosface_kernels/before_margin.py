"""One batch and a class table before any margin: what a loss is given, its precision, and the N-vectors of the operator.

features, table  ->  A_n, t_n, lengths          ops: N x C, slab by slab, no margin
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import margins, validation
from .margins import HardNegatives, Margin
from .ops import recording
from .ops.operands import Largest, Needs, Options, Problem
from .ops.operators import FirstDerivative
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


class LossOptions(NamedTuple):
    """The options of a loss, as in `margin_softmax_loss`."""

    margin: Margin
    scale: float | torch.Tensor | None
    normalize_features: bool | None = None
    centers_per_class: int = 1
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
            reduction=self.reduction,
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


def check_inputs(inputs, options):
    features, weight, labels, bias = inputs.features, inputs.weight, inputs.labels, inputs.bias
    several = inputs.label_weights is not None
    centers = options.centers_per_class
    validation.check_tensors(features, weight, labels, bias, centers, classes=inputs.classes, several=several)
    validation.check_row_scale(inputs.weight, inputs.row_scale)
    options.check_values(inputs.features)
    validation.check_correction(options.sample_correction, inputs.classes, inputs.weight.device)
    refuse_transforms(*(each for each in (features, weight, bias, options.scale) if isinstance(each, Tensor)))


def problem_of(inputs, options, foreign_index, hard=None):
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
            index=_rows_of(classes, centers, weight.shape[0]),
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
    """The Negatives of a batch that `check_inputs` has checked. hard: (N, 4), see Problem."""
    weight, bias, scale, margin = inputs.weight, inputs.bias, options.scale, options.margin
    needs_slope = isinstance(scale, Tensor) and scale.requires_grad and torch.is_grad_enabled()
    vectors, saved, largest = recording.negative_lse(
        *problem_of(inputs, options, foreign_index, hard),
        (weight, bias) if inputs.parameters is None else inputs.parameters,
        Needs(needs_slope, False, options.return_statistics),
    )
    product, target_length = vectors.product, None if margin.normalize_weight else vectors.target_length
    counted = class_indices(inputs.labels) != int(options.ignore_index)
    if counted.dim() == 2:
        counted = counted.any(1)
    else:
        if options.centers_per_class > 1:  # the gradient goes to the nearest centre alone
            nearest = product.argmax(1, keepdim=True)
            product = product.gather(1, nearest)
            target_length = None if target_length is None else target_length.gather(1, nearest)
        product, target_length = product.squeeze(1), None if target_length is None else target_length.squeeze(1)
    return Negatives(
        lse=vectors.lse,
        product=product,
        target_length=target_length,
        feature_length=None if options.normalize_features else vectors.feature_length,
        product_sum=vectors.product_sum if options.label_smoothing else None,
        slope=(saved.unit * saved.pull).sum(1) if needs_slope else None,
        unit=saved.unit,
        counted=counted,
        largest=largest,
    )


class OneShard:
    """The one shard of a table whose rows and classes this process all holds. heads.gathered.Batch has the same methods for
    several.
    """

    foreign_index = None

    def combine(self, bound, found):
        """Negatives of the whole table. bound: of |logits|."""
        return found

    def classes(self, inputs, options):
        """(the class of each row (N,), the number of classes) in the whole table."""
        return class_indices(inputs.labels), inputs.weight.shape[0] // options.centers_per_class

    def largest(self, found):
        """Largest of the whole table."""
        return found

    def nearest(self, products):
        """The largest products (N, k), descending, of the whole table from those of this process."""
        return products

    def total(self, vector):
        """The sum over the processes of a vector (N,) without gradient, 0 for rows whose class another one holds."""
        return vector

    def of_all_shards(self, num_classes, num_sampled):
        """(number of classes in the whole table, number of them that take part)."""
        return num_classes, num_sampled

    def own(self, vector):
        """A vector (N,) that depends on the features alone, or None: only the process of the row computes its gradient."""
        return vector

    def own_rows(self, losses):
        return losses


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


def refuse_transforms(*tensors):
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
