"""Triton's interpreter as the tests need it, in place of a GPU."""

import functools

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float
_patch_lang = interpreter._patch_lang
_np_dtype_of_scalar = functools.lru_cache(interpreter._get_np_dtype)
_patched = set()  # modules of Triton's language that the launch under way has replaced


def install():
    """Rounds float32 to bfloat16 as a GPU does, to nearest even: the interpreter truncates, and tests of accuracy would fail.

    And does once what the interpreter does in every call: it replaces the language, and makes a dictionary of types.
    """
    interpreter._convert_float = _convert_float
    interpreter._patch_lang = _patch_lang_once
    interpreter._get_np_dtype = _get_np_dtype


def _get_np_dtype(dtype):
    return np.dtype(np.uint64) if dtype.scalar.is_ptr() else _np_dtype_of_scalar(dtype.scalar)


def _patch_lang_once(function):
    """A launch replaces the language and restores it. A kernel's call of another function would replace all of it again."""
    langs = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
    if langs and langs <= _patched:
        return None
    scope = _patch_lang(function)
    _patched.update(langs)
    tl.tensor.__index__ = _index
    if scope is None:  # Triton 3.5 restores nothing
        return None
    restore = scope.restore

    def restore_and_forget():
        _patched.clear()
        restore()

    scope.restore = restore_and_forget
    return scope


def _index(tensor):
    """As in Triton 3.7: NumPy 2.4 and later make no number of what has a dimension, which bounds of loops have before that."""
    return int(tensor.handle.data.squeeze())


def _convert_float(data, source, target, rounding_mode):
    if source == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(data).view(np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return _convert(data, source, target, rounding_mode)
