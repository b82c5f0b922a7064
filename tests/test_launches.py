"""How many kernels does a call launch on a GPU? Counted on a CPU: Triton launches, and ATen operators that are no mere view.

At a small table a launch costs more than what it computes, so a count that grows is a regression like a slower kernel. An
operator counts once, though some launch more.
"""

from collections import Counter

import pytest
import torch
from cases import make
from conftest import HAS_GPU
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from cosface_kernels import cosface_loss
from cosface_kernels.ops import operators

EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Launches(TorchDispatchMode):
    """counts[name] of everything launched while active, inside the package's own operators too."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        if operator in (operators.negative_lse, operators.negative_lse_backward, operators.margin_losses):
            with self:
                return operator.implementation(*arguments, **(keywords or {}))
        if torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd"):
            with self:
                return operator.decompose(*arguments, **(keywords or {}))
        result = operator(*arguments, **(keywords or {}))
        is_empty = isinstance(result, torch.Tensor) and not result.numel()
        if not operator.is_view and not is_empty and operator.overloadpacket.__name__ not in EMPTY | {"detach", "_unsafe_view"}:
            self.counts[operator.overloadpacket.__name__] += 1
        return result


@pytest.fixture
def launches(monkeypatch):
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    mode, run = Launches(), interpreter.GridExecutor.__call__

    def count(executor, *arguments, **keywords):
        mode.counts["triton " + executor.fn.__name__] += 1
        with _disable_current_modes():
            return run(executor, *arguments, **keywords)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", count)
    return mode


@pytest.mark.parametrize("num_rows, parts", [(1, 16), (512, 16), (1024, 8), (4096, 2), (16384, 1)])
def test_pull_fills_a_gpu(num_rows, parts):
    """With its 2 x ceil(N / 128) tiles of D = 512, in parts of aligned width, of which 10000 classes are no 16."""
    triton_backend = pytest.importorskip("cosface_kernels.ops.backends.triton_backend")
    widths = (65536, 10000, 80, 16)
    found = [triton_backend.pull_parts(num_rows, 512, width) for width in widths]
    assert found[0] == parts
    assert all(count <= parts and width % (8 * count) == 0 for count, width in zip(found, widths, strict=True))


# Of a table of one slab. The interpreter's bfloat16 products convert: two forward and one backward that a GPU does not launch.
FORWARD, BACKWARD = 11, 10
SLAB_FORWARD, SLAB_BACKWARD = 4, 2  # of every further slab, E kept


@pytest.mark.skipif(HAS_GPU, reason="counted in the interpreter")
@pytest.mark.parametrize("slabs", [1, 3])
def test_launches(slabs, launches, monkeypatch, small_slabs):
    monkeypatch.setattr(operators, "check_labels", lambda *arguments: None)  # a GPU has none
    features, weight, labels = make("uniform", 5, 128 * slabs - 3, 64)
    features = features.bfloat16().requires_grad_()
    weight.requires_grad_()
    with launches:
        loss = cosface_loss(features, weight, labels, backend="triton")
    assert launches.counts.total() == FORWARD + 2 + (SLAB_FORWARD + 2) * (slabs - 1), launches.counts
    launches.counts.clear()
    with launches:
        loss.backward()
    assert launches.counts.total() == BACKWARD + 1 + (SLAB_BACKWARD + 1) * (slabs - 1), launches.counts
