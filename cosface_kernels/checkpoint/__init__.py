"""Checkpoints of any training: whole or not there, verified at load, on any number of ranks. Nothing here knows a loss."""

from .files import CorruptCheckpointError, latest_checkpoint
from .save_and_load import load_checkpoint, save_checkpoint

__all__ = ["CorruptCheckpointError", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]
