"""Large Margin Cosine Loss (CosFace, arXiv 1801.09414) and its relatives over millions of classes, without an N x C matrix."""

from . import margins, reference, theory
from .functional import cosface_loss, cosine_lse, margin_softmax_loss
from .modules import CosFaceLoss, MarginSoftmaxLoss
from .sampling import sample_classes
from .version import __version__

__all__ = [
    "CosFaceLoss",
    "MarginSoftmaxLoss",
    "__version__",
    "cosface_loss",
    "cosine_lse",
    "margin_softmax_loss",
    "margins",
    "reference",
    "sample_classes",
    "theory",
]
