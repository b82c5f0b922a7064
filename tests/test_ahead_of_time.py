"""Do the Triton kernels compile for real chips, without spilling, within shared memory, and on the tensor cores?"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Bytes of shared memory that one block may use. Chips without 16-bit wgmma share sm_80's configurations; sm_86 has the least.
SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448}
# Where ptxas may put one pair of registers aside, once and outside any loop, for the call of a square root: it does at odd D.
# attend, which auto never picks, puts seven columns' scales aside while it has 160 sums in registers.
SPILL_LIMIT = {"project_rows": 8, "update_rows": 8, "sum_targets": 8, "attend": 64}
PRODUCTS = {"exponentials", "maxima", "exponents"}


@pytest.mark.slow
def test_what_is_launched_unasked():
    check("--few", 90)


@pytest.mark.slow
@pytest.mark.chips
@pytest.mark.parametrize("chip", SHARED_LIMIT)
def test_every_launch_configuration(chip):
    check(chip)


def check(*arguments):
    chip = arguments[-1]
    script = Path(__file__).parent / "aot.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(script.parents[1])  # this source tree, whatever is installed
    run = subprocess.run(
        [sys.executable, script, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    for kernel in kernels:
        # A row of 8192 numbers with two states in 8 bits takes 1024 threads, to whom 64 registers each are left.
        is_full = kernel["name"] == "update_rows" and "BLOCK_D=8192" in kernel["arguments"]
        assert kernel["stack"] <= (24 if is_full else SPILL_LIMIT.get(kernel["name"], 0)), f"spills: {kernel}"
        assert kernel["shared"] <= SHARED_LIMIT[chip], kernel
        # IEEE float32 products have no tensor core instruction. Those of attend's small float32 tiles have an older chip's.
        ieee = re.search(r"\bx(_ptr)?=float32", kernel["arguments"]) and "PRECISION=ieee" in kernel["arguments"]
        attends = kernel["name"] == "attend" or (kernel["name"].startswith("attend") and "UPCAST=False" in kernel["arguments"])
        if kernel["name"] == "attend" or not attends or "float32" not in re.search(r"\bx(_ptr)?=(\S+)", kernel["arguments"])[2]:
            assert kernel["tensor_core"] == bool(attends or (kernel["name"] in PRODUCTS and not ieee)), kernel
        assert not kernel["warnings"], f"ptxas waits for each wgmma by itself, or the like: {kernel}"
        if kernel["name"] in PRODUCTS and not ieee:  # a product, minus the shift
            assert (kernel["fma"] > 0) == (kernel["fuses"] and (kernel["name"] == "exponentials")), kernel
