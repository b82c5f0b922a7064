"""What ranks tell each other in a step: batches of any sizes, sums, and errors, so that all of them go on or none does.

    together      a few numbers of every rank, or, where a check fails on one rank, the same error on all
    gather        rows (N_r, ...) of every rank -> (N, ...), differentiable: its gradient is a reduce-scatter
    add           vectors (N, ...) -> their sum over the ranks, differentiable: each rank's part gets the sum's gradient
    all           whether a flag is set on every rank

Without a process group one process is all there is, and nothing is sent.
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F

# PyTorch 2.13 renamed them; one built without distributed has neither.
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)

# What a rank raises for another one's error: the same, where it is one of a caller's mistakes.
_ERRORS = {error.__name__: error for error in (TypeError, ValueError, IndexError)}


class Ranks:
    """The processes of a group, or this one alone."""

    def __init__(self, group=None):
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())

    def together(self, numbers, count, device):
        """numbers() -> `count` ints, called on every rank; returns those of all, a list for each rank.

        Where it raises on one rank, every rank raises: that one its own error, the others one of that type that names the rank.
        On a GPU the host waits for the device here, unless the group sends what is on the CPU too.
        """
        if self.group is None:
            return [list(numbers())]
        failure, own = None, [0] * count
        try:
            own = list(numbers())
        except Exception as error:
            failure = error
        device = "cpu" if "cpu:" in dist.get_backend_config(self.group) else device
        message = torch.tensor([failure is not None, *own], dtype=torch.int64, device=device)
        everyone = message.new_empty(self.size * len(message))
        with self._named("the exchange of batch sizes"):
            _all_gather(everyone, message, group=self.group)
            everyone = everyone.view(self.size, -1).tolist()
        if any(failed for failed, *_ in everyone):
            self._raise_together(failure)
        return [own for _, *own in everyone]

    def _raise_together(self, failure):
        texts = [None] * self.size
        own = None if failure is None else (type(failure).__name__, str(failure))
        with self._named("the exchange of errors"):
            dist.all_gather_object(texts, own, group=self.group)
        if failure is not None:
            raise _ERRORS.get(own[0], RuntimeError)(f"rank {self.rank}: {own[1]}") from failure
        failed = [(rank, *text) for rank, text in enumerate(texts) if text is not None]
        lines = [f"rank {rank}: {name}: {text}" for rank, name, text in failed]
        raise _ERRORS.get(failed[0][1], RuntimeError)("\n".join(lines))

    def gather(self, rows, counts, factor=1):
        """The rows of all ranks, counts[r] of rank r, in order of rank. Their gradient is summed over the ranks, times `factor`.

        Every rank takes part in backward if the rows of any need a gradient: then rows.requires_grad, on every rank.
        """
        return rows if self.group is None else _Gather.apply(rows, self, counts, factor)

    def add(self, tensor):
        return tensor if self.group is None else _Add.apply(tensor, self)

    def maximum(self, tensor):
        """Elementwise, without gradient."""
        if self.group is None or not tensor.numel():
            return tensor
        tensor = tensor.clone()
        with self._named("the all-reduce of maxima"):
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def all(self, flag, device):
        """Whether a flag (0-dim bool) is set on every rank; the group sends what is on `device`."""
        if self.group is None:
            return flag
        everyone = flag.to(device, torch.int32)
        with self._named("the agreement on a step"):
            dist.all_reduce(everyone, dist.ReduceOp.MIN, group=self.group)
        return everyone.bool()

    def own(self, rows, counts):
        """This rank's of the gathered rows; their gradient is that of every rank's."""
        return rows if self.group is None else _Own.apply(rows, self, counts)

    def place(self, counts):
        """(first, one past the last) of this rank's gathered rows."""
        first = sum(counts[: self.rank])
        return first, first + counts[self.rank]

    def _gathered(self, rows, counts):
        """Padded to the largest batch, since gloo gathers equal ones only."""
        largest = max(counts)
        everyone = rows.new_empty(self.size * largest, *rows.shape[1:])
        if everyone.numel():
            with self._named("the all-gather of rows"):
                _all_gather(everyone, _padded(rows, largest), group=self.group)
        if min(counts) == largest:
            return everyone
        return torch.cat([part[:count] for part, count in zip(everyone.split(largest), counts, strict=True)])

    def _scattered_sum(self, rows, counts):
        """Each rank's own of the sum of all ranks' gathered rows."""
        largest = max(counts)
        own = rows.new_empty(largest, *rows.shape[1:])
        if own.numel():
            if min(counts) < largest:
                rows = torch.cat([_padded(part, largest) for part in rows.split(counts)])
            with self._named("the reduce-scatter of the features' gradient"):
                _reduce_scatter(own, rows.contiguous(), group=self.group)
        return own[: counts[self.rank]]

    @contextmanager
    def _named(self, what):
        """A failed collective says what it was; torch's own message is about sockets."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size}: {what} failed or timed out, because another rank has failed or did not come "
                f"to it; that rank's own error, if it left one, says why. {error}"
            ) from error


def _padded(rows, count):
    missing = count - len(rows)
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if missing else rows.contiguous()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, ranks, counts, factor):
        ctx.ranks, ctx.counts, ctx.factor, ctx.dtype = ranks, counts, factor, rows.dtype
        return ranks._gathered(rows, counts)

    @staticmethod
    def backward(ctx, grad):
        # Partial gradients in 16 bits are summed in float32.
        grad = ctx.ranks._scattered_sum(grad.to(torch.promote_types(ctx.dtype, torch.float32)), ctx.counts)
        return (grad * ctx.factor).to(ctx.dtype), None, None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, ranks):
        total = tensor.clone(memory_format=torch.contiguous_format)
        if total.numel():
            with ranks._named("the all-reduce of sums"):
                dist.all_reduce(total, group=ranks.group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, ranks, counts):
        ctx.ranks, ctx.counts = ranks, counts
        return rows[slice(*ranks.place(counts))].clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.ranks._gathered(grad, ctx.counts), None, None
