"""Does the GPU's kernel make the step that PyTorch's operators make, with the same random bits, and move no number twice?"""

import itertools
from collections import Counter

import pytest
import torch
from cases import make
from selection import HAS_GPU, interpreted, pairs, slow_when

from cosface_kernels import CosFaceLoss, FusedAdamW, FusedSGD, MarginSoftmaxLoss
from cosface_kernels.margins import CosFace, Softmax
from cosface_kernels.ops import formats
from cosface_kernels.ops.formats import FLOAT8
from cosface_kernels.ops.table import Table
from cosface_kernels.optim import rules

triton_update = pytest.importorskip("cosface_kernels.ops.backends.triton_update")
DEVICE = "cuda" if HAS_GPU else "cpu"
ROWS = 40
FLOAT32, BFLOAT16, INT8, UINT8 = torch.float32, torch.bfloat16, torch.int8, torch.uint8
TABLES, STATES = (FLOAT32, BFLOAT16, FLOAT8), (FLOAT32, BFLOAT16, INT8)
# Past a word of 32 bits: its upper half counts too.
FIRST_ROW, KEY = 2**33 + 12345, formats.rounding_key(3, 4)


def sgd(momentum=0.9, lr=0.1, decay=0.01, nesterov=False, maximize=False):
    return rules.SGD(lr, momentum, decay, nesterov, maximize)


def adamw(betas=(0.9, 0.999), step=3.0, lr=0.01, eps=1e-8, decay=0.01, maximize=False):
    return rules.AdamW(lr, betas, eps, decay, maximize, torch.tensor(step, device=DEVICE))


def of_many_magnitudes(size, seed, rows=ROWS, exponents=(-6, 2)):
    values = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    return (values * torch.logspace(*exponents, rows)[:, None]).to(DEVICE)


def stored(dtype, values, squared=False):
    """(buffer, scale) that hold about these values, or their squares."""
    buffer = torch.zeros(values.shape, dtype=dtype, device=DEVICE)
    scale = torch.zeros(len(values), device=DEVICE) if dtype.itemsize == 1 else None
    values = values.square() if squared else values
    bits = formats.random_bits(9, torch.arange(len(values), device=DEVICE), values.shape[1], 0)
    if formats.is_rounded(dtype):
        formats.write(buffer, scale, slice(0, len(values)), values, bits)
    else:
        buffer.copy_(values)
    return buffer, scale


def part_of(rule, table, states, size, skip=None):
    """With numbers in its state, as after some steps."""
    buffers = [stored(dtype, of_many_magnitudes(size, 2 + place), squared=place == 1) for place, dtype in enumerate(states)]
    rows, row_scale = stored(table, of_many_magnitudes(size, 1, exponents=(0, 0)))
    return rules.Part(rows, buffers, rule, KEY, FIRST_ROW, skip, row_scale=row_scale)


def copied(part):
    (rows, row_scale), *states = [
        tuple(None if tensor is None else tensor.clone() for tensor in buffer) for buffer in buffers_of(part)
    ]
    return part._replace(rows=rows, row_scale=row_scale, states=states)


def buffers_of(part):
    return [(part.rows, part.row_scale), *part.states]


def same(one, other):
    """Equal bits."""
    return torch.equal(*(each.view(torch.int8) if each.dtype == FLOAT8 else each for each in (one, other)))


