"""Lists of pairs of images, as LFW, CFP-FP, AgeDB, CALFW, CPLFW and YTF have them.

    FILE.bin    InsightFace's: a pickle of (2 P encoded images, P times whether a pair is of one identity)
    FILE.txt    lines "image image 0-or-1", or LFW's "name 1 2" and "name 1 name 2"; a folder in place of an image is a template

A pickle may call whatever it names. Here its operations are looked through first, and its names get stand-ins that hold bytes.
"""

import io
import pickle
import pickletools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .files import IMAGES

# The constructors of lists, bytes, truth values and arrays of bytes: none hashes or compares values of the file.
_OPERATIONS = {
    *("PROTO", "FRAME", "STOP", "MARK", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2"),
    *("LONG1", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET", "MEMOIZE"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
}


class Pairs(NamedTuple):
    """P pairs of templates; a template is one image, or several whose unit embeddings are averaged."""

    templates: list  # of lists of (name for messages, encoded image or path)
    first: np.ndarray  # (P,), places in templates
    second: np.ndarray
    same: np.ndarray  # (P,), bool


def read(path, images=None):
    """The Pairs of a .bin file, or of a list of names below the folder `images` (default: the list's own folder).

    Raises:
        ValueError: the file is not such a list, names a missing image, or is a pickle that would do more than hold images.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    return _read_list(path, Path(images or path.parent)) if path.suffix == ".txt" else _read_bin(path)


def _read_bin(path):
    try:
        content = _unpickled(path.read_bytes())
        encoded, same = (_plain(part, list, tuple) for part in content)
        encoded, same = [_plain(image, bytearray) for image in encoded], [bool(_truth(value)) for value in same]
    except Exception as error:  # bytes that are no such pickle may fail in any way
        raise ValueError(f"{path}: not a .bin file of InsightFace's, or a damaged one ({error})") from error
    if not same or len(encoded) != 2 * len(same):
        raise ValueError(f"{path}: has {len(encoded):,} images for {len(same):,} pairs; each pair needs two")
    templates = [[(f"{path}, image {place} of pair {place // 2}", image)] for place, image in enumerate(encoded)]
    places = np.arange(len(templates))
    return Pairs(templates, places[::2], places[1::2], np.array(same))


class _Bytes:
    """Stand-in for a NumPy array or number of bytes or truth values."""

    data = kind = b""

    def __init__(self, *arguments):
        """(kind, b"...") of a number, (b"...", kind, shape, order) of an array; others come by __setstate__."""
        held = [part for part in arguments if isinstance(part, (bytes, bytearray))]
        kinds = [part for part in arguments if isinstance(part, _Kind)]
        if held and kinds:
            self.data, self.kind = bytes(held[0]), kinds[0].name

    def __setstate__(self, state):
        kind, self.data = state[2], state[4]  # after version and shape; between them whether it is in Fortran's order
        self.kind = kind.name


class _Kind:
    """Stand-in for a NumPy dtype."""

    def __init__(self, name, *_):
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state):
        pass


_NUMPY = {"_reconstruct": _Bytes, "scalar": _Bytes, "_frombuffer": _Bytes, "dtype": _Kind, "ndarray": _Bytes}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data):
        super().__init__(io.BytesIO(data), encoding="bytes")
        self.left = len(data)

    def _latin(self, text, *_):
        """Bytes from the text that Python 3 pickles for Python 2. Named many times, a text may not grow into more bytes."""
        self.left -= len(text)
        if self.left < 0:
            raise ValueError("it makes more bytes than it has")
        return text.encode("latin1")

    def find_class(self, module, name):
        """A new stand-in: a pickle may set attributes of what it gets."""
        if module.partition(".")[0] == "numpy" and name in _NUMPY:
            return type(name, (_NUMPY[name],), {})
        if (module, name) == ("_codecs", "encode"):
            return lambda *arguments: self._latin(*arguments)
        raise ValueError(f"it names {module}.{name}, which is no image and may run code")


def _unpickled(data):
    for operation, argument, _ in pickletools.genops(data):
        if operation.name not in _OPERATIONS:
            raise ValueError(f"its pickle has the operation {operation.name}, which no list of images needs")
        if "PUT" in operation.name and argument >= len(data):  # the memo is a list as long as its largest index
            raise ValueError(f"a pickle of {len(data)} bytes notes an object number {argument}")
    return _Unpickler(data).load()


def _plain(value, *kinds):
    """Bytes, also those of an array, or one of the kinds."""
    value = value.data if isinstance(value, _Bytes) and value.kind in ("u1", "b1") else value
    if type(value) in (bytes, *kinds):
        return value
    raise ValueError(f"there is a {type(value).__name__} in place of an image or a list")


def _truth(value):
    value = value.data[0] if isinstance(value, _Bytes) and value.kind == "b1" and len(value.data) == 1 else value
    if type(value) not in (bool, int) or value not in (0, 1):
        raise ValueError(f"there is {str(value)[:20]!r} in place of whether a pair is of one identity")
    return value


def _read_list(path, images):
    found, first, second, same = {}, [], [], []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a list of pairs ({error})") from error
    for number, line in enumerate(lines, 1):
        words = line.split("\t") if "\t" in line else line.split()
        if not words or (number == 1 and all(word.isdigit() for word in words)):  # LFW's first line: folds, pairs of each
            continue
        try:
            *names, is_same = _names(words)
        except ValueError:
            raise ValueError(
                f"{path}: line {number} must be 'image image 0-or-1', or LFW's 'name 1 2' or 'name 1 name 2', got {line[:80]!r}"
            ) from None
        for name, places in zip(names, (first, second), strict=True):
            if name not in found:
                found[name] = len(found), _template(images / name, f"{path}: line {number}")
            places.append(found[name][0])
        same.append(is_same)
    if not same:
        raise ValueError(f"{path}: has no pairs")
    return Pairs([template for _, template in found.values()], np.array(first), np.array(second), np.array(same))


def _names(words):
    """(name, name, whether they are of one identity) of a line's words; ValueError if it is none."""
    if len(words) == 4:
        return _lfw(words[0], words[1]), _lfw(words[2], words[3]), False
    first, second, last = words
    if first != second and not second.isdigit() and last in ("0", "1"):
        return first, second, last == "1"
    return _lfw(first, second), _lfw(first, last), True


def _lfw(name, number):
    return f"{name}/{name}_{int(number):04d}.jpg"


def _template(path, where):
    if path.is_file():
        return [(path, path)]
    if not path.exists():
        raise ValueError(f"{where} names {path}, and there is no such file")
    found = sorted(each for each in path.iterdir() if each.suffix.lower() in IMAGES)
    if not found:
        raise ValueError(f"{where} names {path}, a folder with no {', '.join(IMAGES)} files in it")
    return [(each, each) for each in found]
