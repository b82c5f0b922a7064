"""The shared library of csrc/cpu, which setup.py builds: what it takes, and what of it runs here. Loaded when first asked for."""

import ctypes
import functools
import math
import os
from pathlib import Path

import torch

from ..slabs import ceil_div

# COSFACE_CPU_LIBRARY names a library built elsewhere or with other flags (make test-sanitize).
LIBRARY = Path(os.environ.get("COSFACE_CPU_LIBRARY") or Path(__file__).with_name("libcosface_cpu.so"))
# Instruction sets that the library may have been compiled for, best first.
INSTRUCTION_SETS = ("amx", "avx512bf16", "avx512", "avx2", "neonbf16", "neon", "portable")

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
# Number of the library's interface: cosface_interface_portable() in csrc/cpu/kernels.cpp.
INTERFACE = 18
# Dtypes of the table that the kernels read in place.
TABLE_DTYPES = (torch.float32, torch.bfloat16)
NUMBERS = {torch.bfloat16: "bfloat16", torch.float32: "float"}


def pointer(name, tensor, dtype, count):
    """The address of a tensor, or null for None. Every tensor passes through here into native code, but for those that the caller
    has just made, and the caller holds it until that is done.

    Raises:
        RuntimeError: it has not `count` or more contiguous numbers of `dtype` in this machine's memory.
    """
    if tensor is None:
        return None
    if not (
        tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.is_contiguous()
        and tensor.numel() >= count
        # A storage that was resized under its tensor, or never had memory, is shorter than the tensor's shape says.
        and tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + count) * dtype.itemsize
    ):
        raise RuntimeError(
            f"native code wants {count} or more contiguous numbers of {dtype} on the CPU for {name}, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)} and strides {tensor.stride()} on {tensor.device}, over "
            f"{tensor.untyped_storage().nbytes()} bytes: nothing was written"
        )
    return tensor.data_ptr()


def floats(name, tensor, count):
    return pointer(name, tensor, torch.float32, count)


def integers(name, tensor, count):
    return pointer(name, tensor, torch.int64, count)


def rows_of_table(name, tensor, count):
    """The address of rows in either of TABLE_DTYPES."""
    return pointer(name, tensor, torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float32, count)


class Count(ctypes.c_int64):
    """A number that native code writes: its `value`."""

    @property
    def address(self):
        return ctypes.addressof(self)


class _Buffer(ctypes.Structure):
    """csrc/cpu/update.h's Buffer."""

    _fields_ = [("data", _POINTER), ("scale", _POINTER), ("format", ctypes.c_int32)]
    FORMATS = (torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.float8_e4m3fn)

    @classmethod
    def of(cls, name, buffer, scale, shape):
        if buffer.dtype not in cls.FORMATS or (buffer.dtype.itemsize == 1) != (scale is not None):
            raise RuntimeError(
                f"native code has no format for {name} of {buffer.dtype} with scale = {scale}: nothing was written"
            )
        data = pointer(name, buffer, buffer.dtype, math.prod(shape))
        return cls(data, floats(f"{name}'s scale", scale, shape[0]), cls.FORMATS.index(buffer.dtype))


class Step(ctypes.Structure):
    """csrc/cpu/update.h's Step: one optimiser step, that of an optim.rules.Part."""

    _STATES = 2
    _NUMBERS = (
        *("lr", "weight_decay", "sign", "nesterov", "eps", "first_decay", "second_decay", "first_rate", "second_rate"),
        *("first_correction", "second_correction", "max_row_norm"),
    )
    _fields_ = [
        ("rule", ctypes.c_int32),
        *((name, ctypes.c_float) for name in _NUMBERS),
        *(("table", _Buffer), ("states", _Buffer * _STATES)),
        *(("size", _SIZE), ("first_of_shard", _SIZE), ("key", ctypes.c_uint64), ("scratch", _POINTER)),
    ]
    NAMES = dict(_fields_).keys()

    @classmethod
    def of(cls, part, numbers):
        rows, states = part.rows, part.states
        threads, size = torch.get_num_threads(), rows.shape[1]
        room = torch.empty(threads, 4, size, dtype=torch.float32, device="cpu")
        buffers = [_Buffer.of(f"state {k}", *state, rows.shape) for k, state in enumerate(states)]
        buffers += [_Buffer()] * (cls._STATES - len(states))
        step = filled(
            cls,
            rule=part.rule.kind,
            **numbers,
            table=_Buffer.of("the table", rows, part.row_scale, rows.shape),
            states=(_Buffer * cls._STATES)(*buffers),
            size=size,
            first_of_shard=part.first_row,
            key=part.key,
            scratch=floats("scratch", room, threads * 4 * size),
        )
        step.shape, step.threads, step._room = rows.shape, threads, room  # keep the scratch alive as long as the step
        return step

    @property
    def address(self):
        return ctypes.addressof(self)

    def check(self, first, rows, size):
        """Raise if rows first .. of a gradient with `size` columns are not rows of the table."""
        if first < 0 or first + rows > self.shape[0] or size != self.shape[1]:
            raise RuntimeError(
                f"a gradient of rows {first} to {first + rows - 1} and {size} columns is none of a table of shape "
                f"{tuple(self.shape)}: nothing was written"
            )


