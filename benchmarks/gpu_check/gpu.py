"""The GPU that a stage's process has, or the line that says why a stage cannot use it."""

import contextlib
from unittest import mock

import torch

from cosface_kernels.ops import slabs as package_slabs
from cosface_kernels.tools.info import why_unusable

from .. import measure
from ..ends import Skip

BUDGETS = {"none": 0, "auto": "auto", "all": 2**60}  # bytes of exponentials that are kept


def device(dtype=torch.bfloat16):
    """The device on which the triton backend runs.

    Raises:
        Skip: nowhere.
    """
    if not torch.cuda.is_available():
        raise Skip("there is no GPU that this torch can use")
    found = torch.device("cuda")
    if why := why_unusable("triton", found, dtype):
        raise Skip(f"the triton backend cannot run here: {why}")
    return found


def shortage(needed, where):
    """A sentence saying why so many bytes do not fit, or None."""
    return measure.shortage(needed, where) if where.type == "cuda" else None


@contextlib.contextmanager
def slabs(rows):
    """Context manager that sets the rows of a slab; 0 or None: the package's own."""
    if not rows:
        yield
        return
    with mock.patch.object(package_slabs, "slab_rows", lambda *arguments, **keywords: rows):
        yield


@contextlib.contextmanager
def forms(asked):
    """Context manager that sets the forms of the package's kernels, {kernel: options}.

    Raises:
        ValueError: the package has no such form.
    """
    if not asked:
        yield
        return
    from cosface_kernels.ops.backends import triton_forms

    with triton_forms.using(**asked):
        yield


@contextlib.contextmanager
def exponentials(options):
    """Context manager that sets the form of `exponentials`, whose tile can be set in packages without a table of forms too."""
    from cosface_kernels.ops.backends import triton_backend

    if known_forms():
        with forms({"exponentials": options}):
            yield
        return
    tiles = triton_backend.tiles
    with mock.patch.object(triton_backend, "tiles", lambda *arguments: {**tiles(*arguments), **options}):
        yield


def known_forms():
    """{kernel: names of its options} of the package's table of forms."""
    try:
        from cosface_kernels.ops.backends import triton_forms
    except ImportError:
        return {}
    return triton_forms.OPTIONS
