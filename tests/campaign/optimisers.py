"""Programs of backward and step: each step of a fused optimiser against torch.optim's from the same table and state."""

import copy
from typing import NamedTuple

import torch
from margin_rows import ROWS, batch, steepness
from rounding import SIZE

from cosface_kernels import FusedAdamW, FusedSGD, MarginSoftmaxLoss, margins
from cosface_kernels.heads import float8
from cosface_kernels.ops import formats

from . import tables

RULES = {"SGD": (FusedSGD, torch.optim.SGD), "AdamW": (FusedAdamW, torch.optim.AdamW)}
FORMATS = ("float32", "float32", "bfloat16", "int8")  # of state
GRADIENT_ROUNDINGS = 2  # of an exponent: by how much two ways of one gradient may differ
BESIDE = (  # the margin
    *("smoothing", "class weights", "statistics", "hard negatives", "nearest negatives", "several classes", "learnt scale"),
)
STEPS = ("step", "step", "two batches", "forgotten", "not finite", "smaller lr", "saved and loaded", "nothing")
SPACE = {
    "margin": [*ROWS],
    "beside": ["", "", "", *BESIDE],
    "rule": [*RULES],
    "rows": [2, 5, 9, 20],
    "classes": [2, 3, 7, 130, 300],
    "lr": [0.1, 0.5, 0.01],
    "momentum": [0.0, 0.9],
    "nesterov": [False, True],
    "betas": [(0.9, 0.999), (0.5, 0.9), (0.0, 0.999), (0.9, 0.0)],
    "eps": [1e-8, 1e-4],
    "weight_decay": [0.0, 0.01, 0.5],
    "maximize": [False, True],
    "max_row_norm": [None, None, 0.5, 10.0],
    "table": ["float64", "float64", "float32", "bfloat16", "float8"],
    "state": [*FORMATS],
    "sample_rate": [1.0, 1.0, 0.4],
    "sample_correction": [False, True],
    "hard_classes": [0, 0, 1, 3],
    "tensors": [False, False, True],  # whether lr and betas are
    "backend": ["torch", "cpu", "auto"],
    **{f"step_{number}": ["nothing", *STEPS] for number in range(5)},
    "seed": [*range(1000)],
}


def settle(case):
    case = case | {"nesterov": case["nesterov"] and case["momentum"] > 0}
    case = case | ({} if goes_with(case) else {"beside": ""})
    if case["table"] == "float64":
        return case | {"backend": "auto" if case["backend"] == "cpu" else case["backend"], "state": "float32"}
    # In float32 rounding says on which side of a jump of ψ an angle is.
    return case | ({"margin": "CosFace"} if ROWS[case["margin"]].jumps(1.0) else {})


def check(case):
    torch.set_num_threads(1)
    torch.manual_seed(case["seed"])
    row = ROWS[case["margin"]]
    wide = torch.float64 if case["table"] == "float64" else torch.float32
    kept = {"dtype": wide} if case["table"] == str(wide).removeprefix("torch.") else {"table_format": case["table"]}
    ours, theirs = (_head(case, row, **options) for options in (kept, {"dtype": wide}))
    numbers = {name: _as_tensors(value) if case["tensors"] else value for name, value in _options(case).items()}
    own = {"max_row_norm": case["max_row_norm"], "state_format": case["state"], "seed": case["seed"]}
    optimizer = RULES[case["rule"]][0](_trained(ours), **numbers, **own)
    for number in range(5):
        what, before = case[f"step_{number}"], []
        if what == "nothing":
            continue
        if what == "smaller lr":
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
        if what == "saved and loaded":
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = type(optimizer)(_trained(ours), lr=1.0, state_format=case["state"])
            optimizer.load_state_dict(saved)
        theirs.load_state_dict(ours.state_dict())
        before = [_read(ours, parameter, optimizer) for parameter in _trained(ours)]
        steepest = _backward(case, number, row, ours, theirs)
        if what != "forgotten":
            optimizer.step()
        changes = what not in ("forgotten", "not finite")  # what is not finite, ours leaves out
        optimizer.zero_grad()
        for parameter, other, old in zip(_trained(ours), _trained(theirs), before, strict=True):
            expected = _stepped(case, optimizer, old, other.grad, steepest) if changes else _Expected(old, None, {})
            _assert_close(ours, _read(ours, parameter, optimizer), parameter, optimizer, expected)
            other.grad = None


