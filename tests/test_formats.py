"""Are formats of 16 and 8 bits right on average, and the same bits in PyTorch and in native code?"""

import itertools
import statistics

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import numpy as np
import torch
from selection import pairs, slow_when

from benchmarks import formats as training
from cosface_kernels.ops import formats
from cosface_kernels.ops.backends import cpu_library
from cosface_kernels.ops.formats import FLOAT8
from cosface_kernels.optim import rules

INDEX = slice(0, 64)


def stored(dtype, rows=64, size=37):
    """(buffer, scale) of a format, zeros."""
    return torch.zeros(rows, size, dtype=dtype), torch.zeros(rows) if dtype.itemsize == 1 else None


def rounded(dtype, rows, key=1, stream=0):
    buffer, scale = stored(dtype, *rows.shape)
    bits = formats.random_bits(key, torch.arange(len(rows)), rows.shape[1], stream)
    formats.write(buffer, scale, slice(0, len(rows)), rows, bits)
    return buffer, scale


def normal(rows=64, size=37):
    """Rows of many magnitudes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, size, generator=generator) * torch.logspace(-12, 12, rows)[:, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8, torch.int8, torch.uint8])
def test_rounds_to_a_neighbour_and_is_right_on_average(dtype):
    rows = normal().abs() if dtype == torch.uint8 else normal()
    count = 400
    values = torch.stack([formats.read(*rounded(dtype, rows, key=formats.rounding_key(0, step)), INDEX) for step in range(count)])
    values, exact = values.double(), rows.double()
    if dtype == torch.uint8:
        values, exact = values.sqrt(), exact.sqrt()
    largest = exact.abs().amax(1, keepdim=True)
    if dtype in (torch.bfloat16, FLOAT8):
        unit = torch.exp2(torch.floor(torch.log2(exact.abs())) - (7 if dtype == torch.bfloat16 else 3))
    else:
        unit = (largest / formats.LARGEST_CODE[dtype]).expand_as(exact)
    slack = 1 + 1e-5  # float32 roundings of the code
    assert ((values - exact).abs() <= unit * slack).all()
    # A mean of `count` numbers within `unit` of each other is off by unit / 2 / sqrt(count) (one standard deviation); of 2368
    # numbers none should be off by five. A square's code is never 0, which is a bias for those below one code.
    fair = exact >= unit if dtype == torch.uint8 else torch.ones_like(exact, dtype=torch.bool)
    off = ((values.mean(0) - exact) / unit)[fair]
    assert (off.abs() < 5 * 0.5 / count**0.5).all()
    assert abs(off.mean()) < 5 * 0.5 / (count * len(off)) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8, torch.int8, torch.uint8])
def test_what_is_stored_stays(dtype):
    """Written again, a number that the format has is the same number: a skipped step, or rows at rest, must not drift."""
    first = formats.read(*rounded(dtype, normal().abs()), INDEX)
    again = first
    for step in range(20):
        again = formats.read(*rounded(dtype, again, key=step), INDEX)
    # int8: the scale of a row is divided by 127 and multiplied again.
    exact = dtype in (torch.bfloat16, FLOAT8)
    assert torch.equal(again, first) if exact else torch.allclose(again, first, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8, torch.int8, torch.uint8])
def test_zeros_and_what_is_not_finite(dtype):
    rows = torch.ones(3, 8)
    rows[0] = 0
    rows[1, 2] = torch.nan
    rows[2, 3] = torch.inf
    values = formats.read(*rounded(dtype, rows), slice(0, 3))
    assert not values[0].any() and not values[1, 2].isfinite() and not values[2, 3].isfinite()


def test_every_number_of_float8_is_pytorchs():
    numbers = torch.arange(256, dtype=torch.uint8).view(FLOAT8)[None]
    exact = numbers.float()
    finite = ~exact.isnan()
    assert torch.equal(formats.read(numbers, torch.ones(1), slice(0, 1))[finite], exact[finite])
    for bits in (None, torch.zeros(1, 254, dtype=torch.int64), torch.full((1, 254), 2**16 - 1)):
        buffer, scale = stored(FLOAT8, 1, 254)
        formats.write(buffer, scale, slice(0, 1), exact[finite][None], bits)
        assert scale.item() == 1 and torch.equal(buffer.view(torch.uint8)[0], numbers.view(torch.uint8)[finite])


def test_float8_to_nearest_is_pytorchs():
    rows = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 64)[:, None]
    rows = torch.cat([rows.clamp(-448, 448), torch.full((64, 1), 448.0)], 1)  # with a scale of 1; some are subnormal
    buffer, scale = stored(FLOAT8, *rows.shape)
    formats.write(buffer, scale, INDEX, rows, None)
    assert (scale == 1).all() and torch.equal(buffer.float(), rows.to(FLOAT8).float())


@pytest.mark.parametrize(
    ("largest", "scale"),
    [(448.0, 1.0), (448.00003, 2.0), (-225.0, 1.0), (224.0, 0.5), (1e-40, 2.0**-126), (0.0, 2.0**-126), (3.4e38, 2.0**119)],
)
def test_the_scale_of_a_float8_row_is_the_least_that_holds_it(largest, scale):
    buffer, scales = rounded(FLOAT8, torch.tensor([[0.0, largest]]))
    assert scales.item() == scale
    assert abs(formats.read(buffer, scales, slice(0, 1))[0, 1].item()) <= 448 * scale  # and no infinity


def test_float8_below_its_normal_numbers_is_right_on_average():
    """Next to 448 their distance is 2^-9 up to 2^-6; a scale that grew must not bury what it made subnormal."""
    rows = torch.linspace(-(2.0**-6), 2.0**-6, 999)[None].repeat(400, 1)
    rows[:, 0] = 448
    values = formats.read(*rounded(FLOAT8, rows), slice(0, 400)).double()
    assert (values - rows).abs().max() < 2.0**-9
    assert ((values.mean(0) - rows[0]).abs() * 2**9 < 5 * 0.5 / 400**0.5).all()


def test_a_square_never_becomes_zero():
    rows = torch.tensor([[1.0, 1e-12, 1e-30, 0.0]])
    values = formats.read(*rounded(torch.uint8, rows), slice(0, 1))
    assert (values[0, :3] > 0).all() and values[0, 3] == 0


def test_random_bits_are_uniform_and_independent():
    """Bits of rows, columns, steps, streams and seeds, each against a bound of five standard deviations."""
    words = [
        formats.random_bits(formats.rounding_key(seed, step), torch.arange(2**33, 2**33 + 200), 50, stream)
        for seed in (0, 1)
        for step in (0, 1)
        for stream in (0, 1, 2, 3)
    ]
    bits = torch.stack(words)[..., None] >> torch.arange(16) & 1
    signs = (2 * bits - 1).double()
    assert (signs.mean((1, 2)).abs() < 5 / 10_000**0.5).all()
    flat = signs.movedim(3, 1).reshape(len(words) * 16, -1)
    correlations = flat @ flat.T / flat.shape[1] - torch.eye(len(flat))
    assert correlations.abs().max() < 6 / 10_000**0.5  # of 32,640 pairs
    # And with those of the other column of a pair, which has the other half of the same word.
    others = signs.unflatten(2, (25, 2)).flip(3).flatten(2, 3).movedim(3, 1).reshape(flat.shape)
    assert (flat @ others.T / flat.shape[1]).abs().max() < 6 / 10_000**0.5
    for neighbour in (signs[:, 1:] * signs[:, :-1], signs[:, :, 1:] * signs[:, :, :-1]):
        assert abs(neighbour.mean()) < 5 / neighbour.numel() ** 0.5
    assert np.unique(words[0].numpy()).size > 9000  # of 10,000 draws from 65,536


NATIVE = (
    ["sgd", "nesterov", "no momentum", "adamw"],
    [torch.float32, torch.bfloat16, FLOAT8],
    [torch.float32, torch.bfloat16, torch.int8],
    [1, 37, 64, 76],
)
NATIVE_PAIRS = pairs(*NATIVE)


@pytest.mark.parametrize("instruction_set", cpu_library.available())
@pytest.mark.parametrize("rule, table, state, size", itertools.product(*NATIVE))
@slow_when(lambda rule, table, state, size: (rule, table, state, size) not in NATIVE_PAIRS)
def test_native_code_is_the_same_step(rule, table, state, size, instruction_set, monkeypatch):
    """Three steps from the same numbers each time: float32 within roundings, stored ones one unit apart, few of them."""
    steps = {
        "sgd": rules.SGD(0.1, 0.9, 0.01, False, False),
        "nesterov": rules.SGD(0.1, 0.9, 0.0, True, True),
        "no momentum": rules.SGD(0.1, 0.0, 0.01, False, False),
        "adamw": rules.AdamW(0.01, (0.9, 0.999), 1e-8, 0.01, False, torch.tensor(3.0)),
    }
    names = {"no momentum": [], "adamw": [state, torch.uint8 if state == torch.int8 else state]}.get(rule, [state])
    generator = torch.Generator().manual_seed(1)
    rows, row_scale = stored(table, 40, size)
    numbers = torch.randn(40, size, generator=generator)
    if table == FLOAT8:
        formats.write(rows, row_scale, slice(0, 40), numbers, None)
    else:
        rows.copy_(numbers)
    states = [stored(dtype, 40, size) for dtype in names]
    monkeypatch.setattr(cpu_library, "available", lambda: (instruction_set,))
    for step in range(3):
        # The last column is that of a bias, so rows lie apart.
        grad = torch.randn(30, size + 1, generator=generator)[:, :size] * torch.logspace(-6, 2, 30)[:, None]
        results = []
        for is_native in (True, False):
            monkeypatch.setattr(rules.Part, "is_native", lambda part, is_native=is_native: is_native)
            copies = [tuple(None if t is None else t.clone() for t in s) for s in states]
            scales = None if row_scale is None else row_scale.clone()
            key = formats.rounding_key(3, step)
            part = rules.Part(rows.clone(), copies, steps[rule], key, 1000, None, row_scale=scales)
            part.apply(slice(5, 35), grad)
            results.append([(part.rows, scales), *part.states])
        for (ours, our_scale), (theirs, their_scale), (before, _) in zip(*results, [(rows, None), *states], strict=True):
            ours_there, before = (each.view(torch.int8) if each.dtype == FLOAT8 else each for each in (ours, before))
            assert torch.equal(ours_there[:5], before[:5]) and torch.equal(ours_there[35:], before[35:])
            one, other = (formats.read(t, s, slice(5, 35)).double() for t, s in ((ours, our_scale), (theirs, their_scale)))
            size_of = other.abs().amax(1, keepdim=True)
            differ = (one - other).abs() > 2**-18 * size_of
            # Rounded, a number that lies within a float32 rounding of the border goes the other way: of 2^16 borders, few.
            assert differ.double().mean() < (0 if ours.dtype == torch.float32 else 0.01) + 1e-9
            of_code = {torch.int8: 1 / 127, torch.uint8: 3 / 255}
            unit = {torch.float32: 2**-18, torch.bfloat16: 2**-7, FLOAT8: 2**-3, **of_code}[ours.dtype]
            assert ((one - other).abs() <= unit * size_of * 1.001).all()
        (rows, row_scale), states = results[1][0], results[1][1:]


@pytest.mark.parametrize("instruction_set", cpu_library.available())
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
def test_native_rounding_leaves_no_number_of_a_nan(table, instruction_set, monkeypatch):
    """What is added for rounding could carry beyond the sign of a NaN whose bits are all 1."""
    monkeypatch.setattr(cpu_library, "available", lambda: (instruction_set,))
    monkeypatch.setattr(rules.Part, "is_native", lambda part: True)
    grad = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)[:, None].expand(2, 37).contiguous()
    for rule, count in (
        (rules.SGD(0.1, 0.9, 0.01, False, False), 1),
        (rules.AdamW(0.01, (0.9, 0.999), 1e-8, 0.01, False, torch.tensor(3.0)), 2),
    ):
        rows, states = torch.ones(2, 37, dtype=table), [stored(torch.bfloat16, 2, 37) for _ in range(count)]
        rules.Part(rows, states, rule, formats.rounding_key(3, 1), 0, None).apply(slice(0, 2), grad)
        for numbers in (rows, *(state for state, _ in states)):
            assert numbers.isnan().all()


@pytest.mark.slow
def test_training_does_not_notice():
    """Real images, 200 steps: what a format changes is less than what another seed changes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        other_seeds = [training.last(training.losses("SGD", "float32", "float32", seed)) for seed in range(3)]
        spread = statistics.stdev(other_seeds)
        for table, state in (("float32", "int8"), ("bfloat16", "bfloat16")):
            assert abs(training.last(training.losses("SGD", table, state, 0)) - other_seeds[0]) < spread / 3, (table, state)
        exact, coarse = (
            training.last(training.losses("AdamW", *formats, 0)) for formats in (("float32",) * 2, ("bfloat16", "int8"))
        )
        assert abs(exact - coarse) < spread / 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_float8_keeps_what_rounding_to_nearest_loses(monkeypatch):
    """Nearly all of the way from a table that is rounded to nearest, and so hardly moves, to a float32 one."""
    exact, ours = (training.last(training.losses("SGD", *pair, 0)) for pair in (("float32",) * 2, ("float8", "int8")))
    stochastic = formats._float8
    monkeypatch.setattr(formats, "_float8", lambda rows, bits: stochastic(rows, None))
    monkeypatch.setattr(rules.Part, "is_native", lambda part: False)
    nearest = training.last(training.losses("SGD", "float8", "float32", 0))
    assert abs(ours - exact) < (nearest - exact) / 8
