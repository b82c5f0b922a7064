"""Are InsightFace's records and tar shards read as they were written, and damage in them said by name?"""

import io
import json
import os
import struct
import tarfile

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from cosface_kernels.training import config, data, faces, records

LABELS = [0, 2, 1, 2]


def image(number, kind="png"):
    """(bytes of a file, its pixels)"""
    pixels = faces.render([number], [0], 16)[0]
    stream = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(stream, kind)
    return stream.getvalue(), pixels


def write_rec(folder, header="<IfQQ", several=False, payloads=None, labels=LABELS, ends=(5, 8)):
    """As mxnet.recordio.MXIndexedRecordIO writes, with pack for one label or several.

    InsightFace's record 0 is in front, and behind there is a record for each of three identities, without an image.
    """
    payloads = payloads or [image(number)[0] for number in range(len(LABELS))]
    contents = [struct.pack(header, 2, 0, 0, 0) + np.array(ends, np.float32).tobytes()]
    for label, payload in zip([*labels, 0, 0, 0], [*payloads, b"", b"", b""], strict=True):
        several_labels = np.array([label, 9], np.float32).tobytes() if several else b""
        contents.append(struct.pack(header, 2 * several, label, 0, 0) + several_labels + payload)
    offsets, stream = [], io.BytesIO()
    for content in contents:
        offsets.append(stream.tell())
        # dmlc's writer leaves the magic number at a multiple of four out, and cuts the record there.
        parts, start, magic = [], 0, struct.pack("<I", records.MAGIC)
        for place in range(0, len(content) - 3, 4):
            if content[place : place + 4] == magic:
                parts.append(content[start:place])
                start = place + 4
        parts.append(content[start:])
        for number, part in enumerate(parts):
            kind = 0 if len(parts) == 1 else 1 if number == 0 else 3 if number == len(parts) - 1 else 2
            stream.write(magic + struct.pack("<I", kind << 29 | len(part)) + part + b"\0" * (-len(part) % 4))
    (folder / "train.rec").write_bytes(stream.getvalue())
    (folder / "train.idx").write_text("".join(f"{key}\t{offset}\n" for key, offset in enumerate(offsets)))


def opened(path):
    return data.open_source(config.Config(data=str(path), image_size=16))


def check(source):
    assert (len(source), source.num_classes) == (4, 3)
    images, labels, damaged = source.batch([3, 0, 1])
    assert labels.tolist() == [2, 0, 2] and not damaged
    assert (images.numpy() == np.stack([image(number)[1] for number in (3, 0, 1)])).all()


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("header", records.HEADERS)
def test_records(tmp_path, header, several):
    write_rec(tmp_path, header, several)
    check(opened(tmp_path))
    check(opened(tmp_path / "train.rec"))


def test_a_record_with_the_magic_number_in_it(tmp_path):
    """In the text of a PNG, at a multiple of four, once and twice in a row."""
    first, _ = image(0)
    magic = struct.pack("<I", records.MAGIC)
    payloads = [first + b"\0" * (-len(first) % 4) + magic * 2 + b"end", *(image(number)[0] for number in (1, 2, 3))]
    write_rec(tmp_path, payloads=payloads)
    source = opened(tmp_path)
    assert source.encoded(0)[1] == payloads[0]
    check(source)


