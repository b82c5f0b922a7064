"""A table in shards over several ranks; features stay as data parallelism has them.

    x, y of all ranks  ->  A_n^r, x̃_n·w̃_{y_n}  of the classes of rank r  ->  A_n = log Σ_r e^{A_n^r},  x̃_n·w̃_{y_n} = Σ_r ...
        all-gather                  operators.py                                       one all-reduce of two N-vectors

After that every rank has the same N-vectors and computes margin, loss and mean of them. Backward has one collective, the
reduce-scatter of dX; each rank computes dW of its own rows. A row whose class another rank holds has no target here.

r: a rank. y_n: the class of row n. A_n: log-sum-exp over the negatives, A_n^r of those that rank r holds.
"""

import math

import torch
from torch.distributed.tensor import DTensor, Shard

from .. import margins, validation
from ..before_margin import product_dtype
from ..distributed import dtensors
from ..ops import backends, formats, label_checks, recording
from ..positives import class_indices
from ..sampling import with_hard_classes
from . import data_parallel, float8, logits
from .gathered import FOREIGN, Batch
from .placement import WHOLE, Whole
from .rank_facts import RankFacts

# A row's label as the operator of one shard gets it is its class, counted from the shard's first; or FOREIGN, a class of another
# shard, so that all classes here are negatives; IGNORED, no loss; INVALID, a number outside [0, C), for which it raises.
IGNORED, INVALID = -100, -2


class OverRanks(Whole):
    """A placement with some of the rows, and a part of the batch, on each rank. In a single process calls go by WHOLE.

    A subclass defines the rows: empty, local, ranks, and first_class(head, weight), the number of this rank's first class.
    """

    makes_shards = True

    def here(self, weight):
        return self if self.ranks(weight).has_group else WHOLE

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
        """Raise a call's error on every rank, in place of the exchange with which their calls begin."""

        def of_this_rank():
            raise error

        RankFacts.agreed(self.ranks(head.weight), of_this_rank, self.local(head.weight).device)

    def batch(self, head, table, inputs, options):
        """(Inputs, LossOptions, Batch) of all ranks' rows with this rank's rows of the table."""
        ranks = self.ranks(table[0])
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

        def of_this_rank():
            _check(head, table, inputs, options)
            label_columns = 0 if inputs.label_weights is None else inputs.label_weights.shape[1]
            return RankFacts.of(head, features, statistics=options.return_statistics, label_columns=label_columns)

        counts, needs_gradient = RankFacts.agreed(ranks, of_this_rank, weight.device)
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
        raise NotImplementedError("a sharded head has no logits, which would be N x C; topk has each row's largest")

    def topk(self, head, table, features, k):
        ranks = self.ranks(table[0])
        rows = weight, _ = self.rows(table)

        def of_this_rank():
            validation.check_features(features, weight if len(weight) else _with_zeros(weight, 1))
            validation.check_k(k, head.num_classes)
            return RankFacts.of(head, features, k)

        counts, _ = RankFacts.agreed(ranks, of_this_rank, weight.device)
        return self._nearest(head, head, rows, ranks.gather(features, counts), counts, k)

    def _nearest(self, head, kind, rows, gathered, counts, k):
        """(values, indices): the k largest logits of this rank's features, of the whole table. gathered: all ranks' features."""
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

        def of_this_rank():
            check()
            return k, count

        everyone, counts = zip(*ranks.exchange("the exchange of k", of_this_rank, 2, self.local(head.weight).device), strict=True)
        if len({*everyone}) > 1:
            raise ValueError(f"k must be the same on all ranks, got {', '.join(map(str, everyone))}")
        return max(counts)

    def nearest(self, head, kind, table, rows, k):
        counts = self._counts(head, rows)
        return self._nearest(head, kind, table, self.ranks(head.weight).gather(rows, counts), counts, k)

    def everyones(self, head, rows):
        return self.ranks(head.weight).gather(rows, self._counts(head, rows))

    def _counts(self, head, rows):
        """The number of rows that each rank has."""
        of_ranks = self.ranks(head.weight).exchange("the exchange of batch sizes", lambda: [len(rows)], 1, rows.device)
        return [count for (count,) in of_ranks]

    def looked_up(self, head, check, features, labels, found):
        ranks = self.ranks(head.weight)
        weight = self.local(head.weight)

        def of_this_rank():
            check(weight if len(weight) else _with_zeros(weight, head.centers_per_class))
            return RankFacts.of(head, features)

        counts, _ = RankFacts.agreed(ranks, of_this_rank, weight.device)
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
    label_checks.check_labels(class_indices(labels), head.num_classes, head.ignore_index)
    margins.check_classes(options.margin, head.num_classes, features.device)
    for name, value in margins.row_tensors(options.margin, len(features)).items():
        if value.requires_grad:
            raise ValueError(f"{name} of {type(options.margin).__name__} must need no gradient: other ranks' rows have none")
