"""Where tests run: on the CPU, and with the marker `gpu` on a GPU where there is one.

Without a GPU the Triton kernels run in Triton's interpreter on CPU tensors, so TRITON_INTERPRET is set before anything imports
triton; with one they are compiled.
"""

import importlib.util
import os

# Inductor's cache does not see a change of an operator's autograd formula, so it would run yesterday's. Torch reads this once.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch

from cosface_kernels.ops import backends

HAS_GPU = torch.cuda.is_available()
os.environ["TRITON_INTERPRET"] = "0" if HAS_GPU else "1"

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no GPU on this machine")])


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    if HAS_GPU:
        import lost_gpu

        config.pluginmanager.register(lost_gpu)
    elif importlib.util.find_spec("triton"):
        import interpreter

        interpreter.install()


@pytest.fixture(params=["cpu", GPU])
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=backends.NAMES)
def backend(request, device):
    why = backends.unusable(request.param, device)
    if why:
        pytest.skip(why)
    return request.param


@pytest.fixture
def small_slabs(monkeypatch):
    """Slabs of 128 classes, so that a table of a few hundred has several."""
    monkeypatch.setattr("cosface_kernels.ops.slabs.SLAB_CLASSES_MIN", 1)
    monkeypatch.setattr("cosface_kernels.ops.slabs.SLAB_CLASSES_MAX", 128)
