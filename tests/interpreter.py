"""Triton's interpreter as the tests need it, in place of a GPU."""

import dataclasses
import functools
import math

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_convert = interpreter._convert_float
_patch_lang = interpreter._patch_lang
_np_dtype_of_scalar = functools.lru_cache(interpreter._get_np_dtype)
_init_of_block_type = tl.block_type.__init__
_are_equal = tl.dtype.__eq__
_broadcast = TritonSemantic.broadcast_impl_value
_patched = set()  # modules of Triton's language that the launch under way has replaced
_left = set()  # those that a call of another function has replaced: nothing restores them
_patches = {}  # of such modules: {(id(object), name): (object, name, before, after)}


def install():
    """Rounds float32 to bfloat16 as a GPU does, to nearest even: the interpreter truncates, and tests of accuracy would fail.

    And does once what the interpreter does in every call: it replaces the language, makes a dictionary of types, and checks a
    shape. Nor does it find out, for an assertion that it then leaves out, whether each sum and product of int32 overflows.
    """
    interpreter._convert_float = _convert_float
    interpreter._patch_lang = _patch_lang_once
    interpreter._get_np_dtype = _get_np_dtype
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    tl.tensor.__init__ = _init_tensor
    tl.block_type.__init__ = _init_block_type
    tl.dtype.__eq__ = lambda one, other: one is other or _are_equal(one, other)
    TritonSemantic.broadcast_impl_value = _broadcast_unless_equal


def _get_np_dtype(dtype):
    return np.dtype(np.uint64) if dtype.scalar.is_ptr() else _np_dtype_of_scalar(dtype.scalar)


@functools.cache
def _langs(function):
    return frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)


def _patch_lang_once(function):
    """A launch replaces the language and restores it. A kernel's call of another function would replace all of it again."""
    langs, is_launch = _langs(function), not _patched
    if langs and langs <= (_patched if is_launch else _patched | _left):
        return None
    if is_launch and langs in _patches:
        scope = interpreter._LangPatchScope()
        for thing, name, before, after in _patches[langs].values():
            scope._changes.append((thing, name, before))
            setattr(thing, name, after)
    else:
        scope = _patch_lang(function)
        tl.tensor.__index__ = _index
        if not is_launch:
            _left.update(langs - _patched)
        elif scope is not None:
            firsts = {(id(thing), name): (thing, name, before) for thing, name, before in reversed(scope._changes)}
            _patches[langs] = {key: (*first, getattr(*first[:2])) for key, first in firsts.items()}
    _patched.update(langs)
    if scope is None:  # Triton 3.5 restores nothing
        return None
    restore = scope.restore

    def restore_and_forget():
        _patched.clear()
        _left.difference_update(langs)
        restore()

    scope.restore = restore_and_forget
    return scope


def _constants(shape):
    """(numel, shape) of a tensor."""
    return tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(size) for size in shape])


@functools.cache
def _checked(shape):
    """(shape, numel, text, constants of tensors) of a block_type."""
    block = object.__new__(tl.block_type)
    _init_of_block_type(block, tl.float32, [*shape])
    found = _of_shape[id(block.shape)] = block.shape, block.numel, str(block.shape), _constants(shape)
    return found


_of_shape = {}  # what _checked has found, by its shape's identity
_SCALAR = _constants(())


def _init_block_type(block, element, shape):
    found = _of_shape.get(id(shape)) or _checked(tuple(map(tl.core._unwrap_if_constexpr, shape)))
    block.element_ty = element
    block.shape, block.numel, text, block.constants = found
    block.name = f"<{text}, {element}>"


def _init_tensor(tensor, handle, type):
    tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
    tensor.numel, tensor.shape = type.constants if type.is_block() else _SCALAR


def _broadcast_unless_equal(semantic, one, other):
    if one.type.is_block() and other.type.is_block() and one.type.shape is other.type.shape:
        return one, other
    return _broadcast(semantic, one, other)


def _index(tensor):
    """As in Triton 3.7: NumPy 2.4 and later make no number of what has a dimension, which bounds of loops have before that."""
    return int(tensor.handle.data.squeeze())


def _convert_float(data, source, target, rounding_mode):
    if source == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(data).view(np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return _convert(data, source, target, rounding_mode)