def _head(case, row, **options):
    sampled = {name: case[name] for name in ("sample_rate", "sample_correction")} | {"sample_seed": case["seed"]}
    sampled |= {"hard_classes": tables.hard_classes(case)}
    options = {"margin": row.margin, "bias": row.bias, "backend": case["backend"], **row.options, **sampled, **options}
    head = MarginSoftmaxLoss(SIZE, case["classes"], **options, **beside(case))
    with torch.no_grad():
        float8.put(head.weight, head.weight_scale, slice(None), torch.randn(head.weight.shape))
    return head


def beside(case):
    """The head's option beside its margin."""
    return {
        "smoothing": {"label_smoothing": 0.1},
        "class weights": {"class_weight": torch.linspace(0, 2, case["classes"])},
        "hard negatives": {"negatives": margins.MVSoftmax(1.2)},
        "nearest negatives": {"negatives": margins.InterTopK(2)},
        "learnt scale": {"learnable_scale": True},
    }.get(case["beside"], {})


def goes_with(case):
    """Whether the margin takes what is beside it."""
    row = ROWS[case["margin"]]
    if case["beside"] in ("smoothing", "several classes"):
        return row.centers == 1
    return case["beside"] not in ("hard negatives", "nearest negatives") or not row.raw


def _trained(head):
    """What the fused optimiser trains."""
    return [parameter for name, parameter in head.named_parameters() if name != "log_scale"]


def _called(case, head, features, labels):
    if case["beside"] == "statistics":
        return head(features, labels, return_statistics=True)[0]
    if case["beside"] == "several classes":
        labels = torch.stack([labels, labels.flip(0), torch.full_like(labels, -1)], 1)
        return head(features, labels, label_weights=torch.tensor([0.7, 0.3, 0.0]).expand(labels.shape))
    return head(features, labels)


def _options(case):
    common = {name: case[name] for name in ("lr", "weight_decay", "maximize")}
    if case["rule"] == "SGD":
        return common | {"momentum": case["momentum"], "nesterov": case["nesterov"]}
    return common | {"betas": case["betas"], "eps": case["eps"]}


def _as_tensors(value):
    """Numbers as float64 tensors, which have the same value."""
    if isinstance(value, tuple):
        return tuple(map(_as_tensors, value))
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else value


def _backward(case, number, row, *heads):
    """Run backward of the same batches for each head; return the steepest logit, for `rounding.tolerance`."""
    steepest = 0.0
    for part in range(2 if case[f"step_{number}"] == "two batches" else 1):
        features, _, labels, *_ = batch(row, num_rows=case["rows"], num_classes=case["classes"], seed=10 * number + part)
        steepest = max(steepest, steepness(row, features, heads[-1].weight.detach().double()))
        for head in heads:
            own = features.to(heads[-1].weight.dtype) * (torch.nan if case[f"step_{number}"] == "not finite" else 1)
            _called(case, head, own, labels).backward()
    return steepest


def _read(head, parameter, optimizer):
    """{name: numbers in float64} of a parameter, "table", and of its state."""
    state = optimizer.state.get(parameter, {})
    found = {"table": parameter.detach().double().clone()}
    if parameter.dtype == formats.FLOAT8:
        found["table"] *= head.weight_scale.double()[:, None]
    for name, value in state.items():
        if name == "step":
            found[name] = value.clone()
        elif name in optimizer._STATE:
            rows = formats.read(value, state.get(f"{name}_scale"), slice(None))
            found[name] = rows.double().clone()
    return found


class _Expected(NamedTuple):
    numbers: dict  # as `_read` has them
    rows: torch.Tensor | None  # that were stepped; None: all stay as they are, to the bit
    errors: dict  # what rounding may make of them before they are stored, where rows say


