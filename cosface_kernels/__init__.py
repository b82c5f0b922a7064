"""Large Margin Cosine Loss (CosFace, arXiv 1801.09414) over millions of classes, without an N x C matrix."""

from . import reference
from .functional import cosface_loss, cosine_lse
from .modules import CosFaceLoss
from .version import __version__

__all__ = ["CosFaceLoss", "__version__", "cosface_loss", "cosine_lse", "reference"]
