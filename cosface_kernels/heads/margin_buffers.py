"""The buffers that a head keeps for its margin: running statistics by their names, and numbers that are tensors, m as margin_m.

A margin may be set at any time. Statistics that the old one had too go on, others appear and vanish with the margin that has
them. Something that is no margin is kept as it is: the next call of the head says what is wrong with it.
"""

import torch

from .. import margins

PREFIX = "margin_"
GIVEN = "class_weight", "hard_classes"  # a head's other buffers of numbers that its caller gave


def write(head, given):
    """Take what `head.margin` is set to, and the buffers that it needs."""
    try:
        margin = head._as_margin(given)
    except (TypeError, ValueError):
        head._margin_refused = (given,)
        return
    device, old = head.weight.device, values(head)
    first = {**margin.state, **(head._negatives.state if head._negatives else {})}
    statistics = {name: old[name] if name in old else _first_value(value, device) for name, value in first.items()}
    tensors = {name: _copy(margin, name, value, device) for name, value in margins.class_tensors(margin).items()}
    for name in old:
        delattr(head, name)
    for name, value in (*statistics.items(), *((PREFIX + name, value) for name, value in tensors.items())):
        head.register_buffer(name, value)
    head._margin_set, head._margin_refused = margins.replaced(margin, dict.fromkeys(tensors)), ()
    head._margin_tensors, head._margin_buffers = (*tensors,), (*statistics, *(PREFIX + name for name in tensors))


def read(head):
    """The margin with the present values of its buffers. Raises if something else was set."""
    for refused in head._margin_refused:
        head._as_margin(refused)
    return margins.replaced(head._margin_set, {name: head._buffers[PREFIX + name] for name in head._margin_tensors})


def values(head):
    """The buffers of the margin, by name."""
    return {name: head._buffers[name] for name in getattr(head, "_margin_buffers", ())}


def by_class(head):
    """The buffers with a number for each class, by name."""
    return {name: value for name, value in values(head).items() if name.startswith(PREFIX) and value.dim()}


def restore(head, before):
    """Undo parts of head._apply: floats stay float32 at least, since in bfloat16 a mean of 20 ignores changes below 0.06, and
    numbers that were given keep their values, which `to_empty` would lose.
    """
    for name, value in before.items():
        moved = head._buffers[name]
        is_float, is_given = moved.is_floating_point(), name.startswith(PREFIX) or name in GIVEN
        if (is_given and not value.is_meta) or (is_float and moved.dtype.itemsize < 4):
            dtype = torch.promote_types(moved.dtype, torch.float32) if is_float else moved.dtype
            head._buffers[name] = value.to(moved.device, dtype)


def _first_value(value, device):
    # Not the default dtype: in 16 bits a mean of 20 hardly moves, and a count past 2048 not at all.
    return torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else torch.int64, device=device)


def _copy(margin, name, tensor, device):
    """A copy for the head. On the device meta there would be no numbers: it stays where it is until the head moves."""
    if tensor.requires_grad:
        raise ValueError(
            f"{name} of {type(margin).__name__} must need no gradient in a head, which keeps it as a buffer; one that is learnt "
            "goes to margin_softmax_loss(..., margin=...)"
        )
    device = tensor.device if device.type == "meta" else device
    return tensor.detach().to(device, torch.promote_types(tensor.dtype, torch.float32), copy=True)
