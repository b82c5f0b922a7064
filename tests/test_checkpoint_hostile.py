"""Do saves that meet leave each other alone, and is a folder that means harm refused: nothing run, opened or changed?"""

import builtins
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_worker import Model, assert_equal, left_over, optimizers_of, train, whole
from torch.distributed.checkpoint.metadata import TensorProperties

from cosface_kernels import CorruptCheckpointError, load_checkpoint, save_checkpoint


def saved(folder, value=0.0):
    model = Model(7, value=value)
    optimizers = optimizers_of(model)
    train(model, optimizers, 1)
    save_checkpoint(folder, model, optimizers)
    return model, optimizers


def assert_loads(folder, wanted):
    again = Model(7, value=9.0)
    optimizers = optimizers_of(again)
    load_checkpoint(folder, again, optimizers)
    assert_equal(whole(again, optimizers), whole(*wanted))


class Halted(threading.Thread):
    """A save that waits in its n-th fsync until `go`."""

    def __init__(self, folder, monkeypatch, at=1):
        super().__init__()
        self.folder, self.reached, self.may_go, self.result = folder, threading.Event(), threading.Event(), None
        fsync, calls = os.fsync, []

        def halting(descriptor):
            if threading.current_thread() is self:
                calls.append(descriptor)
                if len(calls) == at:
                    self.reached.set()
                    assert self.may_go.wait(300)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", halting)
        self.start()
        assert self.reached.wait(300)

    def run(self):
        try:
            self.result = saved(self.folder)
        except Exception as error:
            self.result = error

    def go(self):
        self.may_go.set()
        self.join(60)
        return self.result


@pytest.mark.parametrize("at", [1, 3, 5, 6], ids=["first file", "metadata", "manifest", "folder"])
def test_two_saves_of_one_name(tmp_path, monkeypatch, at):
    """The second is refused while the first lives, wherever that one is."""
    first = Halted(tmp_path / "a", monkeypatch, at)
    with pytest.raises(FileExistsError, match=r"another process or thread is saving .*a now"):
        saved(tmp_path / "a", value=1.0)
    saved(tmp_path / "b")
    assert_loads(tmp_path / "a", first.go())
    assert not left_over(tmp_path)


def test_a_lock_that_was_removed_before_it_was_taken_is_none(tmp_path, monkeypatch):
    """After one save opened the lock's file, another ended and removed it, and a third has made a file of its own."""
    flock, path, third = fcntl.flock, tmp_path / "a.tmp-lock", []

    def late(descriptor, operation):
        if not third:
            path.unlink()
            third.append(path.open("w"))
            flock(third[0], operation)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(FileExistsError, match=r"another process or thread is saving .*a now"):
        saved(tmp_path / "a")
    third[0].close()
    assert os.listdir(tmp_path) == ["a.tmp-lock"]


def no_locks(descriptor, operation):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_two_saves_of_one_name_on_a_disk_without_locks(tmp_path, monkeypatch):
    """Neither removes what may be the other's; the one that ends later fails, and says so."""
    monkeypatch.setattr(fcntl, "flock", no_locks)
    first = Halted(tmp_path / "a", monkeypatch)
    second = saved(tmp_path / "a", value=1.0)
    failure = first.go()
    assert isinstance(failure, OSError) and "was not saved" in str(failure), failure
    assert_loads(tmp_path / "a", second)
    assert not left_over(tmp_path)


