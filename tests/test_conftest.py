"""Does the suite itself fail as it should?"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import attending
import pytest
import torch
from cases import make

from cosface_kernels import cosface_loss
from cosface_kernels.ops import backends

TESTS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_gpu_ends_its_worker_and_names_the_test(workers, tmp_path):
    """One that answers nothing after the first failure, as after an illegal access."""
    (tmp_path / "conftest.py").write_text(
        "import torch, lost_gpu\n"
        "def lost():\n"
        "    raise RuntimeError('an illegal memory access was encountered')\n"
        "torch.cuda.synchronize = lost\n"
    )
    (tmp_path / "test_it.py").write_text(
        "import os, torch\n"
        "torch.cuda.is_initialized = lambda: True\n"
        "def test_before(): pass\n"
        "def test_culprit(): assert False, os.getpid()\n"
        "def test_after(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "lost_gpu", "-p", "no:cacheprovider", "-n", str(workers), "--rootdir", "."]
    run = subprocess.run(
        [*command, "test_it.py"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if workers:
        assert run.returncode == 1 and "crashed while running 'test_it.py::test_culprit'" in run.stdout, run.stdout
        assert "2 failed, 2 passed" in run.stdout, run.stdout  # the failure, the crash; the test after it in a new worker
    else:
        assert run.returncode == 3 and "test_culprit lost the GPU: an illegal memory access" in run.stdout + run.stderr, (
            run.stdout
        )


@pytest.mark.skipif(bool(backends.unusable("triton", torch.device("cpu"))), reason="needs triton's interpreter")
@pytest.mark.parametrize("scale, served", [(64.0, True), (1000.0, False)])
def test_a_mark_of_the_slab_loop_alone_is_held_to_what_attends(scale, served, monkeypatch):
    item = SimpleNamespace(callspec=SimpleNamespace(params={"backend": "triton"}))
    attending.record(item, monkeypatch, "serves")
    features, weight, labels = make("uniform", 3, 5, 8)
    cosface_loss(features.requires_grad_(), weight, labels, scale=scale, backend="triton")
    if served:
        with pytest.raises(pytest.fail.Exception, match="kernels that attend serve this test"):
            attending.check(item)
    else:
        attending.check(item)
        item.callspec.params["backend"] = "attend"
        with pytest.raises(pytest.fail.Exception, match="no kernel attends here"):
            attending.check(item)
