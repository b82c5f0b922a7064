"""Draws the M classes of a step: all positives (own classes of the batch), and others, each equally likely.

The C - P others are numbered 0 .. C - P - 1 and cut into strata, as many as are drawn. One number is drawn from each stratum, and
a random offset, modulo C - P, is added to all: it evens out that strata have two sizes and fixed ends.

    | · x · · | x · · · | · · x · |        · a class, x one that is drawn, | the end of a stratum

O(M) work and memory for M classes, whatever C is; only the batch's labels are sorted. The number P of different labels is known
on their device alone, and nothing waits for it: M is at least the most that P may be, and arrays of fewer numbers end in NOTHING.
"""

import torch

# Neighbouring seeds get streams far from each other: 2^64 over the golden ratio.
SEED_STRIDE = 0x9E3779B97F4A7C15
NOTHING = 2**62  # more than any class


def draw(labels, num_classes, rate, seed, step):
    """(M,) classes, ascending: the P among labels (N,), and M - P others. step: 0-dim int64."""
    num_rows, size = len(labels), wanted(len(labels), num_classes, rate)
    positives, num_positives = _distinct(labels, num_classes)
    count = size - num_positives
    slot, rank = (torch.arange(length, dtype=torch.int64, device=labels.device) for length in (num_rows, size))
    is_positive, is_other = slot < num_positives, rank < count
    ranks = torch.where(
        is_other, _ranks(num_classes - num_positives, count, random_bits(labels.device, seed, step, size + 1)), NOTHING
    )
    # Another class is its rank plus the positives below it; positive i has positives[i] - i others below it.
    below = torch.searchsorted(torch.where(is_positive, positives - slot, NOTHING), ranks, right=True)
    others = torch.where(is_other, ranks + below, NOTHING)
    classes = torch.empty(size + 1, dtype=torch.int64, device=labels.device)  # and a place for NOTHING
    classes.scatter_(0, torch.where(is_other, rank + below, size), others)
    classes.scatter_(0, torch.where(is_positive, slot + torch.searchsorted(others, positives), size), positives)
    return classes[:size]


def wanted(num_rows, num_classes, rate):
    """M, how many classes are drawn at this rate: enough for any labels of so many rows."""
    return max(1, round(rate * num_classes), min(num_rows, num_classes))


def _distinct(labels, num_classes):
    """(the classes among labels (N,), ascending, each once; how many)."""
    ordered = torch.where((labels >= 0) & (labels < num_classes), labels, NOTHING).sort().values
    is_first = (ordered.diff(prepend=ordered.new_full((1,), -1)) != 0) & (ordered < NOTHING)
    place = torch.where(is_first, is_first.cumsum(0) - 1, len(labels))
    distinct = ordered.new_full((len(labels) + 1,), NOTHING).scatter_(0, place, torch.where(is_first, ordered, NOTHING))
    return distinct[:-1], is_first.sum()


def _ranks(population, count, bits):
    """A tensor whose first `count` numbers are distinct, ascending, below population, and each equally likely."""
    population, offset = population.clamp(min=1), bits.index_select(0, count[None])
    # 63 bits modulo a size: no number is likelier than another by more than size / 2^63.
    return one_of_each(population, bits[:-1], offset % population, count)


def one_of_each(population, bits, offset, count):
    """A tensor whose first `count` numbers ascend: number bits[i] modulo the stratum's size of stratum i, plus offset."""
    rank, strata = torch.arange(len(bits) + 1, dtype=torch.int64, device=bits.device), count.clamp(min=1)
    edges = rank * population // strata
    numbers = edges[:-1] + bits % edges.diff() + offset
    turned = ((numbers >= population) & (rank[:-1] < count)).sum()
    return (numbers % population)[(rank[:-1] - turned) % strata]


def random_bits(device, seed, step, count):
    """(count,) numbers of 63 random bits, a function of seed and step: an int, or a 0-dim tensor on the device."""
    if device.type == "cpu":
        generator = torch.Generator().manual_seed((seed * SEED_STRIDE + int(step)) % 2**64)
        return torch.randint(2**63 - 1, (count,), generator=generator, dtype=torch.int64, device="cpu")
    return hashed_bits(device, seed, step, count)


def hashed_bits(device, seed, step, count):
    """random_bits for a step on the device, which only the host could hand to a generator: splitmix64, in wrapping sums."""
    start = _mixed(step.to(device) + _signed(seed * SEED_STRIDE))
    return _unsigned_shift(_mixed(start + torch.arange(1, count + 1, dtype=torch.int64, device=device) * _signed(SEED_STRIDE)), 1)


def _mixed(number):
    number = (number ^ _unsigned_shift(number, 30)) * _signed(0xBF58476D1CE4E5B9)
    number = (number ^ _unsigned_shift(number, 27)) * _signed(0x94D049BB133111EB)
    return number ^ _unsigned_shift(number, 31)


def _unsigned_shift(number, places):
    return (number >> places) & (2 ** (64 - places) - 1)


def _signed(number):
    """An unsigned 64-bit number as the int64 of the same bits."""
    return (number + 2**63) % 2**64 - 2**63
