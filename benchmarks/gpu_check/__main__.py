"""Everything that only a GPU can tell, most valuable first:  python -m benchmarks.gpu_check --out DIR

    DIR/gpu_check.json   each stage's rows, predictions beside measurements; written again after every stage
    DIR/forms.json       which form serves which size, by what was measured; for review, then for the package
    DIR/log.txt          what the stages printed; suite.xml and suite.log: the tests; ncu.txt: the profiler

A stage is a process group of its own with a limit of its own: a hang or a crash costs that stage. After one that did not end
well a new process asks twice whether the GPU still answers; where it does not, the kernels end and the record is whole. What the
machine lacks (memory, Gluon, a sanitizer) is a line. The command needs a source tree, torch and triton; pytest and the peers are
used where they can be imported (wheels on PYTHONPATH will do). Where .git does not travel, COSFACE_COMMIT names the commit.
"""

import argparse
import os
import sys
from pathlib import Path

from . import runner, stages


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), metavar="DIR", help="default: ./gpu-check")
    parser.add_argument("--seconds", type=float, default=stages.SECONDS, help="for all stages (default: %(default).0f)")
    parser.add_argument("--only", nargs="+", metavar="STAGE", choices=[stage.name for stage in stages.PLAN])
    parser.add_argument("--resume", type=Path, metavar="DIR", help="an earlier call's: what it finished is not done again")
    parser.add_argument(
        "--patience", type=float, default=1.0, metavar="X", help="times each limit: to rehearse on a slow machine"
    )
    parser.add_argument("--dry-run", action="store_true", help="every stage's process, none of its work; on any machine")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--since", type=int, default=0, help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.stage:
        leave(runner.work(asked.stage, asked.out, asked.since, asked.dry_run))
    plan = [stage for stage in stages.PLAN if not asked.only or stage.name in asked.only]
    how = {"seconds": asked.seconds, "resume": asked.resume, "dry_run": asked.dry_run, "patience": asked.patience}
    try:
        return runner.check(plan, asked.out, **how)
    except OSError as error:
        print(f"gpu_check: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1


def leave(status):
    """End a stage's process at once. Its usual end takes seconds, and may abort where a thread of PyTorch's still lets go of
    a tensor (pytorch/pytorch#179291), which would look as if the stage had failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    raise SystemExit(main())
