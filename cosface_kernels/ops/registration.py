"""Registration, differentiation and calls of the operators."""

import functools
import itertools

import torch
from torch import library

from .operands import schema, split

LIBRARY = library.Library("cosface_kernels", "FRAGMENT")


class Operator:
    """The operator torch.ops.cosface_kernels.<name>, called with objects of the classes `takes`, and giving those of `gives`.

    PyTorch sees their fields, one after another. A call gets to the implementation in one of three ways:
        __call__, where autograd alone would see the call: _with_autograd(implementation), past PyTorch's dispatcher;
        else __call__ dispatches. For a differentiable operator the dispatcher's autograd key then calls _above_autograd, which
        is _with_autograd(_below_autograd); for others, and without that key, the dispatcher calls the implementation itself;
        _below_autograd dispatches again, for the keys below autograd: to the implementation, or to the fake one in a trace.
    _with_autograd applies the autograd Function where a gradient is wanted, else it only calls what it is given.

    Does the same as library.custom_op, whose register_autograd looks up each
    argument's default in each call, and these have many. torch.compile does not trace into it, as with custom_op.
    inputs: how many of the objects, the first ones, hold tensors that no other operator of a step has seen.
    """

    def __init__(self, name, takes, gives, implementation, inputs=1):
        self.takes, self.gives, self.implementation, self.inputs, self.function = takes, gives, implementation, inputs, None
        LIBRARY.define(name + schema(takes, gives), tags=torch.Tag.pt2_compliant_tag)
        flat = self._flat(implementation)
        LIBRARY.impl(name, torch._disable_dynamo(flat), "CompositeExplicitAutograd")
        self.name, self.operator = f"cosface_kernels::{name}", getattr(torch.ops.cosface_kernels, name).default
        self.operator.implementation = flat  # a dispatch mode sees by it what the operator does

    def __call__(self, *objects):
        """Call it, past PyTorch's dispatcher, slow with many arguments, where nothing but autograd would see that."""
        tensors = _joined(objects[: self.inputs])
        if _only_autograd_sees(tensors):
            return self._with_autograd(self.implementation, objects, tensors)
        return self._dispatched(*objects)

    def register_fake(self, function):
        """Register what the operator gives for tensors without numbers."""
        library.register_fake(self.name, self._flat(function), lib=LIBRARY)

    def differentiable(self, function):
        """Make the operator an autograd Function where a gradient of its inputs may be wanted, as custom_op does.

        Forward of `function` takes the callable that computes the results, the objects, and the tensors of the inputs. It returns
        the fields of the first of the results, which alone have gradients, and the other results.
        """
        self.function = function
        LIBRARY.impl(self.operator, self._flat(self._above_autograd), "Autograd")

    def _flat(self, function):
        """The function of flat arguments, of which the first is a tensor; an empty one stands for each None that it gives."""

        def flat_function(*flat):
            results = _joined(function(*split(flat, self.takes)))
            return tuple(flat[0].new_empty(0) if each is None else each for each in results)

        return flat_function

    def _dispatched(self, *objects):
        return split(self.operator(*_joined(objects)), self.gives)

    def _above_autograd(self, *objects):
        return self._with_autograd(self._below_autograd, objects, _joined(objects[: self.inputs]))

    def _below_autograd(self, *objects):
        with torch._C._AutoDispatchBelowAutograd():
            return self._dispatched(*objects)

    def _with_autograd(self, compute, objects, tensors):
        if self.function and torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
            results, count = self.function.apply(compute, objects, *tensors), len(self.gives[0]._fields)
            return self.gives[0]._make(results[:count]), *results[count:]
        return compute(*objects)


def _joined(objects):
    return tuple(itertools.chain.from_iterable(objects))


# The dispatch keys that a thread adds to those of the tensors, where no mode, transform or trace is active.
_THREAD_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect).add(torch._C.DispatchKey.ADInplaceOrView)


@functools.cache
def _plain_keys(device):
    return torch._C._dispatch_keys(torch.empty(0, dtype=torch.float32, device=device))


def _only_autograd_sees(tensors):
    """False if an operator's call is traced or profiled, or its tensors are of a subclass, transformed or negative views."""
    if torch.compiler.is_compiling() or torch._C._dispatch_tls_local_include_set() != _THREAD_KEYS:
        return False
    if torch.autograd._profiler_enabled():  # else a profile would not name the operators
        return False
    keys_of, plain = torch._C._dispatch_keys, _plain_keys(tensors[0].device)  # those of most: a device is slow to look up
    for each in tensors:
        if each is not None and (keys := keys_of(each)) != plain and keys != _plain_keys(each.device):
            return False
    return True
