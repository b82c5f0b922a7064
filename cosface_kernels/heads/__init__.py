"""The class table as a module: whole in one process, or in shards over several ranks."""

from .cosface import CosFaceLoss
from .plain import MarginSoftmaxLoss

__all__ = ["CosFaceLoss", "MarginSoftmaxLoss"]
