"""Where the rows of a head's table lie, as an object that the head has: here all of them in this process.

over_ranks.py has the placements over several ranks, which have the same methods.
"""

import torch

from .. import validation
from ..distributed import dtensors
from ..loss import WholeTable
from . import logits


class Whole:
    """All rows, and all of the batch, in this process. It holds nothing: methods take the head."""

    def empty(self, rows, *size, centers, device, dtype):
        """Memory for a number, or a row of numbers, for each of the table's rows; `centers` of them are a class."""
        return torch.empty(rows, *size, device=device, dtype=dtype)

    def draw(self, head):
        """Fills the table with its initial values."""
        head.draw(head.weight)

    def local(self, tensor):
        """This process's rows of a parameter."""
        return tensor

    def ranks(self, weight):
        """The processes that the rows lie on."""
        return dtensors.ranks(weight)

    def batch(self, head, inputs, options):
        """(Inputs, LossOptions, shards) of a step, as loss.loss_of_table takes them."""
        if head._samples():
            validation.check_tensors(inputs.features, inputs.weight, inputs.labels, inputs.bias, head.centers_per_class)
            classes = head._classes(inputs.labels, head.ignore_index, head.num_classes, head.sample_seed)
            inputs = inputs._replace(classes=classes)
        return inputs, options, WholeTable()

    def logits(self, head, features):
        validation.check_features(features, head.weight)
        return logits.of_all(head, features)

    def topk(self, head, features, k):
        validation.check_features(features, head.weight)
        validation.check_k(k, head.num_classes)
        return logits.largest(head, features, k)

    def check_resizable(self, head, instead):
        """Raises where rows cannot come and go."""
        if dtensors.is_sharded(head.weight):
            raise NotImplementedError(
                f"the rows of a sharded table cannot be changed in place: save_checkpoint, and into {instead}"
            )

    def extra_repr(self, head):
        return ""
