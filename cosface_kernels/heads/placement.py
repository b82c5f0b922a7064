"""The placement of a head's table: an object of the head that knows where the rows are. Here: all of them in this process.

table: (weight, bias) as the head holds them.

over_ranks.py has the placements over several ranks, with the same methods.
"""

import torch

from .. import validation
from ..before_margin import OneShard, replaced
from ..distributed import dtensors
from ..positives import class_indices
from ..sampling import with_hard_classes
from . import data_parallel, float8, logits, unaveraged


class Whole:
    """All rows and the whole batch in this process. Holds no data: methods take the head."""

    makes_shards = False  # True: a table in shards is its own work, and not that of fully_shard

    def empty(self, rows, *size, centers, device, dtype):
        """An uninitialised tensor with one entry for each row of the table; `centers` rows are a class."""
        return torch.empty(rows, *size, device=device, dtype=dtype)

    def enter(self, head):
        """Prepare a new head for modules that it may be put into, such as DistributedDataParallel."""

    def draw(self, head):
        """Fill the table with its initial values."""
        float8.fill(head.weight, head.weight_scale, head.draw)

    def here(self, weight):
        """The placement that a call goes by: this one, or WHOLE where a single process holds all rows of what would be shards."""
        return self

    def local(self, tensor):
        """This process's rows of a parameter."""
        return tensor

    def rows(self, table):
        """(weight, bias or None), the rows that this process holds."""
        if not self.makes_shards and dtensors.is_sharded(table[0]):
            raise RuntimeError(
                "the head's table is in shards outside of the forward pass of the model that fully_shard wraps: call the head "
                "from there, or have torch.distributed.fsdp.register_fsdp_forward_method(model, name) of the method that calls it"
            )
        return tuple(each if each is None else self.local(each) for each in table)

    def check_parametrised(self, head):
        """Raise if this table cannot be made as torch.nn.utils.parametrize is to make it."""

    def ranks(self, weight):
        """The Ranks that hold the rows."""
        return dtensors.ranks(weight)

    def refuse(self, head, error):
        """Raise the error in the arguments of a call of the head."""
        raise error

    def batch(self, head, table, inputs, options):
        """(Inputs, LossOptions, shards) of a step, as loss.loss_of_table takes them."""
        unaveraged.watch(head, table[0])
        if inputs.parameters is not None:
            data_parallel.check_fused()
        if head._samples():
            several, centers = inputs.label_weights is not None, head.centers_per_class
            validation.check_tensors(inputs.features, inputs.weight, inputs.labels, inputs.bias, centers, several=several)
            certain = with_hard_classes(inputs.labels.flatten(), head.ignore_index, head.hard_classes)
            classes, correction = head._sample(certain, head.num_classes, head.sample_seed)
            weight, bias = (data_parallel.with_dense_gradient(each, head) for each in (inputs.weight, inputs.bias))
            inputs = replaced(inputs, classes=classes, weight=weight, bias=bias)
            options = replaced(options, sample_correction=correction)
        return inputs, options, OneShard()

    def logits(self, head, table, features):
        validation.check_features(features, table[0])
        return logits.of_all(head, self.rows(table), features)

    def topk(self, head, table, features, k):
        validation.check_features(features, table[0])
        validation.check_k(k, head.num_classes)
        return logits.largest(head, self.rows(table), features, k)

    def rounds(self, head, check, k, count):
        """The number of rounds of `nearest` with one k, in which each process looks `count` parts of its rows up."""
        check()
        return count

    def nearest(self, head, kind, table, rows, k):
        """logits.largest of rows of a table among all of it."""
        return logits.largest(kind, table, rows, k)

    def everyones(self, head, rows):
        """The rows of all processes, one for each class they hold."""
        return rows

    def looked_up(self, head, check, features, labels, found):
        """found(features, places) (N, K), places: of the rows' classes among those that a process holds, below 0 for others."""
        check(head.weight)
        return found(features, class_indices(labels))

    def first_class(self, head, weight):
        """The number of the first class that this process holds."""
        return 0

    def check_resizable(self, head, instead):
        """Raise if rows of this table cannot be added or removed."""
        if dtensors.is_sharded(head.weight):
            raise NotImplementedError(
                f"the rows of a sharded table cannot be changed in place: save_checkpoint, and into {instead}"
            )

    def extra_repr(self, head):
        return ""


WHOLE = Whole()
