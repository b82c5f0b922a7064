"""Do the attention-shaped kernels serve what they should, and nothing else? How right they are: the cases "attend" elsewhere."""

import json
from functools import partial

import pytest
import torch
from cases import check_accuracy, draws, evaluate, make
from selection import HAS_GPU

from cosface_kernels import CosFaceLoss, FusedAdamW, FusedSGD, cosface_loss, margin_softmax_loss
from cosface_kernels.margins import CosFace, Softmax
from cosface_kernels.ops import backends
from cosface_kernels.ops.slabs import Plan
from cosface_kernels.ops.table import Table

if backends.unusable("triton", torch.device("cuda" if HAS_GPU else "cpu")):
    pytest.skip("needs triton", allow_module_level=True)

from cosface_kernels.ops.backends import triton_attend, triton_backend, triton_forms, triton_slab, triton_update

DEVICE = "cuda" if HAS_GPU else "cpu"
BOTH = {"attend_features": {}, "attend_table": {}}

pytestmark = pytest.mark.usefixtures("small_slabs")


@pytest.fixture
def attended(monkeypatch):
    """A list of launches that attend: "forward" for each slab, "backward" for each call."""
    names = []
    parts, backward = triton_attend.Features.parts, triton_attend.backward
    monkeypatch.setattr(triton_attend.Features, "parts", lambda *given: names.append("forward") or parts(*given))
    monkeypatch.setattr(triton_attend, "backward", lambda *given, **named: names.append("backward") or backward(*given, **named))
    return names


def results(loss=cosface_loss, shape=(5, 131, 16), **options):
    features, weight, labels = (tensor.to(DEVICE) for tensor in make("hard", *shape))
    upstream = torch.linspace(1, 2, len(labels), device=DEVICE)
    loss = partial(loss, reduction="none", backend="triton", **{"memory_budget": 0, **options})
    return evaluate(loss, features, weight, labels, upstream)


def test_nothing_attends_unless_asked(attended):
    results()
    assert not attended


def test_both_ways_over_every_slab(attended):
    with triton_forms.using(**BOTH):
        results()
    assert attended == ["forward", "forward", "backward"]


@pytest.mark.parametrize("kernel, name", [("attend_features", ["forward"] * 2), ("attend_table", ["backward"])])
def test_one_way_alone(attended, kernel, name):
    inputs = draws("hard", (5, 131, 16), torch.float32, torch.float32, backend="triton")
    with triton_forms.using(**{kernel: {}}):
        check_accuracy("triton", inputs, device=DEVICE, memory_budget=0)
    assert attended == name * len(inputs)


SERVED_BY_THE_SLAB_LOOP = {
    "E kept": {"memory_budget": 10**9},
    "row maxima": {"scale": 100.0},
    "raw rows": {"loss": partial(margin_softmax_loss, margin=Softmax())},
    "sub-centres": {"loss": partial(margin_softmax_loss, margin=CosFace(0.35)), "centers_per_class": 2, "shape": (5, 66, 16)},
    "D past 512": {"shape": (3, 5, 513)},
    "no rows": {"shape": (0, 5, 16)},
}


