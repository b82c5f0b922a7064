"""Images in large files, read in any order: InsightFace's RecordIO (.rec with .idx), and tar shards in WebDataset's layout.

A record of RecordIO is a frame: magic u32, length u32 (its upper three bits say which part of a record it is), data, padded to 4
bytes. Its data are a header "IfQQ", flag u32, label f32, two ids u64; `flag` numbers f32 if there are several labels; the image.
Record 0 holds no image: its two labels are the first key of the identities' records, which hold none either, and their end.
"""

import json
import math
import os
import struct
import tarfile
import warnings
from typing import NamedTuple

import numpy as np

from .config import ConfigError
from .files import IMAGES, Files

MAGIC = 0xCED7230A
# mxnet's header, and forks with float64 labels, whose C compiler aligns them or not.
HEADERS = ("<IfQQ", "<I4xdQQ", "<IdQQ")
_STARTS = (b"\xff\xd8", b"\x89PNG", b"BM", b"RIFF")
_DAMAGED = (ValueError, IndexError, OverflowError, struct.error)  # errors that reading a damaged record may raise
FLOAT32_LABELS = 2**24  # a float32 holds whole numbers exactly up to here


class Records(Files):
    """A .rec file and its .idx."""

    def __init__(self, path, image_size):
        self.path, self.image_size = path, image_size
        self.keys, self.offsets = self._index(path.with_suffix(".idx"))  # by ascending keys
        self.header = self._found_header()
        ends = self._ends()
        if ends is None:
            self.num_classes = 1 + max((self._label(place) for place in range(len(self))), default=-1)
        else:
            self.num_classes = self._without_identities(*ends)
        if self.num_classes < 1 or not len(self):
            raise ConfigError(f"data: {path} has no record of an image with a label from 0 on")
        if self.header == HEADERS[0] and self.num_classes > FLOAT32_LABELS:
            raise ConfigError(
                f"data: {path} has {self.num_classes:,} identities, and its float32 labels are exact up to {FLOAT32_LABELS:,}: "
                "write it as tar shards"
            )

    def _index(self, index):
        """(keys, offsets) of the .idx. self.data becomes the .rec."""
        try:
            keys, offsets = _whole_numbers(index.read_text()).reshape(-1, 2).T
            self.data = np.memmap(self.path, dtype=np.uint8, mode="r")
            if not len(keys) or min(keys.min(), offsets.min()) < 0:
                raise ValueError("there are none, or some below 0")
        except FileNotFoundError as error:
            raise ConfigError(f"data: there is no {error.filename}: a .rec file needs its .idx beside it") from None
        except ValueError as error:
            raise ConfigError(
                f"data: {index} or {self.path} is damaged: lines of KEY, tab, OFFSET are wanted ({error}); copy both anew"
            ) from None
        last, size = int(offsets.max()), len(self.data)
        if last + 8 > size or last + 8 + struct.unpack_from("<I", self.data, last + 4)[0] % 2**29 > size:
            raise ConfigError(
                f"data: {self.path} is cut off: its .idx has a record at byte {last:,}, and the file ends at {size:,}; "
                "copy it anew"
            )
        order = keys.argsort(kind="stable")
        return keys[order], offsets[order]

    def _ends(self):
        """The two labels of InsightFace's record 0; None where there is none."""
        if self.keys[0] != 0:
            return None
        try:
            ends, image = self._read(0)
        except _DAMAGED as error:
            raise self._damaged_front(error) from None
        if len(ends) != 2 or image:
            return None
        if not (1 < ends[0] <= ends[1] < math.inf):
            raise self._damaged_front(f"images end at {ends[0]}, identities at {ends[1]}")
        return int(ends[0]), int(ends[1])

    def _damaged_front(self, why):
        return ConfigError(
            f"data: record 0 of {self.path}, which says how many images there are, is damaged ({why}); copy it anew"
        )

    def _without_identities(self, first, end):
        """Leave the records of images, whose keys are below `first`. The number of identities.

        The two are float32 numbers, rounded where they are above 2^24: then the .idx, and what the records hold, say more.
        """
        identities, slack = end - first, 0
        if end > FLOAT32_LABELS:
            slack = 8
            near = np.searchsorted(self.keys, [first - slack, first + slack])
            images = [place for place in range(*near) if self._whole(place)[1].startswith(_STARTS)]
            first = int(self.keys[images[-1]]) + 1 if images else first
            identities = int((self.keys >= first).sum()) or identities
        images = slice(*np.searchsorted(self.keys, [1, first]))
        self.keys, self.offsets = self.keys[images], self.offsets[images]
        if len(self) < first - 1 - slack:
            raise ConfigError(f"data: the .idx of {self.path} has {len(self):,} images of {first - 1:,}; copy both anew")
        return identities

    def __len__(self):
        return len(self.keys)

    def encoded(self, index):
        name = f"{self.path}, record {self.keys[index]}"
        try:
            labels, image = self._read(index)
            if not (0 <= labels[0] < self.num_classes and labels[0] == int(labels[0])):
                raise ValueError(f"its label is {labels[0]}, and there are {self.num_classes} identities, from 0 on")
            return name, image, int(labels[0])
        except _DAMAGED as error:
            return name, error, 0

    @property
    def labels(self):
        """int64 (N,): the identity of each image, -1 where a record is damaged."""
        return np.array([self._label(place) for place in range(len(self))], dtype=np.int64)

    def remarks(self):
        return ()  # it would take a look at every record

    def _label(self, place):
        """The label of a record, or -1 where it has none."""
        label = self._whole(place)[0][0]
        return int(label) if label >= 0 and label % 1 == 0 else -1

    def _whole(self, place):
        """(labels, the image's bytes) of a record; ([-1], b"") of a damaged one."""
        try:
            return self._read(place)
        except _DAMAGED:
            return [-1], b""

    def _record(self, place):
        """The bytes of a record. One that holds the magic number at a multiple of 4 is in parts, without it."""
        parts, part, offset = [], 1, int(self.offsets[place])
        while part in (1, 2):  # 0 is a record in one part, 3 the last of several
            magic, length = struct.unpack_from("<II", self.data, offset)
            if magic != MAGIC:
                raise ValueError(f"no record begins at byte {offset}")
            part, length = length >> 29, length & 0x1FFFFFFF
            parts.append(self.data[offset + 8 : offset + 8 + length].tobytes())
            if len(parts[-1]) < length:
                raise ValueError("the file ends in it")
            offset += 8 + -(-length // 4) * 4
        return struct.pack("<I", MAGIC).join(parts)

    def _read(self, place):
        """(labels, the image's bytes) of a record."""
        record = self._record(place)
        flag, label, *_ = struct.unpack_from(self.header, record)
        start = struct.calcsize(self.header)
        if not flag:
            return [label], record[start:]
        return np.frombuffer(record, "<f4", flag, start).tolist(), record[start + 4 * flag :]

    def _found_header(self):
        """The form of header after which an image begins, in one of the first records: one may be damaged, or hold none."""
        for place in range(min(len(self), 20)):
            try:
                record = self._record(place)
                (flag,) = struct.unpack_from("<I", record)
            except _DAMAGED:
                continue
            for header in HEADERS:
                if record[struct.calcsize(header) + 4 * flag :].startswith(_STARTS):
                    return header
        raise ConfigError(f"data: the first records of {self.path} hold no JPEG or PNG after a header of {', '.join(HEADERS)}")


def _whole_numbers(text):
    """int64 of a text of numbers with blanks between, without an object for each: there may be a hundred million."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # so NumPy says that the text ends in something else
        try:
            return np.fromstring(text, dtype=np.int64, sep=" ")
        except DeprecationWarning:
            raise ValueError("there is something else in it") from None


class Shards(Files):
    """Tar files with an image and a label, KEY.jpg and KEY.cls or KEY.json, for each key."""

    def __init__(self, paths, image_size):
        self.paths, self.image_size, self.files = paths, image_size, {}
        samples = [(number, each) for number, path in enumerate(paths) for each in _samples(path)]
        if not samples:
            raise ConfigError(
                f"data: {paths[0].parent} has tar files without images: KEY.jpg beside KEY.cls or KEY.json is wanted"
            )
        self.places = np.array([(number, each.offset, each.size) for number, each in samples], dtype=np.int64)
        self.labels = np.array([each.label for _, each in samples], dtype=np.int64)
        self.names, self.num_classes = [each.name for _, each in samples], int(self.labels.max()) + 1

    def __len__(self):
        return len(self.places)

    def named(self, label):
        return f"label {label}"

    def encoded(self, index):
        number, offset, size = self.places[index].tolist()
        if number not in self.files:
            self.files[number] = os.open(self.paths[number], os.O_RDONLY)
        return f"{self.paths[number]}, {self.names[index]}", os.pread(self.files[number], size, offset), int(self.labels[index])


def _label(value):
    if isinstance(value, bool | float) or int(value) >= 2**63:
        raise ValueError(f"a label is {value}")
    return int(value)


class _Sample(NamedTuple):
    offset: int  # of the image in the file
    size: int
    label: int
    name: str


def _samples(path):
    """The _Sample of each image of a tar file."""
    images, labels = {}, {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                key, _, kind = base.partition(".")
                if f".{kind.lower()}" in IMAGES:
                    images[folder, key] = member
                elif kind in ("cls", "json"):
                    text = archive.extractfile(member).read()
                    labels[folder, key] = _label(text if kind == "cls" else json.loads(text)["label"])
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(512) != bytes(512):  # tarfile takes a damaged header for the end
                raise ValueError(f"it is cut off or damaged at byte {archive.offset:,}, where a file or the end is expected")
    except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"data: {path} cannot be read: {type(error).__name__}: {error}; a tar without compression is wanted, with whole "
            'numbers from 0 on in its .cls, or as "label" in its .json'
        ) from None
    if without := [image.name for key, image in images.items() if labels.get(key, -1) < 0]:
        raise ConfigError(
            f"data: {len(without)} images of {path} have no label from 0 on, such as {without[0]}: add its .cls or .json"
        )
    return [_Sample(image.offset_data, image.size, labels[key], image.name) for key, image in images.items()]
