"""Saves and conversions that die in their n-th call of the system: what was there is whole, what is new is whole or not there."""

import fcntl
import os
import shutil
import signal
import tempfile
from pathlib import Path

import torch
from checkpoint_worker import Model, assert_equal, left_over, optimizers_of, train, whole

from cosface_kernels import load_checkpoint, save_checkpoint
from cosface_kernels.checkpoint import files
from cosface_kernels.tools.convert import convert

CALLS = {os: ("open", "close", "mkdir", "fsync", "rename", "replace", "unlink", "rmdir", "scandir", "stat"), fcntl: ("flock",)}
MOST = {"save": 900, "convert": 40}  # calls, and some more: past its last one a save is whole
SPACE = {
    "what": ["save", "save", "save", "convert"],
    "turn": [*range(1, MOST["save"] + 1)],
    "torn": [False, True],  # a write of which half is on the disk
    "left": [False, True],  # whether a killed save of that name was there
}


def settle(case):
    return case | {"turn": (case["turn"] - 1) % MOST[case["what"]] + 1}


def check(case):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        (_killed_save if case["what"] == "save" else _killed_conversion)(case, Path(folder))


def _killed_save(case, folder):
    model = Model(7)
    optimizers = optimizers_of(model)
    train(model, optimizers, 1)
    save_checkpoint(folder / "step-1", model, optimizers)
    first = whole(model, optimizers)
    train(model, optimizers, 1)
    second = whole(model, optimizers)
    if case["left"]:
        shutil.copytree(folder / "step-1", folder / "step-2.tmp-0123456789abcdef")
    _dying(case, lambda: save_checkpoint(folder / "step-2", model, optimizers))
    assert_equal(_loaded(folder / "step-1"), first)
    if not (folder / "step-2").exists():
        save_checkpoint(folder / "step-2", model, optimizers)
        assert not left_over(folder), left_over(folder)
    assert_equal(_loaded(folder / "step-2"), second)


def _loaded(folder):
    model = Model(7, value=5.0)
    optimizers = optimizers_of(model)
    load_checkpoint(folder, model, optimizers)
    return whole(model, optimizers)


def _killed_conversion(case, folder):
    """Convert two shards over existing files: each file must be the old one or the new one."""
    tables = torch.arange(10.0).view(5, 2), -torch.arange(10.0).view(5, 2)
    for name, table in zip(("in", "old"), tables, strict=True):
        torch.save({"weight": table}, folder / f"{name}.pt")
    outs = [folder / f"{rank}.pt" for rank in range(2)]
    for out in outs:
        shutil.copy(folder / "old.pt", out)
    _dying(case, lambda: convert([folder / "in.pt"], folder / "{rank}.pt", to="insightface", ranks=2, force=True))
    for out, new in zip(outs, tables[0].split([3, 2]), strict=True):
        found = torch.load(out)["weight"]
        assert torch.equal(found, tables[1]) or torch.equal(found, new), out


def _dying(case, function):
    """Runs function in a process that is killed before its n-th call, if there are as many."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _arm(case)
            function()
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"it was not killed, and ended with status {status}"


def _arm(case):
    left = [case["turn"]]

    def counted(function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    def torn_write(self, data):
        left[0] -= 1
        if left[0] == 0:
            write(self, memoryview(data)[: memoryview(data).nbytes // 2] if case["torn"] else b"")
            self.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, data)

    write = files._HashedFile.write
    files._HashedFile.write = torn_write
    for owner, names in CALLS.items():
        for name in names:
            setattr(owner, name, counted(getattr(owner, name)))