def in_pytorch(part, index, grad, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(rules.Part, "is_native", lambda part: False)
        patch.setattr(rules.Part, "has_kernel", lambda part: False)
        part.apply(index, grad)


def states_of(state, count):
    return [state, UINT8 if state == INT8 else state][:count]


INDICES = {"slice": slice(5, 35), "sampled": torch.tensor([0, 3, 4, 11, 12, 30, 39], device=DEVICE)}
RULES = {
    "no momentum": (sgd(0.0, maximize=True), 0),
    "sgd": (sgd(), 1),
    "nesterov": (sgd(decay=0.0, nesterov=True, maximize=True), 1),
    "adamw": (adamw(), 2),
    "adamw without memory": (adamw((0.0, 0.0), maximize=True), 2),
}


@pytest.mark.parametrize("name", ["no momentum", "adamw"])
def test_rows_are_shortened(name, monkeypatch):
    """Of norms from 1e-6 to 1e25, whose squares float32 does not hold, and of zeros."""
    (rule, count), size = RULES[name], 37
    part = part_of(rule._replace(weight_decay=0.0), FLOAT32, states_of(FLOAT32, count), size)._replace(max_row_norm=0.5)
    grad = of_many_magnitudes(size, 4, exponents=(-6, 25))
    grad[3] = 0.0
    ours, theirs = copied(part), copied(part)
    triton_update.update(ours, slice(0, ROWS), grad)
    in_pytorch(theirs, slice(0, ROWS), grad, monkeypatch)
    for (one, _), (other, _), (before, _) in zip(*map(buffers_of, (ours, theirs, part)), strict=True):
        # Of a norm's ten roundings, and of the step's: of the gradient, which is 0.5 at most.
        assert not torch.equal(one, before) and (one - other).abs().max() < 20 * 2**-24 * max(1.0, before.abs().max())
    if not count:
        norms = grad.norm(dim=1, dtype=torch.float64).clamp(max=0.5)
        assert torch.allclose((ours.rows - part.rows).norm(dim=1, dtype=torch.float64), norms * rule.lr, rtol=1e-4, atol=1e-7)


PLACES = [("slice", 37), ("sampled", 64)]
CASES = pairs(list(RULES), list(TABLES), STATES, PLACES)
# Single numbers, as a bias is; a row for which a program has more warps.
CASES += [(rule, BFLOAT16, INT8, at) for rule in ("sgd", "adamw") for at in (("sampled", 1), ("slice", 1100))]
CASES += [("sgd", FLOAT8, INT8, ("slice", 1100))]
EVERY_CASE = [*dict.fromkeys([*CASES, *itertools.product(RULES, TABLES[:2], STATES, PLACES)])]


@pytest.mark.parametrize("rule, table, state, at", EVERY_CASE)
@slow_when(lambda rule, table, state, at: (rule, table, state, at) not in CASES)
def test_the_same_step(rule, table, state, at, monkeypatch):
    """float32 within roundings; what is rounded one unit apart where those roundings cross a border, of which there are 2^16."""
    (rule, count), (index, size) = RULES[rule], at
    part, index = part_of(rule, table, states_of(state, count), size), INDICES[index]
    chosen = torch.arange(ROWS, device=DEVICE)[index]
    # As from the product: rows lie apart, and others stand before them.
    grad = of_many_magnitudes(size + 3, 4, rows=len(chosen))[:, 2 : size + 2]
    ours, theirs = copied(part), copied(part)
    triton_update.update(ours, index, grad)
    in_pytorch(theirs, index, grad, monkeypatch)
    others = [row for row in range(ROWS) if row not in chosen.tolist()]
    for buffers in zip(*map(buffers_of, (ours, theirs, part)), strict=True):
        assert all(same(buffers[0][0][row], buffers[2][0][row]) for row in others)
        one, other, before = (formats.read(*pair, chosen) for pair in buffers)
        assert not torch.equal(one, before)
        # Some ten operations, of numbers that may cancel.
        largest = torch.maximum(other.abs(), before.abs()).amax(1, keepdim=True)
        differ = (one - other).abs() > 16 * 2**-24 * largest
        unit = {FLOAT32: 0.0, BFLOAT16: 2**-7, FLOAT8: 2**-3, INT8: 1 / 127, UINT8: 3 / 255}[buffers[0][0].dtype]
        assert differ.double().mean() <= (0.01 if unit else 0)
        assert ((one - other).abs() <= (unit + 16 * 2**-24) * largest).all()


@pytest.mark.parametrize("size", [1, 37, 64])
@pytest.mark.parametrize("dtype, stream", [(BFLOAT16, 0), (FLOAT8, 0), (BFLOAT16, 1), (INT8, 1), (BFLOAT16, 2), (UINT8, 2)])
def test_the_same_bits_are_stored(dtype, stream, size):
    """With numbers that no rule has rounded: β = 0 makes m the gradient, v its square, and a table of 0 the gradient too."""
    grad = of_many_magnitudes(size, 5, exponents=(-15, 15))
    grad[3] = 0
    # A row that is not finite decodes to NaN; its codes have no meaning.
    grad[4, 0], grad[5, 0], grad[6] = torch.nan, torch.inf, 1e-44
    zeros = torch.zeros(ROWS, size, device=DEVICE)
    if stream == 2:
        part = rules.Part(zeros.clone(), [(zeros.clone(), None), stored(dtype, zeros)], adamw((0.0, 0.0)), KEY, FIRST_ROW, None)
        values = grad.square()
    elif stream == 1:
        part = rules.Part(zeros.clone(), [stored(dtype, zeros)], sgd(0.0, lr=0.0, decay=0.0), KEY, FIRST_ROW, None)
        values = grad
    else:
        rows, scale = stored(dtype, zeros)
        part = rules.Part(rows, [], sgd(0.0, lr=1.0, decay=0.0, maximize=True), KEY, FIRST_ROW, None, row_scale=scale)
        values = grad
    triton_update.update(part, slice(0, ROWS), grad)
    bits = formats.random_bits(KEY, torch.arange(ROWS, device=DEVICE) + FIRST_ROW, size, stream)
    wanted, scale = stored(dtype, zeros)
    formats.write(wanted, scale, slice(0, ROWS), values, bits)
    found, found_scale = buffers_of(part)[stream]
    if dtype == BFLOAT16:
        assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))
    else:
        finite = [row for row in range(ROWS) if row not in (4, 5)]
        assert same(found.view(torch.int8)[finite], wanted.view(torch.int8)[finite])
        assert torch.allclose(found_scale, scale, rtol=0, atol=0, equal_nan=True)


