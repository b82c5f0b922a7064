"""Large Margin Cosine Loss (CosFace, arXiv 1801.09414) and its relatives over millions of classes, without an N x C matrix."""

from . import margins, reference, theory
from .functional import cosface_loss, cosine_lse, margin_softmax_loss
from .modules import CosFaceLoss, MarginSoftmaxLoss
from .version import __version__

__all__ = [
    "CosFaceLoss",
    "MarginSoftmaxLoss",
    "ShardedCosFaceLoss",
    "ShardedMarginSoftmaxLoss",
    "__version__",
    "cosface_loss",
    "cosine_lse",
    "margin_softmax_loss",
    "margins",
    "reference",
    "theory",
]


def __getattr__(name):
    """The sharded heads when they are asked for: importing DTensor takes half a second."""
    if name in ("ShardedCosFaceLoss", "ShardedMarginSoftmaxLoss"):
        from . import sharded

        return getattr(sharded, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
