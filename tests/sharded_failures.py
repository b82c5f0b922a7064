"""Checks of sharded_worker.py: one rank is wrong, late, killed or out of memory, and no other waits in vain."""

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from rounding import NUM_CLASSES
from sharded_world import assert_equals_single, check, draw, fused_pair, raises, sharded

from cosface_kernels.ops import recording

# What one rank does wrong: (features, labels) -> them; the error of all.
MISTAKES = {
    "labels of floats": (lambda x, y: (x, y.float()), TypeError, "labels must have an integer dtype"),
    "wrong D": (lambda x, y: (x[:, :5], y), ValueError, r"D = 16, got shape \(\d, 5\)"),
    "no tensor": (lambda x, y: (None, y), TypeError, "got no features"),
    "too few labels": (lambda x, y: (x, y[1:]), ValueError, "one class index for each row"),
    "on another device": (lambda x, y: (x.to("meta"), y), TypeError, "must have its numbers in memory"),
    "a label past the last class": (lambda x, y: (x, torch.full_like(y, 300)), IndexError, r"labels\[0\] is 300.* \[0, 300\)"),
    "a negative label": (lambda x, y: (x, torch.full_like(y, -7)), IndexError, r"labels\[0\] is -7"),
}


@check("a mistake on one rank is an error on all", 2, 3)
def _(world):
    features, weight, labels = draw()
    head, last = sharded(world, weight), world.size - 1
    for wrong, kind, pattern in MISTAKES.values():
        arguments = world.mine(features), world.mine(labels)
        with raises(kind, f"^rank {last}: {kind.__name__}: .*" + pattern):
            head(*(wrong(*arguments) if world.rank == last else arguments))
    # On two ranks at once: all hear of both.
    head.scale = -5.0 if world.rank in (0, last) else 64.0
    with raises(ValueError, f"^rank 0: ValueError: scale must.*\nrank {last}: ValueError: scale must.*got -5"):
        head(world.mine(features), world.mine(labels))
    head.scale = 64.0
    with raises(ValueError, r"same dtype on all ranks, got torch.float32, torch.float64"):
        head(world.mine(features).to(torch.float64 if world.rank else torch.float32), world.mine(labels))
    with raises(ValueError, "gradients must be enabled .*got True, False"), torch.set_grad_enabled(not world.rank):
        head(world.mine(features), world.mine(labels))
    # And all of them go on.
    assert_equals_single(world, head, features, weight, labels)


@check("options that differ between ranks", 2, 3)
def _(world):
    """Some would wait for each other, some would only be wrong."""
    features, weight, labels = draw()
    different = [
        {"scale": 700.0},
        {"reduction": "none"},
        {"margin": 0.1},
        {"num_classes": NUM_CLASSES - 1},
        {"ddp_average": True},
        {"ignore_index": 7},
        {"sample_correction": True},
        {"hard_classes": torch.zeros(NUM_CLASSES, 1, dtype=torch.int64)},
        {"margin": torch.full((NUM_CLASSES,), 0.35)},
    ]
    for options in different:
        head = sharded(world, weight)
        for name, value in options.items():
            if world.rank == 1:
                setattr(head, name, value)
        with raises(ValueError, "options of the head must be the same"):
            head(world.mine(features), world.mine(labels % 50))


# What gloo adds where a rank has left: it has not waited for as long as it may.
AT_ONCE = "(?s:(?!.*Timed out))"


@check("an error inside the loss", 3)
def _(world):
    """One rank has no memory left: it raises, and when it has left, so do the others, long before the timeout."""
    features, weight, labels = draw()
    head = sharded(world, weight)
    if world.rank == 1:
        recording.negative_lse = out_of_memory
        with raises(MemoryError, "none left"):
            head(world.mine(features), world.mine(labels))
        dist.destroy_process_group()
    else:
        with raises(RuntimeError, f"^rank {world.rank} of 3: the all-reduce of sums failed.*another rank has failed{AT_ONCE}"):
            head(world.mine(features), world.mine(labels))


def out_of_memory(*arguments):
    raise MemoryError("none left")


# The parts of a step, and what the others wait for in each.
WAITS = {
    "forward": "^rank {} of 3: the exchange of batch sizes",
    "backward": "rank {} of 3: the reduce-scatter of the features' gradient",
    "step": "^rank {} of 3: the agreement on a step",
}


def until(part, world):
    """(that part of a step, the head, its optimiser) after all before it."""
    features, weight, labels = draw()
    (head, optimizer), _ = fused_pair(world, [weight], {"lr": 0.5})
    local, losses = world.mine(features).requires_grad_(), []
    parts = {
        "forward": lambda: losses.append(head(local, world.mine(labels))),
        "backward": lambda: losses[0].backward(),
        "step": optimizer.step,
    }
    for name, run in parts.items():
        if name == part:
            return run, head, optimizer
        run()


def missing(part):
    def function(world):
        run, *_held = until(part, world)
        if world.rank == 1:
            return world.wait_for_others()
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))
        try:
            with raises(RuntimeError, WAITS[part].format(world.rank) + " failed or timed out"):
                run()
        finally:
            world.leave()

    return function


for part in WAITS:
    check(f"a rank that does not come to {part}", 3)(missing(part))


@check("a rank that has gone before step", 3)
def _(world):
    step, head, _ = until("step", world)
    before = head.weight.to_local().detach().clone()
    if world.rank == 1:
        return dist.destroy_process_group()
    with raises(RuntimeError, WAITS["step"].format(world.rank) + " failed.*another rank has failed" + AT_ONCE):
        step()
    assert torch.equal(head.weight.to_local().detach(), before)


@check("a rank that is killed", 3)
def _(world):
    features, weight, labels = draw()
    head = sharded(world, weight)
    if world.rank == 1:
        recording.negative_lse = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    with raises(RuntimeError, f"^rank {world.rank} of 3: the all-reduce of sums failed{AT_ONCE}"):
        head(world.mine(features), world.mine(labels))
