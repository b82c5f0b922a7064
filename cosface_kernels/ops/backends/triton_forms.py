"""Chooses the form of the triton backend's kernels for a call: as measured in triton_forms.json, else the slab loop.

    {"measured": "the GPU, versions, commit, date and command that the rows come from",
     "rows": [{"kernel": "attend_table", "chip": [9, 0], "dtype": "bfloat16", "num_rows": [1024, 8192], "size": [512, 512],
               "options": {"DESCRIPTORS": true, "num_stages": 2}}, ...]}

kernel      "exponentials": of the slab loop, and what else is made of its product (HALVES: of E alone);
            "attend_features", "attend_table": take the place of the slab loop forward and backward, where nothing is kept
            (triton_attend.py has what else they need; where they cannot, the slab loop does); GLUON: those of triton_hopper.py
chip        compute capability, exactly
dtype       of the products
num_rows    N from .. to, both included; null for no end
size        D from .. to
options     replace single launch options of the kernel: OPTIONS names them, the backend has their defaults

The first row that fits counts. Without one `exponentials` is launched as triton_backend.tiles has it, and nothing attends.
"""

import contextlib
import functools
import json
from pathlib import Path

PATH = Path(__file__).with_suffix(".json")
LAUNCH = {"num_warps", "num_stages"}
OPTIONS = {
    "exponentials": {"BLOCK_N", "BLOCK_C", "BLOCK_K", "DESCRIPTORS", "HALVES", *LAUNCH},
    "attend_features": {"BLOCK_N", "BLOCK_C", "DESCRIPTORS", "GLUON", *LAUNCH},
    "attend_table": {"BLOCK_R", "BLOCK_N", "DESCRIPTORS", "GLUON", *LAUNCH},
}

# The forms set by `using`. One dict for all threads: autograd runs backward in another thread than forward.
_asked = {}


@contextlib.contextmanager
def using(**kernels):
    """Context manager that sets the forms for tests and benchmarks, whatever was measured: using(attend_table={"num_stages": 1}).

    For each kernel its options, or None for the form that a call without a row gets.
    """
    for kernel, options in kernels.items():
        _check(kernel, options or {})
    global _asked
    before, _asked = _asked, {**_asked, **kernels}
    try:
        yield
    finally:
        _asked = before


def options(kernel, num_rows, size, dtype, capability):
    """The launch options that replace the kernel's own; None if neither a measured row nor `using` asks for the kernel."""
    if kernel in _asked:
        return _asked[kernel]
    return _measured(kernel, num_rows, size, str(dtype).removeprefix("torch."), capability)


@functools.cache
def _measured(kernel, num_rows, size, dtype, capability):
    for row in rows():
        fits = row["kernel"] == kernel and row["dtype"] == dtype and tuple(row["chip"]) == capability
        if fits and _within(num_rows, row["num_rows"]) and _within(size, row["size"]):
            return row["options"]
    return None


@functools.cache
def rows():
    """The measured rows."""
    found = json.loads(PATH.read_text())["rows"]
    for row in found:
        _check(row["kernel"], row["options"])
    return found


def forget():
    """Read the file again at the next call."""
    rows.cache_clear()
    _measured.cache_clear()


def _within(number, bounds):
    first, last = bounds
    return first <= number and (last is None or number <= last)


def _check(kernel, options):
    if kernel not in OPTIONS:
        raise ValueError(f'"{kernel}" is none of the kernels that have forms: {", ".join(OPTIONS)}')
    unknown = options.keys() - OPTIONS[kernel]
    if unknown:
        raise ValueError(f"{kernel} has no option {', '.join(sorted(unknown))}; it has {', '.join(sorted(OPTIONS[kernel]))}")
