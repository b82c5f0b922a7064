"""MarginSoftmaxLoss: the class table and its loss as a module, for every margin."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import margins, positives, theory, validation
from ..before_margin import Inputs, LossOptions, default_scale
from ..loss import Statistics, loss_of_table
from ..margins.hard_negatives import HardNegatives
from ..ops import class_tables, formats, recording
from ..sampling import classes_of_step, correction
from ..validation import Backend, Device, MemoryBudget, Reduction, TableFormat
from . import confusions, grow, margin_buffers, own_centers
from .attributes import Attributes
from .placement import WHOLE, Whole


class MarginSoftmaxLoss(Attributes):
    """`margin_softmax_loss` with a learned class table, and the running statistics of margins that have any.

        head = MarginSoftmaxLoss(512, 1_000_000, margin=ArcFace(0.5))
        loss = head(features, labels)  # (N, 512), (N,) -> mean of -log( e^{s ψ_n} / ( e^{s ψ_n} + Σ_{j≠y_n} e^{s cos_nj} ) )

    weight (num_classes · centers_per_class, embedding_size) is drawn from N(0, 0.01²), and bias, a number for each
    of its rows, is zero.

    Args:
        embedding_size: D.
        num_classes: C, the number of identities.
        margin: one of `cosface_kernels.margins`; `head.margin = ArcFace(0.4)` sets another at any time. Its running statistics,
            if any, are buffers by the names in its `state`, and move in training mode only, in every forward as BatchNorm's do,
            so twice a step under activation checkpointing; those that two margins have in common go on. Its numbers that are
            tensors are copied to buffers, m to margin_m; `grow`, `remove` and `head.margin = ...` change those. `to`, `half` and
            the like leave all these float32 at least. Over several ranks each has the numbers of all classes.
        negatives: as in `margin_softmax_loss`, also to set later. Its running statistics are buffers as the margin's are.
        bias: whether to learn one, True or False, for margins.Softmax() alone.
        scale, normalize_features, centers_per_class, reduction, ignore_index, memory_budget, backend: as in
            `margin_softmax_loss`. `head.scale = 30.0` changes s.
        learnable_scale: whether s is learnt: s = e^log_scale, where the parameter log_scale, float32 at least, starts from
            log(scale). It needs an optimiser of torch.optim. `head.scale` is the present s; setting it sets log_scale.
        table_format: "float32"; or "bfloat16" or "float8", half or a quarter of the memory, rounded stochastically, for FusedSGD
            and FusedAdamW alone. float8 is e4m3: weight times the buffer weight_scale, a power of two for each row, is the
            table. `float`, `half` and the like make an ordinary table of it; `load_state_dict` takes either for the other.
        sample_rate: the share of the classes that take part in a training step, 0 < sample_rate <= 1: see `sample_classes`. Below
            1 the gradients of the table are sparse, and the head counts its training steps in the buffer sample_step.
        sample_seed: an int from 0 on. The sample of step t is a function of sample_seed, t and the labels.
        sample_correction: as in `margin_softmax_loss`, in training; with hard_classes `sampling.correction` of the classes drawn.
        hard_classes: (C, k), -1 for none: the classes that are in the sample whenever a class of the batch is, such as
            `head.confusions(k)[1]`; also to set later. Copied to a buffer of that name, int32; over several ranks each has all.
        label_smoothing: as in `margin_softmax_loss`.
        class_weight: as in `margin_softmax_loss`, copied to a buffer of that name, float32 at least; over several ranks each has
            that of all classes. `grow` gives new identities the mean.
        device, dtype: of the table.
        placement: the object that knows where the table's rows are, for the package's own subclasses: see heads/placement.py.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, at construction.

    Warns:
        UserWarning: a scale or margin outside the paper's bounds, at construction, for margins.CosFace with normalised features:
            see `theory.warn_if_out_of_bounds`.
    """

    scale: float | Tensor
    log_scale: nn.Parameter | None
    weight: nn.Parameter
    bias: nn.Parameter | None
    if TYPE_CHECKING:

        @overload
        def __call__(
            self, features: Tensor, labels: Tensor, *, return_statistics: Literal[False] = ..., label_weights: Tensor | None = ...
        ) -> Tensor: ...
        @overload
        def __call__(
            self, features: Tensor, labels: Tensor, *, return_statistics: Literal[True]
        ) -> tuple[Tensor, Statistics]: ...

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        *,
        margin: margins.Margin,
        scale: float | Tensor | None = None,
        learnable_scale: bool = False,
        negatives: HardNegatives | None = None,
        bias: bool = False,
        normalize_features: bool | None = None,
        centers_per_class: int = 1,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        memory_budget: MemoryBudget = "auto",
        backend: Backend = "auto",
        table_format: TableFormat = "float32",
        sample_rate: float = 1.0,
        sample_seed: int = 0,
        sample_correction: bool = False,
        hard_classes: Tensor | None = None,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        placement: Whole = WHOLE,
    ) -> None:
        super().__init__()
        validation.check_size("embedding_size", embedding_size)
        validation.check_size("num_classes", num_classes)
        validation.check_size("centers_per_class", centers_per_class)
        validation.check_flag("bias", bias)
        validation.check_flag("learnable_scale", learnable_scale)
        margins.hard_negatives.check_kind(negatives)
        given, margin = margin, self._as_margin(margin)
        margins.check(margin, bias, normalize_features)
        # The order matters from here on: attributes.py, which sees each assignment, reads some that came before.
        self.__dict__["_negatives"] = negatives
        self.normalize_features = margin.normalize_features if normalize_features is None else normalize_features
        self.scale = default_scale(margin, self.normalize_features) if scale is None else scale
        self.reduction, self.ignore_index, self.memory_budget, self.backend = reduction, ignore_index, memory_budget, backend
        validation.check_options(
            scale=self.scale, reduction=reduction, ignore_index=ignore_index, memory_budget=memory_budget, backend=backend
        )
        validation.check_rate("sample_rate", sample_rate)
        validation.check_count("sample_seed", sample_seed)
        validation.check_flag("sample_correction", sample_correction)
        self.sample_seed, self.sample_correction = sample_seed, sample_correction
        self.num_classes, self.centers_per_class = num_classes, centers_per_class
        self._table_format, self.placement = table_format, placement
        rows = {"centers": centers_per_class, "device": device, "dtype": _table_dtype(table_format, dtype)}
        num_rows, is_float8 = num_classes * centers_per_class, table_format == "float8"
        self.weight = nn.Parameter(placement.empty(num_rows, embedding_size, **rows))
        beside = {**rows, "dtype": torch.float32} if is_float8 else rows
        self.register_parameter("bias", nn.Parameter(placement.empty(num_rows, **beside)) if bias else None)
        self.register_buffer("weight_scale", placement.empty(num_rows, **beside) if is_float8 else None)
        are_numbers = not isinstance(self.scale, Tensor) and not isinstance(getattr(margin, "m", None), Tensor)
        if isinstance(margin, margins.CosFace) and self.normalize_features and are_numbers:
            theory.warn_if_out_of_bounds(num_classes, embedding_size, self.scale, margin.m, stacklevel=self._callers_level())
        if learnable_scale:
            self._learn_scale(device)
        validation.check_label_smoothing(label_smoothing, centers_per_class)
        validation.check_class_weight(class_weight, num_classes, label_smoothing=label_smoothing)
        if class_weight is not None:
            place = class_weight.device if self.weight.is_meta else self.weight.device  # on meta it would lose its numbers
            class_weight = class_weight.detach().to(place, torch.promote_types(class_weight.dtype, torch.float32), copy=True)
        self.register_buffer("class_weight", class_weight)
        self.register_buffer("hard_classes", None)
        self.hard_classes = hard_classes
        self.sample_rate, self.label_smoothing = sample_rate, label_smoothing
        self.margin = given
        class_tables.register(self)
        placement.enter(self)
        self.reset_parameters()

    def _callers_level(self):
        """The stacklevel of the first caller outside the constructors of subclasses."""
        frame, level = sys._getframe(1), 1
        while frame.f_locals.get("self") is self:
            frame, level = frame.f_back, level + 1
        return level

    @property
    def margin(self) -> margins.Margin:
        """The margin, also to set: see margin_buffers.py."""
        return self._margin_refused[0] if self._margin_refused else self._as_given(self._margin())

    @margin.setter
    def margin(self, margin: margins.Margin) -> None:
        margin_buffers.write(self, margin)

    @property
    def sample_rate(self) -> float:
        """The share of the classes that take part in a training step; it may be set at any time."""
        return self._sample_rate

    @sample_rate.setter
    def sample_rate(self, sample_rate: float) -> None:
        validation.check_rate("sample_rate", sample_rate)
        self._sample_rate = sample_rate
        if sample_rate < 1 and "sample_step" not in self._buffers:
            self._begin_sampling()

    @property
    def negatives(self) -> HardNegatives | None:
        """The HardNegatives, or None. Setting them registers and removes buffers of running statistics, as a margin does."""
        return self._negatives

    @negatives.setter
    def negatives(self, negatives: HardNegatives | None) -> None:
        margins.hard_negatives.check_kind(negatives)
        self._negatives = negatives
        margin_buffers.write(self, self.margin)

    @property
    def embedding_size(self) -> int:
        """D, the numbers of a row."""
        return self.weight.shape[1]

    @property
    def normalize_weight(self) -> bool:
        """True if the rows of the table are divided by their norms."""
        return self._margin().normalize_weight

    @property
    def table_format(self) -> TableFormat:
        """The format that the constructor was given; "float32" if the table has another dtype now, as after head.float()."""
        return self._format_of(self.weight)

    def forward(
        self,
        features: Tensor | None = None,
        labels: Tensor | None = None,
        *others: object,
        return_statistics: bool = False,
        label_weights: Tensor | None = None,
        **named: object,
    ) -> Tensor | tuple[Tensor, Statistics]:
        """The loss of features (N, D) with labels (N,), or (N, K) with label_weights (N, K); with return_statistics also the
        Statistics of the rows; all as in `margin_softmax_loss`. Whatever else a call has is a TypeError that says what to call.
        """
        try:
            validation.check_call(features, labels, others, named)
            labels, label_weights = positives.merged(labels, label_weights, self.ignore_index, features)
        except (TypeError, ValueError, IndexError) as error:
            self.placement.here(self.weight).refuse(self, error)
        asked = features, labels, label_weights, return_statistics
        if torch.compiler.is_compiling() and recording.pending(self._parameters.get("weight")) is not None:
            return self._recorded_loss(*asked)
        return self._loss(*asked)

    def _loss(self, features, labels, label_weights, return_statistics):
        table, options = self._table(), self._loss_options(return_statistics)
        inputs = Inputs(
            features=features,
            labels=labels,
            label_weights=label_weights,
            class_weight=self.class_weight,
            row_scale=self._row_scale(),
            **self._own_rows(table),
        )
        inputs, options, shards = self.placement.here(table[0]).batch(self, table, inputs, options)
        loss = loss_of_table(inputs, options, shards=shards, state=self._statistics(), training=self.training)
        if inputs.classes is not None:
            self.sample_step += 1
        return loss

    @torch._disable_dynamo
    def _recorded_loss(self, *asked):
        """`_loss` outside of a graph: its recording cannot be compiled; nor, up to 2.11, objects kept at a break within."""
        return self._loss(*asked)

    def logits(self, features: Tensor) -> Tensor:
        """The logits without margin, s cos_nj, (N, C) float32 (float64), materialised and differentiable: for small C."""
        table = self._table()
        return self.placement.here(table[0]).logits(self, table, features)

    @torch.no_grad()
    def topk(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(values, indices), each (N, k): the k largest of `logits(features)`, descending, slab by slab, never N x C.

        Over several ranks each has features (N_r, D) of its own, gets the largest of the whole table, and must call it.

        Raises:
            TypeError, ValueError: k is no int, negative, or larger than the number of classes.
        """
        table = self._table()
        return self.placement.here(table[0]).topk(self, table, features, k)

    def confusions(self, k: int) -> tuple[Tensor, Tensor]:
        """(cosines, classes), each (C, k): the k other classes whose rows are nearest to each class's, descending, of sub-centres
        by the nearest two. Slab by slab, never C x C; 2 C² D operations. Over several ranks all call it, and get all classes'.

        Raises:
            TypeError, ValueError: k is no int, negative, or larger than C - 1.
        """
        return confusions.confusions(self, k)

    def own_cosines(self, features: Tensor, labels: Tensor) -> Tensor:
        """cos(x_n, w_{y_n,k}), (N, K) float32 (float64): the cosines of features (N, D) with the K centres of their own classes,
        by labels (N,), without gradient; NaN for ignored rows. For the whole of a data set take it batch by batch. Over several
        ranks all call it, each with rows of its own.

        Raises:
            TypeError, ValueError, IndexError: as the loss.
        """
        return own_centers.own_cosines(self, features, labels)

    def dominant_centers(self, cosines: Tensor, labels: Tensor) -> Tensor:
        """(C,) int64: of each class the centre, from 0 to K - 1, that is the nearest to most of its rows; -1 without rows.

        Args:
            cosines: (N, K), `own_cosines` of the rows of a data set.
            labels: (N,), theirs, any integer dtype. Rows with a label outside [0, C) count for nothing.

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape.

        Source: Sub-center ArcFace, Deng et al., ECCV 2020, section 3.4, which drops the other centres, and the rows more than 75
        degrees from this one.
        """
        validation.check_own_cosines(cosines, labels, self.centers_per_class)
        return own_centers.dominant(cosines, positives.class_indices(labels), self.num_classes)

    def grow(self, count: int, optimizer: Optimizer | None = None) -> range:
        """Add `count` identities, drawn as the initial ones were, and return the range of their ids.

        The parameters stay the same objects, so that an optimiser keeps them; their gradients are dropped. A replica by
        DistributedDataParallel has to be wrapped anew. Of a margin's numbers by class new identities get the mean.

        Args:
            count: how many.
            optimizer: the torch.optim.Optimizer that has weight; FusedSGD and FusedAdamW are known without it. All its state
                with a number or vector for each row (momentum, second moments, scales) is zero for the new rows. Without it,
                another optimiser's state of the old shape stays: its next step raises.

        Raises:
            TypeError, ValueError: count is no int, or less than 1; optimizer is none, or without weight. Nothing changed.
            NotImplementedError: the table is sharded; the message says what to do.
        """
        return grow.grow(self, count, optimizer)

    def remove(self, ids: Sequence[int] | Tensor, optimizer: Optimizer | None = None) -> Tensor:
        """Remove the identities `ids`, and return the new id of each old one, (C_old,) int64 on the CPU, -1 for those removed.

        The others move up and keep their order: `labels = new_ids[labels]`. For parameters, gradients and state see `grow`.

        Args:
            ids: class ids, a sequence or tensor of ints; duplicates are one.
            optimizer: as in `grow`.

        Raises:
            TypeError, ValueError, IndexError: ids are no ints, all ids, or out of range; optimizer as in `grow`. Nothing changed.
            NotImplementedError: as in `grow`.
        """
        return grow.remove(self, ids, optimizer)

    @staticmethod
    def draw(rows: Tensor) -> None:
        """Fill rows of a table with their initial values."""
        nn.init.normal_(rows, std=0.01)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the table anew; set bias, a learnt scale, running statistics and sample_step to their first values."""
        self.placement.draw(self)
        if self.bias is not None:
            self.bias.zero_()
        if self._learns_scale():
            self.scale = self._first_scale
        if "sample_step" in self._buffers:
            self.sample_step.zero_()
        for name, value in self._states().items():
            getattr(self, name).fill_(value)

    def _table(self):
        """(weight, bias), to read once a call: torch.nn.utils.parametrize makes a table anew whenever it is read."""
        if "weight" not in self._parameters:
            self.placement.check_parametrised(self)
        return self.weight, self.bias

    def _samples(self):
        """True if only some of the classes take part in this step."""
        return self.sample_rate < 1 and self.training

    def _own_rows(self, table):
        """The Inputs of this process's rows of the table: `parameters` too if only a fused optimiser can train it."""
        if recording.pending(table[0]) is not None or table[0].dtype == formats.FLOAT8:
            with torch.no_grad():
                weight, bias = self.placement.rows(table)
            return {"weight": weight, "bias": bias, "parameters": table}
        weight, bias = self.placement.rows(table)
        if self._format_of(weight) != "float32":
            weight = class_tables.refused(weight, weight.detach())
        return {"weight": weight, "bias": bias}

    def _row_scale(self):
        """The scales of this process's rows (R,), beside a float8 weight."""
        return None if self.weight_scale is None else self.placement.local(self.weight_scale)

    def _sample(self, certain, num_classes, seed):
        """(the classes of this step, the sample_correction of the loss)."""
        classes = classes_of_step(certain, num_classes, self.sample_rate, seed, self.sample_step)
        by_class = self.sample_correction and self.hard_classes is not None
        return classes, correction(classes, certain, num_classes) if by_class else self.sample_correction

    def _loss_options(self, return_statistics=False):
        """The LossOptions of the head's present attributes."""
        own = {name: getattr(self, name) for name in LossOptions._fields if name not in ("margin", "return_statistics")}
        return LossOptions(margin=self._margin(), return_statistics=return_statistics, **own)

    def _statistics(self):
        """Running statistics of margin and negatives, by name."""
        return {name: getattr(self, name) for name in self._states()}


def _table_dtype(table_format, dtype):
    """The dtype of a table: the format's, or for float32 the one that the caller asks for."""
    validation.check_choice("table_format", table_format, formats.TABLE_FORMATS)
    if table_format == "float32":
        return dtype
    wanted = formats.TABLE_FORMATS[table_format]
    if dtype not in (None, wanted):
        raise ValueError(f'table_format="{table_format}" makes the table {wanted}, got dtype={dtype}')
    return wanted
