"""Checkpoints and tables whose bytes were changed: an error of ours and nothing else changed, or what was saved."""

import functools
import hashlib
import json
import random
import shutil
import tempfile
from pathlib import Path

import torch
from checkpoint_worker import Model, assert_equal, optimizers_of, train, whole

from cosface_kernels import CorruptCheckpointError, load_checkpoint, save_checkpoint
from cosface_kernels.tools.convert import convert

NAMES = ["manifest.json", ".metadata", "shared.pt", "rank_0.pt", "__0_0.distcp", "table.pt", "table.pt"]
SPACE = {
    "file": NAMES,
    "change": ["flip", "flip", "bytes", "truncate", "insert", "zeros", "swap"],
    "refit": [False, True],  # whether the manifest has the sum of the changed file
    "seed": [*range(10**6)],
}


def settle(case):
    return case


def check(case):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        (_table if case["file"] == "table.pt" else _checkpoint)(case, Path(folder))


@functools.cache
def _model():
    model = Model(7)
    optimizers = optimizers_of(model)
    train(model, optimizers, 1)
    return model, optimizers


@functools.cache
def _original():
    """{name: bytes} of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder, "a"), *_model(), extra={"epoch": 3})
        return {path.name: path.read_bytes() for path in Path(folder, "a").iterdir()}


def _changed(case, data):
    generator = random.Random(case["seed"])
    place = generator.randrange(len(data))
    length = generator.randrange(1, 20)
    changed = bytearray(data)
    match case["change"]:
        case "flip":
            changed[place] ^= 1 << generator.randrange(8)
        case "bytes":
            changed[place : place + length] = generator.randbytes(length)
        case "truncate":
            del changed[place:]
        case "insert":
            changed[place:place] = generator.randbytes(length)
        case "zeros":
            changed[place:] = bytes(len(data) - place)
        case "swap":
            other = generator.randrange(len(data))
            changed[place : place + length], changed[other : other + length] = (
                changed[other : other + length],
                changed[place : place + length],
            )
    return bytes(changed)


def _checkpoint(case, folder):
    files = dict(_original())
    files[case["file"]] = changed = _changed(case, files[case["file"]])
    if case["refit"] and case["file"] != "manifest.json":
        manifest = json.loads(files["manifest.json"])
        manifest["files"][case["file"]] = {"size": len(changed), "sha256": hashlib.sha256(changed).hexdigest()}
        files["manifest.json"] = json.dumps(manifest).encode()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    model = Model(7, value=5.0)
    optimizers = optimizers_of(model)
    train(model, optimizers, 1)
    before = whole(model, optimizers)
    try:
        extra = load_checkpoint(folder, model, optimizers)
    except CorruptCheckpointError:
        assert_equal(whole(model, optimizers), before)
    except ValueError as error:
        assert case["refit"] and "does not fit, and nothing was loaded" in str(error), error
        assert_equal(whole(model, optimizers), before)
    except RuntimeError as error:
        assert case["refit"] and "could not be read to its end" in str(error), error
    else:
        if not case["refit"]:
            assert extra == {"epoch": 3}
            assert_equal(whole(model, optimizers), whole(*_model()))


def _table(case, folder):
    table = torch.arange(60.0).view(20, 3)
    torch.save({"weight": table}, folder / "in.pt")
    shutil.copy(folder / "in.pt", folder / "out.pt")
    (folder / "in.pt").write_bytes(_changed(case, (folder / "in.pt").read_bytes()))
    try:
        convert([folder / "in.pt"], folder / "out.pt", system="insightface", force=True)
    except ValueError as error:
        assert "in.pt" in str(error), error
    assert torch.equal(torch.load(folder / "out.pt")["weight"], table)
    assert sorted(path.name for path in folder.iterdir()) == ["in.pt", "out.pt"]
