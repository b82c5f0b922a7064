"""The heads with a class table sharded over the ranks of torch.distributed, by the placement over_ranks.OverMesh."""

import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, init_device_mesh
from typing_extensions import Unpack

from .. import validation
from ..margins import Margin
from ..validation import Device
from .cosface import OPTIONS, CosFaceLoss, HeadOptions
from .over_ranks import OverMesh
from .plain import MarginSoftmaxLoss


class CosFaceOptions(HeadOptions, total=False):
    scale: float | Tensor
    margin: float | Tensor


class MarginOptions(HeadOptions, total=False):
    scale: float | Tensor | None
    bias: bool


class ShardedCosFaceLoss(CosFaceLoss):
    """`CosFaceLoss` with the class table sharded over the ranks of torch.distributed.

        head = ShardedCosFaceLoss(512, 10_000_000)       # on each rank
        loss = head(features, labels)                    # its part of the batch, of any size

    Each rank passes its own rows (N_r, D) and gets the loss of all N = Σ N_r, the same number on every rank: the gradients are
    those of that loss. weight (num_classes, embedding_size) is a DTensor, Shard(0); each rank draws its own rows.

    Args:
        embedding_size, num_classes, **options: as for `CosFaceLoss`; num_classes is that of the whole table. device: of the
            mesh's type, and by default that.
        mesh: a 1-D DeviceMesh whose ranks hold the table and bring the batch. None: all ranks, with a process group made from
            torchrun's variables if there is none yet; without torchrun too, this process alone, with a plain tensor.
        ddp_average: True: the gradient of the features is that of the loss times the number of ranks, so that after DDP or
            FSDP2 has averaged a backbone's gradient over the ranks it is that of the loss. False: that of the loss itself.
            weight.grad is always that of the loss.

    With reduction "none" each rank gets the losses of its own rows; gradients are those of the sum, over all ranks, of the
    scalars that they make of them.

    Forward and backward are collective: every rank calls both, under the same grad mode and with the same upstream gradient.

    Raises:
        TypeError, ValueError, IndexError: as CosFaceLoss, on every rank for a mistake on one; features of several dtypes.
        RuntimeError: another rank failed, or did not make the call within the process group's timeout.
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        *,
        mesh: DeviceMesh | None = None,
        ddp_average: bool = True,
        device: Device = None,
        **options: Unpack[CosFaceOptions],
    ) -> None:
        super().__init__(embedding_size, num_classes, **_placed(mesh, ddp_average, device), **options)
        self.ddp_average = ddp_average


class ShardedMarginSoftmaxLoss(MarginSoftmaxLoss):
    """`MarginSoftmaxLoss` with the class table, and the bias, sharded over the ranks of torch.distributed.

    Args:
        embedding_size, num_classes, **options: as for `MarginSoftmaxLoss`. With centers_per_class > 1 num_classes must be such
            that a DTensor's shards are whole classes: a multiple of the number of ranks is.
        mesh, ddp_average: as for `ShardedCosFaceLoss`, and so is all else. Running statistics are of the global batch, and the
            same on every rank.
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        *,
        margin: Margin,
        mesh: DeviceMesh | None = None,
        ddp_average: bool = True,
        device: Device = None,
        **options: Unpack[MarginOptions],
    ) -> None:
        validation.check_names(type(self).__name__, options, OPTIONS)
        super().__init__(embedding_size, num_classes, margin=margin, **_placed(mesh, ddp_average, device), **options)
        self.ddp_average = ddp_average


def _placed(mesh, ddp_average, device):
    """The arguments `placement` and `device` of the constructors above."""
    validation.check_flag("ddp_average", ddp_average)
    placement = OverMesh(_mesh(mesh, device))
    if mesh is None or device is None:
        return {"placement": placement, "device": device if mesh is None else mesh.device_type}
    if torch.device(device).type not in ("meta", mesh.device_type):
        raise ValueError(f"device must be of the mesh's type, {mesh.device_type}, got {device}")
    return {"placement": placement, "device": device}


def _mesh(mesh, device):
    """The given mesh, or one of all ranks; None if there is neither a process group nor torchrun."""
    if mesh is None:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if not dist.is_initialized() and launched == 1:
            return None
        kind = (torch.get_default_device() if device is None else torch.device(device)).type
        kind = torch.accelerator.current_accelerator(check_available=True) or "cpu" if kind == "meta" else kind
        return init_device_mesh(str(kind), (dist.get_world_size() if dist.is_initialized() else launched,))
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a torch.distributed DeviceMesh or None, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, such as mesh['name'] of one that has more, got {mesh}")
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh must contain this rank, {dist.get_rank()}, got {mesh}")
    return mesh
