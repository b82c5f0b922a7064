"""A user's file for test_typing.py: what a type checker must accept, and `# error` lines that it must report. Never run."""

import torch
from torch import Tensor
from typing_extensions import reveal_type

import cosface_kernels
from cosface_kernels import margins, theory

features, labels = torch.randn(8, 512), torch.randint(1000, (8,))
head = cosface_kernels.CosFaceLoss(512, 1000, margin=0.4, sample_rate=0.1, table_format="bfloat16", device="cuda")
reveal_type(head(features, labels))  # Tensor
reveal_type(head(features, labels, return_statistics=True)[1].correct)  # Tensor
reveal_type(cosface_kernels.cosface_loss(features, head.weight, labels))  # Tensor
reveal_type(cosface_kernels.cosface_loss(features, head.weight, labels, return_statistics=True)[1].correct)  # Tensor
largest = cosface_kernels.cosine_lse(features, head.weight, labels, return_largest=True)
reveal_type(largest)  # tuple[Tensor, Tensor, Tensor, Tensor]
reveal_type(head.topk(features, 5))  # tuple[Tensor, Tensor]
reveal_type(head.margin)  # float
reveal_type(head.grow(3))  # range
optimizer = cosface_kernels.FusedSGD(head.parameters(), lr=0.1, momentum=0.9, state_format="int8")
optimizer.step()
other = cosface_kernels.MarginSoftmaxLoss(512, 1000, margin=margins.Softmax(), bias=True)
reveal_type(other.margin)  # Margin
sharded = cosface_kernels.ShardedMarginSoftmaxLoss(512, 1000, margin=margins.ArcFace(0.5), ddp_average=False)
reveal_type(sharded.remove([1, 2], optimizer))  # Tensor
reveal_type(cosface_kernels.cosine_lse(features, head.weight, labels))  # tuple[Tensor, Tensor]
reveal_type(cosface_kernels.sample_classes(labels, 1000, 0.1))  # Tensor
reveal_type(theory.suggest(1000, 512).scale)  # float
reveal_type(cosface_kernels.latest_checkpoint("runs"))  # Path | None
cosface_kernels.save_checkpoint("runs/1", head, optimizer, extra={"epoch": 1})


class Own(margins.Margin):
    def psi(self, cosine: Tensor) -> Tensor:
        return cosine - 0.1


loss: Tensor = cosface_kernels.margin_softmax_loss(features, head.weight, labels, margin=Own(), memory_budget=0)

cosface_kernels.CosFaceLoss(512, "many")  # error
cosface_kernels.CosFaceLoss(512, 1000, sample_rat=0.1)  # error
cosface_kernels.CosFaceLoss(512, 1000, backend="gpu")  # error
cosface_kernels.MarginSoftmaxLoss(512, 1000)  # error
cosface_kernels.ShardedCosFaceLoss(512, 1000, mesh="all")  # error
head(features)  # error
head.topk(features, k="all")  # error
cosface_kernels.cosface_loss(features, head.weight, labels, reduction="average")  # error
cosface_kernels.margin_softmax_loss(features, head.weight, labels, margin=0.35)  # error
cosface_kernels.FusedAdamW(head.parameters(), state_format="int4")  # error
cosface_kernels.load_checkpoint("runs/1", head, grow=1)  # error
cosface_kernels.cosface_lose()  # error
