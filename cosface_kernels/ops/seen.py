"""Recognition of tensors that were changed or replaced since they were last seen."""

from typing import NamedTuple

import torch

from ..distributed import dtensors

CHECKED_ROWS = 64  # rows of a table whose numbers are compared with those that forward saw


class Seen(NamedTuple):
    """A tensor's address, shape, version and some of its numbers at one time. The alias holds its memory, so that no later tensor
    gets the address.
    """

    alias: torch.Tensor
    version: int
    sums: torch.Tensor | None

    @classmethod
    def all(cls, *tensors):
        local = [(dtensors.local(tensor.detach()), tensor._version) for tensor in tensors if tensor is not None]
        return [cls(rows, version, _sums(rows)) for rows, version in local]

    def change(self, tensor):
        """A phrase for a message that says how the tensor differs now, or None."""
        now, then = dtensors.local(tensor.detach()), self.alias
        if (now.shape, now.dtype) != (then.shape, then.dtype):
            return f"replaced, {tuple(then.shape)} of {then.dtype} by {tuple(now.shape)} of {now.dtype},"
        if (now.data_ptr(), now.stride()) != (then.data_ptr(), then.stride()):
            return "replaced by another tensor of its shape"
        if tensor._version != self.version:
            return "changed"
        return None if self.sums is None or torch.equal(self.sums, _sums(now)) else "changed (through .data or a NumPy array)"


def _sums(rows):
    """The bits of the sums of some rows, spread over all, which show a write that PyTorch does not count, as one through `.data`.

    None on a GPU, where comparing them would wait for the device, and for integers, which no optimiser moves.
    """
    if rows.device.type != "cpu" or not rows.is_floating_point() or not len(rows):
        return None
    chosen = rows[:: max(1, len(rows) // CHECKED_ROWS)]
    return chosen.flatten(1).double().sum(1).view(torch.int64) if rows.dim() > 1 else chosen.double().view(torch.int64)


def change_of(seen, *tensors):
    """The phrase of the first tensor that has changed, or None."""
    present = (tensor for tensor in tensors if tensor is not None)
    return next(filter(None, (one.change(tensor) for one, tensor in zip(seen, present, strict=True))), None)
