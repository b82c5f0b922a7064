"""Checks of callers' arguments. Every message names the argument, what it got and what it takes. docs/errors.md lists them."""

# ruff: noqa: F401 (for callers)

from .batch import (
    check_class_weight,
    check_correction,
    check_features,
    check_hard_classes,
    check_ids,
    check_labels,
    check_own_cosines,
    check_positives,
    check_row_scale,
    check_tensors,
)
from .calls import ELSEWHERE, check_attribute, check_call, check_names, check_optimizer
from .options import (
    BACKENDS,
    Backend,
    Device,
    MemoryBudget,
    Reduction,
    StateFormat,
    TableFormat,
    check_fields,
    check_ignore_index,
    check_label_smoothing,
    check_margins,
    check_options,
    check_reduction,
    check_scale,
)
from .tensors import FLOAT_DTYPES, check_read, check_transforms
from .values import (
    check_at_least_zero,
    check_choice,
    check_count,
    check_flag,
    check_integer,
    check_k,
    check_more_than_zero,
    check_number,
    check_probability,
    check_rate,
    check_size,
    shown,
)
