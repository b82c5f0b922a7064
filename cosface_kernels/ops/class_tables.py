"""The parameters that are class tables: the heads that have them, the scales of their rows, the ranks that these lie on."""

import weakref

import torch

from ..distributed import dtensors
from . import formats

FUSED_ALONE = (
    "a table_format of 16 or 8 bits trains with FusedSGD or FusedAdamW alone, made before the forward pass: rounded to nearest, "
    "most of another optimiser's updates would be lost. dtype=torch.bfloat16 makes a table that takes any"
)
_heads = weakref.WeakSet()  # all heads: an optimiser finds by them which of its parameters are tables


def register(head):
    """Register a head, so that optimisers know its parameters as a class table and its bias."""
    _heads.add(head)


def head_of(parameter):
    """The head whose weight or bias a parameter is, or None: also where torch.nn.utils.parametrize makes the weight of it."""
    own = ((head, map(head._parameters.get, ("weight", "bias"))) for head in _heads)
    return next((head for head, parameters in own if any(parameter is each for each in parameters)), None)


def row_scale(weight):
    """The scales of this rank's rows of a table, as its heads hold them: (R,) beside float8, else None."""
    if weight.dtype != formats.FLOAT8:
        return None
    found = [head.weight_scale for head in _heads if head._parameters.get("weight") is weight]
    if not found or any(each is None for each in found):
        raise ValueError(
            "a float8 class table needs the scales of its rows, which a head has that was made with "
            'table_format="float8"; head.to(torch.float8_e4m3fn) makes none'
        )
    if any(each is not found[0] for each in found):
        raise ValueError("heads that share a float8 weight must share its scales too: other.weight_scale = head.weight_scale")
    scale, rows = dtensors.local(found[0]), dtensors.local(weight)
    if len(scale) != len(rows):
        raise ValueError(
            f"the scales of {len(scale)} rows are beside {len(rows)} rows of a float8 table: fully_shard and the like shard no "
            'buffers; ShardedCosFaceLoss(..., table_format="float8") does'
        )
    return scale


def ranks_of(weight):
    """The Ranks that a table's rows lie on."""
    head = head_of(weight)
    return dtensors.ranks(weight) if head is None else head.placement.ranks(weight)


def refused(weight, rows):
    """rows of weight, with a backward that raises: a table of fewer than 32 bits without a fused optimiser."""
    return _Refuse.apply(weight, rows)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, rows):
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(FUSED_ALONE)
