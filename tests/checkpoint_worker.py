"""The processes that test_checkpoint.py starts: ranks, a resumed training, and saves that are killed at every step."""

import copy
import errno
import itertools
import os
import random
import resource
import shutil
import signal
import sys
import warnings
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from cosface_kernels import CorruptCheckpointError, CosFaceLoss, load_checkpoint, save_checkpoint
from cosface_kernels.checkpoint import files, pieces

SIZE = 3


class Model(nn.Module):
    """A backbone's parameter and a table with bias and step count, sharded over `mesh` or plain."""

    def __init__(self, rows, mesh=None, value=0.0, dtype=torch.float32):
        super().__init__()
        place = (lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)])) if mesh else (lambda tensor: tensor)
        table = value + torch.arange(rows * SIZE, dtype=dtype).reshape(rows, SIZE) / 7
        self.weight = nn.Parameter(place(table))
        self.bias = nn.Parameter(place(table[:, 0] / 3))
        self.backbone = nn.Linear(2, 3)
        nn.init.constant_(self.backbone.weight, value + 0.3)
        nn.init.constant_(self.backbone.bias, value)
        self.register_buffer("sample_step", torch.zeros((), dtype=torch.int64))


class TableSGD(torch.optim.SGD):
    """SGD with state of every kind: as the table and of other dtypes, a number for each row, and numbers."""

    def step(self):
        super().step()
        for parameter in self.param_groups[0]["params"]:
            rows = parameter.detach() if parameter.dim() == 1 else parameter.detach()[:, 0]
            state = self.state[parameter]
            state["codes"] = (parameter.detach() * 5).to(torch.int8)
            state["half"] = parameter.detach().to(torch.bfloat16)
            state["scale"] = rows * 2
            state["skipped"] = state.get("skipped", torch.zeros((), dtype=torch.int64)) + 1
            state["none"] = None


def optimizers_of(model):
    return {
        "table": TableSGD([model.weight, model.bias], lr=0.1, momentum=0.9),
        "backbone": torch.optim.AdamW(model.backbone.parameters(), lr=0.01),
    }


def train(model, optimizers, steps):
    """Gradients are elementwise, so that any sharding gives the same bits."""
    for _ in range(steps):
        model.sample_step += 1
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 0.5 - 1
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()


def whole(model, optimizers):
    """{key: plain copy} of all state of both."""
    found = dict(model.state_dict())
    names = {parameter: name for name, parameter in model.named_parameters()}
    for which, optimizer in optimizers.items():
        found |= {f"{which}/{names[p]}/{key}": value for p, state in optimizer.state.items() for key, value in state.items()}
    return {key: (value.full_tensor() if isinstance(value, DTensor) else copy.deepcopy(value)) for key, value in found.items()}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for key, value in wanted.items():
        if value is None:
            assert found[key] is None, key
        else:
            assert found[key].dtype == value.dtype and torch.equal(found[key], value), (key, found[key], value)


def draws():
    """The next numbers of all generators."""
    return [torch.rand(()).item(), random.random(), numpy.random.rand()]


def raises(kind, function, *arguments):
    """The error of that kind that function raises."""
    try:
        function(*arguments)
    except kind as error:
        return error
    raise AssertionError(f"no {kind}")


def left_over(folder):
    return [path.name for path in folder.iterdir() if ".tmp-" in path.name]


