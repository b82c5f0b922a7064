"""The class table as a module: whole in one process, or in shards over several ranks."""

from .plain import CosFaceLoss, MarginSoftmaxLoss

__all__ = ["CosFaceLoss", "MarginSoftmaxLoss"]
