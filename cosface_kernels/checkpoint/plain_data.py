"""Plain data of a checkpoint: numbers, strings, tensors, and tuples, lists and dicts of them, read without running anything."""

import io
import pickle

import torch

from .files import CorruptCheckpointError


def packed(what, value):
    """torch.save's bytes of plain data."""
    try:
        return _round_trip(value)
    except _NOT_PLAIN as error:
        raise TypeError(
            f"{what} must be plain data, Python's own numbers and strings, tensors, or tuples, lists, dicts of them: "
            f"{_not_plain(value)}"
        ) from error


_NOT_PLAIN = (pickle.PickleError, AttributeError, TypeError)


def _round_trip(value):
    """torch.save's bytes of a value. Raises if they cannot be loaded again."""
    stream = io.BytesIO()
    torch.save(value, stream)
    torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
    return stream.getvalue()


def _not_plain(value, path=""):
    """The place and the type of the first part of a value that cannot be loaded again."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, child in children:
        try:
            _round_trip(child)
        except _NOT_PLAIN:
            return _not_plain(child, f"{path}[{key!r}]")
    return f"{path} is of {type(value)}"


def unpacked(path, is_right):
    """The data that `packed` made. Raises CorruptCheckpointError if it has another form."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no file of torch.save may fail in any way
        raise CorruptCheckpointError(f"{path} is no save_checkpoint's: it is no plain data of torch.save's") from error
    if not is_right(found):
        raise CorruptCheckpointError(f"{path} is no save_checkpoint's: it lacks a part, or has one of another type")
    return found