def two_ranks(folder, rank, mesh):
    """Saves "sharded" (7 rows, so 4 and 3) for others to load, loads it, and fails in several ways."""
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(rank)
    model = Model(7, mesh)
    optimizers = optimizers_of(model)
    train(model, optimizers, 2)
    save_checkpoint(folder / "sharded", model, optimizers, extra={"rank": rank})
    saved, wanted_draws = whole(model, optimizers), draws()
    train(model, optimizers, 2)
    trained = whole(model, optimizers)
    if rank == 0:
        torch.save({"saved": saved, "trained": trained}, folder / "wanted.pt")

    fresh = Model(7, mesh, value=5.0)
    fresh_optimizers = optimizers_of(fresh)
    assert load_checkpoint(folder / "sharded", fresh, fresh_optimizers) == {"rank": rank}
    assert draws() == wanted_draws
    assert_equal(whole(fresh, fresh_optimizers), saved)
    assert fresh_optimizers["table"].state[fresh.weight]["scale"].placements == (Shard(0),)
    train(fresh, fresh_optimizers, 2)
    assert_equal(whole(fresh, fresh_optimizers), trained)

    disk_full_on_rank_1(folder, rank, model, optimizers)
    momentum = optimizers["table"].state[model.weight]
    momentum["momentum_buffer"] = momentum["momentum_buffer"].to_local()
    error = raises(ValueError, save_checkpoint, folder / "local", model, optimizers)
    assert "momentum_buffer has this rank's rows of weight as a plain tensor" in str(error), error
    del momentum["momentum_buffer"]
    assert "exists" in str(raises(FileExistsError, save_checkpoint, folder / "sharded", model))
    larger = Model(8, mesh)
    before = whole(larger, {})
    error = raises(ValueError, load_checkpoint, folder / "sharded", larger)
    assert "weight has shape (7, 3) in the checkpoint, (8, 3) here" in str(error)
    assert_equal(whole(larger, {}), before)
    if rank == 0:
        shutil.copytree(folder / "sharded", folder / "flipped")
        flip(folder / "flipped" / "__1_0.distcp")
    dist.barrier()
    assert "__1_0.distcp was changed" in str(raises(CorruptCheckpointError, load_checkpoint, folder / "flipped", model))
    killed_rank_1(folder, rank, model, optimizers)


def disk_full_on_rank_1(folder, rank, model, optimizers):
    fsync = os.fsync
    if rank == 1:
        os.fsync = no_space
    error = raises(OSError, save_checkpoint, folder / "full", model, optimizers)
    os.fsync = fsync
    assert error.errno == errno.ENOSPC and "rank 1: OSError: [Errno 28] No space left on device" in str(error), error
    dist.barrier()
    assert not (folder / "full").exists() and not left_over(folder)
    load_checkpoint(folder / "sharded", model, optimizers)


