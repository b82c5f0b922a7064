"""Backends: implementations of the slab loop, forward and backward. They have one interface, and `choose` picks one.

    forward(x, table, targets, plan, *, need_pull, need_largest=False, need_row_sum=False, hard=None) -> Sums
    backward(x, table, factors, shift, kept, plan, sink, *, hard=None) -> None

x (N, D): x̃, unit features or features as they are, in plan.wide.  table: a table.Table, whose row j, unit or as it is, is w̃_j.
targets (N,) int64: the first of the table.centers rows that are left out of a row's sums; -1 for none. Or (N, K): K such rows,
anywhere; then table.centers is 1, and need_largest False.
factors: a batch_rows.SlabFactors.
E_nj = 2^{k x_n·w̃_j - shift_n}, 0 for the target's rows, and for all but the largest of each other class's rows:

    forward    total_n = Σ_j E_nj        lse_n = log total_n + shift_n log 2
               pull_n = Σ_j E_nj w̃_j / total_n        (0 where total is 0)
               row_sum = Σ_j w̃_j
               largest_n = max_j x_n·w̃_j over the rows j that are left in, and that j
    backward   dw̃_j = (Σ_n E_nj row_scale_n x_n + common) · unscale        (common: None for zeros)
               dw_j = (dw̃_j - ŵ_j (ŵ_j·dw̃_j)) / ‖w_j‖, or dw̃_j as it is, plus target_sums[i] where target_rows[i] = j

hard (N, 4): of each row (τ, p0, p1, p2), for E = 2^{k g(c) - shift}, g(c) = p0 + p1 c + p2 c² where c = x_n·w̃_j > τ, else c. In
all but total E g'(c) then takes the place of E. None: g(c) = c.

sink (table.Sink) takes the rows of every slab.

A backend never holds more than a slab of anything N x C or C x D, beyond what is kept and the gradient itself. It is
deterministic: no atomics, every sum in a fixed order. `row_functions` is the module batch_rows, or one with its four functions.
`in_one_call`, where there is one, does rows and slab loop together for what they are for: `takes`, `forward`, `backward`.
To add a backend: a module <name>_backend with these three names, <name> in validation.BACKENDS, and in `unusable` the reasons why
it cannot run; the tests then hold it to the same rule as the others.
"""

import functools
import importlib
import importlib.util
import warnings
from typing import NamedTuple

import torch

from ... import validation
from ..operands import Largest
from . import cpu_library


class Sums(NamedTuple):
    lse: torch.Tensor  # (N,) plan.wide
    shift: torch.Tensor  # (N,) plan.wide
    total: torch.Tensor  # (N,) plan.wide
    pull: torch.Tensor  # (N, D) plan.wide, or (0, D) when not needed
    kept: torch.Tensor  # 1-D, plan.dtype: the kept slabs' exponentials one after another, see Plan.kept_view
    largest: Largest | None = None  # None where not needed
    row_sum: torch.Tensor | None = None  # (D,) any float dtype; None where not needed


NO_TRITON = 'triton is not installed: pip install "cosface-kernels[triton]"'
NAMES = validation.BACKENDS[1:]  # each is a module of this package, <name>_backend


def choose(name, device, dtype):
    """The backend module called `name` ("auto": the fastest usable one) for tensors on `device` computed in `dtype`."""
    if name == "auto":
        return _module(_fastest(device, dtype))
    why = unusable(name, device, dtype)
    if why:
        raise ValueError(f'backend "{name}" cannot be used here: {why}; backend="auto" picks one that can')
    return _module(name)


@functools.cache
def _module(name):
    return importlib.import_module(f".{name}_backend", __package__)


def _fastest(device, dtype):
    kind = device.type  # a new string each time
    if kind == "cuda":
        if dtype != torch.float64 and not torch.version.hip and not _has_triton():
            raise ModuleNotFoundError(
                f'backend="auto" is "triton" on a GPU, and {NO_TRITON}; backend="torch" computes without it, slower',
                name="triton",
            )
        return "torch" if unusable("triton", device, dtype) else "triton"
    if kind != "cpu":
        return "torch"
    _warn_of_a_missing_library()
    return "cpu" if cpu_library.has_vectors() and dtype != torch.float64 else "torch"


@functools.cache
def _warn_of_a_missing_library():
    """Warn, once in a process, where the native library is missing."""
    why = cpu_library.unavailable()
    if why:
        message = f'the native CPU kernels are missing, so losses take PyTorch\'s slower operators (backend="torch"): {why}'
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def unusable(name, device, dtype=torch.float32):
    """The reason why backend `name` cannot compute in `dtype` on `device`, or None: it can."""
    return {"torch": _torch_unusable, "cpu": _cpu_unusable, "triton": _triton_unusable}[name](device, dtype)


def _torch_unusable(device, dtype):
    return None


def _cpu_unusable(device, dtype):
    if device.type != "cpu":
        return f"it needs tensors on the CPU, these are on {device.type}"
    if dtype == torch.float64:
        return "its kernels compute in float32 and bfloat16, not float64"
    why = cpu_library.unavailable()
    return f"its native library cannot be used: {why}" if why else None


def _has_triton():
    return importlib.util.find_spec("triton") is not None


def _triton_unusable(device, dtype):
    if not _has_triton():
        return NO_TRITON
    if dtype == torch.float64:
        return "its kernels compute in float32 and bfloat16, not float64"
    if device.type == "cuda":
        if torch.version.hip:
            return "its kernels are written and compiled for NVIDIA GPUs, this is an AMD one"
        chip = torch.cuda.get_device_capability(device)
        return None if chip >= (8, 0) else f"it needs a GPU of compute capability 8.0 or later, this has {chip[0]}.{chip[1]}"
    from .triton_slab import INTERPRETED

    if INTERPRETED:
        return None
    return f"it needs tensors on a GPU, these are on {device.type} (TRITON_INTERPRET=1 runs its kernels on a CPU, for tests)"
