"""`exponentials` alone, by tile and form, and the products around it: inputs rotate past L2, many calls are one CUDA graph."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from cosface_kernels.ops.backends import triton_backend
from cosface_kernels.ops.backends.products import accumulated, in_parts
from cosface_kernels.ops.slabs import Plan
from cosface_kernels.ops.table import Table

from .. import harness
from ..peers import SCALE
from . import gpu

CALLS = 20  # in one graph
ROTATED = 120e6  # bytes of class rows, more than twice any L2
E_ERROR = 2.0**-8  # two roundings to bfloat16
# Tensor cores cut each sum of 16 products off at float32's last bit; a cosine's error counts up to 92-fold in its exponent.
SUM_ERROR = 2.0**-23 / 16
EXPONENT_ERROR = 92 * SUM_ERROR


def exponentials(cases, device=None):
    device = device or gpu.device()
    known = gpu.known_forms().get("exponentials", set())
    if missing := [case for case in cases if not known >= set(case.get("options", {}))]:
        yield {"line": f"{len(missing)} cases left out: `exponentials` has no such options"}
        cases = [case for case in cases if case not in missing]
    made = _Inputs(device)
    yield from harness.measure(list(_exponentials_cases(cases, made, device)), device, turns=2)


def _exponentials_cases(cases, made, device):
    for case in cases:
        problem = made.problem(case["rows"], case["classes"], case["size"])
        e = made.buffer(case["rows"] * case["classes"]) if case["store"] else None
        tile = dict(zip(("BLOCK_N", "BLOCK_C", "BLOCK_K"), map(int, case["tile"].split("x")), strict=True))
        options = {**tile, "num_warps": case["warps"], "num_stages": case["stages"], **case.get("options", {})}

        def run(index, problem=problem, e=e, options=options):
            return _launch(problem, problem.units[index % len(problem.units)], e, options)

        def check(problem=problem, e=e, options=options):
            for tensor in filter(lambda tensor: tensor is not None, (problem.partial, e)):
                tensor.fill_(torch.nan)
            own = triton_backend._Slab(problem.x, Table(problem.units[0]), problem.targets, problem.plan).config
            is_own = {**own, **options} == own
            return {"own": is_own, **_errors(problem, *_launch(problem, problem.units[0], e, options))}

        yield harness.Case(case, run, check, calls=CALLS if device.type == "cuda" else 1)


class _Inputs:
    """Inputs of each shape, made once: x̂, slabs of ŵ, targets. All share E's buffer; it is filled with NaN before each check."""

    def __init__(self, device):
        self.device, self.problems, self._buffer = device, {}, torch.empty(0, dtype=torch.bfloat16, device=device)

    def buffer(self, elements):
        if self._buffer.numel() < elements:
            self._buffer = torch.empty(elements, dtype=torch.bfloat16, device=self.device)
        return self._buffer

    def problem(self, n, b, d):
        if (n, b, d) not in self.problems:
            generator = torch.Generator(self.device).manual_seed(0)

            def units(rows):
                return F.normalize(torch.randn(rows, d, generator=generator, device=self.device)).bfloat16()

            copies = max(1, round(ROTATED / (2 * b * d))) if self.device.type == "cuda" else 1
            x, first = units(n), units(b)
            targets = torch.randint(2 * b, (n,), generator=generator, device=self.device)  # half of them in this slab
            x = (0.7 * first.float()[targets % b] + 0.7 * x.float()).bfloat16()  # cosines up to 0.7, as hard ones are
            partial = torch.empty(math.ceil(b / 64), n, dtype=torch.float64, device=self.device)
            plan = Plan(SCALE * math.log2(math.e), float(round(math.log2(b) / 2)), torch.bfloat16, b, 0, 0)
            shift = torch.full((n,), plan.shift, device=self.device)
            slabs = [first, *(units(b) for _ in range(copies - 1))]
            self.problems[n, b, d] = SimpleNamespace(x=x, units=slabs, targets=targets, partial=partial, plan=plan, shift=shift)
        return self.problems[n, b, d]


def _launch(problem, unit, e, options):
    """(row sums of E (tiles, N), E (N, B) or None), by the package's own launching code."""
    rows, classes = len(problem.x), len(unit)
    e = None if e is None else e[: rows * classes].view(rows, classes)
    partial = problem.partial[: math.ceil(classes / options["BLOCK_C"])]
    with gpu.exponentials(options):
        slab = triton_backend._Slab(problem.x, Table(unit), problem.targets, problem.plan)
        slab.exponentials(unit, 0, classes, problem.shift, partial, store=e)
    return partial, e


def _errors(problem, partial, e):
    """Errors of the row sums, and of E if it is stored, against float64."""
    exponents = problem.plan.log2_scale * (problem.x.double() @ problem.units[0].double().T) - problem.plan.shift
    inside = problem.targets < exponents.shape[1]
    exact = exponents.exp2_()
    exact[inside, problem.targets[inside]] = 0
    found = [(partial.sum(0), exact.sum(1), EXPONENT_ERROR * problem.x.shape[1]), *([] if e is None else [(e, exact, E_ERROR)])]
    errors = [harness.relative_error(got, wanted) for got, wanted, _ in found]
    # Written so that a NaN is wrong too.
    return {"errors": errors, "wrong": not all(error <= most for error, (*_, most) in zip(errors, found, strict=True))}


def parts(cases, device=None):
    """The machine's ceilings, and the two products of a slab: E ŵ in parts, and Eᵀ x̂."""
    device = device or gpu.device()
    made = _Inputs(device)
    yield from harness.measure([_part(case, made, device) for case in cases], device, turns=2)


def _part(case, made, device):
    calls = CALLS if device.type == "cuda" else 1
    if case["kind"] == "ceiling":
        rate = "product" if case["what"] == "product" else "copy"
        return harness.Case(case, _ceiling(case, device), calls=1 if rate == "copy" else 2)
    n, b, d = case["rows"], case["classes"], case["size"]
    problem = made.problem(n, b, d)
    e = made.buffer(n * b)[: n * b].view(n, b)
    e.copy_(torch.rand(n, b, dtype=torch.bfloat16, device=device))
    pull = torch.zeros(case["parts"] or 1, n, d, device=device)

    def run(index):
        unit = problem.units[index % len(problem.units)]
        if case["parts"] == 0:
            return accumulated(e.T, problem.x)
        if not case.get("accumulate"):
            return in_parts(e, unit, case["parts"])
        left, right = e.unflatten(1, (case["parts"], -1)).transpose(0, 1), unit.unflatten(0, (case["parts"], -1))
        return torch.baddbmm(pull, left, right, out_dtype=torch.float32, out=pull)

    def check():
        """Check a sum of N or B products in float32; a CPU rounds one of the two to bfloat16."""
        exact = e.T.double() @ problem.x.double() if case["parts"] == 0 else e.double() @ problem.units[0].double()
        got = run(0)
        error = harness.relative_error(got if case["parts"] == 0 else got.sum(0), exact)
        most = SUM_ERROR * (b if case["parts"] else n) if device.type == "cuda" else E_ERROR
        return {"errors": [error], "wrong": not (error <= most or case.get("accumulate"))}

    return harness.Case(case, run, check, calls=calls)


def _ceiling(case, device):
    if case["what"] == "copy":
        source = torch.ones(case["bytes"] // 4, device=device)
        target = torch.empty_like(source)
        return lambda index: target.copy_(source)
    m, n, k = case["shape"]
    left = torch.randn(m, k, device=device).bfloat16()
    right = torch.randn(k, n, device=device).bfloat16()
    return lambda index: torch.mm(left, right)