def _stepped(case, optimizer, before, gradient, steepest):
    """torch.optim's step for the rows that have a gradient, and how far rounding may take ours from it."""
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        rows, gradient = gradient.indices()[0], gradient.values()
    else:
        rows = torch.arange(len(gradient))
    options = _options(case) | {"lr": optimizer.param_groups[0]["lr"]}
    small = torch.nn.Parameter(before["table"][rows])
    small.grad = _clipped(gradient.double(), case["max_row_norm"])
    plain = RULES[case["rule"]][1]([small], **options)
    if len(before) > 1:
        plain.state[small] = {
            name: value[rows] if value.dim() else value.clone() for name, value in before.items() if name != "table"
        }
    plain.step()
    after = {"table": small.detach(), **{n: v for n, v in plain.state[small].items() if isinstance(v, torch.Tensor)}}
    numbers = {
        name: value if not value.dim() else _put(before.get(name), rows, value, before["table"]) for name, value in after.items()
    }
    eps = torch.finfo(gradient.dtype).eps
    off = GRADIENT_ROUNDINGS * steepest * eps * (small.grad.abs().max() if small.grad.numel() else 0.0)
    return _Expected(numbers, rows, _errors(case, options, after, off, before["table"][rows], 8 * eps))


def _clipped(gradient, longest):
    """∇_j · min(1, longest / ‖∇_j‖)."""
    if longest is None:
        return gradient
    norm = gradient.flatten(1).norm(dim=1, keepdim=True) if gradient.dim() > 1 else gradient.abs()
    return torch.where(norm > longest, gradient * (longest / norm), gradient)


def _put(old, rows, values, like):
    return (torch.zeros_like(like) if old is None else old.clone()).index_copy_(0, rows, values)


def _errors(case, options, after, off, table, rounding):
    """By the rules of FusedSGD and FusedAdamW, for a gradient that is off by so much; and some roundings of each number."""
    moved = (after["table"] - table).abs()
    if case["rule"] == "SGD":
        momentum = after.get("momentum_buffer", torch.zeros(()))
        return {
            "table": 2 * options["lr"] * off + rounding * (moved + table.abs()),
            "momentum_buffer": off + rounding * momentum.abs(),
        }
    (first, second), step = options["betas"], float(after["step"])
    root = (after["exp_avg_sq"] / (1 - second**step)).sqrt()
    ratio = after["exp_avg"].abs() / (1 - first**step) / (root + options["eps"])
    # A square root of a mean of squares is off by no more than its terms are.
    least = (root - off).clamp(min=0) + options["eps"]
    return {
        "table": options["lr"] * (1 + ratio) * off / least + rounding * (moved + table.abs()),
        "exp_avg": (1 - first) * off + rounding * after["exp_avg"].abs(),
        "exp_avg_sq": (1 - second) ** 0.5 * off + rounding * after["exp_avg_sq"].sqrt(),  # of the root
    }


def _assert_close(head, ours, parameter, optimizer, expected):
    """Rows that were stepped are as near as rounding and their format allow; all others have their bits."""
    state = optimizer.state.get(parameter, {})
    for name, wanted in expected.numbers.items():
        if name not in ours and not wanted.any():  # a state of zeros need not be there
            continue
        found = ours[name]
        assert found.shape == wanted.shape and torch.isfinite(found).all(), name
        if not found.dim():
            assert found == wanted, f"{name}: {found}, not {wanted}"
            continue
        stored = parameter if name == "table" else state[name]
        changed = torch.zeros(len(found), dtype=torch.bool)
        if expected.rows is not None:
            changed[expected.rows] = True
            one, other = found[changed], wanted[changed]
            if name == "exp_avg_sq":
                one, other = one.sqrt(), other.sqrt()
            allowed = expected.errors[name] + _grid(stored.dtype, one, other)
            if stored.dtype == formats.FLOAT8:
                allowed += tables.LEAST * head.weight_scale.double()[changed, None]
            error = (one - other).abs()
            assert (error <= allowed).all(), (
                f"{name}: off by {(error / allowed).max():.3g} times what is allowed, by {error.max():.3e} at most, "
                f"size {other.abs().max():.3e}"
            )
        assert torch.equal(found[~changed], wanted[~changed]), f"{name}: rows changed that had no gradient"


def _grid(dtype, one, other):
    """The largest error of a stored number: less than a step of its format, because it is rounded stochastically."""
    largest = torch.maximum(one.abs(), other.abs())
    if dtype in formats.LARGEST_CODE:
        return 1.01 * largest.amax(1, keepdim=True) / formats.LARGEST_CODE[dtype]
    return largest * torch.finfo(dtype).eps
