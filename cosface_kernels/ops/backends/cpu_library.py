"""The native CPU kernels of csrc/cpu: a shared library that setup.py builds, loaded with ctypes when first asked for."""

import ctypes
import functools
import os
from pathlib import Path

import torch

# The variable is for a library built elsewhere or with other flags (make test-sanitize).
LIBRARY = Path(os.environ.get("COSFACE_CPU_LIBRARY") or Path(__file__).with_name("libcosface_cpu.so"))
# What the library may have been compiled for, best first.
INSTRUCTION_SETS = ("avx512bf16", "avx512", "avx2", "portable")

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
# Of the library's interface: cosface_interface_portable() in csrc/cpu/kernels.cpp.
INTERFACE = 5
CONSTANTS = ("widest_panel", "sum_classes", "cached_classes")
_NUMBERS = {torch.bfloat16: "bfloat16", torch.float32: "float"}


class _Buffer(ctypes.Structure):
    """csrc/cpu/update.h's Buffer."""

    _fields_ = [("data", _POINTER), ("scale", _POINTER), ("format", ctypes.c_int32)]
    FORMATS = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)

    @classmethod
    def of(cls, rows, scale=None):
        return cls(_pointer(rows), None if scale is None else _pointer(scale), cls.FORMATS.index(rows.dtype))


class Step(ctypes.Structure):
    """csrc/cpu/update.h's Step: one optimiser step as optim.rules.Part says it."""

    _STATES = 2
    _fields_ = [
        *(("rule", ctypes.c_int32), ("numbers", ctypes.c_float * 11), ("table", _Buffer), ("states", _Buffer * _STATES)),
        *(("size", _SIZE), ("first_of_shard", _SIZE), ("key", ctypes.c_uint64), ("scratch", _POINTER)),
    ]

    @classmethod
    def of(cls, rule, numbers, rows, states, first_row, key):
        room = torch.empty(torch.get_num_threads(), 4, rows.shape[1])
        buffers = [_Buffer.of(*state) for state in states] + [_Buffer()] * (cls._STATES - len(states))
        step = cls(
            rule, numbers, _Buffer.of(rows), (_Buffer * cls._STATES)(*buffers), rows.shape[1], first_row, key, _pointer(room)
        )
        step._room = room  # for as long as the step
        return step


def update(step, grad, index):
    """index: which rows, a slice or int64 positions; grad (M, D) float32 with any distance between its rows."""
    assert grad.dtype == torch.float32 and grad.stride(1) == 1
    is_slice = isinstance(index, slice)
    library, _ = _load()
    getattr(library, f"cosface_update_{available()[0]}")(
        *(ctypes.byref(step), _POINTER(grad.data_ptr()), _SIZE(grad.stride(0))),
        *(None if is_slice else _POINTER(_pointer(index)), _SIZE(index.start if is_slice else 0), _SIZE(len(grad))),
        torch.get_num_threads(),
    )


_ARGUMENTS = {
    "row_panels": [_POINTER, _SIZE, _SIZE, _POINTER],
    "column_panels": [_POINTER, _SIZE, _SIZE, _POINTER],
    "normalize": [_POINTER, _SIZE, _SIZE, ctypes.c_bool, _POINTER, _POINTER],
    "exponentials": [
        *[_POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE],
        *[_POINTER, ctypes.c_float, _POINTER, _POINTER, _POINTER],
    ],
    "maxima": [_POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _SIZE, ctypes.c_float, _POINTER, _POINTER],
    "accumulate": [_POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER],
    "table_gradient": [
        *[_POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _SIZE, ctypes.c_bool, ctypes.c_double, _SIZE],
        *[_SIZE, _POINTER, _POINTER, _POINTER, _POINTER, ctypes.POINTER(Step)],
    ],
}


class Kernels:
    """The steps as csrc/cpu/kernels.cpp declares them, for one number type and instruction set: tensors are passed as their
    pointers, None as null, and the number of threads is PyTorch's.
    """

    def __init__(self, dtype, instruction_set):
        library, _ = _load()
        for step, types in _ARGUMENTS.items():
            function = getattr(library, f"cosface_{step}_{_NUMBERS[dtype]}_{instruction_set}")
            function.argtypes, function.restype = [*types, ctypes.c_int], None
            setattr(self, step, functools.partial(_call, function))


def _call(function, *arguments):
    function(*(_pointer(a) if isinstance(a, torch.Tensor) else a for a in arguments), torch.get_num_threads())


def _pointer(tensor):
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return tensor.data_ptr()


@functools.cache
def kernels(dtype):
    """The kernels for the best instruction set that both the library and this processor have."""
    return Kernels(dtype, available()[0])


@functools.cache
def available():
    """Every instruction set that can run here, best first; none without a library."""
    library, _ = _load()
    return tuple(name for name in INSTRUCTION_SETS if getattr(library, f"cosface_supported_{name}", lambda: False)())


def has_vectors():
    """Whether the library can run here with vector instructions; without them it is slower than PyTorch's operators."""
    return available()[:1] not in ((), ("portable",))


def unavailable():
    """Why there is no library, or None."""
    return _load()[1]


def constant(name):
    """A constant of csrc/cpu/kernels.cpp that says how much room its callers leave."""
    library, _ = _load()
    return getattr(library, f"cosface_{name}_portable")()


@functools.cache
def _load():
    """(library or None, why there is none)."""
    if not LIBRARY.exists():
        why = "installing the package does that (in a source tree with -e), and needs a C++ compiler with OpenMP"
        return None, f"it was not built beside {LIBRARY.parent}: {why}"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, str(error)
    if getattr(library, "cosface_interface_portable", lambda: None)() != INTERFACE:
        return None, f"{LIBRARY} is of another version: install the package again"
    return library, None
