"""Are the native CPU kernels right for every instruction set that they are compiled for, not only for this processor's best?"""

import _ctypes
import ctypes
import functools
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import check_accuracy, draws, evaluate, make
from selection import pairs, slow_when

from cosface_kernels import cosface_loss
from cosface_kernels.ops import backends
from cosface_kernels.ops.backends import cpu_kernels, cpu_library, cpu_loop
from cosface_kernels.optim import rules
from cosface_kernels.tools import info

if not cpu_library.available():
    pytest.skip("the native library was not built here: that needs a C++ compiler", allow_module_level=True)


@pytest.fixture(params=cpu_library.available())
def instruction_set(request, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "kernels", lambda dtype: cpu_kernels.Kernels(dtype, request.param))
    monkeypatch.setattr(cpu_kernels, "batch_kernels", lambda: cpu_library.KernelTable("batch_kernels", request.param))
    return request.param


def elementary(name, instruction_set, x, out):
    """exp2 or to_bfloat16, as the kernels compute it, of a float32 array."""
    function = getattr(ctypes.CDLL(str(cpu_library.LIBRARY)), f"cosface_{name}_{instruction_set}")
    function(ctypes.c_void_p(x.ctypes.data), ctypes.c_int64(len(x)), ctypes.c_void_p(out.ctypes.data))
    return out


def every_kind_of_float():
    """Each 1009th of all 2^32 bit patterns, a prime so that every low bit occurs, and the ends of every range of 2^x."""
    patterns = np.arange(0, 2**32, 1009, dtype=np.uint64).astype(np.uint32).view(np.float32)
    ends = np.float32(
        [0, 0.5, -0.5, 127.99999, 128, 129, 1e30, -125.99999, -126, -149, -149.5, -150, -151, -1e30, np.inf, -np.inf]
    )
    quiet, all_ones = np.uint32([0x7FC00000, 0x7FFFFFFF]).view(np.float32)
    return np.concatenate([patterns, ends, np.nextafter(ends, np.float32(0)), [quiet, all_ones, -all_ones]])


def test_exp2_within_two_ulp(instruction_set):
    x = every_kind_of_float()
    got = elementary("exp2", instruction_set, x, np.empty_like(x))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        exact = np.exp2(x.astype(np.float64))
        nearest = exact.astype(np.float32)
        ulp = np.spacing(np.clip(nearest, 0, np.finfo(np.float32).max)).astype(np.float64)
    assert np.array_equal(np.isnan(got), np.isnan(x))
    number = ~np.isnan(x) & np.isfinite(nearest)
    assert (np.abs(got[number] - exact[number]) <= 2 * ulp[number]).all()
    overflow = np.isinf(nearest)
    assert np.isinf(got[overflow & (x >= 128)]).all()
    assert (got[x == -np.inf] == 0).all() and (got[x == np.inf] == np.inf).all()


ADAMW = rules.AdamW(0.01, (0.9, 0.999), 1e-8, 0.01, False, torch.tensor(3.0))


def test_the_x87_unit_is_left_as_it_was(instruction_set, monkeypatch):
    """fmod, which torch.remainder is made of, runs there; an MMX instruction makes its next result NaN."""
    monkeypatch.setattr(cpu_library, "available", lambda: (instruction_set,))
    rule = rules.SGD(0.1, 0.9, 0.01, False, False)
    for table, state in itertools.product((torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16, torch.int8)):
        scale = torch.zeros(8) if state == torch.int8 else None
        states = [(torch.zeros(8, 37, dtype=state), scale)]
        part = rules.Part(torch.ones(8, 37, dtype=table), states, rule, 1, 0, None)
        cpu_library.update(part.native_update(), torch.ones(8, 37), slice(0, 8))
        assert torch.remainder(torch.tensor([5.0, 4.0]), 3).tolist() == [2, 1]


