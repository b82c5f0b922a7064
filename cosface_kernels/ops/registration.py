"""Registration, differentiation and calls of the operators."""

import functools

import torch
from torch import Tensor, library

from .operands import schema, split

LIBRARY = library.Library("cosface_kernels", "FRAGMENT")


def register(name, signature, implementation):
    """Register torch.ops.cosface_kernels.<name> and return it. Does the same as library.custom_op, whose register_autograd looks
    up each argument's default in each call, and these have many. torch.compile does not trace into it, as with custom_op.
    """
    LIBRARY.define(name + signature, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, torch._disable_dynamo(implementation), "CompositeExplicitAutograd")
    operator = getattr(torch.ops.cosface_kernels, name).default
    operator.implementation = implementation
    return operator


def register_named(name, implementation, takes, gives):
    """The same for an implementation whose arguments are objects of the classes `takes`, and whose results are of `gives`."""

    def flat(*arguments):
        return sum(implementation(*split(arguments, takes)), ())

    return register(name, schema(takes, gives), flat)


def register_fake(name, takes):
    """Register a function of objects of the classes `takes` as what the operator gives for tensors without numbers."""

    def register(function):
        library.register_fake(f"cosface_kernels::{name}", lambda *flat: function(*split(flat, takes)), lib=LIBRARY)

    return register


def differentiable(operator, function):
    """Make the operator an autograd Function where a gradient may be wanted, as custom_op does.

    function: its forward takes, before the operator's arguments, the callable that computes its results below autograd.
    """

    def with_autograd(compute):
        def below_autograd(*inputs):
            with torch._C._AutoDispatchBelowAutograd():
                return compute(*inputs)

        def call(*inputs):
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
                return function.apply(below_autograd, *inputs)
            return below_autograd(*inputs)

        return call

    LIBRARY.impl(operator, with_autograd(operator), "Autograd")
    operator.past_dispatcher = with_autograd(operator.implementation)


def call(operator, *inputs):
    """operator(*inputs), past PyTorch's dispatcher, slow with many arguments, where nothing but autograd would see the call."""
    return (operator.past_dispatcher if _only_autograd_sees(inputs) else operator)(*inputs)


# The dispatch keys that a thread adds to those of the tensors, where no mode, transform or trace is active.
_THREAD_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect).add(torch._C.DispatchKey.ADInplaceOrView)
_CONSTANTS = {float, int, bool, str, torch.dtype, type(None)}  # an operator's other arguments


@functools.cache
def _plain_keys(device_type):
    return torch._C._dispatch_keys(torch.empty(0, dtype=torch.float32, device=device_type))


def _only_autograd_sees(inputs):
    """False if an operator's call is traced or profiled, or its tensors are of a subclass, transformed or negative views."""
    if torch.compiler.is_compiling() or torch._C._dispatch_tls_local_include_set() != _THREAD_KEYS:
        return False
    if torch.autograd._profiler_enabled():  # else a profile would not name the operators
        return False
    tensors = (each for each in inputs if type(each) not in _CONSTANTS and isinstance(each, Tensor))
    return all(torch._C._dispatch_keys(each) == _plain_keys(each.device.type) for each in tensors)