def test_damage_of_records(tmp_path):
    write_rec(tmp_path, payloads=[*(image(number)[0] for number in (0, 1, 2)), image(3)[0][:60]])
    ((name, why),) = opened(tmp_path).batch([0, 3])[2].values()
    assert name == f"{tmp_path}/train.rec, record 4" and why
    os.truncate(tmp_path / "train.rec", 2000)
    with pytest.raises(config.ConfigError, match=r"train\.rec is cut off: its \.idx has a record at byte"):
        opened(tmp_path)
    (tmp_path / "train.idx").unlink()
    with pytest.raises(config.ConfigError, match=r"there is no .*train\.idx"):
        opened(tmp_path)
    write_rec(tmp_path, payloads=[b"none"] * 4)
    with pytest.raises(config.ConfigError, match=r"first records of .* hold no JPEG or PNG"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("", "there are none"),
        ("0\t0\n1", "lines of KEY, tab, OFFSET are wanted"),
        ("0\t0\n1\tx\n", "something else in it"),
        ("0\t0\n1\t-4\n", "some below 0"),
        ("0\t0\n1\t99999999999999999999\n", "is cut off"),
        ("0\t0\n1\t40\n", "has 1 images of 4"),
        ("1\t8\n", "hold no JPEG or PNG"),
    ],
)
def test_a_damaged_index(tmp_path, index, message):
    write_rec(tmp_path)
    (tmp_path / "train.idx").write_text(index)
    with pytest.raises(config.ConfigError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize("ends", [(np.nan, 8), (5, np.inf), (0, 8), (5, 4), (9e8, 9e9)])
def test_a_front_that_counts_wrong(tmp_path, ends):
    write_rec(tmp_path, ends=ends)
    with pytest.raises(config.ConfigError, match=r"record 0 of .* is damaged|has 7 images of"):
        opened(tmp_path)


@pytest.mark.parametrize("label", [np.nan, np.inf, -1, 1.5, 3])
def test_a_label_that_is_none(tmp_path, label):
    """With record 0, which counts the identities, and without."""
    write_rec(tmp_path, labels=[label, *LABELS[1:]])
    assert list(opened(tmp_path).batch([0, 1])[2]) == [0]
    lines = (tmp_path / "train.idx").read_text().splitlines()
    (tmp_path / "train.idx").write_text("\n".join(lines[1:5]))
    source = opened(tmp_path)
    assert source.num_classes == (4 if label == 3 else 3)
    assert list(source.batch([0, 1])[2]) == ([] if label == 3 else [0])


def test_counts_that_float32_rounds(tmp_path, monkeypatch):
    """Of 42 million images record 0 has the number only to a multiple of four: the records themselves say where they end."""
    monkeypatch.setattr(records, "FLOAT32_LABELS", 4)
    for ends in ((4, 8), (5, 8), (8, 12)):
        write_rec(tmp_path, ends=ends)
        check(opened(tmp_path))


def test_labels_that_float32_cannot_hold(tmp_path, monkeypatch):
    write_rec(tmp_path)
    monkeypatch.setattr(records, "FLOAT32_LABELS", 2)
    with pytest.raises(config.ConfigError, match="has 3 identities, and its float32 labels are exact up to 2"):
        opened(tmp_path)


def write_tar(path, samples):
    with tarfile.open(path, "w") as archive:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_tar_shards(tmp_path):
    pairs = [
        (f"set/{number:03}.png", image(number)[0], (f"set/{number:03}.cls", b"%d" % label))
        for number, label in enumerate(LABELS[:2])
    ]
    write_tar(tmp_path / "0.tar", [each for name, content, label in pairs for each in ((name, content), label)])
    more = [(f"{number}.json", json.dumps({"label": label}).encode()) for number, label in enumerate(LABELS) if number > 1]
    write_tar(tmp_path / "1.tar", [*more, *((f"{number}.png", image(number)[0]) for number in (2, 3))])
    check(opened(tmp_path))
    assert len(opened(tmp_path / "1.tar")) == 2
    write_tar(tmp_path / "1.tar", [("a.png", image(0)[0])])
    with pytest.raises(config.ConfigError, match=r"1 images of .*1\.tar have no label from 0 on, such as a\.png"):
        opened(tmp_path)
    for content in (b"1.5", b"true", b'"x"', b"null", b"-1", b"["):
        write_tar(tmp_path / "1.tar", [("a.png", image(0)[0]), ("a.json", b'{"label": ' + content + b"}")])
        with pytest.raises(config.ConfigError, match=r"1\.tar cannot be read|have no label from 0 on"):
            opened(tmp_path)
    write_tar(tmp_path / "1.tar", [("a.png", image(0)[0]), ("a.cls", b"ann")])
    with pytest.raises(config.ConfigError, match=r"1\.tar cannot be read: ValueError"):
        opened(tmp_path)
    write_tar(tmp_path / "1.tar", [("a.png", image(0)[0]), ("a.cls", b"9" * 30)])
    with pytest.raises(config.ConfigError, match=r"1\.tar cannot be read: ValueError: a label is b'9999"):
        opened(tmp_path)


def test_a_damaged_shard(tmp_path):
    """Cut off in an image, in a header and between; a header of other bytes, which tarfile takes for the end."""
    samples = [each for number in range(4) for each in ((f"{number}.png", image(number)[0]), (f"{number}.cls", b"%d" % number))]
    write_tar(tmp_path / "0.tar", samples)
    (remark,) = opened(tmp_path).remarks()
    assert remark.startswith("4 of 4 identities have one image, such as label 0")
    whole = (tmp_path / "0.tar").read_bytes()
    with tarfile.open(tmp_path / "0.tar") as archive:
        third = archive.getmember("2.png")
    for size in (third.offset, third.offset + 100, third.offset_data, third.offset_data + 9, archive.offset):
        (tmp_path / "0.tar").write_bytes(whole[:size])
        with pytest.raises(config.ConfigError, match=r"0\.tar cannot be read: .*(cut off or damaged at byte|unexpected end)"):
            opened(tmp_path)
    (tmp_path / "0.tar").write_bytes(whole[: third.offset] + b"x" * 512 + whole[third.offset + 512 :])
    with pytest.raises(config.ConfigError, match=rf"cut off or damaged at byte {third.offset:,}, where a file"):
        opened(tmp_path)
