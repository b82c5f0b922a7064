"""Which classes are drawn: all positives, and as many others as are wanted in all, each as likely as any other.

The others are ranked 0 .. C - P - 1 and cut into as many strata as are drawn; one number of each, and all are turned by a random
offset, which makes up for strata of two sizes and ends between two of them:

    | · x · · | x · · · | · · x · |

O(M) work and memory for M classes, whatever C is, and nothing is sorted but the batch's labels.
"""

import torch

# Neighbouring seeds get streams far from each other: 2^64 over the golden ratio.
SEED_STRIDE = 0x9E3779B97F4A7C15


def draw(labels, num_classes, rate, seed, step):
    """(max(P, M),) ascending: the P classes among labels (N,), and others up to M = rate C."""
    positives = labels[(labels >= 0) & (labels < num_classes)].unique()
    count = max(wanted(num_classes, rate) - len(positives), 0)
    generator = torch.Generator(labels.device).manual_seed((seed * SEED_STRIDE + step) % 2**64)
    ranks = _distinct(num_classes - len(positives), count, generator)
    # Another class is its rank plus the positives below it; positive i has positives[i] - i others below it.
    below = torch.searchsorted(positives - _range_like(positives), ranks, right=True)
    others = ranks + below
    classes = torch.empty(len(positives) + count, dtype=torch.int64, device=labels.device)
    classes[_range_like(ranks) + below] = others
    classes[_range_like(positives) + torch.searchsorted(others, positives)] = positives
    return classes


def wanted(num_classes, rate):
    """M."""
    return max(1, round(rate * num_classes))


def _distinct(population, count, generator):
    """(count,) ascending distinct numbers below population, each as likely as any other."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=generator.device)
    # 63 bits modulo a size: no number is likelier than another by more than size / 2^63.
    bits = torch.randint(2**63 - 1, (count + 1,), generator=generator, device=generator.device)
    return one_of_each(population, bits[:-1], bits[-1] % population)


def one_of_each(population, bits, offset):
    """(count,) ascending: number bits[i] modulo its size of stratum i, turned by offset."""
    edges = torch.arange(len(bits) + 1, device=bits.device) * population // len(bits)
    numbers = edges[:-1] + bits % edges.diff() + offset
    turned = (numbers >= population).sum()
    return (numbers % population)[(_range_like(numbers) - turned) % len(numbers)]


def _range_like(tensor):
    return torch.arange(len(tensor), device=tensor.device)
