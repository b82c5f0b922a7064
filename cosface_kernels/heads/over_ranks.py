"""A table in shards over several ranks; features stay as data parallelism has them.

    x, y of all ranks  ->  A_n^r, x̃_n·w̃_{y_n}  of the classes of rank r  ->  A_n = log Σ_r e^{A_n^r},  x̃_n·w̃_{y_n} = Σ_r ...
        all-gather                  operators.py                                       one all-reduce of two N-vectors

After that every rank has the same N-vectors and computes margin, loss and mean of them. Backward has one collective, the
reduce-scatter of dX; each rank computes dW of its own rows. A row whose class another rank holds has no target here.

r: a rank. y_n: the class of row n. A_n: log-sum-exp over the negatives, A_n^r of those that rank r holds.
"""

import math
import zlib
from dataclasses import fields
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.utils.weak import WeakTensorKeyDictionary

from .. import margins, validation
from ..distributed import dtensors
from ..distributed.ranks import ONE_PROCESS
from ..loss import class_indices, product_dtype
from ..ops import backends, formats, operators, recording
from ..ops.operands import Largest
from ..sampling import with_hard_classes
from . import data_parallel, float8, logits
from .placement import Whole

# Labels as the operator of one shard gets them: ignored, a class of another shard, and a number outside [0, C).
IGNORED, FOREIGN, INVALID = -100, -1, -2

# With logits up to this e^A, of any number of classes, is a float64, and not 0: their sum needs no maximum before it.
LARGEST_EXPONENT = 600.0

_checksums = WeakTensorKeyDictionary()  # of a margin's tensors: (version, checksum)


class Told(NamedTuple):
    """The numbers that a rank sends the others about its batch and its head."""

    num_rows: int
    dtype: int
    grad_mode: bool
    options: int
    needs_gradient: bool
    k: int
    statistics: bool
    label_columns: int  # K of labels (N, K), 0 of labels (N,)

    @classmethod
    def of(cls, head, features, k=0, statistics=False, label_columns=0):
        names = ("num_classes", "scale", "reduction", "normalize_features", "ignore_index", "ddp_average", "label_smoothing")
        names = *names, "negatives"
        sampling = ("sample_rate", "sample_correction", "training")
        values = [getattr(head, name) for name in (*names, *sampling)]
        values = [value.item() if isinstance(value, torch.Tensor) else value for value in values]
        values.append(head.hard_classes is None)
        options = zlib.crc32(repr([*values, *_margin_told(head._margin(), len(features))]).encode())
        dtype, grad_mode = validation.FLOAT_DTYPES.index(features.dtype), torch.is_grad_enabled()
        needs_gradient = grad_mode and features.requires_grad
        return cls(len(features), dtype, grad_mode, options, needs_gradient, k, statistics, label_columns)

    @classmethod
    def agreed(cls, everyone):
        """(rows of each rank, True if any needs the gradient of its features). Raises unless all ranks have the same options."""
        told = cls(*zip(*everyone, strict=True))
        options = "num_classes, scale, margin and all other options of the head must be the same (compared by a checksum)"
        grad_modes = "gradients must be enabled on all ranks or on none: torch.is_grad_enabled() must be the same"
        for what, values in (
            ("features must have the same dtype", [validation.FLOAT_DTYPES[dtype] for dtype in told.dtype]),
            (options, told.options),
            (grad_modes, [*map(bool, told.grad_mode)]),
            ("k must be the same", told.k),
            ("return_statistics must be the same", [*map(bool, told.statistics)]),
            ("the number of label_weights to a row must be the same", told.label_columns),
        ):
            if len({*values}) > 1:
                raise ValueError(f"{what} on all ranks, got {', '.join(map(str, values))}")
        return [*told.num_rows], any(told.needs_gradient)


