"""Compiles every kernel that a call can launch, for chips that need not be here, and prints one JSON line for each: kernel, chip,
arguments, registers, bytes of stack (spills), bytes of shared memory, use of tensor cores, number of fused multiply-adds and
whether they are allowed, and the warnings of ptxas.

The package itself makes the launches, for the calls below and with CPU tensors, and Triton compiles them instead of running them:
with the dtypes, alignment, and numbers that are 1 or divisible by 16 that a GPU's launches are compiled for.

It runs in a process of its own, because kernels decorated under TRITON_INTERPRET=1 cannot be compiled:
    python tests/aot.py [--few] [90 100 ...]
--few leaves out what no call launches unasked, and most sizes, of which it takes the first and last.
"""

import contextlib
import functools
import itertools
import json
import sys
from typing import NamedTuple
from unittest import mock

import compiled_facts
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from cosface_kernels import FusedAdamW, FusedSGD, MarginSoftmaxLoss, margin_softmax_loss, margins
from cosface_kernels.ops import backends, formats, slabs
from cosface_kernels.ops.backends import (
    triton_attend,
    triton_backend,
    triton_exponentials,
    triton_forms,
    triton_hopper,
    triton_rows,
    triton_slab,
    triton_update,
)
from cosface_kernels.optim import base, rules

FLOAT32, BFLOAT16, FLOAT16 = DTYPES = torch.float32, torch.bfloat16, torch.float16
SLAB = 256  # a tile of every configuration
PRECISIONS = (BFLOAT16, "ieee"), (FLOAT32, "ieee"), (FLOAT32, "tf32")
# Hopper's three tiles of 16 bits, and the one of float32.
FEW_TILES = [(64, 512, PRECISIONS[0]), (131, 64, PRECISIONS[0]), *((131, 512, precision) for precision in PRECISIONS)]
EXPONENTIALS = {"DESCRIPTORS": True}, {"HALVES": True}, {"DESCRIPTORS": True, "HALVES": True}


class Launch(NamedTuple):
    kernel: str
    numbers: dict  # of the keywords: constants and launch options
    arguments: str  # all of them, as Triton compiles for them
    compiled: object


class Chip:
    """Answers Triton's questions to a driver, for a GPU that is not here."""

    def __init__(self, chip):
        self.chip = chip

    def get_current_target(self):
        return GPUTarget("cuda", self.chip, 32)

    def get_current_device(self):
        return self.chip  # compiled kernels are kept for each

    def get_current_stream(self, device):
        return 0


def launches(chip, calls):
    """A Launch of everything that calls [function, ...] launch, each once."""
    found, run = {}, JITFunction.run

    def compile_only(kernel, *arguments, grid, warmup, **keywords):
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **keywords)
        if compiled not in found:
            named = {**dict(zip(kernel.arg_names, arguments, strict=False)), **keywords}
            described = " ".join(f"{name}={_described(value, name in keywords)}" for name, value in named.items())
            found[compiled] = Launch(kernel.fn.__name__, keywords, described, compiled)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (JITFunction, "run", compile_only),
            (backends, "unusable", lambda *arguments: None),
            (triton_slab, "capability", lambda device: divmod(chip, 10)),
            (slabs, "SLAB_CLASSES_MIN", SLAB),
            (slabs, "SLAB_CLASSES_MAX", SLAB),
            (base.Fused, "_part", _decided_there),
            (rules.Part, "apply", triton_update.update),
            # What is only compiled computes nothing, and needs no products.
            (base.Fused, "_finite", lambda *arguments: torch.tensor(True)),
            (triton_backend, "in_parts", lambda left, right, parts: torch.empty(parts, len(left), right.shape[1])),
            (triton_backend, "accumulated", _room),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        triton.runtime.driver.set_active(Chip(chip))
        for call in calls:
            done = len(found)
            call()
            yield from list(found.values())[done:]


def _described(value, constant):
    value = getattr(value, "base", value) if hasattr(value, "block_shape") else value  # a descriptor's tensor
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}"[6:] + " unaligned" * (value.data_ptr() % 16 != 0)
    if constant or not isinstance(value, int) or value == 1:
        return value
    return ("" if abs(value) < 2**31 else "long ") + ("16n" if value % 16 == 0 else "n")


