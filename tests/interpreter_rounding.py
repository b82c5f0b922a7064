"""Triton's interpreter truncates float32 to bfloat16; a GPU rounds to nearest even. Tests of accuracy need the latter."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float


def _convert_float(data, source, target, rounding_mode):
    if source == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(data).view(np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return _convert(data, source, target, rounding_mode)


def install():
    interpreter._convert_float = _convert_float