class Batch:
    """The rows of all ranks in one step, with the methods that loss.loss_of_table calls for a sharded table."""

    foreign_index = FOREIGN

    def __init__(self, ranks, counts, first_class, holds_classes, labels, num_classes):
        self.ranks, self.counts, self.first_class, self.holds_classes = ranks, counts, first_class, holds_classes
        self.labels, self.num_classes = labels, num_classes

    def combine(self, bound, found):
        """Negatives of the whole table from those of this shard. bound: of |logits|."""
        dtype, lse = found.lse.dtype, found.lse.double()
        if not self.holds_classes:
            lse = lse.masked_fill(lse.new_ones((), dtype=torch.bool), -torch.inf)
        shift = torch.zeros_like(lse)
        if bound > LARGEST_EXPONENT:
            shift = self.ranks.maximum(lse.detach())
            shift = torch.where(shift.isinf(), 0.0, shift)
        total = (lse - shift).exp()
        columns = {name: getattr(found, name) for name in ("product", "product_sum", "target_length")} | {"lse": total}
        columns["slope"] = None if found.slope is None else total.detach() * found.slope
        columns = {name: column.double() for name, column in columns.items() if column is not None}
        columns = self._added(columns)
        total = columns["lse"]
        # No negative at all: log 0, without its infinite derivative.
        none = total == 0
        total = torch.where(none, 1.0, total)
        columns["lse"] = torch.where(none, -torch.inf, total.log() + shift)
        if "slope" in columns:
            columns["slope"] = columns["slope"].detach() / total.detach()
        return found._replace(**{name: column.to(dtype) for name, column in columns.items()})

    def _added(self, columns):
        """The sums over the ranks of {name: (N,) or (N, K)}."""
        parts = [column if column.dim() == 2 else column[:, None] for column in columns.values()]
        sums = self.ranks.add(torch.cat(parts, 1)).split([part.shape[1] for part in parts], 1)
        return {name: each.reshape(column.shape) for (name, column), each in zip(columns.items(), sums, strict=True)}

    def classes(self, inputs, options):
        """(the class of each row (N,), the number of classes) in the whole table."""
        return self.labels, self.num_classes

    def largest(self, found):
        """Largest of the whole table, by class numbers of that."""
        value = found.value if self.holds_classes else torch.full_like(found.value, -torch.inf)
        largest = self.ranks.maximum(value)
        here = (value == largest) & (value > -torch.inf)
        none = torch.iinfo(torch.int64).max
        place = -self.ranks.maximum(-torch.where(here, found.place + self.first_class, none))
        return Largest(largest, torch.where(place == none, -1, place))

    def nearest(self, products):
        """The largest products (N, k), descending, of the whole table from those of this shard."""
        products = products if self.holds_classes else torch.full_like(products, -torch.inf)
        found = self.ranks.gather(products, [len(products)] * self.ranks.size)
        return found.unflatten(0, (self.ranks.size, -1)).transpose(0, 1).flatten(1).topk(products.shape[1]).values

    def total(self, vector):
        """The sum over the ranks of a vector (N,) without gradient."""
        return self.ranks.add(vector)

    def of_all_shards(self, num_classes, num_sampled, device):
        """(C, M) of the whole table, from the number of classes in this shard and of those that take part."""
        numbers = [num_classes, num_sampled] if self.holds_classes else [0, 0]
        return self.ranks.add(torch.tensor(numbers, dtype=torch.int64, device=device)).tolist()

    def own(self, vector):
        """A vector (N,) that depends on the features alone, or None. Only the rank that brought a row gets its gradient."""
        if vector is None:
            return None
        first, stop = self.ranks.place(self.counts)
        others = vector.detach()
        return torch.cat([others[:first], vector[first:stop], others[stop:]])

    def own_rows(self, losses):
        return self.ranks.own(losses, self.counts)


