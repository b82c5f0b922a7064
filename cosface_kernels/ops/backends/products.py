"""The two kinds of matrix product in the slab loop. Operands may be bfloat16; the result is float32 (float64 for float64)."""

import torch


def cosines(x, unit):
    """x unitᵀ, accumulated and returned wide: rounding a cosine of 0.9 to bfloat16 may cost 0.002, 13% of e^{64 cos}."""
    if x.dtype != torch.bfloat16:
        return x @ unit.T
    if x.is_cuda:
        return torch.mm(x, unit.T, out_dtype=torch.float32)
    return x.float() @ unit.float().T  # no other device multiplies bfloat16 into float32


def accumulated(left, right):
    """left @ right, returned wide. Off CUDA a bfloat16 product is rounded once, before the caller adds it to others."""
    if left.dtype != torch.bfloat16:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def in_parts(left, right, parts):
    """(parts, N, D) float32 whose sum is left (N, B) @ right (B, D), each over its own part of B.

    A product with few rows and columns and a long sum occupies few of a GPU's processors; its parts occupy them all.
    """
    left, right = left.unflatten(1, (parts, -1)).transpose(0, 1), right.unflatten(0, (parts, -1))
    if left.is_cuda and left.dtype == torch.bfloat16:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())
