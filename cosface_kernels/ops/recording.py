"""Backward of a class table that a fused optimiser trains: it records O(N D) numbers, and `step` makes dW of them, slab by slab.

A record holds the arguments of the operator's backward: (x̃, labels, shift, total) of forward and the gradients of its
N-vectors. Records of several backward calls, concatenated along N, describe the sum of their gradients.
"""

import gc
import threading
import warnings
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..distributed import dtensors
from . import formats, operators
from .operands import Options, TableFactors, Vectors
from .operators import in_rows, write_table_gradient, zeros_for_none
from .slabs import KEPT_ANYWAY
from .table import Table, TableGradient

PUT_ROWS = 2**16  # rows of a sum that are handed on at once
CHECKED_ROWS = 64  # rows of a table whose numbers are compared with those that forward saw
MANY_RECORDS = 256  # records of a table after which a warning asks whether `step` was forgotten
FUSED_ALONE = (
    "a table_format of 16 or 8 bits trains with FusedSGD or FusedAdamW alone, made before the forward pass: rounded to nearest, "
    "most of another optimiser's updates would be lost. dtype=torch.bfloat16 makes a table that takes any"
)
_heads = weakref.WeakSet()  # all heads: an optimiser finds by them which of its parameters are tables


class Seen(NamedTuple):
    """A tensor's address, shape, version and some of its numbers at one time. The alias holds its memory, so that no later tensor
    gets the address.
    """

    alias: torch.Tensor
    version: int
    sums: torch.Tensor | None

    @classmethod
    def all(cls, *tensors):
        local = [(dtensors.local(tensor.detach()), tensor._version) for tensor in tensors if tensor is not None]
        return [cls(rows, version, _sums(rows)) for rows, version in local]

    def change(self, tensor):
        """How the tensor differs now, as a phrase for a message, or None."""
        now, then = dtensors.local(tensor.detach()), self.alias
        if (now.shape, now.dtype) != (then.shape, then.dtype):
            return f"replaced, {tuple(then.shape)} of {then.dtype} by {tuple(now.shape)} of {now.dtype},"
        if (now.data_ptr(), now.stride()) != (then.data_ptr(), then.stride()):
            return "replaced by another tensor of its shape"
        if tensor._version != self.version:
            return "changed"
        return None if self.sums is None or torch.equal(self.sums, _sums(now)) else "changed (through .data or a NumPy array)"