class OverRanks(Whole):
    """A placement with some of the rows, and a part of the batch, on each rank; a single process has all of both.

    A subclass defines the rows: empty, local, ranks, and first_class(head, weight), the number of this rank's first class.
    """

    def enter(self, head):
        if self.ranks(head.weight).size > 1:
            data_parallel.leave_out(head)

    @torch.no_grad()
    def draw(self, head):
        """Draw this rank's rows. The seed is a number from the default generator plus the rank."""
        weight = self.local(head.weight)
        seed = torch.randint(2**62, (), dtype=torch.int64, device="cpu").item() + self.ranks(head.weight).rank
        generator = None if weight.is_meta else torch.Generator(weight.device).manual_seed(seed)
        float8.fill(weight, head._row_scale(), lambda rows: rows.normal_(std=0.01, generator=generator))

    def refuse(self, head, error):
        """Raise it on every rank, in place of the exchange with which their calls begin."""
        ranks = self.ranks(head.weight)
        if ranks is ONE_PROCESS:
            raise error

        def told():
            raise error

        ranks.exchange("the exchange of batch sizes", told, len(Told._fields), self.local(head.weight).device)

    def batch(self, head, table, inputs, options):
        """(Inputs, LossOptions, Batch) of all ranks' rows with this rank's rows of the table."""
        ranks = self.ranks(table[0])
        if ranks is ONE_PROCESS:
            return super().batch(head, table, inputs, options)
        features, weight, bias, parameters = inputs.features, inputs.weight, inputs.bias, inputs.parameters
        num_classes_here = len(weight) // head.centers_per_class
        if not num_classes_here:
            # A rank without classes gets one of zeros, which Batch.combine leaves out of the sum.
            inputs = inputs._replace(row_scale=None)
            weight, bias = (_with_zeros(each, head.centers_per_class) for each in (weight, bias))
            if parameters is not None:  # the loss has a gradient here too; nobody asks for this one's
                weight.requires_grad_(table[0].requires_grad)
                parameters = None
        inputs = inputs._replace(weight=weight, bias=bias, parameters=parameters)
        per_row = margins.row_tensors(options.margin, len(features))

        def told():
            _check(head, table, inputs, options)
            label_columns = 0 if inputs.label_weights is None else inputs.label_weights.shape[1]
            return Told.of(head, features, statistics=options.return_statistics, label_columns=label_columns)

        counts, needs_gradient = Told.agreed(
            ranks.exchange("the exchange of batch sizes", told, len(Told._fields), weight.device)
        )
        if needs_gradient and not features.requires_grad:
            features = features.detach().requires_grad_()
        features = ranks.gather(features, counts, ranks.size if head.ddp_average else 1)
        everywhere = ranks.gather(class_indices(inputs.labels), counts)
        first = self.first_class(head, table[0])
        labels = _labels_here(everywhere, head.ignore_index, head.num_classes, first, num_classes_here)
        inputs = inputs._replace(features=features, labels=labels)
        if inputs.label_weights is not None:
            inputs = inputs._replace(label_weights=ranks.gather(inputs.label_weights.detach().to(torch.float64), counts))
        per_row = {name: ranks.gather(value.detach().to(features.device), counts) for name, value in per_row.items()}
        margin = margins.replaced(options.margin, per_row)
        if head._samples():
            seed = (head.sample_seed * ranks.size + ranks.rank) % 2**63
            certain = with_hard_classes(everywhere.flatten(), head.ignore_index, head.hard_classes)
            certain = _labels_here(certain, IGNORED, head.num_classes, first, num_classes_here)
            classes, correction = head._sample(certain, max(num_classes_here, 1), seed)
            inputs, options = inputs._replace(classes=classes), options._replace(sample_correction=correction)
        batch = Batch(ranks, counts, first, bool(num_classes_here), everywhere, head.num_classes)
        return inputs, options._replace(margin=margin, ignore_index=IGNORED), batch

    def logits(self, head, table, features):
        if self.ranks(table[0]) is ONE_PROCESS:
            return super().logits(head, table, features)
        raise NotImplementedError("a sharded head has no logits, which would be N x C; topk has each row's largest")

    def topk(self, head, table, features, k):
        ranks = self.ranks(table[0])
        if ranks is ONE_PROCESS:
            return super().topk(head, table, features, k)
        rows = weight, _ = self.rows(table)

        def told():
            validation.check_features(features, weight if len(weight) else _with_zeros(weight, 1))
            validation.check_k(k, head.num_classes)
            return Told.of(head, features, k)

        counts, _ = Told.agreed(ranks.exchange("the exchange of batch sizes", told, len(Told._fields), weight.device))
        return self._nearest(head, head, rows, ranks.gather(features, counts), counts, k)

    def _nearest(self, head, kind, rows, gathered, counts, k):
        """This rank's rows of the largest logits, of the whole table, of all ranks' features."""
        ranks = self.ranks(head.weight)
        values, indices = logits.largest(kind, rows, gathered, k)
        missing = k - values.shape[1]
        found = [
            ranks.gather(torch.nn.functional.pad(each, (0, missing), value=fill), [len(gathered)] * ranks.size)
            for each, fill in ((values, -math.inf), (indices + self.first_class(head, head.weight), 0))
        ]
        own = slice(*ranks.place(counts))
        values, indices = (each.unflatten(0, (ranks.size, -1))[:, own].transpose(0, 1).flatten(1) for each in found)
        values, order = values.topk(k)
        return values, indices.gather(1, order)

    def rounds(self, head, check, k, count):
        ranks = self.ranks(head.weight)
        if ranks is ONE_PROCESS:
            return super().rounds(head, check, k, count)

        def told():
            check()
            return k, count

        everyone, counts = zip(*ranks.exchange("the exchange of k", told, 2, self.local(head.weight).device), strict=True)
        if len({*everyone}) > 1:
            raise ValueError(f"k must be the same on all ranks, got {', '.join(map(str, everyone))}")
        return max(counts)

    def nearest(self, head, kind, table, rows, k):
        if self.ranks(head.weight) is ONE_PROCESS:
            return super().nearest(head, kind, table, rows, k)
        counts = self._counts(head, rows)
        return self._nearest(head, kind, table, self.ranks(head.weight).gather(rows, counts), counts, k)

    def everyones(self, head, rows):
        if self.ranks(head.weight) is ONE_PROCESS:
            return rows
        return self.ranks(head.weight).gather(rows, self._counts(head, rows))

    def _counts(self, head, rows):
        """The number of rows that each rank has."""
        told = self.ranks(head.weight).exchange("the exchange of batch sizes", lambda: [len(rows)], 1, rows.device)
        return [count for (count,) in told]

    def looked_up(self, head, check, features, labels, found):
        ranks = self.ranks(head.weight)
        if ranks is ONE_PROCESS:
            return super().looked_up(head, check, features, labels, found)
        weight = self.local(head.weight)

        def told():
            check(weight if len(weight) else _with_zeros(weight, head.centers_per_class))
            return Told.of(head, features)

        counts, _ = Told.agreed(ranks.exchange("the exchange of batch sizes", told, len(Told._fields), weight.device))
        labels = ranks.gather(class_indices(labels), counts)
        first, count = self.first_class(head, head.weight), len(weight) // head.centers_per_class
        places = _labels_here(labels, head.ignore_index, head.num_classes, first, count)
        here = found(ranks.gather(features.detach(), counts), places)
        total = ranks.add(torch.where((places < 0)[:, None], 0.0, here))
        return total.masked_fill((labels == head.ignore_index)[:, None], torch.nan)[slice(*ranks.place(counts))]

    def extra_repr(self, head):
        ranks = self.ranks(head.weight)
        return f", ddp_average={head.ddp_average}, rank {ranks.rank} of {ranks.size}"


