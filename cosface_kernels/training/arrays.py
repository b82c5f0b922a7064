"""Embeddings, labels and results on the disk: .npy and .safetensors, JSON. A file is whole or not there."""

import json
import os
import secrets
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..ops.normalize import TINY_NORM

CHUNK = 2**12  # rows that are looked through at a time


def read_embeddings(path):
    """An array (N, D) of floats, mapped from the disk where it is .npy.

    Raises:
        ValueError: no such file, or not one row of finite numbers, not all zero, for each image.
    """
    found = _read(path, "embeddings")
    found = found if found.dtype.isnative else found.astype(found.dtype.newbyteorder("="))
    if found.ndim != 2 or found.dtype.kind != "f" or found.dtype.itemsize > 8:
        raise ValueError(f"{path}: must hold floats of shape (N, D), one row for each image, got {found.dtype} {found.shape}")
    if not found.size:
        raise ValueError(f"{path}: holds no embeddings, its shape is {found.shape}")
    for start in range(0, len(found), CHUNK):
        rows = found[start : start + CHUNK].astype(np.float64)
        short = np.abs(rows).max(1) < TINY_NORM
        for wrong, what in ((~np.isfinite(rows).all(1), "not finite"), (short, "all zeros, or nearly, and has no direction")):
            if wrong.any():
                place = start + int(wrong.argmax())
                raise ValueError(f"{path}: row {place} is {what}; leave such rows out, and their labels")
    return found


def read_labels(path, count):
    """An array (count,) of integers or text, one identity for each embedding."""
    found = _read(path, "labels")
    if found.dtype.kind == "f" and np.isfinite(found).all() and np.array_equal(found, np.trunc(found)):
        found = found.astype(np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iuU":
        raise ValueError(
            f"{path}: must hold one integer or text for each embedding, of shape (N,), got {found.dtype} {found.shape}"
        )
    if len(found) != count:
        raise ValueError(f"{path}: has {len(found):,} labels for {count:,} embeddings; one is needed for each")
    return found


def _read(path, name):
    """The array in a .npy file, or the tensor `name`, or the only one, in a .safetensors file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    if path.suffix == ".npy":
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            if "Python objects" in str(error):
                raise ValueError(f"{path}: holds Python objects; write it again, labels.astype(str) or as numbers") from None
            why = "it does not begin as one" if "allow_pickle" in str(error) else error  # NumPy advises to unpickle it
            raise ValueError(f"{path}: not a file of numpy.save, or a damaged one ({why})") from error
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: must be a .npy or a .safetensors file")
    tensors = _safetensors(path)
    if name not in tensors and len(tensors) != 1:
        raise ValueError(f"{path}: must hold a tensor {name!r}, or one alone, got {', '.join(sorted(tensors)) or 'none'}")
    tensor = tensors.get(name, next(iter(tensors.values())))
    return (tensor.float() if tensor.dtype.itemsize == 2 and tensor.is_floating_point() else tensor).numpy()


def _safetensors(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file, or a damaged one ({error})") from error


def read_json(path):
    """The content of a JSON file; None where there is none, or a damaged one."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None


def whole_lines(path):
    """The lines of a file, bytes, without a last one that a kill cut short; none where there is no file."""
    return Path(path).read_bytes().split(b"\n")[:-1] if Path(path).exists() else []


def write_json(path, record):
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def write_text(path, text):
    """Write a file of text, whole or not at all."""
    with written(path) as file:
        file.write(text.encode())


@contextmanager
def written(path):
    """Yield a binary file that takes the place of `path` once the block ends without an error; else nothing is left of it.

    Raises:
        OSError: it cannot be written; the message names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