def calls(chip, few=False):
    """Functions that take every choice of the launching code at least once; off Hopper, those that the chip has a part in.

    few: fewer, which still launch every configuration of every kernel that is launched unasked.
    """
    yield from _measured(chip)
    if not few:
        yield from _forms(chip)
    product = itertools.product((37, 64, 128, 131) if chip == 90 else (64, 131), (64, 512), PRECISIONS)
    yield from _tiles(FEW_TILES if few else product)
    if chip == 90:
        yield from _formats()
        yield from _shapes(few)
    else:
        yield Step(512, "bfloat16")  # where nothing attends, in a kernel of its own


def _tiles(cases):
    # The table of tiles, and what its kernels are compiled for: whether E is stored, row maxima, whole and cut tiles, N and B
    # divisible by 16 or not, sub-centres.
    for num_rows, size, (dtype, precision) in cases:
        case = {"num_rows": num_rows, "size": size, "dtypes": (dtype, dtype), "precision": precision}
        num_classes = 2 * SLAB + (89 if num_rows % 16 == 0 else 80)
        for options in ({}, {"scale": 100.0}, {"frozen": True}):
            yield Call(num_classes=num_classes, **case, **options)
        yield Call(num_classes=num_classes // 3, centers_per_class=3, **case)
        if num_rows not in (64, 131) or size == 64 or precision == "tf32":  # the epilogue's, whatever the product's form
            continue
        for options in ({}, {"frozen": True}, {"centers_per_class": 3}):
            yield Call(**case, statistics=True, **options)
            yield Call(**case, negatives=margins.MVSoftmax(), scale=16.0, **options)
        yield Call(**case, negatives=margins.CurricularFace())


def _shapes(few):
    exponents = (0, 6, 9, 13) if few else range(14)
    # D: powers of two that a block of rows is rounded up to, its sizes odd and, from 64, divisible by 16.
    for exponent in exponents:
        yield Call(size=2**exponent if exponent < 3 else 3 * 2 ** (exponent - 2) + 1, autocast=True)
        if exponent >= 6:
            yield Call(size=2**exponent, dtypes=(BFLOAT16, BFLOAT16))
    # Dtypes and layouts of what the caller brings.
    for dtypes in itertools.product(DTYPES, DTYPES):
        yield Call(size=512, dtypes=dtypes)
    for dtype, layout in itertools.product(DTYPES[: 1 if few else 3], (_unaligned, _transposed, _every_other)):
        yield Call(size=70, dtypes=(dtype, dtype), layout=layout)
    for dtype, bias in itertools.product(DTYPES, (False, True)):
        yield Call(size=512, dtypes=(dtype, dtype), margin=margins.Softmax(), bias=bias)
    yield Call(ignore_index=2**40)
    for reduction in ("sum", "none"):
        yield Call(reduction=reduction)
    # Steps of fused optimisers: the same sizes of a block.
    for exponent in exponents:
        yield Step(2**exponent if exponent < 3 else 3 * 2 ** (exponent - 2) + 1, "float32", "int8", FusedAdamW)
        if exponent >= 6:
            yield Step(2**exponent, "bfloat16", "int8", FusedAdamW)
    for size in (7, 6145, 8192):
        yield Step(size, "float32", "float32", FusedAdamW)
        yield Step(size, "float32", "float32", FusedAdamW, max_row_norm=1.0)
        yield Step(size, "float8", "int8", FusedAdamW)
    # SEARCH_STEPS, and tables of one class and with a last slab of one.
    for num_rows in (0, *(2**exponent for exponent in ((0, 16) if few else range(17)))):
        yield Call(num_rows=num_rows, num_classes=16)
    yield Call(num_rows=1, num_classes=1)
    yield Call(num_classes=SLAB + 1)
    # PARTS: the smallest of each number's calls.
    shapes = {}
    for tiles, width in itertools.product(range(1, 129), range(16, SLAB + 1, 16)):
        num_rows = tiles * triton_backend.PULL_TILE[0]
        shapes.setdefault(triton_backend.pull_parts(num_rows, 64, width), (num_rows, width))
    assert sorted(shapes) == list(range(1, triton_backend.PULL_PARTS_MAX + 1))
    for num_rows, num_classes in shapes.values():
        yield Call(num_rows=num_rows, num_classes=num_classes)


def _formats():
    """Steps of fused optimisers: each format of table and state, a bias, sampled rows."""
    for table_format, state_format, kind in itertools.product(
        formats.TABLE_FORMATS, formats.STATE_FORMATS, (FusedSGD, FusedAdamW)
    ):
        yield Step(512, table_format, state_format, kind)
    for table_format in formats.TABLE_FORMATS:
        # Of two scales gradients are added up, in float32, before the update.
        yield functools.partial(Step(512, table_format), (64.0, 32.0))
        yield Step(512, table_format, momentum=0.0)
        yield Step(512, table_format, "int8", FusedAdamW, max_row_norm=1.0)
        yield Step(512, table_format, sample_rate=0.5)
        yield Step(512, table_format, margin=margins.Softmax(), bias=True)


def _forms(chip):
    """The kernels that triton_forms.json may ask for: where both attend, whole and cut blocks."""
    cases = [(BFLOAT16, "ieee", {}), (FLOAT32, "ieee", {}), (FLOAT32, "tf32", {})]
    if chip >= 90:
        cases.append((BFLOAT16, "ieee", {"DESCRIPTORS": True}))
    for size, (dtype, precision, options) in itertools.product((64, 128, 256, 512), cases):
        for num_classes in (2 * SLAB, 2 * SLAB + 80):
            call = Call(num_classes=num_classes, size=size, dtypes=(dtype, dtype), precision=precision)
            yield asking(call, attend_features=options, attend_table=options)
    # The two tiles that chips from 9.0 on have in bfloat16, as the stage `exponentials` of benchmarks.gpu_check tries them.
    for size, options in itertools.product((64, 512), EXPONENTIALS if chip >= 90 else ()):
        call = Call(num_classes=2 * SLAB + 80, size=size, dtypes=(BFLOAT16, BFLOAT16))
        yield asking(call, exponentials=options)
        yield asking(call._replace(statistics=True), exponentials=options)
        if "HALVES" not in options:
            yield asking(call._replace(frozen=True), exponentials=options)
            yield asking(call._replace(frozen=True, statistics=True), exponentials=options)
            yield asking(call._replace(scale=100.0), exponentials=options)
    # D divisible by 16 or not, which the widest tiles of 9.x do not take.
    for size, dtypes in itertools.product((100, 200, 300, 304), ((FLOAT16, BFLOAT16), (BFLOAT16, FLOAT16), (FLOAT32, BFLOAT16))):
        yield asking(Call(size=size, dtypes=dtypes, autocast=True), attend_features={}, attend_table={})
    for size, table_format, (state_format, kind) in itertools.product(
        (64, 128, 256, 512), formats.TABLE_FORMATS, (("float32", FusedSGD), ("int8", FusedAdamW))
    ):
        if size == 512 or (table_format == "bfloat16" and kind is FusedAdamW):
            yield asking(Step(size, table_format, state_format, kind, memory_budget=0), attend_table={})
    if chip == 90:
        for dtype, num_classes, size in ((BFLOAT16, 2 * SLAB, 512), (FLOAT16, 2 * SLAB + 89, 301)):
            call = Call(num_rows=131, num_classes=num_classes, size=size, dtypes=(dtype, dtype))
            yield asking(call, attend_features={"GLUON": True}, attend_table={"GLUON": True})


def _measured(chip):
    """The kernels that triton_forms.json asks for on the chip."""
    for row in triton_forms.rows():
        if tuple(row["chip"]) == divmod(chip, 10):
            dtype, (num_rows, _) = getattr(torch, row["dtype"]), row["num_rows"]
            for size in {size for size in (64, 128, 256, 512) if row["size"][0] <= size <= row["size"][1]}:
                call = Call(num_rows=num_rows, num_classes=2 * SLAB + 80, size=size, dtypes=(dtype, dtype))
                yield asking(call, **{row["kernel"]: row["options"]})


def asking(call, **forms):
    def asked():
        with triton_forms.using(**forms):
            call()

    return asked


class Call(NamedTuple):
    """One forward and backward."""

    num_rows: int = 128
    num_classes: int = SLAB + 80
    size: int = 64
    dtypes: tuple = (FLOAT32, FLOAT32)  # of features and table
    autocast: bool = False
    precision: str = "ieee"
    layout: object = None  # a function of a matrix or vector
    frozen: bool = False  # features need no gradient, so that E is for its sums alone
    margin: object = margins.CosFace(0.35)
    bias: bool = False
    centers_per_class: int = 1
    scale: float | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    statistics: bool = False
    negatives: object = None

    def __call__(self):
        layout = self.layout or (lambda tensor: tensor)
        rows = self.num_classes * self.centers_per_class
        features = layout(torch.ones(self.num_rows, self.size, dtype=self.dtypes[0])).requires_grad_(not self.frozen)
        weight = layout(torch.ones(rows, self.size, dtype=self.dtypes[1])).requires_grad_()
        labels = layout(torch.arange(self.num_rows) % self.num_classes)
        names = ("negatives", "margin", "centers_per_class", "scale", "ignore_index", "reduction")
        options = {name: getattr(self, name) for name in names}
        if self.bias:
            options["bias"] = torch.ones(rows, dtype=self.dtypes[1], requires_grad=True)
        torch.backends.cuda.matmul.fp32_precision = self.precision
        with torch.autocast("cpu", BFLOAT16, enabled=self.autocast):
            options |= {"memory_budget": 0, "backend": "triton", "return_statistics": self.statistics}
            loss = margin_softmax_loss(features, weight, labels, **options)
        (loss[0] if self.statistics else loss).sum().backward()


class Step:
    """One step of a fused optimiser, its forward and backward being some Call's."""

    def __init__(
        self,
        size,
        table_format,
        state_format="float32",
        kind=FusedSGD,
        momentum=0.9,
        sample_rate=1.0,
        max_row_norm=None,
        **head,
    ):
        self.size, self.kind, self.head = size, kind, {"table_format": table_format, "sample_rate": sample_rate, **head}
        self.options = {
            "state_format": state_format,
            "max_row_norm": max_row_norm,
            **({"momentum": momentum} if kind is FusedSGD else {}),
        }

    def __call__(self, scales=(64.0,)):
        head = MarginSoftmaxLoss(self.size, SLAB + 80, backend="triton", **{"margin": margins.CosFace(0.35), **self.head})
        optimizer = self.kind(head.parameters(), lr=0.1, **self.options)
        for head.scale in scales:
            with torch.autocast("cpu", BFLOAT16):
                dtype = FLOAT32 if head.weight_scale is not None else head.weight.dtype
                loss = head(torch.ones(128, self.size, dtype=dtype), torch.arange(128))
            loss.backward()
        optimizer.step()


def _decided_there(*arguments, part=base.Fused._part):
    """On a GPU the device alone knows whether a step is skipped."""
    return part(*arguments)._replace(skip=torch.zeros((), dtype=torch.bool))


def _room(left, right, out=None):
    return torch.empty(len(left), right.shape[1]) if out is None else out


def _unaligned(tensor):
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)