class OverMesh(OverRanks):
    """A DTensor, Shard(0), over the ranks of a DeviceMesh; without a mesh, a plain tensor in this process."""

    def __init__(self, mesh):
        self.mesh = mesh

    def empty(self, rows, *size, centers, device, dtype):
        if self.mesh is None:
            return super().empty(rows, *size, centers=centers, device=device, dtype=dtype)
        num_ranks = self.mesh.size()
        chunk = -(-rows // num_ranks)
        if chunk % centers and num_ranks > 1:
            raise ValueError(
                f"a DTensor cuts {rows} rows for {num_ranks} ranks after every {chunk}, inside the {centers} rows of a class: "
                f"num_classes must be a multiple of the number of ranks, such as {-(-rows // centers // num_ranks) * num_ranks}"
            )
        first, stop = dtensors.bounds(rows, self.mesh)
        dtensors.unscale_beside_plain()
        local = torch.empty(stop - first, *size, device=device, dtype=dtype)
        return DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False, shape=(rows, *size), stride=(*size, 1))

    def first_class(self, head, weight):
        return dtensors.first_row(weight) // head.centers_per_class

    def check_parametrised(self, head):
        made_by = {type(each).__name__ for each in head.parametrizations["weight"]} if self.mesh is not None else set()
        if made_by & {"_WeightNorm", "_SpectralNorm"}:
            raise NotImplementedError(
                "weight_norm and spectral_norm go with a table in one process: in shards a DTensor has no norm with a gradient. "
                "The loss divides each row by its length anyway; leave them out, or take CosFaceLoss or MarginSoftmaxLoss"
            )

    def local(self, tensor):
        """This rank's rows of a parameter, as an ordinary tensor with a gradient. Nothing else converts a DTensor for a loss."""
        return dtensors.local(tensor)