def update(step, grad, index):
    """Apply a step to rows. index: a slice or int64 positions; grad: their gradient (M, D) float32."""
    grad, is_slice = grad.contiguous(), isinstance(index, slice)
    first, last = (index.start, index.start + len(grad) - 1) if is_slice else map(int, index.aminmax()) if len(index) else (0, -1)
    step.check(first, last - first + 1, grad.shape[1])
    _update_kernels(available()[0]).call(
        "update",
        step.threads,
        step=step.address,
        grad=floats("the gradient", grad, grad.numel()),
        index=None if is_slice else integers("the index", index, len(grad)),
        size=grad.shape[1],
        first=first if is_slice else 0,
        rows=len(grad),
    )


def _structure(*fields, pointers="", sizes="", double="", floats="", bools=""):
    """The ctypes class of a structure of csrc/cpu/kernels.h; the fields of each type are in this order."""
    types = (pointers, _POINTER), (sizes, _SIZE), (double, ctypes.c_double), (floats, ctypes.c_float), (bools, ctypes.c_bool)
    fields = [*fields, *((name, type_) for names, type_ in types for name in names.split())]
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields, "NAMES": dict(fields).keys()})


EXPONENTS = _structure(pointers="x_panels unit targets", sizes="num_rows classes size first_class", floats="log2_scale")
SIZES = _structure(sizes="num_rows size slab threads")
LOOP = _structure(
    pointers="table labels unit shifts kept room",
    sizes="num_rows size slab threads classes kept_classes kept_numbers products_of_thread ignore_index",
    floats="scale log2_scale",
    bools="is_bfloat16",
)
# The arguments of each kernel, in the order of kernels.cpp's KERNELS.
_SLAB = {
    "row_panels": _structure(pointers="rows panels", sizes="num_rows size"),
    "column_panels": _structure(pointers="rows panels", sizes="num_rows size"),
    "normalize": _structure(pointers="table unit panels", sizes="classes size", bools="is_bfloat16 normalized"),
    "exponentials": _structure(("of", EXPONENTS), pointers="shifts e e_panels partial values places hard"),
    "maxima": _structure(("of", EXPONENTS), pointers="exponents partial values places hard", sizes="centers"),
    "accumulate": _structure(pointers="e_panels unit_panels pull", sizes="num_rows classes size"),
    "table_gradient": _structure(
        pointers="e x_panels table target_classes target_sums common scratch grad step",
        sizes="num_rows classes size first_class num_targets scratch_size",
        double="unscale",
        bools="is_bfloat16 normalized grad_is_bfloat16",
    ),
    "add_up": _structure(pointers="partial totals", sizes="pieces num_rows"),
    "finish_sums": _structure(pointers="totals shifts rounded lse", sizes="num_rows"),
    "forward": _structure(
        ("loop", LOOP),
        pointers="x target_unit inverse_norms products totals lse pull unknown",
        sizes="foreign_index",
        floats="shift",
        bools="x_is_bfloat16",
    ),
    "backward": _structure(("loop", LOOP), pointers="lse_grads product_grads totals grad step", bools="grad_is_bfloat16"),
}
# The structures of batch.cpp.
_BATCH = {
    "enter": _structure(
        pointers="x table labels targets unit target_unit inverse_norms products",
        sizes="num_rows size classes ignore_index foreign_index",
        bools="x_is_bfloat16 table_is_bfloat16",
    ),
    "losses": _structure(
        pointers="lse logits counted losses slopes", sizes="num_rows", floats="scale", bools="is_reduced is_mean"
    ),
    "x_gradient": _structure(
        pointers="lse_grads product_grads inverse_norms unit target_unit pull grad",
        sizes="num_rows size",
        floats="scale",
        bools="grad_is_bfloat16",
    ),
    "slab_factors": _structure(
        pointers="labels lse_grads product_grads totals unit table targets target_rows row_scales target_sums unscale slots",
        sizes="num_rows size classes ignore_index",
        floats="scale",
        bools="is_bfloat16",
    ),
}
# The structure of update.cpp.
_UPDATE = {"update": _structure(pointers="step grad index", sizes="size first rows")}
_ARGUMENTS = {"batch_kernels": _BATCH, "update_kernels": _UPDATE, **{f"kernels_{numbers}": _SLAB for numbers in NUMBERS.values()}}


