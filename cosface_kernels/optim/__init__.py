"""Optimisers that update a class table slab by slab, without its gradient."""

from .fused import FusedAdamW, FusedSGD

__all__ = ["FusedAdamW", "FusedSGD"]
