"""Fetches the peers' wheels for a GPU machine that reaches no registry:  python -m benchmarks.peer_wheels DIR

Only peers whose dependencies that machine has: cut-cross-entropy and Liger-Kernel, both written in Triton. quack is left out: it
needs nvidia-cutlass-dsl, which is larger than all the rest. On that machine:
python -m pip install --no-index --no-deps --target SITE DIR/*.whl, and SITE on PYTHONPATH.
"""

import argparse
import subprocess
import sys
from pathlib import Path

WHEELS = "cut-cross-entropy", "liger-kernel"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args(argv).folder
    status = 0
    for name in WHEELS:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            str(folder),
            name,
        ]
        status |= subprocess.run(command).returncode
    for path in sorted(folder.glob("*.whl")):
        print(f"{path.stat().st_size / 1e3:8.0f} kB  {path.name}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