# Quiet with the smallest payload, with the largest, the same negative, and signalling ones.
@pytest.mark.parametrize("word", [0x7FC00000, 0x7FFFFFFF, -0x400000, -1, 0x7F800001, -0x7FFFFF])
def test_a_step_that_makes_nan_stores_nan(instruction_set, word, monkeypatch):
    """In 16 bits too, where what is added for rounding could carry into the exponent or the sign of some."""
    monkeypatch.setattr(cpu_library, "available", lambda: (instruction_set,))
    grad = torch.ones(8, 37)
    nan = torch.zeros(8, 37, dtype=torch.bool).index_fill(1, torch.tensor([0, 7, 36]), True)
    grad.view(torch.int32)[nan] = word
    for dtype in (torch.bfloat16, torch.float32):
        for rule, count in ((rules.SGD(0.1, 0.9, 0.01, True, False), 1), (ADAMW, 2)):
            states = [(torch.zeros(8, 37, dtype=dtype), None) for _ in range(count)]
            part = rules.Part(torch.ones(8, 37, dtype=torch.bfloat16), states, rule, 1, 0, None)
            cpu_library.update(part.native_update(), grad, slice(0, 8))
            assert all(torch.equal(rows.isnan(), nan) for rows in (part.rows, *(state for state, _ in states)))


def emptied(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    "unfit",
    [
        torch.ones(8, 37, dtype=torch.bfloat16),
        torch.ones(8, 37, dtype=torch.float64),
        torch.ones(7, 37),
        torch.ones(37, 8).T,
        torch.ones(8, 37, device="meta"),
        emptied(torch.ones(8, 37)),
    ],
    ids=["16 bits", "64 bits", "too short", "strided", "meta", "without storage"],
)
def test_a_tensor_that_is_not_what_a_kernel_takes_is_refused(unfit):
    kernels, rule = cpu_kernels.Kernels(torch.float32, "portable"), rules.SGD(0.1, 0.9, 0.01, False, False)
    room = torch.full((8, 37), 7.0)
    with pytest.raises(RuntimeError, match="native code wants 296 or more contiguous numbers of torch"):
        kernels.normalize(room, 8, 37, True, unfit, None)
    if unfit.dtype != torch.bfloat16:  # which a table may be
        with pytest.raises(RuntimeError, match="native code wants"):
            kernels.normalize(unfit, 8, 37, True, room, None)
        with pytest.raises(RuntimeError, match="native code"):
            rules.Part(room, [(unfit, None)], rule, 1, 0, None).native_update()
    assert (room == 7).all()


@pytest.mark.parametrize(
    "index, columns",
    [(slice(0, 9), 37), (slice(-1, 8), 37), (torch.tensor([3, 8]), 37), (torch.tensor([-1, 2]), 37), (slice(0, 8), 36)],
)
def test_an_update_of_rows_that_the_table_has_not_is_refused(index, columns):
    table, state = torch.ones(8, 37), torch.zeros(8, 37)
    part = rules.Part(table, [(state, None)], rules.SGD(0.1, 0.9, 0.01, False, False), 1, 0, None)
    rows = len(index) if isinstance(index, torch.Tensor) else index.stop - index.start
    with pytest.raises(RuntimeError, match=r"is none of a table of shape \(8, 37\)"):
        cpu_library.update(part.native_update(), torch.ones(rows, columns), index)
    assert (table == 1).all() and (state == 0).all()


def test_a_field_that_is_left_out_or_unknown_is_refused():
    for fields in ({"rows": None, "panels": None, "num_rows": 3}, {"rows": None, "panels": None, "num_rows": 3, "sizes": 2}):
        with pytest.raises(TypeError, match="for a structure of rows, panels, num_rows, size"):
            cpu_library.filled(cpu_library._SLAB["row_panels"], **fields)


def test_a_library_with_other_structures_is_refused(monkeypatch):
    library, _ = cpu_library._load()
    assert cpu_library._fits(library)
    monkeypatch.setitem(cpu_library._SLAB, "accumulate", cpu_library._structure(pointers="e_panels unit_panels pull"))
    assert not cpu_library._fits(library)


