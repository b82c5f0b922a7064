"""Hard negatives in plain PyTorch: where a product c of row n passes τ_n, g(c) = p0_n + p1_n c + p2_n c² takes its place.

E of g(c) is summed; E g'(c) is kept and multiplied, so that both gradients are what they would be without g.
"""

import torch


def changed(products, hard, dim):
    """(g(c), g'(c)) of products with rows along the other dimension than dim; hard: (N, 4), (τ, p0, p1, p2) of each row."""
    threshold, p0, p1, p2 = (column.unsqueeze(dim) for column in hard.unbind(1))
    is_hard = products > threshold
    return (
        torch.where(is_hard, p0 + products * (p1 + products * p2), products),
        torch.where(is_hard, p1 + 2 * p2 * products, 1.0),
    )