def test_every_number_of_float8_is_read_and_stays():
    """Of codes that are none of NaN; where m is the decay alone it is what was read."""
    numbers = [code for code in range(256) if code & 0x7F != 0x7F]
    rows = torch.tensor(numbers, dtype=torch.uint8, device=DEVICE).view(FLOAT8).repeat(ROWS, 1)
    scale, first = torch.linspace(-126, 119, ROWS, device=DEVICE).round().exp2(), torch.zeros(rows.shape, device=DEVICE)
    part = rules.Part(rows.clone(), [(first, None)], sgd(lr=0.0, decay=1.0), KEY, FIRST_ROW, None, row_scale=scale.clone())
    triton_update.update(part, slice(0, ROWS), torch.zeros_like(first))
    assert torch.equal(first, rows.float() * scale[:, None])
    assert same(part.rows, rows) and torch.equal(part.row_scale, scale)


@pytest.mark.parametrize("rule, table, state", pairs(list(RULES), list(TABLES), STATES))
def test_a_skipped_step_changes_nothing(rule, table, state):
    rule, count = RULES[rule]
    grad = of_many_magnitudes(37, 4)
    grad[3] = torch.nan
    for skips in (True, False):
        part = part_of(rule, table, states_of(state, count), 37, torch.tensor(skips, device=DEVICE))
        before = copied(part)
        triton_update.update(part, slice(0, ROWS), grad)
        for one, other in zip(buffers_of(part), buffers_of(before), strict=True):
            for now, was in zip(one, other, strict=True):
                assert now is None or same(now, was) == skips


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99999), (0.5, 0.0)])
@pytest.mark.parametrize("step", [1.0, 2.0, 100.0, 1e4, 1e7])
def test_the_corrections_of_adamw(step, betas):
    """1 - β^t to the last digits, though β in float32 is off by more than 1 - β can bear."""
    grad = of_many_magnitudes(64, 6, exponents=(0, 0))
    zeros = torch.zeros(ROWS, 64, device=DEVICE)
    rule = adamw(betas, step, lr=1.0, eps=0.0, decay=0.0)
    part = rules.Part(zeros.clone(), [(zeros.clone(), None), (zeros.clone(), None)], rule, KEY, 0, None)
    triton_update.update(part, slice(0, ROWS), grad)
    first, second = ((1 - beta) / (1 - beta**step) for beta in betas)
    wanted = -grad.double().sign() * first / second**0.5
    # Nine operations, of which log β t is the coarsest: an error of it counts once.
    assert ((part.rows - wanted).abs() <= 16 * 2**-24 * wanted.abs()).all()


def test_a_beta_of_zero_forgets():
    """To the bit, however large what was there is."""
    grad, large = of_many_magnitudes(37, 4), torch.full((ROWS, 37), 1e8, device=DEVICE)
    part = rules.Part(large.clone(), [(large.clone(), None), (large.clone(), None)], adamw((0.0, 0.0)), KEY, 0, None)
    triton_update.update(part, slice(0, ROWS), grad)
    (first, _), (second, _) = part.states
    assert torch.equal(first, grad) and torch.equal(second, grad.square())


FORMS = {
    "cosines": (CosFaceLoss, {}),
    "sampled": (MarginSoftmaxLoss, {"margin": CosFace(0.35), "sample_rate": 0.5, "sample_seed": 1}),
    "bias": (MarginSoftmaxLoss, {"margin": Softmax(), "bias": True}),
    "3 centres": (MarginSoftmaxLoss, {"margin": CosFace(0.1), "centers_per_class": 3}),
}


