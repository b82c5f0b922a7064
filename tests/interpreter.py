"""Triton's interpreter as the tests need it, in place of a GPU."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float


def install():
    """It truncates float32 to bfloat16; a GPU rounds to nearest even, which tests of accuracy need."""
    interpreter._convert_float = _convert_float
    why = unusable(triton.__version__, np.__version__)
    if why:
        interpreter.GridExecutor.__call__ = lambda *arguments, **keywords: pytest.skip(why)


def unusable(triton_version, numpy_version):
    """Why kernels cannot be run, or None: tests that launch one are skipped with that reason."""
    if _numbers(triton_version) < (3, 7) and _numbers(numpy_version) >= (2, 4):
        return f"the interpreter of Triton {triton_version} fails with NumPy {numpy_version}: it needs one below 2.4"
    return None


def _numbers(version):
    return tuple(int(number) for number in version.split(".")[:2])


def _convert_float(data, source, target, rounding_mode):
    if source == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(data).view(np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return _convert(data, source, target, rounding_mode)
