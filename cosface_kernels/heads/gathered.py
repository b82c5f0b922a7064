"""The rows of all ranks in one step, and the results of a whole table from those of its shards.

    A_n^r, x̃_n·w̃_{y_n} of the classes of rank r  ->  A_n = log Σ_r e^{A_n^r},  x̃_n·w̃_{y_n} = Σ_r ...

One all-reduce of these N-vectors; n: a row, y_n: its class, A_n: log-sum-exp over the negatives.
"""

import torch

from ..ops.operands import Largest

FOREIGN = -1  # the label of a row whose class another shard holds

# With logits up to this e^A, of any number of classes, is a float64, and not 0: their sum needs no maximum before it.
LARGEST_EXPONENT = 600.0


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

    def of_all_shards(self, num_classes, num_sampled):
        """(C, M) of the whole table, from the number of classes in this shard and of those that take part."""
        numbers = [num_classes, num_sampled] if self.holds_classes else [0, 0]
        return self.ranks.add(torch.tensor(numbers, dtype=torch.int64, device=self.labels.device)).tolist()

    def own(self, vector):
        """A vector (N,) that depends on the features alone, or None. Only the rank that brought a row gets its gradient."""
        if vector is None:
            return None
        first, stop = self.ranks.place(self.counts)
        others = vector.detach()
        return torch.cat([others[:first], vector[first:stop], others[stop:]])

    def own_rows(self, losses):
        return self.ranks.own(losses, self.counts)