@pytest.mark.parametrize("case", SERVED_BY_THE_SLAB_LOOP)
def test_served_by_the_slab_loop(attended, case):
    options = dict(SERVED_BY_THE_SLAB_LOOP[case])
    if case == "sub-centres":
        options["loss"] = lambda x, w, y, loss=options["loss"], **more: loss(x, w, y // 2, **more)
    with triton_forms.using(**BOTH):
        results(**options)
    assert not attended


@pytest.mark.parametrize("kernel", triton_attend.BLOCKS)
@pytest.mark.parametrize("size, served", [(301, False), (304, True), (200, False), (208, True), (100, True)])
def test_hoppers_widest_tiles_have_whole_blocks_of_16_columns(kernel, size, served, monkeypatch):
    monkeypatch.setattr(triton_slab, "capability", lambda device: (9, 0))
    x, table, plan = torch.empty(3, size), Table(torch.empty(5, size)), Plan(92.0, 4.0, torch.bfloat16, 256, 0, 0)
    with triton_forms.using(**BOTH):
        assert (triton_attend.constants(kernel, x, table, torch.zeros(3), plan) is not None) == served


def test_a_frozen_table_needs_no_second_pass_and_frozen_features_no_sum(attended):
    features, weight, labels = (tensor.to(DEVICE) for tensor in make("hard", 5, 31, 16))
    with triton_forms.using(**BOTH):
        cosface_loss(features, weight.requires_grad_(), labels, backend="triton", memory_budget=0).backward()
        assert attended == ["backward"]
        cosface_loss(features.requires_grad_(), weight.detach(), labels, backend="triton", memory_budget=0).backward()
    assert attended == ["backward", "forward"]


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_descriptors_and_other_tiles_and_every_run_give_the_same_bits(dtype):
    """Tiles decide which sums are added up first, of rows and of classes alike: these leave them as they are."""
    features, weight, labels = (tensor.to(DEVICE) for tensor in make("hard", 70, 131, 70))
    upstream = torch.linspace(1, 2, 70, device=DEVICE)
    loss = partial(cosface_loss, reduction="none", backend="triton", memory_budget=0)

    def run(**options):
        with triton_forms.using(attend_features=options, attend_table=options):
            return evaluate(loss, features.to(dtype), weight.to(dtype), labels, upstream)

    first = run()
    for options in ({"DESCRIPTORS": True}, *([{}, {"num_warps": 4}] if HAS_GPU else [])):
        for one, other in zip(first, run(**options), strict=True):
            assert torch.equal(one, other), options


@pytest.mark.parametrize("num_rows", [1, 64, 200, 1024, 10**5])
@pytest.mark.parametrize("classes", [1, 130, 70_000])
def test_every_class_is_in_one_part(monkeypatch, num_rows, classes):
    """Whatever the rows: programs fill a GPU, parts are no more than add_pull adds."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *given, **constants: launched.append((grid[0], given[9], constants["BLOCK_C"]))

    monkeypatch.setattr(triton_attend, "attend_features", Kernel())
    low = torch.empty(num_rows, 64, dtype=torch.bfloat16, device="meta")
    constants = {"BLOCK_N": 64, "BLOCK_C": 32, "DESCRIPTORS": False, "SIZE": 64}
    plan = type("Plan", (), {"log2_scale": 1.0, "shift": 0.0, "slab": 4096})
    features = triton_attend.Features(low, 64, None, plan, constants)
    parts = features.parts(torch.empty(classes, 64, device="meta"), 0, classes)
    ((programs, blocks_each, block),) = launched
    assert programs == len(parts) * -(-num_rows // 64) and len(parts) <= triton_attend.PARTS_MAX
    assert len(parts) * blocks_each * block >= classes
    assert programs >= triton_attend.PROGRAMS or len(parts) in (triton_attend.PARTS_MAX, -(-classes // 32)) or num_rows == 200


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 100, 256, 512])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_every_padded_size(size, precision):
    with triton_forms.using(**BOTH):
        inputs = draws("hard", (67, 131, size), precision, precision, backend="triton")
        check_accuracy("triton", inputs, device=DEVICE, memory_budget=0)


def _stepped(kind, table_format, state_format, sample_rate, forms):
    """The numbers of the table, and its state, after two steps."""
    torch.manual_seed(0)
    options = {"memory_budget": 0, "table_format": table_format, "sample_rate": sample_rate, "device": DEVICE}
    head = CosFaceLoss(50, 131, backend="triton", **options)
    optimizer = kind(head.parameters(), lr=0.1, state_format=state_format, **({"momentum": 0.9} if kind is FusedSGD else {}))
    for seed in range(2):
        features, _, labels = make("uniform", 5, 131, 50, seed=seed)
        head(features.to(DEVICE).requires_grad_(), labels.to(DEVICE)).backward()
        with triton_forms.using(**forms):
            optimizer.step()
    states = optimizer.state[head.weight].values()
    return head.double().weight.detach(), [state for state in states if torch.is_tensor(state) and state.shape == (131, 50)]


@pytest.mark.parametrize("kind, table_format, state_format, sample_rate", [
    (FusedSGD, "bfloat16", "int8", 1.0),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        (FusedSGD, "float32", "float32", 0.6),
        (FusedAdamW, "float32", "float32", 1.0),
        (FusedAdamW, "float8", "int8", 1.0),
        (FusedAdamW, "bfloat16", "bfloat16", 0.6),
    ]),
])  # fmt: skip
def test_rows_are_stepped_where_their_gradient_is_made(kind, table_format, state_format, sample_rate, monkeypatch):
    """As by the slab loop and its kernel, with the same random bits: of numbers that are rounded the gradients' last bits decide
    one in fifty at most, and that by one spacing.
    """
    table, states = _stepped(kind, table_format, state_format, sample_rate, {})
    monkeypatch.setattr(triton_update, "launcher", None)  # of the kernel that only steps
    found, found_states = _stepped(kind, table_format, state_format, sample_rate, {"attend_table": {}})
    assert len(states) == (2 if kind is FusedAdamW else 1)
    pairs = [(found, table), *zip(found_states, states, strict=True)]
    if table_format == "float32":
        # An exponent is up to 92 and rounded, which v has twice.
        assert all((one - other).norm() <= 2 * 92 * 2.0**-24 * other.norm() for one, other in pairs)
    else:
        spacing = {"bfloat16": 2.0**-7, "float8": 2.0**-2}[table_format]
        assert ((found - table).abs() <= spacing * table.abs().clamp(min=2.0**-6)).all()
        assert all((one == other).sum() >= 0.98 * one.numel() for one, other in pairs)


def test_the_committed_table_of_forms_can_be_read():
    table = json.loads(triton_forms.PATH.read_text())
    assert triton_forms.rows() == table["rows"] and (table["measured"] or not table["rows"])
    for row in table["rows"]:
        assert row.keys() == {"kernel", "chip", "dtype", "num_rows", "size", "options"}


def test_the_first_row_that_fits_counts(tmp_path, monkeypatch):
    def row(kernel, num_rows, options):
        return {
            "kernel": kernel,
            "chip": [9, 0],
            "dtype": "bfloat16",
            "num_rows": num_rows,
            "size": [257, 512],
            "options": options,
        }

    path = tmp_path / "forms.json"
    rows = [row("attend_table", [1, 8], {"num_stages": 1}), row("attend_table", [8, None], {"num_warps": 4})]
    path.write_text(json.dumps({"measured": "never", "rows": rows}))
    monkeypatch.setattr(triton_forms, "PATH", path)
    triton_forms.forget()
    try:
        ask = partial(triton_forms.options, "attend_table")
        assert ask(8, 512, torch.bfloat16, (9, 0)) == {"num_stages": 1}
        assert ask(10**6, 257, torch.bfloat16, (9, 0)) == {"num_warps": 4}
        for no in ((9, 256, torch.bfloat16, (9, 0)), (9, 512, torch.float32, (9, 0)), (9, 512, torch.bfloat16, (10, 0))):
            assert ask(*no) is None
        with triton_forms.using(attend_table=None):
            assert ask(8, 512, torch.bfloat16, (9, 0)) is None
    finally:
        monkeypatch.undo()
        triton_forms.forget()


EXPONENTIALS = [
    ({"BLOCK_N": 32, "BLOCK_C": 64, "num_warps": 2}, torch.float32),
    ({"DESCRIPTORS": True}, torch.bfloat16),
    ({"HALVES": True}, torch.float32),
    ({"DESCRIPTORS": True, "HALVES": True, "BLOCK_N": 64, "BLOCK_C": 64}, torch.bfloat16),
]


@pytest.mark.parametrize("options, dtype", EXPONENTIALS, ids=str)
def test_another_form_of_exponentials(attended, options, dtype):
    """Rows and classes that fill no tile, a last slab of three classes."""
    inputs = draws("hard", (70, 131, 70), dtype, dtype, backend="triton")
    with triton_forms.using(exponentials=options):
        check_accuracy("triton", inputs, device=DEVICE, memory_budget=0)
    assert not attended


@pytest.mark.parametrize("chip, wanted", [((9, 0), True), ((8, 0), False), ((10, 0), False)])
def test_halves_are_for_hopper(monkeypatch, chip, wanted):
    launched = []
    monkeypatch.setattr(triton_slab, "capability", lambda device: chip)
    monkeypatch.setattr(triton_backend._Slab, "_launch", lambda *given, **constants: launched.append(constants))
    with triton_forms.using(exponentials={"HALVES": True}):
        results()
    assert launched and all(constants["HALVES"] is wanted for constants in launched)


@pytest.mark.parametrize("scale", [pytest.param(64.0, marks=pytest.mark.slow), 100.0])
def test_descriptors_of_exponentials_give_the_same_bits(scale):
    """Row maxima among them, and E kept."""
    wanted = results(shape=(70, 131, 70), scale=scale, memory_budget=10**9)
    with triton_forms.using(exponentials={"DESCRIPTORS": True}):
        for one, other in zip(wanted, results(shape=(70, 131, 70), scale=scale, memory_budget=10**9), strict=True):
            assert torch.equal(one, other)


def test_unknown_forms_are_refused():
    with pytest.raises(ValueError, match='"attend" is none of'), triton_forms.using(attend={}):
        pass
    with pytest.raises(ValueError, match="attend_table has no option STAGES"), triton_forms.using(attend_table={"STAGES": 2}):
        pass
