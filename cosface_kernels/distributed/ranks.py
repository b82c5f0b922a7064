"""The messages between ranks in a step: batches of any sizes, sums, and errors, so that all ranks go on or none does.

    together      the result of an action, or, if it fails on one rank, that error on all
    exchange      the same with a few numbers of every rank
    objects       an object of every rank
    gather        rows (N_r, ...) of every rank -> (N, ...), differentiable: its gradient is a reduce-scatter
    add           vectors (N, ...) -> their sum over the ranks, differentiable: each rank's part gets the sum's gradient
    all           whether a flag is set on every rank

ONE_PROCESS takes their place if there is one process alone, and sends nothing.
"""

import pickle
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

# PyTorch 2.13 renamed them; one built without distributed has neither.
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


class OneProcess:
    """One process alone, with those methods of Ranks that callers use for both."""

    rank, size = 0, 1
    has_group = False  # Ranks may be one process too, in a group

    def together(self, what, action, device=None):
        return action()

    def objects(self, value):
        return [value]

    def all(self, flag, device):
        return flag


ONE_PROCESS = OneProcess()


def world():
    """The Ranks of the default process group, or ONE_PROCESS without one."""
    return Ranks(dist.group.WORLD) if dist.is_available() and dist.is_initialized() else ONE_PROCESS


class Failure(NamedTuple):
    """An error in the form in which it is sent to other ranks."""

    rank: int
    kind: type
    text: str
    errno: int | None

    @classmethod
    def of(cls, error, rank):
        kind = type(error)
        try:
            pickle.loads(pickle.dumps(kind))
        except Exception:  # a class that other ranks cannot find
            kind = RuntimeError
        return cls(getattr(error, "failed_rank", rank), kind, f"{type(error).__name__}: {error}", getattr(error, "errno", None))

    def error(self, text):
        """An exception of the same type, if that type can be made from a text; else a RuntimeError."""
        try:
            error = self.kind(text)
        except Exception:  # an exception's constructor may raise anything
            return RuntimeError(text)
        if str(error) != text:
            return RuntimeError(text)
        if self.errno is not None:
            error.errno = self.errno
        return error


class Ranks:
    """The processes of a group."""

    has_group = True

    def __init__(self, group):
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def __eq__(self, other):
        return isinstance(other, Ranks) and self.group is other.group

    def __hash__(self):
        return id(self.group)

    def together(self, what, action, device=None):
        """Call action() on every rank and return its result. If it raises on one rank, all raise that error, with the rank.

        what: a name of the exchange, for the message if it fails.
        """
        results = []

        def numbers():
            results.append(action())
            return ()

        self.exchange(what, numbers, 0, device)
        return results[0]

    def exchange(self, what, numbers, count, device=None):
        """Call numbers() -> `count` ints on every rank; return a list of them for each rank. Raises as `together` does.

        On a GPU the host waits for the device here, unless the group can send CPU tensors. device: None, the current one.
        """
        failure, own = None, [0] * count
        try:
            own = list(numbers())
        except Exception as error:
            failure = error
        if "cpu:" in dist.get_backend_config(self.group):
            device = "cpu"
        elif device is None:
            device = torch.accelerator.current_accelerator()
        message = torch.tensor([failure is not None, *own], dtype=torch.int64, device=device)
        everyone = message.new_empty(self.size * len(message))
        try:
            with self._named(what):
                _all_gather(everyone, message, group=self.group)
                everyone = everyone.view(self.size, -1).tolist()
        except RuntimeError as lost:
            if failure is not None:
                raise failure from lost  # it says more
            raise
        if any(failed for failed, *_ in everyone):
            raise self._shared(failure) from failure
        return [own for _, *own in everyone]

    def _shared(self, failure):
        """The error of the first rank that has one, with the texts of all ranks' errors."""
        failures = self.objects(None if failure is None else Failure.of(failure, self.rank))
        failed = [*dict.fromkeys(filter(None, failures))]
        return failed[0].error("\n".join(f"rank {each.rank}: {each.text}" for each in failed))

    def objects(self, value):
        """A list of the values of all ranks."""
        values = [None] * self.size
        with self._named("the exchange of objects"):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def gather(self, rows, counts, factor=1):
        """The rows of all ranks, counts[r] of rank r, in order of rank. Their gradient is summed over the ranks, times `factor`.

        Every rank takes part in backward if the rows of any need a gradient: then rows.requires_grad, on every rank.
        """
        return _Gather.apply(rows, self, counts, factor)

    def add(self, tensor):
        return _Add.apply(tensor, self)

    def maximum(self, tensor):
        """The elementwise maximum over the ranks, without gradient."""
        if not tensor.numel():
            return tensor
        tensor = tensor.clone()
        with self._named("the all-reduce of maxima"):
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def all(self, flag, device):
        """0-dim bool: True if the flag (0-dim bool) is set on every rank. It is sent from `device`."""
        everyone = flag.to(device, torch.int32)
        with self._named("the agreement on a step"):
            dist.all_reduce(everyone, dist.ReduceOp.MIN, group=self.group)
        return everyone.bool()

    def own(self, rows, counts):
        """This rank's own among gathered rows. Backward gathers the gradients of all ranks' own rows."""
        return _Own.apply(rows, self, counts)

    def place(self, counts):
        """(first, one past the last) of this rank's gathered rows."""
        first = sum(counts[: self.rank])
        return first, first + counts[self.rank]

    def _gathered(self, rows, counts):
        """The rows of all ranks. They are padded to the largest batch on the way, because gloo gathers equal shapes only."""
        largest = max(counts)
        everyone = rows.new_empty(self.size * largest, *rows.shape[1:])
        if everyone.numel():
            with self._named("the all-gather of rows"):
                _all_gather(everyone, _padded(rows, largest), group=self.group)
        if min(counts) == largest:
            return everyone
        return torch.cat([part[:count] for part, count in zip(everyone.split(largest), counts, strict=True)])

    def _scattered_sum(self, rows, counts):
        """This rank's own rows of the sum, over the ranks, of gathered rows."""
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
        """Name the collective in the error if it fails: torch's own message is about sockets."""
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
