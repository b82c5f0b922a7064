"""Parameters that may be DTensors sharded by rows, Shard(0). torch.distributed.tensor is not imported here: that takes long."""

import functools
import sys

import torch

from .ranks import ONE_PROCESS, Ranks


def is_sharded(tensor):
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor):
    """This rank's rows of a tensor, as an ordinary tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def ranks(tensor):
    """The Ranks that hold a tensor's rows, or ONE_PROCESS."""
    return Ranks(tensor.device_mesh.get_group()) if is_sharded(tensor) else ONE_PROCESS


def bounds(num_rows, mesh):
    """(first, one past the last) of this rank's rows, by the rule of Shard(0), which is torch.chunk's."""
    rank, chunk = mesh.get_local_rank(), -(-num_rows // mesh.size())
    return min(rank * chunk, num_rows), min((rank + 1) * chunk, num_rows)


def first_row(tensor):
    """The number of this rank's first row in the whole."""
    return bounds(tensor.shape[0], tensor.device_mesh)[0] if is_sharded(tensor) else 0


def zeros(like, shape, dtype):
    """Zeros of a shape, sharded as `like` is."""
    if not is_sharded(like):
        return torch.zeros(shape, dtype=dtype, device=like.device)
    distributed = sys.modules["torch.distributed.tensor"]
    return distributed.zeros(shape, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)


@functools.cache
def unscale_beside_plain():
    """Let torch.amp.GradScaler unscale the gradients of one optimiser of which some are DTensors: those after the others.

    It passes all of them to one operator, and DTensor's implementation of that takes no other tensors.
    """
    operator = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default
    handlers = getattr(sys.modules["torch.distributed.tensor"].DTensor._op_dispatcher, "_custom_op_handlers", {})
    usual = handlers.get(operator)
    if usual is None:  # another PyTorch, which may do without
        return

    def handler(operator, arguments, named):
        grads, found_inf, inverse_scale = arguments
        plain = [grad for grad in grads if not is_sharded(grad)]
        if plain:
            operator(plain, found_inf, inverse_scale)
        return usual(operator, ([grad for grad in grads if is_sharded(grad)], found_inf, inverse_scale), named)

    handlers[operator] = handler
