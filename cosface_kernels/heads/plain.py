"""The class table and its loss as modules: CosFaceLoss, and MarginSoftmaxLoss for every margin."""

import torch
from torch import nn

from .. import margins, theory, validation
from ..loss import Inputs, LossOptions, default_scale, loss_of_table
from ..ops import formats, recording
from ..ops.normalize import unit_rows
from ..ops.slabs import slab_rows, wide_dtype
from ..ops.table import Table
from ..sampling import classes_of_step
from . import grow


class _Head(nn.Module):
    """A class table weight (C K, D) drawn from N(0, 0.01²), its logits, and which classes take part in a training step."""

    holds_plain_shard = False  # whether weight has this rank's rows alone, and does not say so as a DTensor does

    def __init__(self, embedding_size, num_classes, centers_per_class, table_format, sampling, device, dtype, **options):
        super().__init__()
        validation.check_size("embedding_size", embedding_size)
        validation.check_size("num_classes", num_classes)
        validation.check_size("centers_per_class", centers_per_class)
        validation.check_options(**options)
        for name, value in options.items():
            setattr(self, name, value)
        self.num_classes, self.centers_per_class = num_classes, centers_per_class
        rows = num_classes * centers_per_class
        self._table_format = table_format
        dtype = table_dtype(table_format, dtype)
        self.weight = nn.Parameter(self._empty(rows, embedding_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.normalize_features = self.normalize_weight = True
        self.sample_rate, self.sample_seed, self.sample_correction = sampling
        validation.check_rate("sample_rate", self.sample_rate)
        validation.check_count("sample_seed", self.sample_seed)
        validation.check_flag("sample_correction", self.sample_correction)
        if self.sample_rate < 1:
            self.register_buffer("sample_step", torch.zeros((), dtype=torch.int64, device=device))
        recording.register(self)

    def __setstate__(self, state):
        super().__setstate__(state)
        recording.register(self)

    @property
    def table_format(self):
        """As it was asked for, while the table is of that dtype: head.float() makes any table an ordinary one."""
        return self._table_format if self.weight.dtype == formats.TABLE_FORMATS[self._table_format] else "float32"

    @staticmethod
    def draw(rows):
        """Fills rows of a table with their initial values."""
        nn.init.normal_(rows, std=0.01)

    def grow(self, count, optimizer=None):
        """Adds `count` identities, drawn as the initial ones were, and returns the range of their ids.

        The parameters stay the same objects, so that an optimiser keeps them; their gradients are dropped. A replica by
        DistributedDataParallel has to be wrapped anew.

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

    def remove(self, ids, optimizer=None):
        """Removes the identities `ids`, and returns the new id of each old one, (C_old,) int64 on the CPU, -1 for those removed.

        The others move up and keep their order: `labels = new_ids[labels]`. For parameters, gradients and state see `grow`.

        Args:
            ids: class ids, a sequence or tensor of ints; duplicates are one.
            optimizer: as in `grow`.

        Raises:
            TypeError, ValueError, IndexError: ids are no ints, all ids, or out of range; optimizer as in `grow`. Nothing changed.
            NotImplementedError: as in `grow`.
        """
        return grow.remove(self, ids, optimizer)

    def _empty(self, *shape, device, dtype):
        """Not yet drawn, a number or a row of numbers for each row of the table."""
        return torch.empty(*shape, device=device, dtype=dtype)

    def _table(self):
        """(weight, bias) as this process holds them."""
        return self.weight, self.bias

    def _trained_table(self):
        """(weight, bias) of this process for the loss, and whose rows they are where a fused optimiser trains them, or None."""
        if recording.pending(self.weight) is not None:
            with torch.no_grad():
                return *self._table(), (self.weight, self.bias)
        weight, bias = self._table()
        return weight if self.table_format == "float32" else recording.refused(weight), bias, None

    def reset_parameters(self):
        self.draw(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.sample_rate < 1:
            self.sample_step.zero_()

    def forward(self, features, labels):
        """The loss of features (N, D) with labels (N,)."""
        weight, bias, parameters = self._trained_table()
        inputs = Inputs(features, weight, labels, bias, parameters=parameters)
        if not self._samples():
            return loss_of_table(inputs, self._loss_options(), state=self._statistics(), training=self.training)
        validation.check_tensors(features, weight, labels, bias, self.centers_per_class)
        classes = self._classes(labels, self.ignore_index, self.num_classes, self.sample_seed)
        inputs = inputs._replace(classes=classes)
        loss = loss_of_table(inputs, self._loss_options(), state=self._statistics(), training=self.training)
        self.sample_step += 1
        return loss

    def _samples(self):
        """Whether this step takes some of the classes."""
        return self.sample_rate < 1 and self.training

    def _classes(self, labels, ignore_index, num_classes, seed):
        """Those of this step."""
        return classes_of_step(labels, ignore_index, num_classes, self.sample_rate, seed, self.sample_step)

    def _loss_options(self):
        """LossOptions as the head is now."""
        return LossOptions(
            margin=self._margin(),
            scale=self.scale,
            normalize_features=self.normalize_features,
            centers_per_class=self.centers_per_class,
            reduction=self.reduction,
            sample_correction=self.sample_correction,
            ignore_index=self.ignore_index,
            memory_budget=self.memory_budget,
            backend=self.backend,
        )

    def _margin(self):
        """As an object."""
        return self.margin

    def _statistics(self):
        """Running statistics of the margin, by name."""
        return {name: getattr(self, name) for name in self._margin().state}

    def logits(self, features):
        """The logits without margin, s cos_nj, (N, C) float32 (float64), materialised and differentiable: for small C."""
        validation.check_features(features, self.weight)
        return self._logits(self._rows(features), 0, len(self.weight))

    @torch.no_grad()
    def topk(self, features, k):
        """(values, indices), each (N, k): the k largest of `logits(features)`, descending, slab by slab, never N x C.

        Raises:
            TypeError, ValueError: k is no int, negative, or larger than the number of classes.
        """
        validation.check_features(features, self.weight)
        validation.check_k(k, self.num_classes)
        return self._topk(features, k)

    def _topk(self, features, k):
        """Of the rows that this process holds, as many as there are up to k."""
        rows, weight, centers = self._rows(features), self._table()[0], self.centers_per_class
        values = rows.new_empty(len(rows), 0)
        indices = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
        slab = slab_rows(features, Table(weight, centers=centers), rows.dtype)
        for start in range(0, len(weight), slab or 1):  # 0: an empty shard
            found = self._logits(rows, start, start + slab)
            best = found.topk(min(k, found.shape[1]))
            candidates = torch.cat([values, best.values], 1)
            values, order = candidates.topk(min(k, candidates.shape[1]))
            indices = torch.cat([indices, best.indices + start // centers], 1).gather(1, order)
        return values, indices

    def _rows(self, features):
        """What is multiplied with the table."""
        rows = features.to(wide_dtype(torch.promote_types(features.dtype, self.weight.dtype)))
        return unit_rows(rows)[0] if self.normalize_features else rows

    def _logits(self, rows, start, stop):
        """Outside autocast: rounded to 16 bits, many of a million cosines would be equal."""
        with torch.autocast(rows.device.type, enabled=False):
            weight, bias = self._table()
            table = weight[start:stop].to(rows.dtype)
            products = rows @ (unit_rows(table)[0] if self.normalize_weight else table).T
            if bias is not None:
                products = products + bias[start:stop].to(rows.dtype)
            if self.centers_per_class > 1:
                products = products.unflatten(1, (-1, self.centers_per_class)).max(2).values
            return self.scale * products

    def extra_repr(self):
        shape = f"{self.weight.shape[1]}, {self.num_classes}"
        usual = {"table_format": "float32", "sample_rate": 1.0, "sample_seed": 0, "sample_correction": False}
        others = "".join(f", {name}={getattr(self, name)}" for name, value in usual.items() if getattr(self, name) != value)
        return f"{shape}, scale={self.scale}, margin={self.margin}, reduction={self.reduction!r}{others}"


def table_dtype(table_format, dtype):
    """The dtype of a table: what the format says, and for float32 what the caller wants."""
    validation.check_choice("table_format", table_format, formats.TABLE_FORMATS)
    if table_format == "float32":
        return dtype
    wanted = formats.TABLE_FORMATS[table_format]
    if dtype not in (None, wanted):
        raise ValueError(f'table_format="{table_format}" makes the table {wanted}, got dtype={dtype}')
    return wanted


class CosFaceLoss(_Head):
    """`cosface_loss` with a learned class table, weight (num_classes, embedding_size) drawn from N(0, 0.01²).

    Args:
        embedding_size: D.
        num_classes: C, the number of identities.
        scale, margin, reduction, ignore_index, memory_budget, backend: as in `cosface_loss`.
        table_format: "float32", or "bfloat16": half the memory, rounded stochastically, for FusedSGD and FusedAdamW alone.
        sample_rate: of the classes that take part in a training step, 0 < sample_rate <= 1: see `sample_classes`. Below 1 the
            gradients of the table are sparse, and the head counts its training steps in the buffer sample_step.
        sample_seed: what samples are drawn from; step t's is a function of sample_seed, t and the labels.
        sample_correction: as in `margin_softmax_loss`, in training.
        device, dtype: of the table.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, at construction.

    Warns:
        UserWarning: a scale or margin outside the paper's bounds, at construction: see `theory.warn_if_out_of_bounds`.
    """

    def __init__(
        self,
        embedding_size,
        num_classes,
        *,
        scale=64.0,
        margin=0.35,
        reduction="mean",
        ignore_index=-100,
        memory_budget="auto",
        backend="auto",
        table_format="float32",
        sample_rate=1.0,
        sample_seed=0,
        sample_correction=False,
        device=None,
        dtype=None,
    ):
        super().__init__(
            embedding_size,
            num_classes,
            1,
            table_format,
            (sample_rate, sample_seed, sample_correction),
            device,
            dtype,
            scale=scale,
            reduction=reduction,
            ignore_index=ignore_index,
            memory_budget=memory_budget,
            backend=backend,
        )
        validation.check_margin(margin)
        theory.warn_if_out_of_bounds(num_classes, embedding_size, scale, margin, stacklevel=2)
        self.margin = margin
        self.reset_parameters()

    def _margin(self):
        return margins.CosFace(self.margin)


class MarginSoftmaxLoss(_Head):
    """`margin_softmax_loss` with a learned class table, and the running statistics of margins that have any.

        head = MarginSoftmaxLoss(512, 1_000_000, margin=ArcFace(0.5))

    weight (num_classes · centers_per_class, embedding_size) is drawn from N(0, 0.01²), and bias, a number for each
    of its rows, is zero.

    Args:
        embedding_size: D.
        num_classes: C, the number of identities.
        margin: one of `cosface_kernels.margins`. Its running statistics, if any, are buffers by the names in its `state`, and
            move in training mode only, in every forward as BatchNorm's do, so twice a step under activation checkpointing; `to`,
            `half` and the like leave them float32 at least.
        bias: whether to learn one, True or False, for margins.Softmax() alone.
        scale, normalize_features, centers_per_class, reduction, ignore_index, memory_budget, backend: as in
            `margin_softmax_loss`.
        table_format: "float32", or "bfloat16": half the memory, rounded stochastically, for FusedSGD and FusedAdamW alone.
        sample_rate, sample_seed, sample_correction: as in `CosFaceLoss`.
        device, dtype: of the table.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, at construction.

    Warns:
        UserWarning: as CosFaceLoss, for margins.CosFace with normalised features.
    """

    def __init__(
        self,
        embedding_size,
        num_classes,
        *,
        margin,
        scale=None,
        bias=False,
        normalize_features=None,
        centers_per_class=1,
        reduction="mean",
        ignore_index=-100,
        memory_budget="auto",
        backend="auto",
        table_format="float32",
        sample_rate=1.0,
        sample_seed=0,
        sample_correction=False,
        device=None,
        dtype=None,
    ):
        validation.check_flag("bias", bias)
        margins.check(margin, bias, normalize_features)
        normalize_features = margin.normalize_features if normalize_features is None else normalize_features
        super().__init__(
            embedding_size,
            num_classes,
            centers_per_class,
            table_format,
            (sample_rate, sample_seed, sample_correction),
            device,
            dtype,
            scale=default_scale(margin, normalize_features) if scale is None else scale,
            reduction=reduction,
            ignore_index=ignore_index,
            memory_budget=memory_budget,
            backend=backend,
        )
        if isinstance(margin, margins.CosFace) and normalize_features:
            theory.warn_if_out_of_bounds(num_classes, embedding_size, self.scale, margin.m, stacklevel=2)
        self.margin, self.normalize_features = margin, normalize_features
        self.normalize_weight = margin.normalize_weight
        if bias:
            self.bias = nn.Parameter(self._empty(len(self.weight), device=device, dtype=self.weight.dtype))
        for name, value in margin.state.items():
            # Whatever the default dtype: in 16 bits a mean of 20 hardly moves, and a count past 2048 not at all.
            dtype = torch.float32 if isinstance(value, float) else torch.int64
            self.register_buffer(name, torch.tensor(value, dtype=dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self):
        super().reset_parameters()
        for name, value in self.margin.state.items():
            getattr(self, name).fill_(value)

    def _apply(self, function, recurse=True):
        """In 16 bits a running mean of 20 would not move by less than 0.06."""
        before = {name: getattr(self, name) for name in self.margin.state}
        super()._apply(function, recurse)
        for name, value in before.items():
            moved = getattr(self, name)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                setattr(self, name, value.to(moved.device, wide_dtype(value.dtype)))
        return self

    def extra_repr(self):
        options = (
            ("bias", self.bias is not None, False),
            ("normalize_features", self.normalize_features, self.margin.normalize_features),
            ("centers_per_class", self.centers_per_class, 1),
        )
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value, usual in options if value != usual)])
