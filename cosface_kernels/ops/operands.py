"""Arguments and results of the operators, by name. An operator's schema is generated from these fields, in their order."""

from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """A batch and the class table."""

    x: Tensor  # (N, D), any float dtype and norms
    weight: Tensor  # (C K, D)
    bias: Tensor | None  # (C K,)
    labels: Tensor  # (N,) int64, or (N, K) of several classes to a row, each once; then K stands for their number below
    index: Tensor | None  # (M,) int64, the rows of the table that take part, ascending and all of a class; None: all
    own_scale: Tensor | None = None  # () float64 on the CPU, in place of Options.scale: torch.compile knows no number of a tensor
    hard: Tensor | None = None  # (N, 4), (τ, p0, p1, p2) of margins/hard_negatives.py for each row
    correction: Tensor | None = None  # (M,), added to the binary exponents of the index's rows; None: zeros
    row_scale: Tensor | None = None  # (C K,) float32 beside a float8 weight


class Options(NamedTuple):
    """Scalar options of a call."""

    scale: float
    ignore_index: int  # label of no class; rows without any are ignored: taken as zero, whatever they hold, without a target
    normalize_features: bool
    normalize_weight: bool
    centers: int
    dtype: torch.dtype  # of the matrix products' operands
    memory_budget: int | None  # bytes of exponentials that may be kept from forward for backward; None: as slabs.kept_size says
    backend: str
    foreign_index: int | None  # label of rows whose class another rank holds: they count, and have no target here
    sums_products: bool = False  # True: Vectors.product_sum is wanted
    bound: float = 1.0  # of |logit| / scale, for cosines

    @property
    def cosines(self):
        """True if logits are s cos θ, and so bounded."""
        return self.normalize_features and self.normalize_weight


class Needs(NamedTuple):
    """Flags: the gradients that are needed, and Largest."""

    need_x_grad: bool
    need_table_grad: bool
    need_largest: bool = False


class Ranked(NamedTuple):
    """The number of each row's largest products with negatives that are wanted."""

    count: int


class Vectors(NamedTuple):
    """The N-vectors that margins are applied to, or their gradients."""

    lse: Tensor  # A_n (N,)
    product: Tensor  # x̃_n·w̃_{y_n} (N, K)
    target_length: Tensor | None  # ‖w̃_{y_n}‖ (N, K); None where they are 1
    product_sum: Tensor | None  # Σ_j x̃_n·w̃_j (N,), over all classes; None where it is not wanted
    feature_length: Tensor | None  # ‖x̃‖ (N,); None where they are 1

    @property
    def of_table(self):
        """The fields that depend on the table: all but feature_length."""
        return self[:-1]


class Targets(NamedTuple):
    """The products of a batch's rows with their own classes and their nearest negatives, before the slabs."""

    product: Tensor  # x̃_n·w̃_{y_n} (N, K)
    unit: Tensor  # x̃ (N, D)
    nearest: Tensor  # (N, Ranked.count), the largest x̃_n·w̃_j of its negatives, descending, -inf for none


class Saved(NamedTuple):
    """Tensors that forward saves for backward; D + 1 columns with a bias."""

    unit: Tensor  # x̃ (N, D)
    target_unit: Tensor  # w̃_{y_n} (N, K, D)
    inverse_norm: Tensor  # 1 / ‖x‖ (N,); (0,) where features are not normalised
    pull: Tensor  # Σ_j p_nj w̃_j (N, D), or (0, D) where no gradient of x is needed
    shift: Tensor  # (N,)
    total: Tensor  # (N,)
    row_sum: Tensor | None  # Σ_j w̃_j (D,); None where it is not wanted
    kept: Tensor  # (any number,) exponentials, see slabs.Plan.kept_view


class Largest(NamedTuple):
    """The largest x̃_n·w̃_j of each row's negatives, and where it is, the lowest of equal ones; None where they are not needed."""

    value: Tensor | None  # (N,); -inf where a row has no negative
    place: Tensor | None  # (N,) int64, the class, in backends the position of its row; -1 where there is none

    @classmethod
    def of_parts(cls, values, places):
        """The largest of a row's parts, each (P, N), in any order."""
        value = values.amax(0)
        place = torch.where(values == value, places, torch.iinfo(torch.int64).max).amin(0)
        return cls(value, torch.where(value > -torch.inf, place, -1))


class Gradients(NamedTuple):
    """Gradients of x (N, D), weight (C K, D) and bias (C K,), each in its tensor's dtype; None for one that is not needed.

    With an index, those of weight (M, D) and bias (M,) have its rows.
    """

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class RowLogits(NamedTuple):
    """The arguments of the losses of rows, of one float dtype."""

    lse: Tensor  # A_n (N,)
    logit: Tensor  # t'_n (N,)
    counted: Tensor  # (N,) bool


class Reduction(NamedTuple):
    """Options of the losses of rows."""

    scale: float
    reduction: str
    backend: str


class Losses(NamedTuple):
    loss: Tensor  # (), or (N,) for reduction "none"


class Slopes(NamedTuple):
    slope: Tensor  # (N,), the derivative of the loss by each row's A_n


class TableFactors(NamedTuple):
    """The factors of dW, beside the table: O(N D) numbers."""

    unit: Tensor  # x̃ (N, D), D + 1 with a bias
    labels: Tensor  # (N,) or (N, K)
    shift: Tensor  # (N,)
    total: Tensor  # (N,)
    lse_grad: Tensor  # (N,)
    product_grad: Tensor  # (N, K)
    length_grad: Tensor | None  # (N, K); None where the table is normalised, or for zeros
    sum_grad: Tensor | None  # (N,), of product_sum; None where that is not wanted, or for zeros
    kept: Tensor  # exponentials kept by forward; empty if backward computes them again
    hard: Tensor | None  # (N, 4): see Problem

    @classmethod
    def of(cls, labels, saved, grads, hard, options):
        """The factors of labels, the tensors that forward saved, gradients of Vectors, Problem.hard and Options. A gradient of a
        vector that is not wanted may be an empty tensor, where PyTorch's operator gave one for the vector.
        """
        return cls(
            unit=saved.unit,
            labels=labels,
            shift=saved.shift,
            total=saved.total,
            lse_grad=grads.lse,
            product_grad=grads.product,
            length_grad=None if options.normalize_weight else grads.target_length,
            sum_grad=grads.product_sum if options.sums_products else None,
            kept=saved.kept,
            hard=hard,
        )


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    int: "int",
    int | None: "int?",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
}


def schema(takes, gives):
    """The text of an operator's schema: its arguments and results are the fields of these classes, one after another. PyTorch's
    operators give no None.
    """
    arguments = [f"{_SCHEMA_TYPES[kind]} {name}" for fields in takes for name, kind in fields.__annotations__.items()]
    results = ["Tensor"] * sum(len(fields._fields) for fields in gives)
    return f"({', '.join(arguments)}) -> ({', '.join(results)})"


def split(flat, classes):
    """Objects of these classes from a flat sequence of their fields."""
    found, start = [], 0
    for fields in classes:
        stop = start + len(fields._fields)
        found.append(fields._make(flat[start:stop]))
        start = stop
    return found