class _Kernel(ctypes.Structure):
    """csrc/cpu/kernel.h's Kernel."""

    _fields_ = [("function", ctypes.CFUNCTYPE(None, _POINTER, ctypes.c_int)), ("bytes", _SIZE)]


class KernelTable:
    """A table of csrc/cpu's kernels for one instruction set; name: one of _ARGUMENTS."""

    def __init__(self, name, instruction_set, library=None):
        table = getattr(library or _load()[0], f"cosface_{name}_{instruction_set}")
        table.restype = ctypes.POINTER(_Kernel * len(_ARGUMENTS[name]))
        self._arguments, self._kernels = _ARGUMENTS[name], dict(zip(_ARGUMENTS[name], table().contents, strict=True))

    def call(self, kernel, threads=None, **fields):
        """Run a kernel. fields: of its structure, see `filled`; threads: PyTorch's, unless given."""
        arguments = filled(self._arguments[kernel], **fields)
        self._kernels[kernel].function(ctypes.addressof(arguments), threads or torch.get_num_threads())

    def fits(self):
        """True if each kernel's arguments have the size of the structure here."""
        return all(kernel.bytes == ctypes.sizeof(self._arguments[name]) for name, kernel in self._kernels.items())


@functools.cache
def _update_kernels(instruction_set):
    return KernelTable("update_kernels", instruction_set)


def filled(structure, **fields):
    """The structure, with addresses from `pointer`."""
    if fields.keys() != structure.NAMES:  # ctypes takes any names, and leaves the others null
        raise TypeError(f"got {', '.join(fields)} for a structure of {', '.join(structure.NAMES)}")
    return structure(**fields)


def sizes(dtype, instruction_set):
    """(dtype of operands for numbers of `dtype`, classes whose exponentials one partial sum adds, a function of N and D: the
    floats of scratch that `table_gradient` needs for each thread).
    """
    library, _ = _load()
    per_word = getattr(library, f"cosface_per_word_{NUMBERS[dtype]}_{instruction_set}")()
    scratch_numbers = getattr(library, f"cosface_scratch_numbers_{instruction_set}")
    scratch_numbers.argtypes, scratch_numbers.restype = [_SIZE, _SIZE], _SIZE
    sum_classes = getattr(library, f"cosface_sum_classes_{instruction_set}")()
    return {1: torch.float32, 2: torch.bfloat16}[per_word], sum_classes, scratch_numbers


def room(direction, dtype, instruction_set):
    """A function of N, D, B, threads and loop.h's flag: the floats of room of csrc/cpu/loop.h's "forward" or "backward"."""
    numbers = getattr(_load()[0], f"cosface_{direction}_room_{NUMBERS[dtype]}_{instruction_set}")
    numbers.argtypes, numbers.restype = [SIZES, ctypes.c_bool], _SIZE
    return functools.lru_cache(lambda *sizes: numbers(SIZES(*sizes[:-1]), sizes[-1]))


def padded(columns):
    """A number of columns rounded up to the widest panel of any instruction set."""
    return ceil_div(columns, _widest_panel()) * _widest_panel()


@functools.cache
def available():
    """Every instruction set that can run here, best first; none without a library."""
    return tuple(name for name in INSTRUCTION_SETS if _supported(name) > 0)


def why_not_amx():
    """The reason why this processor's AMX is not used, or None: it is used, or there is none."""
    return {
        -1: "the operating system does not let this process use AMX: Linux does since 5.16",
        -2: "AMX is not used: in a check its products differed from AVX-512's; please report it",
    }.get(_supported("amx"))


def _supported(instruction_set):
    """1 if an instruction set can run here, 0 or less if not: see kernels.cpp."""
    library, _ = _load()
    return getattr(library, f"cosface_supported_{instruction_set}", lambda: 0)()


def has_vectors():
    """True if the library can run here with vector instructions; without them it is slower than PyTorch's operators."""
    return available()[:1] not in ((), ("portable",))


def unavailable():
    """The reason why there is no library, or None."""
    return _load()[1]


@functools.cache
def _widest_panel():
    """The columns of the widest panel of any instruction set."""
    library, _ = _load()
    return library.cosface_widest_panel_portable()


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
    if getattr(library, "cosface_interface_portable", lambda: None)() != INTERFACE or not _fits(library):
        return None, f"{LIBRARY} is of another version: install the package again"
    return library, None


def _fits(library):
    return all(KernelTable(name, "portable", library).fits() for name in _ARGUMENTS)
