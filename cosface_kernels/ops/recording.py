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

from ..distributed import dtensors
from . import class_tables, formats, operators
from .memory import total_memory
from .operands import Options, Problem, Saved, TableFactors, Vectors, split
from .operators import in_rows
from .recorded_gradient import write_gradient
from .seen import Seen, change_of
from .slabs import automatic_fused_budget
from .table import Table, TableGradient

MANY_RECORDS = 256  # records of a table after which a warning asks whether `step` was forgotten


class Record(NamedTuple):
    """The factors of dW from one backward call."""

    options: Options  # records with equal options can be concatenated
    index: torch.Tensor | None  # (M,) the rows of the table that took part; None: all
    correction: torch.Tensor | None  # (M,), of the index's rows, see Problem
    factors: TableFactors
    seen: list  # Seen of weight, bias, scales of float8 rows and index then
    trained: tuple  # flags: weight and bias needed a gradient


class Pending:
    """The records of a table since the last step."""

    def __init__(self, optimizer, bias):
        self.optimizer, self.bias = weakref.ref(optimizer), bias
        self.records = []  # in the order of backward
        self.knows_leaves = False  # True: the parameters' nodes have been asked for hooks
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
        changes = [
            change_of(record.seen, weight, self.bias, class_tables.row_scale(weight), record.index) for record in self.records
        ]
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
        budget = automatic_fused_budget(problem.weight.nbytes, total_memory(problem.weight.device))
        options = options._replace(memory_budget=budget)
    vectors, saved, largest = operators.negative_lse(problem, options, needs._replace(need_table_grad=True))
    return _recorded(parameters, vectors, saved, problem, options), saved, largest


@torch._disable_dynamo
def _recorded(parameters, vectors, saved, problem, options):
    """The given Vectors with gradients that are recorded when backward asks for the table's.

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
    detached = Vectors(*(None if vector is None else vector.detach() for vector in vectors))
    parts = _Record.apply(*parameters, detached, saved, problem, options)
    of_table = (None if vector is None else vector + part for vector, part in zip(vectors.of_table, parts, strict=True))
    return Vectors(*of_table, vectors.feature_length)


class _Record(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bias, vectors, saved, problem, options):
        # The parameters themselves: activation checkpointing and other hooks of saved tensors would return copies.
        ctx.parameters, ctx.seen = (weight, bias), Seen.all(weight, bias, problem.row_scale)
        # Not what a record has no use for, or holds as `seen`.
        problem = problem._replace(x=None, weight=None, bias=None, own_scale=None, row_scale=None)
        ctx.save_for_backward(*problem, *saved._replace(target_unit=None, inverse_norm=None, pull=None, row_sum=None))
        ctx.options = options
        return tuple(None if vector is None else torch.zeros_like(vector) for vector in vectors.of_table)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        (problem, saved), no_gradients = split(ctx.saved_tensors, (Problem, Saved)), (None,) * len(ctx.needs_input_grad)
        if change := change_of(ctx.seen, *ctx.parameters, class_tables.row_scale(ctx.parameters[0])):
            raise RuntimeError(f"the class table was {change} between forward and backward")
        grads = Vectors(*grads, feature_length=None)
        # The caller may write the next batch's labels into this tensor before step; no caller has the other tensors.
        factors = TableFactors.of(problem.labels.clone(), saved, grads, problem.hard, ctx.options)
        seen = [*ctx.seen, *Seen.all(problem.index)]
        record = Record(ctx.options, problem.index, problem.correction, factors, seen, ctx.needs_input_grad[:2])
        returned = [node is not None and _is_returned(node) for node, _ in ctx.next_functions]  # of tensors: not of no bias
        if any(returned):
            return *_gradients(ctx.parameters, record, returned), *no_gradients[len(returned) :]
        _check_hooks(ctx.parameters)
        found = pending(ctx.parameters[0])
        if found is None:
            was = "the fused optimiser that this loss was computed for no longer exists"
            raise RuntimeError(class_tables.FUSED_ALONE if ctx.parameters[0].dtype == formats.FLOAT8 else was)
        found.add(record)
        return no_gradients


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
    grads = made.weight, made.bias
    if record.index is not None:
        grads = [in_rows(record.index, *each) for each in zip(grads, parameters, strict=True)]
    return [grad if needed else None for grad, needed in zip(grads, wanted, strict=False)]


def _own_hooks(parameter):
    return [*(parameter._backward_hooks or {}).values(), *(parameter._post_accumulate_grad_hooks or {}).values()]


def _leaf_hooks(parameter):
    """The hooks of the node of autograd that accumulates the gradient. PyTorch tells only the garbage collector of them, and only
    while no graph holds the node, as before the first forward pass.
    """
    if not parameter.requires_grad:
        return []
    held = gc.get_referents(torch.autograd.graph.get_gradient_edge(parameter).node)
    return [hook for each in held if isinstance(each, dict) for hook in each.values()]


def _check_hooks(parameters, hooks_of=_own_hooks):
    """Raise for a hook that would be called with None, or not at all. Hooks marked `needs_no_grad` are this package's."""
    for name, parameter in zip(("weight", "bias"), parameters, strict=True):
        if parameter is not None and not all(getattr(hook, "needs_no_grad", False) for hook in hooks_of(parameter)):
            raise RuntimeError(
                f"the head's {name} has a hook for its gradient, which does not exist: a fused optimiser makes it slab by "
                "slab in its step and calls no hook. Remove the hook (wandb.watch: give it the backbone alone), or train the "
                "head with torch.optim"
            )
