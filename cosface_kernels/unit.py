"""Unit rows at any magnitude, in plain differentiable PyTorch."""

import torch

# Below this norm a row has no direction: its unit vector and its gradient are zero (reference.unit_rows does the same).
TINY_NORM = 1e-12


def unit_rows(rows):
    """(rows / ‖rows‖ (R, D), 1 / ‖rows‖ (R, 1)), both zero for a row shorter than 1e-12.

    A row is divided by its largest element first, because the square of 1e20 is not a float32. The unit vector does not depend
    on that divisor, so autograd rightly sees a constant.
    """
    largest = rows.detach().abs().amax(1, keepdim=True)
    scaled = rows / torch.where(largest == 0, 1.0, largest)
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    tiny = length * largest < TINY_NORM
    length = torch.where(tiny, 1.0, length)
    return torch.where(tiny, 0.0, scaled / length), torch.where(tiny, 0.0, 1.0 / (length * largest))
