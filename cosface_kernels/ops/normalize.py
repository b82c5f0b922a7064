"""Unit rows at any magnitude, in plain differentiable PyTorch, and their gradient as a function for code outside of autograd."""

import torch
import torch.nn.functional as F

# Below this norm a row has no direction: its unit vector and its gradient are zero (reference.unit_rows does the same).
TINY_NORM = 1e-12


def unit_rows(rows):
    """(rows / ‖rows‖ (R, D), 1 / ‖rows‖ (R, 1)), both zero for a row shorter than 1e-12.

    A row is divided by its largest element first, because the square of 1e20 is not a float32. The unit vector does not depend
    on that divisor, so autograd rightly sees a constant.
    """
    largest = rows.detach().abs().amax(1, keepdim=True)
    divisor = torch.where(largest == 0, 1.0, largest)
    scaled = rows / divisor
    length = torch.where(largest == 0, 1.0, scaled.square().sum(1, keepdim=True)).sqrt()
    tiny = length * largest < TINY_NORM
    return scaled / torch.where(tiny, torch.inf, length), torch.where(tiny, 0.0, 1.0 / (length * divisor))


def direction(rows):
    """rows / ‖rows‖, the derivative of a row's length, however short or long; zero for a row of zeros."""
    largest = rows.abs().amax(-1, keepdim=True)
    return F.normalize(rows / torch.where(largest == 0, 1.0, largest), dim=-1)


def project(unit, inverse_norm, unit_grad):
    """The gradient of rows from that of their unit rows: its part orthogonal to the row, over the norm; 0 for a row of norm 0.

    inverse_norm None: the rows were not normalised, so the gradient is returned unchanged.
    """
    if inverse_norm is None:
        return unit_grad
    grad = (unit_grad - unit * (unit * unit_grad).sum(1, keepdim=True)) * inverse_norm
    return torch.where(inverse_norm == 0, 0.0, grad)