def _sums(rows):
    """The bits of the sums of some rows, spread over all, which show a write that PyTorch does not count, as one through `.data`.

    None on a GPU, where comparing them would wait for the device, and for integers, which no optimiser moves.
    """
    if rows.device.type != "cpu" or not rows.is_floating_point() or not len(rows):
        return None
    chosen = rows[:: max(1, len(rows) // CHECKED_ROWS)]
    return chosen.flatten(1).double().sum(1).view(torch.int64) if rows.dim() > 1 else chosen.double().view(torch.int64)


def _change(seen, *tensors):
    """How the first tensor that has changed differs, as a phrase for a message, or None."""
    present = (tensor for tensor in tensors if tensor is not None)
    return next(filter(None, (one.change(tensor) for one, tensor in zip(seen, present, strict=True))), None)


class Record(NamedTuple):
    """The factors of dW from one backward call."""

    options: Options  # records with equal options can be concatenated
    index: torch.Tensor | None  # (M,) the rows of the table that took part; None: all
    correction: torch.Tensor | None  # (M,), of the index's rows, see Problem
    factors: TableFactors
    seen: list  # Seen of weight, bias, scales of float8 rows and index then
    trained: tuple  # whether weight and bias needed a gradient


class Pending:
    """The records of a table since the last step."""

    def __init__(self, optimizer, bias):
        self.optimizer, self.bias = weakref.ref(optimizer), bias
        self.records = []  # in the order of backward
        self.knows_leaves = False  # whether the parameters' nodes have been asked for hooks
        self._lock = threading.Lock()  # several threads may call backward

    def __reduce__(self):
        return type(None), ()  # a pickled parameter has no optimiser

    def add(self, record):
        """Append a record. Kept exponentials are dropped as soon as there are two: the concatenated batch has another matrix."""
        with self._lock:
            self.records.append(record)
            if len(self.records) > 1:
                self.records = [_without_kept(each) for each in self.records]
            count = len(self.records)
        if count == MANY_RECORDS:
            warnings.warn(
                f"{MANY_RECORDS} backward passes have been recorded for a class table since the last step() or zero_grad() of "
                "the fused optimiser that trains it: unless so many batches make a step, it is never called",
                stacklevel=2,
            )

    def check(self, weight):
        """Raise if the records can no longer be turned into a gradient. They stay."""
        if weight.grad is not None:
            raise RuntimeError(
                "the class table has an ordinary gradient, which a fused optimiser does not use: nothing but the loss of its "
                "head may depend on the table, and the head cannot be in DistributedDataParallel (ShardedCosFaceLoss is for "
                "several ranks); and the optimiser must be there before the forward pass. Set weight.grad = None"
            )
        if len({record.trained for record in self.records}) > 1:
            raise RuntimeError(
                "the weight or the bias was frozen for some of the backward passes since the last step and not for others: make "
                "a step, or call zero_grad, before requires_grad changes"
            )
        changes = [_change(record.seen, weight, self.bias, row_scale(weight), record.index) for record in self.records]
        if any(changes):
            raise RuntimeError(
                f"the class table, or the classes that a loss was told to take, were {next(filter(None, changes))} between "
                "backward and step, so the gradient can no longer be made: change them after step, or call zero_grad first"
            )

    def take(self):
        """Return the records and forget them."""
        with self._lock:
            records, self.records = self.records, []
        return records


def _without_kept(record):
    return record._replace(factors=record.factors._replace(kept=record.factors.kept.new_empty(0)))


def register(head):
    """Register a head, so that optimisers know its parameters as a class table and its bias."""
    _heads.add(head)


def head_of(parameter):
    """The head whose weight or bias a parameter is, or None: also where torch.nn.utils.parametrize makes the weight of it."""
    own = ((head, map(head._parameters.get, ("weight", "bias"))) for head in _heads)
    return next((head for head, parameters in own if any(parameter is each for each in parameters)), None)


def row_scale(weight):
    """The scales of this rank's rows of a table, as its heads hold them: (R,) beside float8, else None."""
    if weight.dtype != formats.FLOAT8:
        return None
    found = [head.weight_scale for head in _heads if head._parameters.get("weight") is weight]
    if not found or any(each is None for each in found):
        raise ValueError(
            "a float8 class table needs the scales of its rows, which a head has that was made with "
            'table_format="float8"; head.to(torch.float8_e4m3fn) makes none'
        )
    if any(each is not found[0] for each in found):
        raise ValueError("heads that share a float8 weight must share its scales too: other.weight_scale = head.weight_scale")
    scale, rows = dtensors.local(found[0]), dtensors.local(weight)
    if len(scale) != len(rows):
        raise ValueError(
            f"the scales of {len(scale)} rows are beside {len(rows)} rows of a float8 table: fully_shard and the like shard no "
            'buffers; ShardedCosFaceLoss(..., table_format="float8") does'
        )
    return scale


def ranks_of(weight):
    """The Ranks that a table's rows lie on."""
    head = head_of(weight)
    return dtensors.ranks(weight) if head is None else head.placement.ranks(weight)


def attach(weight, bias, optimizer):
    """Make backward record for this table, until the optimiser is deleted."""
    if pending(weight) is not None and pending(weight).optimizer() is optimizer:
        return
    weight._pending = Pending(optimizer, bias)
    weakref.finalize(optimizer, _detach, weakref.ref(weight), weight._pending)


def _detach(reference, pending):
    weight = reference()
    if weight is not None and weight._pending is pending:
        weight._pending = None


def pending(weight):
    """The table's Pending, or None if no fused optimiser trains it."""
    return getattr(weight, "_pending", None)


def negative_lse(problem, options, parameters, needs):
    """operators.negative_lse. Backward records instead of making dW if a fused optimiser trains the table.

    parameters: the nn.Parameters (weight, bias) that own the problem's rows. needs: what is wanted in any case.
    """
    needed = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in parameters)
    if not needed or (pending(parameters[0]) is None and problem.row_scale is None):
        return operators.negative_lse(problem, options, needs)  # it sees what needs a gradient
    bias = None if problem.bias is None else problem.bias.detach()
    problem = problem._replace(weight=problem.weight.detach(), bias=bias)
    if options.memory_budget is None:
        options = options._replace(memory_budget=automatic_budget(problem.weight))
    vectors, saved, largest = operators.negative_lse(problem, options, needs._replace(need_table_grad=True))
    return _recorded(parameters, vectors, saved, problem, options), saved, largest


def automatic_budget(weight):
    """Bytes of exponentials kept by memory_budget "auto" beside a table whose gradient never exists: a tenth of the table's, at
    least KEPT_ANYWAY.
    """
    return max(weight.nbytes // 10, KEPT_ANYWAY)


@torch._disable_dynamo
def _recorded(parameters, vectors, saved, problem, options):
    """The same Vectors, whose gradients are recorded when backward asks for the table's.

    The operator that made them saw a detached table. Zeros that depend on the table are added to them, so that the path to the
    features does not lead through the recording: torch.autograd.grad(loss, features) records nothing.
    """
    found = pending(parameters[0])
    if found is not None and parameters[1] is not found.bias:
        raise ValueError(
            "a fused optimiser trains weight and bias of a head together: a loss of its weight takes that bias, and no other; "
            "heads that share a weight cannot have a bias each"
        )
    if found is not None and not found.knows_leaves:
        _check_hooks(parameters, _leaf_hooks)
        found.knows_leaves = True
    options = operators.with_scale(problem, options)
    detached = Vectors(*(vector.detach() for vector in vectors))
    parts = _Record.apply(*parameters, detached, saved, problem, options)
    of_table = (vector + part for vector, part in zip(vectors.of_table, parts, strict=True))
    return Vectors(*of_table, vectors.feature_length)


class _Held(NamedTuple):
    """The tensors that backward records."""

    labels: torch.Tensor
    index: torch.Tensor | None
    correction: torch.Tensor | None
    unit: torch.Tensor
    shift: torch.Tensor
    total: torch.Tensor
    kept: torch.Tensor
    hard: torch.Tensor | None


class _Record(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bias, vectors, saved, problem, options):
        # The parameters themselves: activation checkpointing and other hooks of saved tensors would return copies.
        ctx.parameters, ctx.seen = (weight, bias), Seen.all(weight, bias, problem.row_scale)
        ctx.save_for_backward(
            *_Held(
                *(problem.labels, problem.index, problem.correction),
                *(saved.unit, saved.shift, saved.total, saved.kept, problem.hard),
            )
        )
        ctx.options, ctx.shapes = options, [vector.shape for vector in vectors.of_table]
        ctx.set_materialize_grads(False)
        return tuple(torch.zeros_like(vector) for vector in vectors.of_table)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        held = _Held(*ctx.saved_tensors)
        if change := _change(ctx.seen, *ctx.parameters, row_scale(ctx.parameters[0])):
            raise RuntimeError(f"the class table was {change} between forward and backward")
        # The caller may write the next batch's labels into this tensor before step; no caller has the other tensors.
        grads = zeros_for_none(grads, ctx.shapes, held.total)
        hard = held.total.new_empty(0, 4) if held.hard is None else held.hard
        factors = TableFactors(held.unit, held.labels.clone(), held.shift, held.total, *grads, held.kept, hard)
        seen = [*ctx.seen, *Seen.all(held.index)]
        record = Record(ctx.options, held.index, held.correction, factors, seen, ctx.needs_input_grad[:2])
        returned = [node is not None and _is_returned(node) for node, _ in ctx.next_functions]  # of tensors: not of no bias
        if any(returned):
            return *_gradients(ctx.parameters, record, returned), *(None,) * (6 - len(returned))
        _check_hooks(ctx.parameters)
        found = pending(ctx.parameters[0])
        if found is None:
            was = "the fused optimiser that this loss was computed for no longer exists"
            raise RuntimeError(FUSED_ALONE if ctx.parameters[0].dtype == formats.FLOAT8 else was)
        found.add(record)
        return (None,) * 6


def _is_returned(leaf):
    """True if torch.autograd.grad returns the gradient of this leaf's node; False if backward accumulates it."""
    try:
        torch._C._will_engine_execute_node(leaf)
    except RuntimeError as error:  # how PyTorch answers for a leaf of autograd.grad
        if "autograd.grad" not in str(error):
            raise
        return True
    return False


def _gradients(parameters, record, wanted):
    """The gradients of weight and bias that are wanted, as without a fused optimiser."""
    weight, bias = parameters
    if weight.dtype == formats.FLOAT8:
        raise RuntimeError(
            "torch.autograd.grad of a float8 class table is not made: 8 bits have no room for a gradient, which exists slab by "
            "slab in the fused optimiser's step alone. Ask for the gradient of the features, or of a copy: "
            "copy.deepcopy(head).float()"
        )
    if dtensors.is_sharded(weight):
        raise RuntimeError(
            "torch.autograd.grad of a sharded class table that a fused optimiser trains is not made: its gradient exists slab by "
            "slab in the optimiser's step alone. Ask for the gradient of the features, or train the head with torch.optim"
        )
    table = Table(weight.detach(), None if bias is None else bias.detach(), index=record.index)
    made = TableGradient.of(table)
    write_gradient(table, [record], made)
    grads = made if record.index is None else [in_rows(record.index, *each) for each in zip(made, parameters, strict=True)]
    return [grad if needed else None for grad, needed in zip(grads, wanted, strict=False)]


def _own_hooks(parameter):
    return [*(parameter._backward_hooks or {}).values(), *(parameter._post_accumulate_grad_hooks or {}).values()]


def _leaf_hooks(parameter):
    """Those of the node of autograd that accumulates the gradient. PyTorch tells only the garbage collector of them, and only
    while no graph holds the node, as before the first forward pass.
    """
    if not parameter.requires_grad:
        return []
    held = gc.get_referents(torch.autograd.graph.get_gradient_edge(parameter).node)
    return [hook for each in held if isinstance(each, dict) for hook in each.values()]


def _check_hooks(parameters, hooks_of=_own_hooks):
    """Raise for a hook that would be called with None, or not at all. Those marked `needs_no_grad` are this package's."""
    for name, parameter in zip(("weight", "bias"), parameters, strict=True):
        if parameter is not None and not all(getattr(hook, "needs_no_grad", False) for hook in hooks_of(parameter)):
            raise RuntimeError(
                f"the head's {name} has a hook for its gradient, which does not exist: a fused optimiser makes it slab by "
                "slab in its step and calls no hook. Remove the hook (wandb.watch: give it the backbone alone), or train the "
                "head with torch.optim"
            )


def refused(weight, rows):
    """rows of weight, with a backward that raises: a table of fewer than 32 bits without a fused optimiser."""
    return _Refuse.apply(weight, rows)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, rows):
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(FUSED_ALONE)


def rows_of(records):
    """The rows of the table (M,) ascending that any record has a gradient for; None: all."""
    samples = {id(record.index): record.index for record in records}
    if None in samples.values():
        return None
    samples = list(samples.values())
    return samples[0] if len(samples) == 1 else torch.cat(samples).unique()


def write_gradient(table, records, sink):
    """Write the sum of all records' gradients slab by slab into a Sink.

    table: its index must be `rows_of(records)`.
    """
    with torch.cuda.device_of(table.weight):  # kernels go to the current device
        _write_groups(table, records, sink)


def _write_groups(table, records, sink):
    alike = {}
    for record in records:
        alike.setdefault((record.options, id(record.index), id(record.correction)), []).append(record)
    if len(alike) == 1:
        _write(table, records, sink)
        return
    # Batches with other classes or another scale have other exponentials, so only their gradients can be added: here these exist,
    # for the rows that any of the batches has.
    total = _Sum(table, sink.room(0, 1).dtype)
    for group in alike.values():
        total.into(group[0].index)
        _write(table, group, total)
    for start in range(0, len(total.rows), PUT_ROWS):
        stop = min(start + PUT_ROWS, len(total.rows))
        sink.put(start, stop, total.rows[start:stop])


class _Sum:
    """A Sink that accumulates: it adds each slab's rows to `self.rows`."""

    def __init__(self, table, dtype):
        size = table.weight.shape[1] + (table.bias is not None)
        self.index = table.index
        self.rows = torch.zeros(table.num_rows, size, dtype=dtype, device=table.weight.device)

    def into(self, index):
        """Set which rows of the table the next slabs belong to: index (M,), or None for all."""
        self.positions = index if self.index is None or index is None else torch.searchsorted(self.index, index)

    def native_update(self):
        return None

    device_update = native_update

    def room(self, start, stop, dtype=None):
        return torch.empty(stop - start, self.rows.shape[1], dtype=dtype or self.rows.dtype, device=self.rows.device)

    def put(self, start, stop, rows):
        self.rows[slice(start, stop) if self.positions is None else self.positions[start:stop]] += rows


def _write(table, records, sink):
    """Write the gradient of records with equal options and rows into a Sink."""
    options, index, correction = records[0][:3]
    table = table._replace(normalize=options.normalize_weight, centers=options.centers, index=index, correction=correction)
    columns = zip(*_of_one_width([record.factors for record in records], options.ignore_index), strict=True)
    # No copy for a single record: `kept` may be large.
    factors = TableFactors(*(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in columns))
    if not len(factors.kept):
        options = options._replace(memory_budget=0)
    write_table_gradient(sink, table, factors, options)


def _of_one_width(batches, ignore_index):
    """TableFactors whose labels are all (N,), or else all (N, K) of one K."""
    if all(factors.labels.dim() == 1 for factors in batches):
        return batches
    width = max(factors.product_grad.shape[1] for factors in batches)

    def widened(factors):
        labels = factors.labels if factors.labels.dim() == 2 else factors.labels[:, None]
        missing = (0, width - labels.shape[1])
        gradients = {name: F.pad(getattr(factors, name), missing) for name in ("product_grad", "length_grad")}
        return factors._replace(labels=F.pad(labels, missing, value=ignore_index), **gradients)

    return [widened(factors) for factors in batches]
