"""python -m tests.campaign [--minutes M | --cases N] [--seed S] [--kinds ...] [--json FILE], from the root of the checkout."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from . import TESTS, engine


def commit():
    """The checkout's commit, so that each has cases of its own, and the same ones each time."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=TESTS, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "no commit"


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description="Random cases against oracles.")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=1.0, metavar="M")
    length.add_argument("--cases", type=int, metavar="N", help="instead, so that the same ones are run on any machine")
    parser.add_argument("--seed", default=None, metavar="S", help="any text (default: the commit)")
    parser.add_argument("--kinds", nargs="+", choices=engine.ROUND, default=[*engine.ROUND])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was tried to FILE")
    arguments = parser.parse_args()
    seconds = None if arguments.cases else 60 * arguments.minutes
    result = engine.campaign(arguments.seed or commit(), seconds=seconds, cases=arguments.cases, kinds=arguments.kinds)
    if arguments.json:
        engine.write(result, arguments.json)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in result["cases"].items())
    print(f"{counts} in {result['seconds']:.0f} s, seed {result['seed']}: {len(result['failures'])} failed")
    return bool(result["failures"])


if __name__ == "__main__":
    sys.exit(main())
