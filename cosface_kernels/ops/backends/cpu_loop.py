"""The rows of a batch and the slab loop as one native call each way, csrc/cpu/loop.h, where the common loss has not too many
cosines with a table that the kernels read in place. The bits are those of cpu_rows.py and cpu_backend.py.
"""

import torch

from .. import label_checks, page_pool
from ..batch_rows import Entered
from . import Sums, cpu_kernels, cpu_library
from .cpu_library import TABLE_DTYPES, floats, integers, pointer, rows_of_table
from .cpu_rows import is_readable, readable

# N C D of a call, at most: Ctrl-C waits for it, some seconds on one core.
MOST_IN_ONE_CALL = 2**35


def takes(x, table, plan):
    """True if this can be one call, for what a backend's row_functions are for."""
    return plan.shift is not None and is_readable(table.weight) and table.num_rows * x.numel() <= MOST_IN_ONE_CALL


def forward(x, table, labels, options, plan, need_pull):
    """(Entered without targets, Sums), after a check of the labels."""
    (num_rows, size), x, labels = x.shape, readable(x), labels.contiguous()
    unit = x.new_empty(num_rows, size, dtype=torch.float32)
    target_unit, pull = unit.new_empty(num_rows, 1, size), unit.new_empty(num_rows if need_pull else 0, size)
    inverse_norm, product, shift = unit.new_empty(num_rows), unit.new_empty(num_rows, 1), unit.new_empty(num_rows)
    total, lse = unit.new_empty(num_rows), unit.new_empty(num_rows)
    kept = page_pool.empty((plan.kept_elements,), plan.dtype, x.device)
    kernels, threads, unknown = cpu_kernels.kernels(plan.dtype), torch.get_num_threads(), cpu_library.Count()
    room = unit.new_empty(kernels.loop_room("forward", num_rows, size, plan.slab, threads, need_pull))
    kernels.table.call(
        "forward",
        threads,
        loop=_loop(
            *(table, options, plan, labels, (num_rows, size)),
            threads=threads,
            unit=unit.data_ptr(),
            shifts=shift.data_ptr(),
            kept=kept.data_ptr(),
            kept_numbers=plan.kept_elements,
            room=room.data_ptr(),
        ),
        x=rows_of_table("features", x, num_rows * size),
        target_unit=target_unit.data_ptr(),
        inverse_norms=inverse_norm.data_ptr(),
        products=product.data_ptr(),
        totals=total.data_ptr(),
        lse=lse.data_ptr(),
        pull=pull.data_ptr() if need_pull else None,
        unknown=unknown.address,
        foreign_index=options.ignore_index if options.foreign_index is None else options.foreign_index,
        shift=plan.shift,
        x_is_bfloat16=x.dtype == torch.bfloat16,
    )
    if unknown.value:
        label_checks.check_labels(labels, table.num_classes, options.ignore_index, options.foreign_index)
    return Entered(None, unit, inverse_norm, target_unit, product), Sums(lse, shift, total, pull, kept)


def backward(factors, table, options, plan, sink):
    """Write dW into a Sink. factors: operands.TableFactors. Returns False where the sink wants slabs, and then does nothing."""
    step, (num_rows, size) = sink.native_update(), factors.unit.shape
    grad = sink.whole() if step is None else None
    if step is None and (grad is None or grad.dtype not in TABLE_DTYPES):
        return False
    labels, unit, total = factors.labels.contiguous(), factors.unit.contiguous(), factors.total.contiguous()
    lse_grad, product_grad = factors.lse_grad.contiguous(), factors.product_grad.contiguous()
    shift, kept = factors.shift.contiguous(), factors.kept
    kernels, classes, threads = cpu_kernels.kernels(plan.dtype), table.num_rows, torch.get_num_threads()
    if step:
        step.check(0, classes, size)
        threads = min(threads, step.threads)
    recomputes = plan.kept_slabs * plan.slab < classes
    room = unit.new_empty(kernels.loop_room("backward", num_rows, size, plan.slab, threads, recomputes))
    kernels.table.call(
        "backward",
        threads,
        loop=_loop(
            *(table, options, plan, labels, (num_rows, size)),
            threads=threads,
            unit=floats("unit features", unit, num_rows * size),
            shifts=floats("shifts", shift, num_rows),
            kept=pointer("kept exponentials", kept, plan.dtype, num_rows * min(plan.kept_slabs * plan.slab, classes)),
            kept_numbers=kept.shape[0],
            room=room.data_ptr(),
        ),
        lse_grads=floats("gradients of log-sum-exps", lse_grad, num_rows),
        product_grads=floats("gradients of products", product_grad, num_rows),
        totals=floats("totals", total, num_rows),
        grad=None if step else rows_of_table("the gradient", grad, classes * size),
        step=step.address if step else None,
        grad_is_bfloat16=step is None and grad.dtype == torch.bfloat16,
    )
    return True


def _loop(table, options, plan, labels, shape, *, threads, kept_numbers, **addresses):
    """The struct LOOP, which the calls of both directions have; shape: of x; addresses: of unit, shifts, kept and room."""
    weight, classes, (num_rows, size) = table.weight, table.num_rows, shape
    return cpu_library.filled(
        cpu_library.LOOP,
        table=rows_of_table("weight", weight, classes * size),
        labels=integers("labels", labels, num_rows),
        **addresses,
        num_rows=num_rows,
        size=size,
        slab=plan.slab,
        threads=threads,
        classes=classes,
        kept_classes=min(plan.kept_slabs * plan.slab, classes),
        kept_numbers=kept_numbers,
        products_of_thread=cpu_kernels.PRODUCTS_OF_THREAD,
        ignore_index=options.ignore_index,
        scale=options.scale,
        log2_scale=plan.log2_scale,
        is_bfloat16=weight.dtype == torch.bfloat16,
    )
