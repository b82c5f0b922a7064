"""Do the Triton kernels compile for real chips, without spilling, within shared memory, and on the tensor cores?"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Bytes of shared memory that one block may use. Chips without 16-bit wgmma share sm_80's configurations; sm_86 has the least.
SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448}
KERNELS = {"exponentials", "normalize_rows", "add_pull", "project_rows"}
KERNELS |= {"enter_rows", "x_gradient_rows", "order_targets", "sum_targets"}


@pytest.mark.parametrize("chip", SHARED_LIMIT)
def test_every_launch_configuration(chip):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "aot.py"
    run = subprocess.run([sys.executable, script, str(chip)], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["name"].split()[0] for kernel in kernels} == KERNELS
    for kernel in kernels:
        assert kernel["stack"] == 0, f"spills: {kernel}"
        assert kernel["shared"] <= SHARED_LIMIT[chip], kernel
        # IEEE float32 products have no tensor core instruction.
        if kernel["name"].startswith("exponentials") and "fp32 ieee" not in kernel["name"]:
            assert kernel["tensor_core"], kernel
