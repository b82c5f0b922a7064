"""Large Margin Cosine Loss (CosFace, arXiv 1801.09414) and its relatives over millions of classes, without an N x C matrix."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from . import margins, reference, theory
    from .checkpoint import CorruptCheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
    from .functional import cosface_loss, cosine_lse, margin_softmax_loss
    from .heads import CosFaceLoss, MarginSoftmaxLoss
    from .heads.sharded import ShardedCosFaceLoss, ShardedMarginSoftmaxLoss
    from .loss import Statistics
    from .optim import FusedAdamW, FusedSGD
    from .sampling import sample_classes

__all__ = [
    "CorruptCheckpointError",
    "CosFaceLoss",
    "FusedAdamW",
    "FusedSGD",
    "MarginSoftmaxLoss",
    "ShardedCosFaceLoss",
    "ShardedMarginSoftmaxLoss",
    "Statistics",
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
_HOMES = {
    "checkpoint": ("CorruptCheckpointError", "latest_checkpoint", "load_checkpoint", "save_checkpoint"),
    "functional": ("cosface_loss", "cosine_lse", "margin_softmax_loss"),
    "heads": ("CosFaceLoss", "MarginSoftmaxLoss"),
    "heads.sharded": ("ShardedCosFaceLoss", "ShardedMarginSoftmaxLoss"),
    "loss": ("Statistics",),
    "optim": ("FusedAdamW", "FusedSGD"),
    "sampling": ("sample_classes",),
}


if not TYPE_CHECKING:  # a checker then reports an unknown name

    def __getattr__(name):
        """Import names on first use: torch.distributed takes half as long to import as torch itself."""
        if name in ("margins", "reference", "theory"):
            return import_module(f".{name}", __name__)
        for home, names in _HOMES.items():
            if name in names:
                globals()[name] = found = getattr(import_module(f".{home}", __name__), name)
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})


def _is_the_command():
    """True in a process of `cosface` or `python -m cosface_kernels`, which answers --help and mistakes without torch."""
    is_module = ("-m", __name__) in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    return is_module or [Path(path).name for path in sys.argv[:1]] == ["cosface"]


# Everywhere else the import registers the package's operators, as torch.export.load needs.
if not _is_the_command():
    for home in ("functional", "heads", "optim", "sampling"):
        import_module(f".{home}", __name__)