def _margin_told(margin, num_rows):
    """What must be the same of a margin on all ranks: its kind and its numbers, but those for this rank's own rows."""
    per_row = margins.row_tensors(margin, num_rows)
    for name in (field.name for field in fields(margin)):
        value = getattr(margin, name)
        shared = isinstance(value, torch.Tensor) and name not in per_row
        yield name, "of rows" if name in per_row else _checksum(value) if shared else value
    yield type(margin).__qualname__


def _checksum(tensor):
    """A checksum of a tensor's numbers, made once: on a GPU it waits for the device."""
    version, checksum = _checksums.get(tensor, (None, None))
    if version != tensor._version:
        numbers = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        memory = bytearray(len(numbers))
        if memory:
            torch.frombuffer(memory, dtype=torch.uint8).copy_(numbers)
        checksum = zlib.crc32(memory)
        _checksums[tensor] = tensor._version, checksum
    return checksum


def _with_zeros(rows, count):
    """rows and `count` more; of a float8 table float32."""
    if rows is None:
        return None
    rows = rows.float() if rows.dtype == formats.FLOAT8 else rows
    return torch.cat([rows, rows.new_zeros(count, *rows.shape[1:])])


def _labels_here(labels, ignore_index, num_classes, first, count):
    """Each label (N,) as its place among the `count` classes from `first` on, or FOREIGN, IGNORED or INVALID."""
    place = labels - first
    known = (labels >= 0) & (labels < num_classes)
    elsewhere = torch.where(known, FOREIGN, INVALID)
    place = torch.where(known & (place >= 0) & (place < count), place, elsewhere)
    return torch.where(labels == ignore_index, IGNORED, place)


def _check(head, table, inputs, options):
    """Check everything that can be wrong on one rank alone, before ranks wait for each other."""
    features, weight, labels = inputs.features, inputs.weight, inputs.labels
    wants_sparse = head._samples() and torch.is_grad_enabled() and table[0].requires_grad
    if dtensors.is_sharded(table[0]) and wants_sparse and recording.pending(table[0]) is None:
        raise RuntimeError(
            "a sharded table with sample_rate < 1 trains with FusedSGD or FusedAdamW alone, made before the forward pass: a "
            "DTensor has no sparse gradient"
        )
    options.checked(inputs.bias is not None).check_values(features)
    several = inputs.label_weights is not None
    validation.check_tensors(features, weight, labels, inputs.bias, head.centers_per_class, several=several)
    if several and inputs.label_weights.requires_grad:
        raise ValueError("label_weights must need no gradient: other ranks' rows have none")
    backends.choose(head.backend, weight.device, product_dtype(features, weight))
    operators.check_labels(class_indices(labels), head.num_classes, head.ignore_index)
    margins.check_classes(options.margin, head.num_classes, features.device)
    for name, value in margins.row_tensors(options.margin, len(features)).items():
        if value.requires_grad:
            raise ValueError(f"{name} of {type(options.margin).__name__} must need no gradient: other ranks' rows have none")
