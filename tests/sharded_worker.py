"""The ranks of test_sharded.py: python sharded_worker.py FOLDER SIZE... runs every check that is for SIZE ranks, on as many.

Each check has a process group of its own, so that one that fails on a rank takes no other with it. In FOLDER/SIZE are then
outcomes.RANK, a line for each check with its name and a traceback or null; log.RANK, what a rank printed; codes, all exit codes.
Ranks are forks of one process, which has imported what all of them need.
"""

import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import sharded_failures  # noqa: F401 (its checks)
import sharded_losses  # noqa: F401
import sharded_partial_fc  # noqa: F401
import sharded_steps  # noqa: F401
import torch
import torch._dynamo  # the first optimiser imports it
import torch.distributed as dist
import unwritten
import wrapped_heads
from sharded_world import CHECKS, World, check

from cosface_kernels.ops import recording, slabs

# Until a collective gives up: on a busy machine a rank may get there minutes after another.
PATIENCE = timedelta(minutes=5)

for name, function in wrapped_heads.CHECKS.items():
    check(name, 2)(function)


def main(folder, sizes):
    ranks = {size: [fork(rank, size, folder / str(size)) for rank in range(size)] for size in sizes}
    for size, processes in ranks.items():
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        (folder / str(size) / "codes").write_text(json.dumps(codes))


def fork(rank, size, folder):
    """The process of a rank."""
    if process := os.fork():
        return process
    with open(folder / f"log.{rank}", "wb") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    try:
        run(rank, size, folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # as checkpoint_worker.leave does, and why


def run(rank, size, folder):
    torch.set_num_threads(1)
    unwritten.install()
    warnings.simplefilter("ignore")  # of scales and margins past the paper's bounds, at 300 classes
    slabs.SLAB_CLASSES_MIN, slabs.SLAB_CLASSES_MAX = 1, 128  # several slabs to a shard
    with open(folder / f"outcomes.{rank}", "w", buffering=1) as outcomes:
        for number, name in enumerate(sorted(CHECKS, key=lambda name: "killed" in name)):  # that one last
            sizes, function = CHECKS[name]
            if size not in sizes:
                continue
            store = dist.FileStore(str(folder / f"store.{number}"), size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
            lse, outcome = recording.negative_lse, None
            try:
                function(World(rank, size, folder / f"done{number}"))
            except Exception:
                outcome = traceback.format_exc()
            recording.negative_lse = lse
            print(json.dumps([name, outcome]), file=outcomes)
            if dist.is_initialized():
                dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(size) for size in sys.argv[2:]])