def trained(form, size=20, steps=2, num_classes=150, kind=FusedAdamW, table_format="bfloat16", state_format="int8", **options):
    torch.manual_seed(0)
    head, settings = FORMS[form]
    head = head(size, num_classes, backend="triton", device=DEVICE, table_format=table_format, **settings)
    optimizer = kind(head.parameters(), lr=0.1, state_format=state_format, **options)
    for seed in range(steps):
        features, _, labels = make("uniform", 9, num_classes, size, seed=seed)
        head(features.to(DEVICE), labels.to(DEVICE)).backward()
        optimizer.step()
    return [*head.parameters(), *head.buffers(), *(value for state in optimizer.state.values() for value in state.values())]


@pytest.mark.parametrize("form, kind", [("cosines", FusedSGD), *((form, FusedAdamW) for form in FORMS)])
@slow_when(lambda form, kind: interpreted("triton") and (form, kind) not in (("cosines", FusedSGD), ("bias", FusedAdamW)))
def test_rows_are_projected_and_updated_at_once(form, kind, small_slabs, monkeypatch):
    """With the bits of a gradient that is made first."""
    table_format = "float8" if form in ("cosines", "sampled") else "bfloat16"
    with monkeypatch.context() as patch:
        patch.setattr(rules.Update, "put", None)
        found = trained(form, kind=kind, table_format=table_format)
    put = []

    def apply(part, index, grad):
        put.append(grad)
        triton_update.update(part, index, grad)

    monkeypatch.setattr(rules.Update, "device_update", lambda update: None)
    monkeypatch.setattr(rules.Part, "apply", apply)
    wanted = trained(form, kind=kind, table_format=table_format)
    assert put and any(grad.any() for grad in put)
    assert all(same(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_float64_table_is_updated_by_pytorch():
    rows = torch.zeros(3, 4, dtype=torch.float64)
    wide, single = (rules.Part(each, [], sgd(), 0, 0, None) for each in (rows, rows.float()))
    assert rules.Update(Table(rows), wide, None).device_update() is None
    assert rules.Update(Table(rows.float()), single, None).device_update() == [(single, 0)]


@pytest.fixture
def moved(monkeypatch):
    """Bytes that kernels have read and written, by their masks."""
    builder, counts = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder, Counter()

    def counted(name, place_of_mask):
        original = getattr(builder, name)

        def call(self, pointers, *arguments):
            size = pointers.get_element_ty().primitive_bitwidth // 8
            counts["bytes"] += int(arguments[place_of_mask].data.sum()) * size
            return original(self, pointers, *arguments)

        monkeypatch.setattr(builder, name, call)

    counted("create_masked_load", 0), counted("create_masked_store", 1)
    return counts


# Bytes a number: 4 of the gradient, and what the table and each state take, read and written.
BYTES = [
    (sgd(0.0), FLOAT32, (), 12),
    (sgd(), FLOAT32, (FLOAT32,), 20),
    (sgd(), BFLOAT16, (BFLOAT16,), 12),
    (sgd(), BFLOAT16, (INT8,), 10),
    (sgd(0.0), FLOAT8, (), 6),
    (sgd(), FLOAT8, (INT8,), 8),
    (adamw(), FLOAT32, (FLOAT32, FLOAT32), 28),
    (adamw(), BFLOAT16, (INT8, UINT8), 12),
    (adamw(), FLOAT8, (INT8, UINT8), 10),
]


@pytest.mark.skipif(HAS_GPU, reason="counted in the interpreter")
@pytest.mark.parametrize("rule, table, states, wanted", BYTES)
def test_each_number_is_read_once_and_written_once(rule, table, states, wanted, moved):
    size, num_targets = 512, 9
    part = part_of(rule, table, states, size, torch.tensor(False))
    targets = torch.arange(num_targets) * 4, torch.ones(num_targets, size)
    moved.clear()
    triton_update.update(
        part, slice(0, ROWS), of_many_magnitudes(size, 1), normalize=True, unscale=torch.tensor(2.0), targets=targets
    )
    scales = 2 * 4 * sum(dtype.itemsize == 1 for dtype in (table, *states))
    search = 8 * (num_targets.bit_length() + 1)
    beside = ROWS * (scales + search + 9) + targets[1].nbytes
    assert wanted * ROWS * size <= moved["bytes"] <= wanted * ROWS * size + beside