def no_space(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def leave():
    """Ends the process without taking the interpreter down. DTensor's caches keep the process group alive, and a thread of Gloo's
    that lets go of its last tensor after the interpreter is gone aborts (pytorch/pytorch#179291)."""
    sys.stderr.flush()
    os._exit(0)


def killed_rank_1(folder, rank, model, optimizers):
    if rank == 1:
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
    assert "was not saved" in str(raises(RuntimeError, save_checkpoint, folder / "killed", model, optimizers))
    assert not (folder / "killed").exists() and not left_over(folder)
    leave()


def three_ranks(folder, rank, mesh):
    """Loads what two ranks and what one process saved (7 rows, so 3, 3 and 1), and saves 4 rows (2, 2 and none)."""
    wanted = torch.load(folder / "wanted.pt")
    for name in ("sharded", "plain"):
        model = Model(7, mesh, value=5.0)
        optimizers = optimizers_of(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            extra = load_checkpoint(folder / name, model, optimizers)
        assert extra == {"rank": 0}
        assert [str(w.message) for w in caught if "seed them" in str(w.message)] or rank != 0
        assert_equal(whole(model, optimizers), wanted["saved"])
        train(model, optimizers, 2)
        assert_equal(whole(model, optimizers), wanted["trained"])

    grown = Model(9, mesh, value=5.0)
    before, optimizers = whole(grown, {}), optimizers_of(grown)
    load_checkpoint(folder / "sharded", grown, optimizers, grow=("weight", "bias"))
    found = whole(grown, optimizers)
    for key, value in wanted["saved"].items():
        if isinstance(value, torch.Tensor) and value.shape[:1] == (7,):
            assert torch.equal(found[key][:7], value), key
            assert torch.equal(found[key][7:], before[key][7:] if key in before else torch.zeros_like(found[key][7:])), key
        else:
            assert value is found[key] is None or torch.equal(found[key], value), key
    train(grown, optimizers, 1)

    small = Model(4, mesh)
    optimizers = optimizers_of(small)
    train(small, optimizers, 1)
    assert rank != 2 or small.weight.to_local().numel() == 0
    save_checkpoint(folder / "empty", small, optimizers)
    again = Model(4, mesh, value=5.0)
    again_optimizers = optimizers_of(again)
    load_checkpoint(folder / "empty", again, again_optimizers)
    assert_equal(whole(again, again_optimizers), whole(small, optimizers))


def flip(path):
    """Changes one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def kill_at(n):
    """Kills this process -9 at its n-th change to the disk; of writes, some thirty for a small tensor, every 25th counts."""
    file, left, writes = files._HashedFile, itertools.count(n, -1), itertools.count(1)

    def counted(function):
        def call(*arguments, **options):
            if (function is not write or next(writes) % 25 == 0) and next(left) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    write = file.write
    for owner, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (file, "__init__"), (file, "write"), (file, "close")):
        setattr(owner, name, counted(getattr(owner, name)))


def forked(function):
    """The status of a child that runs function."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def killed_saves(folder):
    """Kills a save at its first change to the disk, its second, ... until one ends, and loads and saves after each."""
    model = Model(7)
    optimizers = optimizers_of(model)
    train(model, optimizers, 1)
    save_checkpoint(folder / "step-1", model, optimizers)
    first = whole(model, optimizers)
    train(model, optimizers, 1)
    second = whole(model, optimizers)

    def load(name):
        again = Model(7, value=5.0)
        again_optimizers = optimizers_of(again)
        load_checkpoint(folder / name, again, again_optimizers)
        return whole(again, again_optimizers)

    kills = 0
    while True:

        def killed_save(n=kills + 1):
            kill_at(n)
            save_checkpoint(folder / "step-2", model, optimizers)

        status = forked(killed_save)
        assert_equal(load("step-1"), first)
        if (folder / "step-2").exists():  # renamed, so all of it is there, killed or not
            assert_equal(load("step-2"), second)
            shutil.rmtree(folder / "step-2")
        if status == 0:
            break
        assert status == signal.SIGKILL, status
        kills += 1
        assert len(left_over(folder)) <= 2  # a folder and the lock: the save cleaned up after the one before
    assert kills > 30 and not left_over(folder), (kills, left_over(folder))
    full_disks(folder, model, optimizers, (0, 1, 2000, 5000))


def full_disk_under_torchs_writer(folder):
    """Past what is buffered its write fails, for which it has an error of its own."""
    pieces.PIECE_BYTES = 2**24
    full_disks(folder, CosFaceLoss(16, 20_000), {}, (5000, 500_000))


def full_disks(folder, model, optimizers, limits):
    """Files may not grow beyond a limit: writes fail as on a full disk."""
    for limit in limits:

        def limited(limit=limit):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            error = raises(OSError, save_checkpoint, folder / "step-2", model, optimizers)
            assert error.errno == errno.EFBIG and "was not saved" in str(error), error

        assert forked(limited) == 0, limit
        assert not (folder / "step-2").exists() and not left_over(folder)


def trained(optimizer_class, options):
    """A model with dropout and batch statistics over a CosFace table, its optimizer, and a step that returns the loss."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 5))
    model = nn.ModuleDict({"backbone": backbone, "head": CosFaceLoss(5, 300, scale=16.0)})
    optimizer = optimizer_class(model.parameters(), **options)

    def step():
        loss = model["head"](model["backbone"](torch.randn(32, 6)), torch.randint(300, (32,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return model, optimizer, step


TRAININGS = {"sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), "adamw": (torch.optim.AdamW, {"lr": 0.01})}


def resume(folder):
    """Goes on where the checkpoints of TRAININGS stopped, in a process that has drawn other numbers."""
    for name, training in TRAININGS.items():
        model, optimizer, step = trained(*training)
        torch.rand(5)
        assert load_checkpoint(folder / name, model, optimizer) == {"epoch": 3}
        losses = [step() for _ in range(3)]
        torch.save({"losses": losses, "state": model.state_dict()}, folder / f"{name}-resumed.pt")


def main(scenario, folder, rank=0, world_size=1):
    torch.set_num_threads(1)
    pieces.PIECE_BYTES = 2 * SIZE * 4  # two rows of float32
    folder, rank, world_size = Path(folder), int(rank), int(world_size)
    if world_size == 1:
        globals()[scenario](folder)
    else:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{scenario}", rank=rank, world_size=world_size)
        globals()[scenario](folder, rank, dist.init_device_mesh("cpu", (world_size,)))
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
