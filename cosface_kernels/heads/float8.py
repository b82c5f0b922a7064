"""The scales of a float8 table's rows, weight_scale: how a head draws such rows, converts and loads them.

table = weight.float() · weight_scale[:, None]
"""

import torch

from .. import validation
from ..distributed import dtensors
from ..ops import formats

NUMBERS = 2**18  # encoded or decoded at a time, in some ten temporary buffers of 1 MB


def _slabs(table):
    rows = max(1, NUMBERS // table.shape[1])
    return [slice(start, start + rows) for start in range(0, len(table), rows)]


@torch.no_grad()
def put(weight, row_scale, index, rows):
    """Write float rows into rows of a table of any format, float8 to nearest. row_scale: beside float8, else None."""
    if row_scale is None:
        weight[index] = rows.to(weight)
    else:
        formats.write(weight, row_scale, index, rows.to(weight.device, torch.float32), None)


@torch.no_grad()
def fill(weight, row_scale, draw):
    """Fill a table of any format with what `draw` fills float rows with."""
    if row_scale is None:
        draw(weight)
        return
    for slab in _slabs(weight):
        rows = torch.empty_like(weight[slab], dtype=torch.float32)
        draw(rows)
        put(weight, row_scale, slab, rows)


def restore(head, row_scale):
    """Undo parts of head._apply: scales stay float32; where the weight became an ordinary float table, it takes them in."""
    if head.weight.dtype == formats.FLOAT8:
        if head.weight_scale.dtype != torch.float32:
            head.weight_scale = row_scale.to(head.weight_scale.device)
        return
    weight, row_scale = dtensors.local(head.weight.data), dtensors.local(row_scale)
    if not weight.is_meta:
        weight.mul_(row_scale.to(weight.device)[:, None])
    head.weight_scale = None


@torch.no_grad()
def convert(head, state_dict, prefix):
    """Turn the table in a state dict that is about to be loaded into the head's format, where one of both is float8."""
    weight, scale = f"{prefix}weight", f"{prefix}weight_scale"
    given, own = state_dict.get(weight), head._parameters.get("weight")
    if not isinstance(given, torch.Tensor) or own is None or given.shape != own.shape:
        return
    if given.dtype == formats.FLOAT8 and scale not in state_dict:
        raise ValueError(f"{weight} in the state dict is float8, and the scales of its rows, {scale}, are not there")
    if (given.dtype == formats.FLOAT8) == (own.dtype == formats.FLOAT8):
        return
    if dtensors.is_sharded(given) or dtensors.is_sharded(own):
        raise ValueError(
            f"{weight} is {given.dtype} in the state dict, {own.dtype} here, and sharded tables are not converted: make the head "
            "with the table_format that was saved, and convert with float() or in a head of one process"
        )
    if own.dtype == formats.FLOAT8:
        numbers = torch.empty(given.shape, dtype=formats.FLOAT8, device=given.device)
        scales = torch.empty(len(given), dtype=torch.float32, device=given.device)
        for slab in _slabs(given):
            formats.write(numbers, scales, slab, given[slab].float(), None)
        state_dict[weight], state_dict[scale] = numbers, scales
    else:
        validation.check_row_scale(given, state_dict[scale])
        table, scales = torch.empty(given.shape, dtype=torch.float32, device=given.device), state_dict.pop(scale)
        for slab in _slabs(given):
            table[slab] = formats.read(given, scales, slab)
        state_dict[weight] = table