def test_rounding_to_bfloat16(instruction_set):
    x = every_kind_of_float()
    got = torch.from_numpy(elementary("to_bfloat16", instruction_set, x, np.empty(len(x), np.int16))).view(torch.bfloat16)
    wanted = torch.from_numpy(x).bfloat16()
    assert torch.equal(got.isnan(), wanted.isnan())
    normal = ~wanted.isnan() & (torch.from_numpy(x).abs() >= 2.0**-126)  # the instruction takes a subnormal for 0
    assert torch.equal(got[normal], wanted[normal])
    subnormal = torch.from_numpy(x).abs() < 2.0**-126
    assert (got[subnormal].float().abs() <= 2.0**-126).all()


# (N, C, D): odd ones, where words of two bfloat16 have an empty half; one past a panel of 32 rows and a tile of 8 classes;
# several pieces of 64 summed classes and of 32 cached ones.
SHAPES = [(1, 2, 1), (7, 17, 3), (33, 265, 65), (131, 521, 70)]
ACCURACY_PAIRS = pairs(SHAPES, [False, True], [64.0, 1000.0], [0, "auto"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scale", [64.0, 1000.0])
@pytest.mark.parametrize("budget", [0, "auto"])
@slow_when(lambda shape, autocast, scale, budget: (shape, autocast, scale, budget) not in ACCURACY_PAIRS)
@pytest.mark.usefixtures("small_slabs")
def test_accuracy(instruction_set, shape, autocast, scale, budget):
    inputs = draws("hard", shape, torch.float32, torch.float32)
    check_accuracy("cpu", inputs, autocast=autocast, scale=scale, memory_budget=budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unit_rows_of_any_number_of_columns(instruction_set, dtype):
    kernels = cpu_kernels.kernels(torch.float32)
    for size in range(1, 81):
        rows, unit = torch.randn(9, size).to(dtype), torch.empty(9, size)
        kernels.normalize(rows, 9, size, True, unit, None)
        torch.testing.assert_close(unit, F.normalize(rows.double(), eps=0).float(), rtol=5e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(instruction_set, dtype, monkeypatch):
    """So many rows that batch.cpp wakes threads too."""
    monkeypatch.setattr(cpu_kernels, "PRODUCTS_OF_THREAD", 1)
    features, weight, labels = make("hard", 939, 1009, 70)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            inputs = features.to(dtype), weight, labels, torch.ones(939)
            results.append(evaluate(lambda x, w, y: cosface_loss(x, w, y, reduction="none", backend="cpu"), *inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other, strict=True))


THREADS = """
import os, torch
from cosface_kernels import cosface_loss
threads = lambda: len(os.listdir("/proc/self/task"))
inputs = torch.randn(64, 32), torch.randn(5000, 32), torch.zeros(64, dtype=torch.long)
torch.set_num_threads(1)
torch.randn(500, 500) @ torch.randn(500, 500)
alone = threads()
cosface_loss(*inputs, backend="cpu")
assert threads() == alone, "threads in spite of set_num_threads(1)"
torch.set_num_threads(3)
torch.randn(500, 500) @ torch.randn(500, 500)
pool = threads()
cosface_loss(*inputs, backend="cpu")
assert threads() == pool > alone, "a pool beside PyTorch's"
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc, which only Linux has")
@pytest.mark.slow
def test_runs_in_pytorchs_threads():
    run = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize(
    "available, dtype, backend",
    [
        (("avx2", "portable"), torch.float32, "cpu"),
        (("avx2", "portable"), torch.bfloat16, "cpu"),
        (("avx2", "portable"), torch.float64, "torch"),
        (("portable",), torch.float32, "torch"),  # slower than PyTorch's vector instructions
    ],
)
def test_chosen_where_it_is_faster(monkeypatch, available, dtype, backend):
    monkeypatch.setattr(cpu_library, "available", lambda: available)
    assert backends.choose("auto", torch.device("cpu"), dtype).__name__.endswith(f".{backend}_backend")


@pytest.mark.parametrize("answer, why", [(-1, "the operating system does not let"), (-2, "differed from AVX-512's")])
def test_amx_that_cannot_be_used(monkeypatch, answer, why):
    """AVX-512 takes its place, and `cosface info` says why."""
    supported = {"amx": answer, "avx512bf16": 1, "portable": 1}
    monkeypatch.setattr(cpu_library, "_supported", lambda instruction_set: supported.get(instruction_set, 0))
    monkeypatch.setattr(cpu_library, "available", cpu_library.available.__wrapped__)
    assert cpu_library.available() == ("avx512bf16", "portable")
    assert why in info.report()


@pytest.mark.skipif("amx" not in cpu_library.available(), reason="no AMX here, nor its stand-in")
@pytest.mark.parametrize("fault, answer", [(0, 1), (1, -1), (2, -2)])
def test_amx_is_checked(monkeypatch, fault, answer):
    """The stand-in refuses tiles (1), or makes one product of 512 wrong (2)."""
    library, _ = cpu_library._load()
    if not hasattr(library, "stand_in_fault"):
        pytest.skip("the processor's own AMX has no faults to choose from")
    monkeypatch.setattr(ctypes.c_int.in_dll(library, "stand_in_fault"), "value", fault)
    assert cpu_library._supported("amx") == answer


def test_missing_library(monkeypatch, tmp_path):
    """No library, or one that does not load: `auto` goes on without it, and asking for it says what is wrong."""
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    another = Path(_ctypes.__file__)  # some shared library
    for path, why in (
        (tmp_path / "missing.so", "it was not built"),
        (broken, str(broken)),
        (another, "is of another version"),
    ):
        monkeypatch.setattr(cpu_library, "LIBRARY", path)
        monkeypatch.setattr(cpu_library, "_load", cpu_library._load.__wrapped__)
        monkeypatch.setattr(cpu_library, "available", cpu_library.available.__wrapped__)
        assert backends.choose("auto", torch.device("cpu"), torch.float32).__name__.endswith(".torch_backend")
        with pytest.raises(ValueError, match=f'backend "cpu" cannot be used here.*{why}'):
            cosface_loss(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.long), backend="cpu")
        assert why in info.report()
        monkeypatch.undo()


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("weight", (5000, 256), "invalid gradient"),
        ("labels", (32_000,), None),  # the first 64 are the batch's
        ("labels", (10,), "native code wants 64 or more"),
    ],
    ids=str,
)
def test_sizes_that_change_between_forward_and_backward(name, shape, message):
    """Through `.data`, which autograd does not see: nothing past the end of any tensor is read or written."""
    torch.manual_seed(0)
    features, weight, labels = torch.randn(64, 32), torch.randn(5000, 32), torch.randint(5000, (64,))
    wanted = gradient(features, weight, labels)
    changed = torch.randn(shape) if name == "weight" else labels.repeat(shape[0] // 64 + 1)[: shape[0]]
    if message is None:
        assert gradient(features, weight, labels, labels, changed).equal(wanted)
    else:
        with pytest.raises(RuntimeError, match=message):
            gradient(features, weight, labels, weight if name == "weight" else labels, changed)


def gradient(features, weight, labels, tensor=None, changed=None):
    """dW by the native loop, after `tensor` has become `changed`, another one, between forward and backward."""
    parameter, labels = weight.clone().requires_grad_(), labels.clone() if tensor is not labels else labels
    loss = cosface_loss(features, parameter, labels, backend="cpu")
    if tensor is not None:
        (parameter if tensor is weight else labels).data = changed
    loss.backward()
    return parameter.grad


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("budget", [0, 4 * 37 * 128, "auto"])  # bytes: no slab's exponentials kept, one's or two's, all
@pytest.mark.usefixtures("small_slabs")
def test_the_loop_in_one_call_has_the_bits_of_a_call_for_each_step(instruction_set, autocast, budget, monkeypatch):
    features, weight, labels = make("hard", 37, 300, 70)
    results = []
    for weight_dtype in (torch.float32, torch.bfloat16):
        for in_one_call in (True, False):
            with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                if not in_one_call:
                    patch.setattr(cpu_loop, "MOST_IN_ONE_CALL", 0)
                inputs = features, weight.to(weight_dtype), labels, torch.ones(())
                loss = functools.partial(cosface_loss, backend="cpu", memory_budget=budget)
                results.append(evaluate(loss, *inputs))
    for one, same in (results[:2], results[2:]):
        assert all(torch.equal(mine, other) for mine, other in zip(one, same, strict=True))
