"""InsightFace's PartialFC_V2 (recognition/arcface_torch/partial_fc_v2.py): its constructor, call and state dict, our loss."""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .. import validation
from ..distributed.ranks import ONE_PROCESS, Ranks, world
from ..heads.over_ranks import OverRanks
from ..heads.plain import MarginSoftmaxLoss
from .insightface_margins import translate


class PlainShards(OverRanks):
    """A plain tensor with this rank's rows, C // W + (r < C % W), which does not say so as a DTensor does."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def empty(self, rows, *size, centers, device, dtype):
        return torch.empty(rows // self.size + (self.rank < rows % self.size), *size, device=device, dtype=dtype)

    def ranks(self, weight):
        return Ranks(dist.group.WORLD) if self.size > 1 else ONE_PROCESS

    def first_class(self, head, weight):
        return head.num_classes // self.size * self.rank + min(self.rank, head.num_classes % self.size)

    def check_resizable(self, head, instead):
        if self.size > 1:
            raise NotImplementedError(
                f"the rows of a {type(head).__name__} on several ranks cannot be changed in place: use ShardedCosFaceLoss"
            )


class PartialFC_V2(MarginSoftmaxLoss):
    """The class table over the ranks of the default process group, or in this process alone where there is none.

        module_partial_fc = PartialFC_V2(margin_loss, embedding_size=512, num_classes=10_000_000)
        loss = module_partial_fc(local_embeddings, local_labels)      # the mean over all ranks' rows, the same on all

    weight (C_local, D) is a plain tensor with the rows that theirs gives this rank, C // W + (r < C % W) of them, not a DTensor:
    so each rank's checkpoint loads as it is, its optimiser's momentum too, and `state_dict` asks no other rank. As with theirs,
    the embeddings' gradient is that of the loss times W, for DistributedDataParallel to average.

    Differences: those of `insightface.head`; batches may differ from rank to rank and step to step; fp16 computes in bfloat16,
    and leaves autocast alone where it is False.

    Args:
        margin_loss: their CosFace, ArcFace or CombinedMarginLoss, measured by `insightface.translate`.
        embedding_size: D.
        num_classes: C, of all ranks.
        sample_rate: as in `CosFaceLoss`. As with theirs weight.grad is then dense, zero for classes that took no part, unless
            FusedSGD or FusedAdamW trains it, which touch sampled rows alone; and which classes were drawn is in no state dict.
        fp16: whether to compute in 16 bits.

    Raises:
        TypeError, ValueError: from `translate`, or an argument of the wrong type or value.
        RuntimeError: several processes were launched, and have no process group yet.
    """

    def __init__(
        self,
        margin_loss: Callable[..., Tensor],
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
    ) -> None:
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RuntimeError("PartialFC_V2 on several ranks needs torch.distributed.init_process_group() before it")
        validation.check_flag("fp16", fp16)
        margin, scale = translate(margin_loss)
        rank, size = world().rank, world().size
        options = {"ignore_index": -1, "sample_rate": sample_rate, "placement": PlainShards(rank, size)}
        super().__init__(embedding_size, num_classes, margin=margin, scale=scale, **options)
        self.rank, self.world_size, self.ddp_average, self.fp16 = rank, size, True, fp16
        self.num_local = len(self.weight)
        self.class_start = self.placement.first_class(self, self.weight)

    def _begin_sampling(self):
        super()._begin_sampling()
        self.register_buffer("sample_step", self.sample_step, persistent=False)
        self.weight.register_post_accumulate_grad_hook(_make_dense)

    def check_checkpoint(self):
        """Raise if there are several ranks. save_checkpoint calls this: of a plain tensor it would save rank 0's rows alone."""
        if self.world_size > 1:
            raise ValueError(
                f"{type(self).__name__} on several ranks has each rank's rows as a plain tensor, of which rank 0's alone would "
                "be saved: save its state_dict() on every rank, as InsightFace does, or use ShardedCosFaceLoss"
            )

    def forward(
        self, local_embeddings: Tensor | None = None, local_labels: Tensor | None = None, *others: object, **named: object
    ) -> Tensor:
        """The loss of the global batch, of which this rank has embeddings (N_r, D) with labels (N_r,) or (N_r, 1)."""
        if isinstance(local_labels, torch.Tensor) and local_labels.shape[1:] == (1,):
            local_labels = local_labels[:, 0]
        if not self.fp16:
            return super().forward(local_embeddings, local_labels, *others, **named)
        with torch.autocast(next(self.parameters()).device.type, torch.bfloat16):
            return super().forward(local_embeddings, local_labels, *others, **named)


def _make_dense(weight):
    """Make a sparse gradient dense: most of torch.optim refuses sparse ones together with weight decay."""
    if weight.grad is not None and weight.grad.is_sparse:
        weight.grad = weight.grad.to_dense()


_make_dense.needs_no_grad = True  # with a fused optimiser there is none
