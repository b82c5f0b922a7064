"""A head inside a model that DistributedDataParallel wraps, as Lightning and accelerate do by themselves.

Whole tables are averaged like any parameter. Tables in shards are left out: each rank has other rows, and their gradients are
those of the global batch already. DDP reads the names of what to leave out from the module it is given, so every module that a
sharded head is registered in, at any depth, gets them.
"""

import weakref

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

_LEFT_OUT = "_ddp_params_and_buffers_to_ignore"  # DistributedDataParallel reads this attribute
_hooks = []


class _Names:
    """Names of the parameters in shards that a module holds when they are asked for: heads in it may be replaced."""

    def __init__(self, module):
        self._module = weakref.ref(module)
        if not _hooks:
            _hooks.append(register_module_module_registration_hook(_registered))

    def __iter__(self):
        module = self._module()
        for prefix, each in () if module is None else module.named_modules():
            if isinstance(vars(each).get(_LEFT_OUT), _Shards):
                yield from (f"{prefix}.{name}".lstrip(".") for name, _ in each.named_parameters(recurse=False))

    def __deepcopy__(self, memo):
        module = self._module()
        return type(self)(memo.get(id(module), module))

    def __reduce__(self):
        return list, ([*self],)


class _Shards(_Names):
    """The names of the parameters of a head in shards, which that head itself holds."""

    def __reduce__(self):
        return _Shards, (self._module(),)


def leave_out(head):
    """Have DistributedDataParallel leave out the parameters of a head, in whatever module it comes to be."""
    vars(head)[_LEFT_OUT] = _Shards(head)


def _registered(module, name, child):
    """Give a module the names if a child that is registered in it has some."""
    names, known = getattr(child, "__dict__", {}).get(_LEFT_OUT), vars(module).get(_LEFT_OUT, ())
    if isinstance(names, _Names) and not isinstance(known, _Names):
        # Not setattr: a compiled module would set it on the one that it wraps, where names have no prefix.
        vars(module)[_LEFT_OUT] = [*known, *(f"{name}.{each}" for each in names)] if known else _Names(module)


def around():
    """The DistributedDataParallel over several ranks whose forward calls us, or None."""
    kind = getattr(nn.parallel, "DistributedDataParallel", None)
    found = None if kind is None or torch.compiler.is_compiling() else kind._get_active_ddp_module()
    return None if found is None or found.process_group.size() == 1 else found


def check_fused():
    """Raise where a fused optimiser trains a whole table that DistributedDataParallel cannot average."""
    if around() is not None:
        raise RuntimeError(
            "a fused optimiser trains a class table inside DistributedDataParallel: the table has no gradient that could be "
            "averaged over the ranks, so each would train another table. ShardedCosFaceLoss and ShardedMarginSoftmaxLoss are for "
            "several ranks, inside the wrapped model too; or train the head with torch.optim"
        )


def with_dense_gradient(rows, head):
    """The rows of a head's table. Their sparse gradient becomes dense where the next code needs that: the averaging of
    DistributedDataParallel or fully_shard, or the backward of a computed table, as under torch.nn.utils.parametrize.
    """
    needs = rows is not None and (not rows.is_leaf or head._is_fully_sharded or around() is not None)
    return _Dense.apply(rows) if needs else rows


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        return grad.to_dense() if grad.is_sparse else grad