def _transposed(tensor):
    return tensor.T.contiguous().T if tensor.dim() == 2 else tensor


def _every_other(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


def kernels(chip, few=False):
    """Every kernel of the package that the chip may launch, or does unasked: its other functions are called by these."""
    modules = [triton_exponentials, triton_slab, triton_rows, triton_update]
    modules += [] if few else [triton_attend, *[triton_hopper] * (chip == 90)]
    functions = [function for module in modules for function in vars(module).values() if isinstance(function, JITFunction)]
    called = {name for function in functions for name in function.fn.__code__.co_names}
    return {function.fn.__name__ for function in functions} - called


def configurations(chip):
    """Every launch configuration in the table of tiles."""
    powers = [2**exponent for exponent in range(14)]
    epilogues = (False, False), (True, False), (True, True)
    cases = itertools.product([*powers, *(power + 1 for power in powers)], powers[6:], (BFLOAT16, FLOAT32), epilogues)
    found = [triton_backend.tiles(rows, size, dtype, divmod(chip, 10), *epilogue) for rows, size, dtype, epilogue in cases]
    return {tuple(config.items()) for config in found}


def main():
    few = "--few" in sys.argv
    for chip in [int(argument) for argument in sys.argv[1 + few :]] or sorted(compiled_facts.TENSOR_CORE):
        left = kernels(chip, few) | configurations(chip)
        with compiled_facts.remembered(f"triton-{triton.__version__}/sm_{chip}", forget=not few):
            for launch in launches(chip, calls(chip, few)):
                left -= {launch.kernel, *(config for config in left if set(config) <= launch.numbers.items())}
                found = {"chip": chip, "name": launch.kernel, "arguments": launch.arguments, **launch.compiled.facts}
                print(json.dumps(found | {"fuses": launch.numbers.get("enable_fp_fusion", True)}), flush=True)
        if left:
            sys.exit(f"launched by no call: {left}")


if __name__ == "__main__":
    main()
