"""State of a fused optimiser for one parameter of a table: its buffers, and whether they fit.

<name>          a number for each of the parameter's, in a state format
<name>_scale    a number for each row, for the formats with codes of 8 bits
step, skipped, rounding_step    counts
"""

import torch

from .. import validation
from ..distributed import dtensors
from ..ops import class_tables, formats
from ..ops.slabs import wide_dtype

COUNTS = ("step", "skipped", "rounding_step")
INTERRUPTED = "interrupted"  # key in a table's state while a step is writing it; never in state that is loaded


def allocate(parameter, state, name, state_format):
    """Add a buffer of zeros, the first value of all state, in its format."""
    dtype = formats.STATE_FORMATS[state_format if parameter.dim() == 2 else "float32"]
    if dtype == torch.float32:
        dtype = wide_dtype(parameter.dtype)
    if dtype == torch.int8 and name == "exp_avg_sq":
        dtype = torch.uint8
    state[name] = dtensors.zeros(parameter, parameter.shape, dtype)
    if dtype in formats.LARGEST_CODE:
        state[f"{name}_scale"] = dtensors.zeros(parameter, parameter.shape[:1], torch.float32)


def rows_of(tensor):
    """This rank's rows (R, D) of a table or its state; (R, 1) for a bias."""
    tensor = dtensors.local(tensor)
    return tensor if tensor.dim() == 2 else tensor[:, None]


def check_rows(parameter, group, state):
    """Check that `step` can write a parameter and its state: `head.to(...)` and `weight.data = ...` may have replaced them."""
    row_scale = class_tables.row_scale(parameter)
    validation.check_row_scale(dtensors.local(parameter), row_scale)
    if row_scale is not None and not row_scale.is_contiguous():
        raise ValueError(f"weight_scale must be contiguous to train a float8 table, got strides {row_scale.stride()}")
    if row_scale is None and parameter.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"a class table to train must be float32, bfloat16, float64 or float8, got {parameter.dtype}")
    if not dtensors.local(parameter).is_contiguous():
        raise ValueError(f"a class table to train must be contiguous, got strides {parameter.stride()}")
    if parameter.dtype == torch.float64 and group["state_format"] != "float32":
        raise ValueError(f'a float64 table has state of its own dtype, state_format="float32", got {group["state_format"]!r}')
    check_whole(state)
    wide = wide_dtype(parameter.dtype)
    for name, value in state.items():
        try:
            check_state(state, name, parameter)
            if value.dim() and (value.device != parameter.device or not dtensors.local(value).is_contiguous()):
                raise ValueError(
                    f"{name} must be contiguous on {parameter.device}, got strides {value.stride()} on {value.device}"
                )
        except (TypeError, ValueError) as error:
            message = (
                f"{error}: the table or its state was replaced; make the optimiser again (head.grow and head.remove keep both)"
            )
            raise type(error)(message) from None
        is_wide = value.dim() and value.is_floating_point() and not formats.is_rounded(value.dtype)
        if is_wide and not name.endswith("_scale") and value.dtype != wide:
            raise ValueError(f"{name} is {value.dtype}, but the table is {parameter.dtype} now: make the optimiser again")


def check_whole(state):
    """Raise for the state of a table whose last step was interrupted."""
    if INTERRUPTED in state:
        raise RuntimeError(
            "the class table is between steps: an error or Ctrl-C ended the last step when some of its rows had been updated and "
            "others not. Load table and optimiser from a checkpoint, or make the optimiser again to go on from the table as it is"
        )


def check_state(state, name, parameter, waits=False):
    """Check a buffer: it has its parameter's shape (a scale: one number for each row), and is sharded as the parameter is; codes
    have their scales. waits: whether to check a count on a GPU too, for whose value the host waits.
    """
    value, shape = state[name], () if name in COUNTS else parameter.shape[:1] if name.endswith("_scale") else parameter.shape
    validation.check_read(name, tuple(shape), value)
    if value.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)} for the table of {tuple(parameter.shape)}, got {tuple(value.shape)}"
        )
    if name in COUNTS:
        if waits or value.device.type == "cpu":
            _check_count(name, value)
        return
    codes = torch.uint8 if name == "exp_avg_sq" else torch.int8
    dtypes = (torch.float32,) if name.endswith("_scale") else (torch.float32, torch.float64, torch.bfloat16, codes)
    if value.dtype not in dtypes:
        raise ValueError(f"{name} must be one of {dtypes}, got {value.dtype}")
    if dtensors.is_sharded(value) != dtensors.is_sharded(parameter):
        raise ValueError(f"{name} must be sharded where the table is: use load_checkpoint, which shards what was plain")
    if value.dtype in formats.LARGEST_CODE and f"{name}_scale" not in state:
        raise ValueError(f"{name} is {value.dtype}, so there must be a {name}_scale")


def _check_count(name, value):
    """Check a count's value: a whole number of at least 0."""
    counted = None if value.dtype == torch.bool or value.is_complex() else value.item()
    if counted is None or not 0 <= counted < float("inf") or counted != int(counted):
        raise ValueError(f"{name} must be a count, a whole number of at least 0, got {value}")
