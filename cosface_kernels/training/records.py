"""Images in large files, read in any order: InsightFace's RecordIO (.rec with .idx), and tar shards in WebDataset's layout.

A record of RecordIO is a frame: magic u32, length u32 (its upper three bits say which part of a record it is), data, padded to 4
bytes. Its data are a header "IfQQ", flag u32, label f32, two ids u64; `flag` numbers f32 if there are several labels; the image.
Record 0 holds no image: its two labels are the first key of the identities' records, which hold none either, and their end.
"""

import json
import os
import struct
import tarfile
from pathlib import Path

import numpy as np

from .config import ConfigError
from .files import IMAGES, Files

MAGIC = 0xCED7230A
# mxnet's header, and forks with float64 labels, whose C compiler aligns them or not.
HEADERS = ("<IfQQ", "<I4xdQQ", "<IdQQ")
_STARTS = (b"\xff\xd8", b"\x89PNG", b"BM", b"RIFF")
FLOAT32_LABELS = 2**24  # a float32 holds whole numbers exactly up to here


class Records(Files):
    """A .rec file and its .idx."""

    def __init__(self, path, image_size):
        self.path, self.image_size, index = path, image_size, path.with_suffix(".idx")
        try:
            keys, offsets = np.array(index.read_text().split(), dtype=np.int64).reshape(-1, 2).T
            self.data = np.memmap(path, dtype=np.uint8, mode="r")
        except FileNotFoundError as error:
            raise ConfigError(f"data: there is no {error.filename}: a .rec file needs its .idx beside it") from None
        except ValueError as error:
            raise ConfigError(f"data: {index} or {path} is damaged: lines of KEY, tab, OFFSET are wanted ({error})") from None
        places = dict(zip(keys.tolist(), offsets.tolist(), strict=True))
        last = int(offsets.max())
        if last + 8 > len(self.data) or last + 8 + self._length(last) > len(self.data):
            raise ConfigError(
                f"data: {path} is cut off: its .idx has a record at byte {last:,}, and the file ends at "
                f"{len(self.data):,}; copy it anew"
            )
        # Not the first one, which may hold no image.
        self.header = self._found_header(int(keys[min(1, len(keys) - 1)]), int(offsets[min(1, len(keys) - 1)]))
        ends, image = self._labels(self._record(places[0])) if 0 in places else ([], b"")
        if len(ends) == 2 and not image:
            self.keys, self.num_classes = np.arange(1, int(ends[0])), int(ends[1] - ends[0])
            self.offsets = np.array([places.get(key, -1) for key in self.keys.tolist()])
        else:
            self.keys, self.offsets = keys, offsets
            self.num_classes = 1 + int(max(self._labels(self._record(each))[0][0] for each in offsets.tolist()))
        if self.header == HEADERS[0] and self.num_classes > FLOAT32_LABELS:
            raise ConfigError(
                f"data: {path} has {self.num_classes:,} identities, and its float32 labels are exact up to {FLOAT32_LABELS:,}: "
                "write it as tar shards"
            )

    def __len__(self):
        return len(self.keys)

    def encoded(self, index):
        name = f"{self.path}, record {self.keys[index]}"
        try:
            labels, image = self._labels(self._record(int(self.offsets[index])))
            label = int(labels[0])
            if not 0 <= label < self.num_classes:
                raise ValueError(f"label {labels[0]}, and there are {self.num_classes} identities")
            return name, image, label
        except (ValueError, struct.error) as error:
            return name, error, 0

    def _length(self, offset):
        magic, length = struct.unpack_from("<II", self.data, offset)
        if magic != MAGIC:
            raise ValueError(f"no record begins at byte {offset}")
        return length & 0x1FFFFFFF

    def _record(self, offset):
        """The bytes of the record at an offset. One that holds the magic number at a multiple of 4 is in parts, without it."""
        parts, part = [], 0
        if offset < 0:
            raise ValueError("it is not in the .idx")
        while part in (0, 1, 2):
            length = self._length(offset)
            part = self.data[offset + 7] >> 5
            parts.append(self.data[offset + 8 : offset + 8 + length].tobytes())
            if len(parts[-1]) < length:
                raise ValueError("the file ends in it")
            offset += 8 + -(-length // 4) * 4
            if part in (0, 3):
                break
        return struct.pack("<I", MAGIC).join(parts)

    def _labels(self, record):
        """(labels, the image's bytes)"""
        flag, label, *_ = struct.unpack_from(self.header, record)
        start = struct.calcsize(self.header)
        if not flag:
            return [label], record[start:]
        return np.frombuffer(record, "<f4", flag, start).tolist(), record[start + 4 * flag :]

    def _found_header(self, key, offset):
        """The form of header after which an image begins in a record."""
        record = self._record(offset)
        for header in HEADERS:
            (flag,) = struct.unpack_from("<I", record)
            if record[struct.calcsize(header) + 4 * flag :].startswith(_STARTS):
                return header
        raise ConfigError(f"data: record {key} of {self.path} holds no JPEG or PNG after a header of {', '.join(HEADERS)}")


class Shards(Files):
    """Tar files with an image and a label, KEY.jpg and KEY.cls or KEY.json, for each key."""

    def __init__(self, paths, image_size):
        self.paths, self.image_size, self.files, samples = paths, image_size, {}, []
        for number, path in enumerate(paths):
            samples += [(number, *each) for each in _samples(path)]
        if not samples:
            raise ConfigError(
                f"data: {paths[0].parent} has tar files without images: KEY.jpg beside KEY.cls or KEY.json is wanted"
            )
        self.places = np.array([each[:4] for each in samples], dtype=np.int64)
        self.names, self.num_classes = [each[4] for each in samples], int(self.places[:, 3].max()) + 1

    def __len__(self):
        return len(self.places)

    def encoded(self, index):
        number, offset, size, label = self.places[index].tolist()
        if number not in self.files:
            self.files[number] = os.open(self.paths[number], os.O_RDONLY)
        return f"{self.paths[number]}, {self.names[index]}", os.pread(self.files[number], size, offset), label


def _samples(path):
    """(offset, size, label, name) of each image of a tar file."""
    images, labels = {}, {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                key, _, kind = base.partition(".")
                if f".{kind.lower()}" in IMAGES:
                    images[folder, key] = member.offset_data, member.size, member.name
                elif kind in ("cls", "json"):
                    text = archive.extractfile(member).read()
                    labels[folder, key] = int(text) if kind == "cls" else int(json.loads(text)["label"])
    except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"data: {path} cannot be read: {type(error).__name__}: {error}; a tar without compression is wanted, with whole "
            'numbers from 0 on in its .cls, or as "label" in its .json'
        ) from None
    if without := [images[key][2] for key in images if labels.get(key, -1) < 0]:
        raise ConfigError(
            f"data: {len(without)} images of {path} have no label from 0 on, such as {without[0]}: add its .cls or .json"
        )
    return [(offset, size, labels[key], name) for key, (offset, size, name) in images.items()]


def open_records(path, image_size):
    """The source in a path, or None if it has neither records nor shards."""
    path = Path(path)
    if path.suffix == ".rec" or (path / "train.rec").exists():
        return Records(path if path.suffix == ".rec" else path / "train.rec", image_size)
    paths = [path] if path.suffix == ".tar" and path.is_file() else sorted(path.glob("*.tar")) if path.is_dir() else []
    return Shards(paths, image_size) if paths else None
