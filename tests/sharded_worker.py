"""One rank of test_sharded.py: python sharded_worker.py RANK SIZE FOLDER runs every check that is for SIZE ranks.

Each check has a process group of its own, so that one that fails on a rank takes no other with it. What became of it goes into
FOLDER/outcomes.RANK, a line each: its name, and a traceback or null.
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
import torch.distributed as dist
import unwritten
import wrapped_heads
from sharded_world import CHECKS, World, check

from cosface_kernels.ops import recording, slabs

# Until a collective gives up: on a busy machine a rank may get there minutes after another.
PATIENCE = timedelta(minutes=5)

for name, function in wrapped_heads.CHECKS.items():
    check(name, 2)(function)


def main(rank, size, folder):
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
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    os._exit(0)  # as checkpoint_worker.leave does, and why