@pytest.mark.parametrize("lost", ["__0_0.distcp", ".metadata", "shared.pt", "rank_0.pt", "manifest.json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 1)], ids=["removed", "truncated"])
def test_files_that_go_while_it_is_renamed(tmp_path, monkeypatch, lost, damage):
    """As by another program that tidies up: no checkpoint, and no report of one."""
    rename = os.rename

    def meddled(source, target):
        if Path(target) == tmp_path / "a":
            damage(Path(source) / lost)
        rename(source, target)

    monkeypatch.setattr(os, "rename", meddled)
    with pytest.raises(RuntimeError, match=f"was not saved.*has removed or changed {lost}"):
        saved(tmp_path / "a")
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "a"
    saved(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    shutil.copytree(original, tmp_path / "a")
    return tmp_path / "a"


def assert_refused(folder, match, error=CorruptCheckpointError):
    model = Model(7, value=5.0)
    optimizers = optimizers_of(model)
    train(model, optimizers, 1)
    before, generator = whole(model, optimizers), torch.get_rng_state()
    with pytest.raises(error, match=match):
        load_checkpoint(folder, model, optimizers)
    assert_equal(whole(model, optimizers), before)
    assert torch.equal(torch.get_rng_state(), generator)


def change_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(change(manifest)))


def put(folder, name, data):
    """A file with a sum that fits."""
    (folder / name).write_bytes(data)
    file = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change_manifest(folder, lambda manifest: {**manifest, "files": manifest["files"] | {name: file}})


@pytest.fixture
def opened(monkeypatch):
    """Every path that is opened, by whatever of Python's."""
    paths = []

    def recording(function):
        def call(path, *arguments, **options):
            paths.append(str(path))
            return function(path, *arguments, **options)

        return call

    for owner, name in ((os, "open"), (builtins, "open")):
        monkeypatch.setattr(owner, name, recording(getattr(owner, name)))
    return paths


@pytest.mark.parametrize(
    "name",
    ["/dev/zero", "/etc/passwd", "../secret", "sub/file", "", ".", "..", "a\0b", "manifest.json", "\ud800", "x" * 256, "a\nb"],
)
def test_manifest_that_leaves_its_folder(folder, opened, name):
    (folder.parent / "secret").touch()
    file = {"size": 0, "sha256": hashlib.sha256().hexdigest()}
    change_manifest(folder, lambda manifest: {**manifest, "files": manifest["files"] | {name: file}})
    opened.clear()
    assert_refused(folder, "is no name of a file of its folder")
    assert set(opened) <= {str(folder / "manifest.json")}


def device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
@pytest.mark.parametrize("make", [os.mkfifo, device, Path.mkdir])
def test_files_that_are_none(folder, opened, make, name):
    (folder / name).unlink()
    make(folder / name)
    opened.clear()
    assert_refused(folder, f"{name} is no regular file, and was not opened")
    assert str(folder / name) not in opened


SUM = "0" * 64
FILE = {"size": 1, "sha256": SUM}
ABSURD = [
    *(None, [], "a", 0, {}, {"format": 1}, {"files": {}}, {"format": 1, "files": None}, {"format": 1, "files": [FILE]}),
    *({"format": value, "files": {}} for value in (None, True, 1.0, "1", 2, 10**400, [], {})),
    *({"format": 1, "files": {"a": value}} for value in (None, 1, "a", [], {}, {"size": 1}, {"sha256": SUM})),
    *({"format": 1, "files": {"a": FILE | {"size": value}}} for value in (None, True, -1, 1.0, "1", 1e300, 10**400, [], {})),
    *({"format": 1, "files": {"a": FILE | {"sha256": value}}} for value in (None, 0, "", "0" * 63, "Z" * 64, "é" * 64, [], {})),
]


@pytest.mark.parametrize("manifest", ABSURD, ids=lambda manifest: repr(manifest)[:60])
def test_absurd_manifests(folder, manifest):
    change_manifest(folder, lambda _: manifest)
    assert_refused(folder, "manifest.json is damaged|has format|a is missing")


@pytest.mark.parametrize(
    "text",
    [b"[" * 10**6, b'{"format": 1, "files": ' + b"9" * 5000 + b"}", b'{"format": NaN}', b"\xff\xfe\x00"],
    ids=["deep", "long number", "NaN", "no text"],
)
def test_manifests_that_are_no_json(folder, text):
    (folder / "manifest.json").write_bytes(text)
    assert_refused(folder, "manifest.json is damaged")


class Runs:
    """Pickled, a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "name"), [(os.mkdir, "posix.mkdir"), (eval, "builtins.eval"), (torch.load, "torch.serialization.load")]
)
def test_pickles_that_run(folder, function, name):
    """Each file in turn, with sums that fit."""
    call = {"module/weight": Runs(function, f"open({str(folder / 'ran')!r}, 'w')")}
    torch.save(call, folder / "new")
    matches = {
        ".metadata": (pickle.dumps(call), rf"it names {name}, which describes no tensor and may run code"),
        "shared.pt": ((folder / "new").read_bytes(), "it is no plain data"),
        "rank_0.pt": ((folder / "new").read_bytes(), "it is no plain data"),
    }
    for file, (data, match) in matches.items():
        before = (folder / file).read_bytes()
        put(folder, file, data)
        assert_refused(folder, match)
        put(folder, file, before)
    assert not (folder / "ran").exists() and not Path("ran").exists()


def test_pickle_that_would_change_a_class_of_dcps(folder):
    """BUILD with a tuple sets attributes, also of a class."""
    text = b"ctorch.distributed.checkpoint.metadata\nTensorProperties\n(N}V__setstate__\nVchanged\nstb."
    before = TensorProperties.__setstate__
    put(folder, ".metadata", text)
    assert_refused(folder, r"\.metadata is damaged")
    assert TensorProperties.__setstate__ is before


def changed_weight(**changes):
    def change(metadata):
        tensors = metadata.state_dict_metadata
        tensors["module/weight"] = dataclasses.replace(tensors["module/weight"], **changes)

    return change


def changed_first_piece(**changes):
    def change(metadata):
        pieces = metadata.state_dict_metadata["module/weight"].chunks
        pieces[0] = dataclasses.replace(pieces[0], **changes)

    return change


def changed_item(**changes):
    def change(metadata):
        key = next(key for key in metadata.storage_data if key.fqn == "module/weight")
        metadata.storage_data[key] = dataclasses.replace(metadata.storage_data[key], **changes)

    return change


METADATA = {
    "huge tensor": (changed_weight(size=torch.Size([10**15, 3])), "the pieces of module/weight do not make it up"),
    "negative size": (changed_weight(size=torch.Size([-7, 3])), r"there is a size \(-7, 3\)"),
    "size is a list": (changed_weight(size=[7, 3]), "a list in place of a Size"),
    "no properties": (changed_weight(properties=None), "NoneType"),
    "no pieces": (changed_weight(chunks=[]), "do not make it up"),
    "pieces are no list": (changed_weight(chunks=5), "not iterable"),
    "piece past the end": (changed_first_piece(sizes=torch.Size([8, 3])), r"ends at \[8, 3\] of \(7, 3\)"),
    "piece elsewhere": (changed_first_piece(offsets=torch.Size([5, 0])), "module/weight"),
    "piece of other dimensions": (changed_first_piece(sizes=torch.Size([3])), "ValueError"),
    "other file": (changed_item(relative_path="../secret"), "in '../secret', which is no file of this checkpoint"),
    "device": (changed_item(relative_path="/dev/zero"), "in '/dev/zero', which is no file"),
    "past the file": (changed_item(offset=10**12), "at bytes 1000000000000 to"),
    "before the file": (changed_item(offset=-1), "at bytes -1 to"),
    "too short": (changed_item(length=3), "is longer than what was written"),
    "length is no number": (changed_item(length="all"), "a str in place of a int"),
    "no tensors": (lambda metadata: metadata.state_dict_metadata.clear(), "lacks a part"),
    "tensors are no dict": (lambda metadata: setattr(metadata, "state_dict_metadata", 3), "AttributeError"),
    "no places": (lambda metadata: setattr(metadata, "storage_data", None), "AttributeError"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_is_absurd(folder, case):
    change, match = METADATA[case]
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    put(folder, ".metadata", pickle.dumps(metadata))
    assert_refused(folder, match)


def test_metadata_with_an_absurd_memo(folder):
    """One flipped bit of a pickle had the process killed for memory: here the index is one that costs 160 MB."""
    data = pickle.dumps(pickle.loads((folder / ".metadata").read_bytes()), protocol=4)
    assert data[-1:] == pickle.STOP
    put(folder, ".metadata", data[:-1] + pickle.LONG_BINPUT + (10**7).to_bytes(4, "little") + pickle.STOP)
    assert_refused(folder, "notes an object number 10000000")


def without(key):
    return lambda found: {name: value for name, value in found.items() if name != key}


def optimizer_with(**changes):
    def change(found):
        return found | {"optimizers": found["optimizers"] | {"table": found["optimizers"]["table"] | changes}}

    return change


SHARED = {
    "no dict": lambda found: [found],
    **{f"no {key}": without(key) for key in ("world_size", "module", "optimizers")},
    "world size": lambda found: found | {"world_size": "1"},
    "module": lambda found: found | {"module": 0},
    "optimizers": lambda found: found | {"optimizers": ["table"]},
    "groups": optimizer_with(groups=3),
    "names": optimizer_with(groups=[{"options": {}}]),
    "options": optimizer_with(groups=[{"names": ["weight", "bias"], "options": None}]),
    "states": optimizer_with(states=[]),
    "state of a stranger": optimizer_with(states={"other": {"on_cpu": {}, "plain": {}}}),
    "state that was not saved": optimizer_with(states={"weight": {"on_cpu": {"other": True}, "plain": {}}}),
}


@pytest.mark.parametrize("case", SHARED)
def test_shared_part_that_is_absurd(folder, case):
    torch.save(SHARED[case](torch.load(folder / "shared.pt")), folder / "new")
    put(folder, "shared.pt", (folder / "new").read_bytes())
    assert_refused(folder, r"shared\.pt is no save_checkpoint's: it lacks a part")


def random_with(**changes):
    return lambda found: found | {"random": found["random"] | changes}


OWN = {
    "nothing": lambda found: None,
    "no random": without("random"),
    "no extra": without("extra"),
    "no generators": lambda found: found | {"random": {}},
    "torch": random_with(torch=torch.zeros(3)),
    "python": random_with(python=(3, (-1,) * 625, None)),
    "numpy": random_with(numpy=("MT19937", [-1] * 624, 0, 0, 0.0)),
}


@pytest.mark.parametrize("case", OWN)
def test_own_part_that_is_absurd(folder, case):
    torch.save(OWN[case](torch.load(folder / "rank_0.pt")), folder / "new")
    put(folder, "rank_0.pt", (folder / "new").read_bytes())
    assert_refused(folder, r"rank_0\.pt is no save_checkpoint's: it lacks a part")
