"""python -m benchmarks: the same as `cosface bench`."""

import sys

from cosface_kernels.tools.cli import main

raise SystemExit(main(["bench", *sys.argv[1:]]))
