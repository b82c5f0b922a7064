"""The facts that ranks exchange before a call: sizes, dtypes, and a checksum of the options that must be the same."""

import zlib
from dataclasses import fields
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .. import margins, validation

# The options of a head that must be the same on all ranks.
SHARED = (
    *("num_classes", "scale", "reduction", "normalize_features", "ignore_index", "ddp_average", "label_smoothing"),
    *("negatives", "sample_rate", "sample_correction", "training"),
)
_checksums = WeakTensorKeyDictionary()  # of a margin's tensors: (version, checksum)


class RankFacts(NamedTuple):
    """The numbers that a rank sends the others about its batch and its head."""

    num_rows: int
    dtype: int
    grad_mode: bool
    options: int
    needs_gradient: bool
    k: int
    statistics: bool
    label_columns: int  # K of labels (N, K), 0 of labels (N,)

    @classmethod
    def of(cls, head, features, k=0, statistics=False, label_columns=0):
        values = [getattr(head, name) for name in SHARED]
        values = [value.item() if isinstance(value, torch.Tensor) else value for value in values]
        values.append(head.hard_classes is None)
        options = zlib.crc32(repr([*values, *_margin_facts(head._margin(), len(features))]).encode())
        grad_mode = torch.is_grad_enabled()
        return cls(
            num_rows=len(features),
            dtype=validation.FLOAT_DTYPES.index(features.dtype),
            grad_mode=grad_mode,
            options=options,
            needs_gradient=grad_mode and features.requires_grad,
            k=k,
            statistics=statistics,
            label_columns=label_columns,
        )

    @classmethod
    def agreed(cls, ranks, of_this_rank, device):
        """(rows of each rank, True if any needs the gradient of its features). Raises unless all ranks have the same options.

        of_this_rank() -> RankFacts; what it raises on one rank, all raise.
        """
        of_ranks = cls(*zip(*ranks.exchange("the exchange of batch sizes", of_this_rank, len(cls._fields), device), strict=True))
        options = "num_classes, scale, margin and all other options of the head must be the same (compared by a checksum)"
        grad_modes = "gradients must be enabled on all ranks or on none: torch.is_grad_enabled() must be the same"
        for what, values in (
            ("features must have the same dtype", [validation.FLOAT_DTYPES[dtype] for dtype in of_ranks.dtype]),
            (options, of_ranks.options),
            (grad_modes, [*map(bool, of_ranks.grad_mode)]),
            ("k must be the same", of_ranks.k),
            ("return_statistics must be the same", [*map(bool, of_ranks.statistics)]),
            ("the number of label_weights to a row must be the same", of_ranks.label_columns),
        ):
            if len({*values}) > 1:
                raise ValueError(f"{what} on all ranks, got {', '.join(map(str, values))}")
        return [*of_ranks.num_rows], any(of_ranks.needs_gradient)


def _margin_facts(margin, num_rows):
    """The part of a margin that must be the same on all ranks: its kind and its numbers, but those for this rank's own rows."""
    per_row = margins.row_tensors(margin, num_rows)
    for name in (field.name for field in fields(margin)):
        value = getattr(margin, name)
        shared = isinstance(value, torch.Tensor) and name not in per_row
        yield name, "of rows" if name in per_row else _checksum(value) if shared else value
    yield type(margin).__qualname__


def _checksum(tensor):
    """A checksum of a tensor's numbers, made once: on a GPU it waits for the device."""
    version, checksum = _checksums.get(tensor, (None, None))
    if version != tensor._version:
        numbers = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        memory = bytearray(len(numbers))
        if memory:
            torch.frombuffer(memory, dtype=torch.uint8).copy_(numbers)
        checksum = zlib.crc32(memory)
        _checksums[tensor] = tensor._version, checksum
    return checksum
