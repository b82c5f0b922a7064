"""Large Margin Cosine Loss (CosFace, arXiv 1801.09414) and its relatives over millions of classes, without an N x C matrix."""

from . import margins, reference, theory
from .functional import cosface_loss, cosine_lse, margin_softmax_loss
from .heads import CosFaceLoss, MarginSoftmaxLoss
from .optim import FusedAdamW, FusedSGD
from .sampling import sample_classes
from .version import __version__

__all__ = [
    "CorruptCheckpointError",
    "CosFaceLoss",
    "FusedAdamW",
    "FusedSGD",
    "MarginSoftmaxLoss",
    "ShardedCosFaceLoss",
    "ShardedMarginSoftmaxLoss",
    "__version__",
    "cosface_loss",
    "cosine_lse",
    "latest_checkpoint",
    "load_checkpoint",
    "margin_softmax_loss",
    "margins",
    "reference",
    "sample_classes",
    "save_checkpoint",
    "theory",
]


def __getattr__(name):
    """On first use what is made of torch.distributed, which takes half as long to import as torch itself."""
    if name in ("CorruptCheckpointError", "latest_checkpoint", "load_checkpoint", "save_checkpoint"):
        from . import checkpoint

        return getattr(checkpoint, name)
    if name in ("ShardedCosFaceLoss", "ShardedMarginSoftmaxLoss"):
        from .heads import sharded

        return getattr(sharded, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
