"""The heads with a class table sharded over the ranks of torch.distributed; features stay as data parallelism has them.

    x, y of all ranks  ->  A_n^r, x̃_n·w̃_{y_n}  of the classes of rank r  ->  A_n = log Σ_r e^{A_n^r},  x̃_n·w̃_{y_n} = Σ_r ...
        all-gather                  operators.py                                       one all-reduce of two N-vectors

After that every rank has the same N-vectors and does the same with them: margin, loss, mean. Backward has one collective, the
reduce-scatter of dX; dW is each rank's own. A row whose class another rank holds is one without a target here (operators.py).
"""

import math
import os
import zlib

import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, init_device_mesh

from .. import validation
from ..distributed import dtensors
from ..distributed.ranks import Ranks
from ..loss import Inputs, class_indices, loss_of_table, product_dtype
from ..ops import backends, operators, recording
from .plain import CosFaceLoss, MarginSoftmaxLoss, _Head

# Labels as the operator of one shard gets them: no class, a class of another shard, and what is no label.
IGNORED, FOREIGN, INVALID = -100, -1, -2

# With logits up to this e^A, of any number of classes, is a float64, and not 0: their sum needs no maximum before it.
LARGEST_EXPONENT = 600.0


class Batch:
    """The rows of all ranks in one step, and what loss.loss_of_table does with them where the table is sharded."""

    foreign_index = FOREIGN

    def __init__(self, ranks, counts, holds_classes):
        self.ranks, self.counts, self.holds_classes = ranks, counts, holds_classes

    def combine(self, bound, lse, product, target_length):
        """(A, x̃·w̃_y, ‖w̃_y‖ or None), each (N,), of the whole table from those of this shard. bound: of |logits|."""
        if self.ranks.group is None:
            return lse, product, target_length
        dtype = lse.dtype
        lse = lse.double()
        if not self.holds_classes:
            lse = lse.masked_fill(lse.new_ones((), dtype=torch.bool), -torch.inf)
        shift = torch.zeros_like(lse)
        if bound > LARGEST_EXPONENT:
            shift = self.ranks.maximum(lse.detach())
            shift = torch.where(shift.isinf(), 0.0, shift)
        columns = [(lse - shift).exp(), product, *([] if target_length is None else [target_length])]
        total, *others = self.ranks.add(torch.stack([column.double() for column in columns], 1)).unbind(1)
        # No negative at all: log 0, without its infinite derivative.
        none = total == 0
        lse = torch.where(none, -torch.inf, torch.where(none, 1.0, total).log() + shift)
        lse, product, target_length, *_ = (*(column.to(dtype) for column in (lse, *others)), None)
        return lse, product, target_length

    def of_all_shards(self, num_classes, num_sampled, device):
        """(C, M) of the whole table from how many classes this shard has, and how many of them take part."""
        if self.ranks.group is None:
            return num_classes, num_sampled
        numbers = [num_classes, num_sampled] if self.holds_classes else [0, 0]
        return self.ranks.add(torch.tensor(numbers, dtype=torch.int64, device=device)).tolist()

    def own(self, vector):
        """A vector (N,) of the features, which every rank computes, with gradient on the rank that the row came from, once."""
        if vector is None or self.ranks.group is None:
            return vector
        first, stop = self.ranks.place(self.counts)
        others = vector.detach()
        return torch.cat([others[:first], vector[first:stop], others[stop:]])

    def own_rows(self, losses):
        return self.ranks.own(losses, self.counts)


