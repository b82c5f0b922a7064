"""Identities that come and go: new and removed rows of a head's table, its bias, and the optimiser's state of them."""

import torch
import torch.nn.functional as F

from .. import validation
from ..ops import formats, recording
from . import float8, margin_buffers


@torch.no_grad()
def grow(head, count, optimizer=None):
    """`MarginSoftmaxLoss.grow`."""
    validation.check_size("count", count)
    _check_parameter(head)
    head.placement.check_resizable(head, "a larger sharded head load_checkpoint(..., grow=('weight',))")
    rows, new_rows = len(head.weight), count * head.centers_per_class

    def with_new_rows(tensor):
        if tensor.is_sparse:  # torch.optim.SGD's momentum of sampled classes
            tensor = tensor.coalesce()
            size = len(tensor) + new_rows, *tensor.shape[1:]
            return torch.sparse_coo_tensor(tensor.indices(), tensor.values(), size, is_coalesced=True, check_invariants=False)
        return torch.cat([tensor, tensor.new_zeros(new_rows, *tensor.shape[1:])])

    hard_classes = None if head.hard_classes is None else F.pad(head.hard_classes, (0, 0, 0, count), value=-1)
    drawn = head.weight.new_empty(new_rows, head.weight.shape[1])
    scale = None if head.weight_scale is None else head.weight_scale.new_empty(new_rows)
    float8.fill(drawn, scale, head.draw)
    changes = [(head.weight, torch.cat([head.weight, drawn]))]
    if scale is not None:
        changes.append((head.weight_scale, torch.cat([head.weight_scale, scale])))
    if head.bias is not None:
        changes.append((head.bias, with_new_rows(head.bias)))
    _change(head, changes, optimizer, with_new_rows, lambda numbers: torch.cat([numbers, numbers.mean().expand(count)]))
    head.num_classes += count
    head.hard_classes = hard_classes
    first = rows // head.centers_per_class
    return range(first, first + count)


@torch.no_grad()
def remove(head, ids, optimizer=None):
    """`MarginSoftmaxLoss.remove`."""
    _check_parameter(head)
    centers = head.centers_per_class
    classes = len(head.weight) // centers
    ids = validation.check_ids(ids, classes)
    head.placement.check_resizable(
        head, "a plain head in one process load_checkpoint; remove and save_checkpoint; load that into a sharded head"
    )
    kept = torch.ones(classes, dtype=torch.bool, device="cpu")
    kept[ids] = False
    new_ids = torch.where(kept, kept.cumsum(0) - 1, -1)
    rows = kept.repeat_interleave(centers).nonzero().squeeze(1)
    hard_classes = head.hard_classes
    if hard_classes is not None:
        place = F.pad(new_ids, (0, 1), value=-1).to(hard_classes.device)  # of -1 too
        hard_classes = place[hard_classes[kept.to(hard_classes.device)].long()]

    def of_kept_rows(tensor):
        words = tensor.view(torch.int8) if tensor.dtype == formats.FLOAT8 else tensor  # not every device gathers float8
        found = words.index_select(0, rows.to(tensor.device))
        return found.view(tensor.dtype) if words is not tensor else found

    tensors = (head.weight, head.bias, head.weight_scale)
    changes = [(tensor, of_kept_rows(tensor)) for tensor in tensors if tensor is not None]
    _change(head, changes, optimizer, of_kept_rows, lambda numbers: numbers[kept.to(numbers.device)])
    head.num_classes = int(kept.sum())
    head.hard_classes = hard_classes
    return new_ids


def follow(optimizer, parameter, change):
    """[(state, key, change(tensor))] of an optimiser's state tensors that have a row for each row of parameter."""
    state = optimizer.state.get(parameter, {})
    per_row = {
        key: tensor
        for key, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and tensor.dim() and len(tensor) == len(parameter)
    }
    return [(state, key, change(tensor)) for key, tensor in per_row.items()]


def _check_parameter(head):
    if "weight" not in head._parameters:
        raise ValueError(
            f"the table of this {type(head).__name__} is made anew from other parameters (torch.nn.utils.parametrize): "
            "add or remove rows before the head is parametrised"
        )


def _change(head, changes, optimizer, change, change_by_class):
    """Compute all new tensors, then replace the old ones, so that running out of memory changes nothing."""
    states, recorded = [], recording.pending(head.weight)
    if optimizer is None and recorded is not None:
        optimizer = recorded.optimizer()
    if optimizer is not None:
        validation.check_optimizer(optimizer, head.weight)
        states = [new for parameter, _ in changes for new in follow(optimizer, parameter, change)]
    by_class = {**margin_buffers.by_class(head), "class_weight": head.class_weight}
    by_class = {name: change_by_class(numbers) for name, numbers in by_class.items() if numbers is not None}
    for name, numbers in by_class.items():
        setattr(head, name, numbers)
    for state, key, tensor in states:
        state[key] = tensor
    for parameter, rows in changes:
        parameter.grad = None
        parameter.data = rows
        torch.autograd.graph.increment_version(parameter)  # a backward pass of the old rows then raises
    if recorded is not None:
        recorded.records.clear()
