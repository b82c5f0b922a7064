"""The two kinds of matrix product in the slab loop. Operands may be bfloat16; the result is float32 (float64 for float64)."""

import torch


def cosines(x, unit):
    """x unitᵀ, accumulated and returned wide: rounding a cosine of 0.9 to bfloat16 may cost 0.002, 13% of e^{64 cos}."""
    if x.dtype != torch.bfloat16:
        return x @ unit.T
    if x.is_cuda:
        return torch.mm(x, unit.T, out_dtype=torch.float32)
    return x.float() @ unit.float().T  # no other device multiplies bfloat16 into float32


def accumulated(left, right, out=None):
    """left @ right, returned wide, in `out` if given. Off CUDA a bfloat16 product is rounded once, before the caller adds it."""
    if left.is_cuda and left.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    product = torch.mm(left, right, out=out if left.dtype != torch.bfloat16 else None)
    if left.dtype != torch.bfloat16:
        return product
    return product.float() if out is None else out.copy_(product)


def in_parts(left, right, parts):
    """(parts, N, D) float32 whose sum is left (N, B) @ right (B, D), each over its own part of B.

    A product with few rows and columns and a long sum keeps few of a GPU's processors busy; its parts keep all of them busy.
    """
    width = left.shape[1] // parts
    left = left.as_strided((parts, left.shape[0], width), (width, *left.stride()))
    right = right.unflatten(0, (parts, -1))
    if left.is_cuda and left.dtype == torch.bfloat16:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())
