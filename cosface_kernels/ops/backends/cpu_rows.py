"""The functions of batch_rows.py as one native call each, csrc/cpu/batch.cpp: over few classes the hundred small operators of
plain PyTorch take several times as long as the slabs. All but `losses` are for cosines and one row to a class.

A table that the kernels cannot read in place, for its dtype or its strides, is left to batch_rows.
"""

import torch

from .. import batch_rows
from ..batch_rows import Entered, SlabFactors
from . import cpu_kernels
from .cpu_library import TABLE_DTYPES, floats, integers, pointer, rows_of_table


def enter(x, table, labels, options, wide):
    """See batch_rows.enter."""
    weight = table.weight
    if not is_readable(weight):
        return batch_rows.enter(x, table, labels, options, wide)
    (num_rows, size), classes = x.shape, weight.shape[0]
    x, labels = readable(x), labels.contiguous()
    targets, unit = labels.new_empty(num_rows), x.new_empty(num_rows, size, dtype=torch.float32)
    target_unit, inverse_norm, product = unit.new_empty(num_rows, 1, size), unit.new_empty(num_rows), unit.new_empty(num_rows, 1)
    cpu_kernels.batch_kernels().call(
        "enter",
        x=rows_of_table("features", x, num_rows * size),
        table=rows_of_table("weight", weight, classes * size),
        labels=integers("labels", labels, num_rows),
        targets=targets.data_ptr(),
        unit=unit.data_ptr(),
        target_unit=target_unit.data_ptr(),
        inverse_norms=inverse_norm.data_ptr(),
        products=product.data_ptr(),
        num_rows=num_rows,
        size=size,
        classes=classes,
        ignore_index=options.ignore_index,
        foreign_index=options.ignore_index if options.foreign_index is None else options.foreign_index,
        x_is_bfloat16=x.dtype == torch.bfloat16,
        table_is_bfloat16=weight.dtype == torch.bfloat16,
    )
    return Entered(targets, unit, inverse_norm, target_unit, product)


def losses(lse, logit, counted, scale, reduction):
    """See batch_rows.losses."""
    lse, logit, counted = lse.contiguous(), logit.contiguous(), counted.contiguous()
    num_rows, is_reduced = lse.shape[0], reduction != "none"
    losses, slopes = lse.new_empty(() if is_reduced else num_rows), lse.new_empty(num_rows)
    cpu_kernels.batch_kernels().call(
        "losses",
        lse=floats("log-sum-exps", lse, num_rows),
        logits=floats("logits", logit, num_rows),
        counted=pointer("counted rows", counted, torch.bool, num_rows),
        losses=losses.data_ptr(),
        slopes=slopes.data_ptr(),
        num_rows=num_rows,
        scale=scale,
        is_reduced=is_reduced,
        is_mean=reduction == "mean",
    )
    return losses, slopes


def x_gradient(grads, saved, options, shape, dtype):
    """See batch_rows.x_gradient."""
    num_rows, size = shape
    grad = saved.unit.new_empty(num_rows, size, dtype=dtype if dtype in TABLE_DTYPES else torch.float32)
    lse_grad, product_grad, inverse_norm = grads.lse.contiguous(), grads.product.contiguous(), saved.inverse_norm.contiguous()
    unit, target_unit, pull = saved.unit.contiguous(), saved.target_unit.contiguous(), saved.pull.contiguous()
    cpu_kernels.batch_kernels().call(
        "x_gradient",
        lse_grads=floats("gradients of log-sum-exps", lse_grad, num_rows),
        product_grads=floats("gradients of products", product_grad, num_rows),
        inverse_norms=floats("inverse norms", inverse_norm, num_rows),
        unit=floats("unit features", unit, num_rows * size),
        target_unit=floats("targets' unit rows", target_unit, num_rows * size),
        pull=floats("pull", pull, num_rows * size),
        grad=grad.data_ptr(),
        num_rows=num_rows,
        size=size,
        scale=options.scale,
        grad_is_bfloat16=dtype == torch.bfloat16,
    )
    return grad if grad.dtype == dtype else grad.to(dtype)


def slab_factors(factors, table, options):
    """See batch_rows.slab_factors."""
    weight, (num_rows, size) = table.weight, factors.unit.shape
    if not is_readable(weight):
        return batch_rows.slab_factors(factors, table, options)
    classes, is_bfloat16 = weight.shape[0], weight.dtype == torch.bfloat16
    labels, unit, total = factors.labels.contiguous(), factors.unit.contiguous(), factors.total.contiguous()
    lse_grad, product_grad = factors.lse_grad.contiguous(), factors.product_grad.contiguous()
    targets, target_rows, slots = labels.new_empty(num_rows), labels.new_empty(num_rows), labels.new_empty(4 * num_rows)
    row_scale, unscale = total.new_empty(num_rows), total.new_empty(())
    target_sums = unit.new_empty(num_rows, size)
    cpu_kernels.batch_kernels().call(
        "slab_factors",
        labels=integers("labels", labels, num_rows),
        lse_grads=floats("gradients of log-sum-exps", lse_grad, num_rows),
        product_grads=floats("gradients of products", product_grad, num_rows),
        totals=floats("totals", total, num_rows),
        unit=floats("unit features", unit, num_rows * size),
        table=rows_of_table("weight", weight, classes * size),
        targets=targets.data_ptr(),
        target_rows=target_rows.data_ptr(),
        row_scales=row_scale.data_ptr(),
        target_sums=target_sums.data_ptr(),
        unscale=unscale.data_ptr(),
        slots=slots.data_ptr(),
        num_rows=num_rows,
        size=size,
        classes=classes,
        ignore_index=options.ignore_index,
        scale=options.scale,
        is_bfloat16=is_bfloat16,
    )
    return SlabFactors(targets, row_scale, unscale, target_rows, target_sums)


def readable(x):
    """Features as the kernels read them."""
    return (x if x.dtype in TABLE_DTYPES else x.float()).contiguous()


def is_readable(weight):
    return weight.dtype in TABLE_DTYPES and weight.is_contiguous()
