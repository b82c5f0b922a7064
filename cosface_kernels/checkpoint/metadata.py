"""Reads DCP's `.metadata`, the list of a checkpoint's tensors, from its pickle without running any of it.

A pickle may call whatever it names. This one may name torch.Size, dtypes and DCP's own classes, for which it gets empty
stand-ins. DCP's objects are then built here from numbers that were checked against one another and against the files' sizes.
"""

import io
import math
import pickle
import pickletools

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from .files import CorruptCheckpointError

METADATA = ".metadata"
_RECORDS = {"Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta"}
# Classes that are read and ignored. Python 3.13 alone has the second name of a path.
_IGNORED = {
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class CheckedReader(dcp.FileSystemReader):
    """DCP's reader of a folder, with metadata that `read_metadata` has checked."""

    def __init__(self, folder, metadata):
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args, **options):
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata


def read_metadata(folder, manifest):
    """DCP's Metadata of a checkpoint whose files, {name: {"size"}}, were verified.

    Raises:
        CorruptCheckpointError: it names anything else than DCP's classes, or is no description of tensors in these files.
    """
    path = folder / METADATA
    try:
        saved = _unpickled(path.read_bytes()).state
        tensors = {_checked(str, name): _tensor(record) for name, record in saved["state_dict_metadata"].items()}
        items = dict(_item(index, info, manifest) for index, info in saved["storage_data"].items())
        for name, tensor in tensors.items():
            _check_pieces(name, tensor, items)
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{path} is damaged, or no save_checkpoint's: {error}") from None
    except Exception as error:  # bytes that are no such pickle may fail in any way
        raise CorruptCheckpointError(f"{path} is damaged, or no save_checkpoint's: {type(error).__name__}: {error}") from error
    return Metadata(state_dict_metadata=tensors, storage_data=items)


class _Record:
    """Stand-in for an object of DCP's, with the arguments that the pickle gave it."""

    state = None

    def __setstate__(self, state):
        self.state = state


def _unpickled(data):
    """The object of a pickle. Its memo is a list as long as its largest index: one of 10^9 would take 16 GB."""
    for operation, argument, _ in pickletools.genops(data):
        if "PUT" in operation.name and argument >= len(data):
            raise CorruptCheckpointError(f"a pickle of {len(data)} bytes notes an object number {argument}")
    return _Unpickler(io.BytesIO(data)).load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        """The class of that name for the unpickler, or a new stand-in: a pickle may set attributes of what it gets."""
        of_dcp = module == "torch.distributed.checkpoint.metadata" and name in _RECORDS
        if of_dcp or (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo"):
            return type(name, (_Record,), {})
        if (module, name) in _IGNORED:
            return lambda *arguments: None
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        raise CorruptCheckpointError(f"it names {module}.{name}, which describes no tensor and may run code")


def _checked(kind, value):
    if type(value) is not kind:
        raise CorruptCheckpointError(f"there is a {type(value).__name__} in place of a {kind.__name__}")
    return value


def _size(value):
    if any(type(number) is not int or number < 0 for number in _checked(torch.Size, value)):
        raise CorruptCheckpointError(f"there is a size {tuple(value)}")
    return value


def _tensor(record):
    state = record.state
    chunks = [ChunkStorageMetadata(_size(chunk.state["offsets"]), _size(chunk.state["sizes"])) for chunk in state["chunks"]]
    dtype = _checked(torch.dtype, state["properties"].state[0])
    return TensorStorageMetadata(TensorProperties(dtype), _size(state["size"]), chunks)


def _item(index, info, manifest):
    """(the index of a piece of a tensor, its place in a file)."""
    index, info = index.state, info.state
    name, offset, length = _checked(str, info["relative_path"]), _checked(int, info["offset"]), _checked(int, info["length"])
    if name not in manifest:
        raise CorruptCheckpointError(f"it has a tensor in {name!r}, which is no file of this checkpoint's")
    if not 0 <= offset <= offset + length <= manifest[name]["size"]:
        raise CorruptCheckpointError(f"it has a tensor at bytes {offset} to {offset + length} of {name}")
    return MetadataIndex(_checked(str, index["fqn"]), _size(index["offset"])), _StorageInfo(name, offset, length)


def _check_pieces(name, tensor, items):
    """Check that a tensor's pieces lie inside it, have as many numbers as it has, and have room for them in their files."""
    for piece in tensor.chunks:
        ends = [offset + size for offset, size in zip(piece.offsets, piece.sizes, strict=True)]
        if any(end > size for end, size in zip(ends, tensor.size, strict=True)):
            raise CorruptCheckpointError(f"a piece of {name} ends at {ends} of {tuple(tensor.size)}")
        if items[MetadataIndex(name, piece.offsets)].length < math.prod(piece.sizes) * tensor.properties.dtype.itemsize:
            raise CorruptCheckpointError(f"a piece of {name} is longer than what was written of it")
    if sum(math.prod(piece.sizes) for piece in tensor.chunks) != math.prod(tensor.size):
        raise CorruptCheckpointError(f"the pieces of {name} do not make it up")