class _ShardedHead(_Head):
    """What every head does when its table is sharded, but for where it comes in a class's bases."""

    def _place(self, mesh, ddp_average, device):
        """Where the table will lie, before the constructor that makes it; returns the device."""
        validation.check_flag("ddp_average", ddp_average)
        self.ddp_average = ddp_average
        self._mesh = _mesh(mesh, device)
        if mesh is None or device is None:
            return device if mesh is None else mesh.device_type
        if torch.device(device).type not in ("meta", mesh.device_type):
            raise ValueError(f"device must be of the mesh's type, {mesh.device_type}, got {device}")
        return device

    def _empty(self, *shape, device, dtype):
        if self._mesh is None:
            return super()._empty(*shape, device=device, dtype=dtype)
        size, rows, centers = self._mesh.size(), shape[0], self.centers_per_class
        chunk = -(-rows // size)
        if chunk % centers and size > 1:
            raise ValueError(
                f"a DTensor cuts {rows} rows for {size} ranks after every {chunk}, inside the {centers} rows of a class: "
                f"num_classes must be a multiple of the number of ranks, such as {-(-rows // centers // size) * size}"
            )
        first, stop = dtensors.bounds(rows, self._mesh)
        local = torch.empty(stop - first, *shape[1:], device=device, dtype=dtype)
        return DTensor.from_local(local, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=(*shape[1:], 1))

    def _ranks(self):
        return Ranks(self.weight.device_mesh.get_group() if isinstance(self.weight, DTensor) else None)

    def _first_class(self):
        return dtensors.first_row(self.weight) // self.centers_per_class

    def _table(self):
        """(weight, bias) of this rank: the one place where a DTensor becomes the tensor that the losses take."""
        return tuple(each.to_local() if isinstance(each, DTensor) else each for each in (self.weight, self.bias))

    @torch.no_grad()
    def reset_parameters(self):
        """Each rank draws its own rows, from a seed of the default generator's plus its rank."""
        weight, bias = self._table()
        seed = torch.randint(2**62, (), dtype=torch.int64, device="cpu").item() + self._ranks().rank
        weight.normal_(std=0.01, generator=None if weight.is_meta else torch.Generator(weight.device).manual_seed(seed))
        if bias is not None:
            bias.zero_()
        if self.sample_rate < 1:
            self.sample_step.zero_()

    def forward(self, features, labels):
        """The loss of the global batch, of which this rank has features (N_r, D) with labels (N_r,)."""
        ranks, options = self._ranks(), self._loss_options()
        weight, bias, parameters = self._trained_table()
        num_classes_here = len(weight) // self.centers_per_class
        if not num_classes_here:
            # A class of zeros, whose part of the sum Batch.combine leaves out: this rank takes part in all else.
            weight, bias = (_with_zeros(each, self.centers_per_class) for each in (weight, bias))
            if parameters is not None:  # the loss has a gradient here too; nobody asks for this one's
                weight.requires_grad_(self.weight.requires_grad)
                parameters = None

        def numbers():
            self._check(features, weight, labels, bias, options)
            return self._numbers(features)

        counts, needs_gradient = _agreed(ranks.together(numbers, 5, weight.device))
        batch = Batch(ranks, counts, bool(num_classes_here))
        if needs_gradient and not features.requires_grad:
            features = features.detach().requires_grad_()
        features = ranks.gather(features, counts, ranks.size if self.ddp_average else 1)
        labels = ranks.gather(class_indices(labels), counts)
        labels = _labels_here(labels, self.ignore_index, self.num_classes, self._first_class(), num_classes_here)
        options = options._replace(ignore_index=IGNORED)
        classes = None
        if self._samples():
            seed = (self.sample_seed * ranks.size + ranks.rank) % 2**63
            classes = self._classes(labels, IGNORED, max(num_classes_here, 1), seed)
        inputs = Inputs(features, weight, labels, bias, classes, parameters)
        loss = loss_of_table(inputs, options, shards=batch, state=self._statistics(), training=self.training)
        if self._samples():
            self.sample_step += 1
        return loss

    def _check(self, features, weight, labels, bias, options):
        """All that can be wrong on one rank alone, before ranks wait for each other."""
        wants_sparse = self._samples() and torch.is_grad_enabled() and self.weight.requires_grad
        if dtensors.is_sharded(self.weight) and wants_sparse and recording.pending(self.weight) is None:
            raise RuntimeError(
                "a sharded table with sample_rate < 1 trains with FusedSGD or FusedAdamW alone, made before the forward pass: a "
                "DTensor has no sparse gradient"
            )
        options.checked(bias is not None).check_values()
        validation.check_tensors(features, weight, labels, bias, self.centers_per_class)
        backends.choose(self.backend, weight.device, product_dtype(features, weight))
        operators.check_labels(class_indices(labels), self.num_classes, self.ignore_index)

    def _numbers(self, features):
        """What a rank tells the others of its batch and its head; `_agreed` reads it."""
        dtype, grad_mode = validation.FLOAT_DTYPES.index(features.dtype), torch.is_grad_enabled()
        names = ("num_classes", "scale", "margin", "reduction", "normalize_features", "ignore_index", "ddp_average")
        sampling = ("sample_rate", "sample_correction", "training")
        options = zlib.crc32(repr([getattr(self, name) for name in (*names, *sampling)]).encode())
        return len(features), dtype, grad_mode, options, grad_mode and features.requires_grad

    def logits(self, features):
        if self._ranks().group is None:
            return super().logits(features)
        raise NotImplementedError("a sharded head has no logits, which would be N x C; topk has each row's largest")

    @torch.no_grad()
    def topk(self, features, k):
        """(values, indices), each (N_r, k): the k largest logits of this rank's features (N_r, D) over the whole table.

        Every rank must call it.
        """
        ranks, weight = self._ranks(), self._table()[0]

        def numbers():
            validation.check_features(features, _with_zeros(weight, 1))
            validation.check_k(k, self.num_classes)
            return *self._numbers(features), k

        *everyone, counts_k = zip(*ranks.together(numbers, 6, weight.device), strict=True)
        if len({*counts_k}) > 1:
            raise ValueError(f"k must be the same on all ranks, got {', '.join(map(str, counts_k))}")
        counts, _ = _agreed(list(zip(*everyone, strict=True)))
        gathered = ranks.gather(features, counts)
        values, indices = self._topk(gathered, k)
        missing = k - values.shape[1]
        found = [
            ranks.gather(torch.nn.functional.pad(each, (0, missing), value=fill), [len(gathered)] * ranks.size)
            for each, fill in ((values, -math.inf), (indices + self._first_class(), 0))
        ]
        own = slice(*ranks.place(counts))
        values, indices = (each.unflatten(0, (ranks.size, -1))[:, own].transpose(0, 1).flatten(1) for each in found)
        values, order = values.topk(k)
        return values, indices.gather(1, order)

    def extra_repr(self):
        ranks = self._ranks()
        return f"{super().extra_repr()}, ddp_average={self.ddp_average}, rank {ranks.rank} of {ranks.size}"


class ShardedCosFaceLoss(CosFaceLoss, _ShardedHead):
    """`CosFaceLoss` with the class table sharded over the ranks of torch.distributed.

        head = ShardedCosFaceLoss(512, 10_000_000)       # on each rank
        loss = head(features, labels)                    # its part of the batch, of any size

    Each rank passes its own rows (N_r, D) and gets the loss of all N = Σ N_r, the same number on every rank: the gradients are
    those of that loss. weight (num_classes, embedding_size) is a DTensor, Shard(0); each rank draws its own rows.

    Args:
        embedding_size, num_classes, **options: as for `CosFaceLoss`; num_classes is that of the whole table. device: of the
            mesh's type, and by default that.
        mesh: a 1-D DeviceMesh whose ranks hold the table and bring the batch. None: all ranks, with a process group made by
            torchrun's rules if there is none yet; this process alone where there is no torchrun either, with a plain tensor.
        ddp_average: True: the gradient of the features is that of the loss times the number of ranks, so that after DDP or
            FSDP2 has averaged a backbone's gradient over the ranks it is that of the loss. False: that of the loss itself.
            weight.grad is always that of the loss.

    With reduction "none" each rank gets the losses of its own rows, and what is differentiated is the sum over the ranks of what
    they make of them.

    Forward and backward are collective: every rank calls both, under the same grad mode and with the same upstream gradient.

    Raises:
        TypeError, ValueError, IndexError: as CosFaceLoss, on every rank for a mistake on one; features of several dtypes.
        RuntimeError: another rank failed, or did not come within the process group's timeout.
    """

    def __init__(self, embedding_size, num_classes, *, mesh=None, ddp_average=True, device=None, **options):
        device = self._place(mesh, ddp_average, device)
        super().__init__(embedding_size, num_classes, device=device, **options)


class ShardedMarginSoftmaxLoss(MarginSoftmaxLoss, _ShardedHead):
    """`MarginSoftmaxLoss` with the class table, and the bias, sharded over the ranks of torch.distributed.

    Args:
        embedding_size, num_classes, **options: as for `MarginSoftmaxLoss`. With centers_per_class > 1 num_classes must be such
            that a DTensor's shards are whole classes: a multiple of the number of ranks is.
        mesh, ddp_average: as for `ShardedCosFaceLoss`, and so is all else. Running statistics are of the global batch, and the
            same on every rank.
    """

    def __init__(self, embedding_size, num_classes, *, mesh=None, ddp_average=True, device=None, **options):
        device = self._place(mesh, ddp_average, device)
        super().__init__(embedding_size, num_classes, device=device, **options)


def _mesh(mesh, device):
    """The mesh given, or one of all ranks; None where there is neither a process group nor torchrun."""
    if mesh is None:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if not dist.is_initialized() and launched == 1:
            return None
        kind = (torch.get_default_device() if device is None else torch.device(device)).type
        kind = torch.accelerator.current_accelerator(check_available=True) or "cpu" if kind == "meta" else kind
        return init_device_mesh(str(kind), (dist.get_world_size() if dist.is_initialized() else launched,))
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a torch.distributed DeviceMesh or None, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, such as mesh['name'] of one that has more, got {mesh}")
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh must contain this rank, {dist.get_rank()}, got {mesh}")
    return mesh


def _with_zeros(rows, count):
    return None if rows is None else torch.cat([rows, rows.new_zeros(count, *rows.shape[1:])])


def _labels_here(labels, ignore_index, num_classes, first, count):
    """Each label (N,) as its place among the `count` classes from `first` on, or FOREIGN, IGNORED or INVALID."""
    place = labels - first
    known = (labels >= 0) & (labels < num_classes)
    elsewhere = torch.where(known, FOREIGN, INVALID)
    place = torch.where(known & (place >= 0) & (place < count), place, elsewhere)
    return torch.where(labels == ignore_index, IGNORED, place)


def _agreed(everyone):
    """(rows of each rank, whether any needs the gradient of its features) of every rank's `_numbers`."""
    counts, dtypes, grad_modes, options, needs_gradient = ([*each] for each in zip(*everyone, strict=True))
    for what, values in (
        ("features must have the same dtype", [validation.FLOAT_DTYPES[dtype] for dtype in dtypes]),
        ("num_classes, scale, margin and all other options of the head must be the same (compared by a checksum)", options),
        ("gradients must be enabled on all ranks or on none: torch.is_grad_enabled() must be the same", map(bool, grad_modes)),
    ):
        values = [*values]
        if len({*values}) > 1:
            raise ValueError(f"{what} on all ranks, got {', '.join(map(str, values))}")
    return counts, any(needs_gradient)
