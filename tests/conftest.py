"""Where tests run: on the CPU, and with the marker `gpu` on a GPU where there is one. Which are slow: see selection.py.

Without a GPU the Triton kernels run in Triton's interpreter on CPU tensors, so TRITON_INTERPRET is set before anything imports
triton; with one they are compiled.
"""

import contextlib
import gc
import importlib.util
import inspect
import os

# Inductor's cache does not see a change of an operator's autograd formula, so it would run yesterday's. Torch reads this once.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import attending
import pytest
import torch
from selection import HAS_GPU

from cosface_kernels.ops import backends
from cosface_kernels.ops.backends import cpu_library

os.environ["TRITON_INTERPRET"] = "0" if HAS_GPU else "1"

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if HAS_GPU else ["cpu"]


def pytest_configure(config):
    asked, why = os.environ.get("COSFACE_CPU_LIBRARY"), cpu_library.unavailable()
    if asked and (why or not cpu_library.available()):  # else all of its tests would be skipped
        raise pytest.UsageError(f"COSFACE_CPU_LIBRARY={asked} cannot be used: {why or 'no instruction set of it runs here'}")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    if HAS_GPU:
        import lost_gpu

        config.pluginmanager.register(lost_gpu)
    elif importlib.util.find_spec("triton"):
        import interpreter

        interpreter.install()
    import unwritten

    unwritten.install()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark tests by selection.slow_when before -m selects. Leave out those that need a GPU if there is none, cases "attend" that
    the slab loop serves alone, and those that would repeat others.
    """
    left_out = set()
    for item in items:
        if holds(item, "slow_when"):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") and not HAS_GPU:
            left_out.add(item)
        if holds(item, "repeats") or (attending.asked(item) and holds(item, "slab_loop")):
            left_out.add(item)
    config.hook.pytest_deselected(items=[*left_out])
    items[:] = [item for item in items if item not in left_out]


def holds(item, mark):
    """Whether the condition of one of the item's marks of that name holds of its parameters."""
    given, conditions = attending.parameters(item), [mark.args[0] for mark in item.iter_markers(mark)]
    return any(condition(**{name: given[name] for name in inspect.signature(condition).parameters}) for condition in conditions)


def pytest_collection_finish():
    """Tests that collect garbage need not walk over every module and every other test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=[*backends.NAMES, pytest.param("attend", marks=pytest.mark.slow)])
def backend(request, device, monkeypatch):
    """A backend's name. "attend" is triton with the attention-shaped kernels, which serve where nothing is kept; a test that they
    do not serve is marked selection.slab_loop.
    """
    name = "triton" if request.param == "attend" else request.param
    why = backends.unusable(name, device)
    if why:
        pytest.skip(why)
    with contextlib.ExitStack() as stack:
        if request.param == "attend":
            from cosface_kernels.ops.backends import triton_forms

            monkeypatch.setattr("cases.EXPONENT_ROUNDINGS", 2)
            monkeypatch.setattr("cosface_kernels.ops.slabs.kept_size", lambda *arguments: (0, 0))
            stack.enter_context(triton_forms.using(attend_features={}, attend_table={}))
            attending.record(request.node, monkeypatch, "constants")
        elif name == "triton" and holds(request.node, "slab_loop"):
            attending.record(request.node, monkeypatch, "serves")
        yield name


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Hold a test that has passed to what its mark slab_loop, or its absence, says."""
    result = yield
    attending.check(pyfuncitem)
    return result


@pytest.fixture
def small_slabs(monkeypatch):
    """Slabs of 128 classes, so that a table of a few hundred has several."""
    monkeypatch.setattr("cosface_kernels.ops.slabs.SLAB_CLASSES_MIN", 1)
    monkeypatch.setattr("cosface_kernels.ops.slabs.SLAB_CLASSES_MAX", 128)
