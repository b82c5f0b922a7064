"""Parameters that may be sharded: DTensors, Shard(0), whose rows other ranks have too. Nothing here imports their module."""

import sys

import torch

from .ranks import ONE_PROCESS, Ranks


def is_sharded(tensor):
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor):
    """This rank's rows."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def ranks(tensor):
    """The Ranks that its rows lie on, or ONE_PROCESS."""
    return Ranks(tensor.device_mesh.get_group()) if is_sharded(tensor) else ONE_PROCESS


def bounds(num_rows, mesh):
    """(first, one past the last) of this rank's rows, by the rule of Shard(0), which is torch.chunk's."""
    rank, chunk = mesh.get_local_rank(), -(-num_rows // mesh.size())
    return min(rank * chunk, num_rows), min((rank + 1) * chunk, num_rows)


def first_row(tensor):
    """The number of this rank's first row in the whole."""
    return bounds(tensor.shape[0], tensor.device_mesh)[0] if is_sharded(tensor) else 0


def zeros(like, shape, dtype):
    """Zeros of a shape whose rows lie where those of `like` do."""
    if not is_sharded(like):
        return torch.zeros(shape, dtype=dtype, device=like.device)
    distributed = sys.modules["torch.distributed.tensor"]
    return distributed.zeros(shape, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)
