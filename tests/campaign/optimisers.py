"""Programs of backward and step: a fused optimiser and torch.optim's, each with a head of its own that began the same."""

import copy

import torch
from margin_rows import ROWS, batch
from rounding import SIZE

from cosface_kernels import FusedAdamW, FusedSGD, MarginSoftmaxLoss

RULES = {"SGD": (FusedSGD, torch.optim.SGD), "AdamW": (FusedAdamW, torch.optim.AdamW)}
STEPS = ("step", "step", "two batches", "forgotten", "not finite", "smaller lr", "saved and loaded", "nothing")
SPACE = {
    "margin": [*ROWS],
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
    "dtype": ["float64", "float64", "float32"],
    "backend": ["torch", "cpu", "auto"],
    **{f"step_{number}": ["nothing", *STEPS] for number in range(5)},
    "seed": [*range(1000)],
}


def settle(case):
    case = case | {"nesterov": case["nesterov"] and case["momentum"] > 0}
    if case["dtype"] == "float64":
        return case | {"backend": "auto" if case["backend"] == "cpu" else case["backend"]}
    return case | {"rule": "SGD", "margin": "CosFace"}  # AdamW divides by what may be rounding alone


def check(case):
    """Step by step the two tables part and so do their gradients: by s = 64 roundings of each batch of each step."""
    row, dtype = ROWS[case["margin"]], getattr(torch, case["dtype"])
    allowed = 10 * 64 * 1e2 ** (dtype == torch.float64) * torch.finfo(dtype).eps
    torch.manual_seed(case["seed"])
    ours = MarginSoftmaxLoss(
        *(SIZE, case["classes"]),
        **{"margin": row.margin, "bias": row.bias, "dtype": dtype, "backend": case["backend"], **row.options},
    )
    with torch.no_grad():
        ours.weight.normal_()
    theirs = copy.deepcopy(ours)
    optimizers = [
        make(head.parameters(), **_options(case)) for make, head in zip(RULES[case["rule"]], (ours, theirs), strict=True)
    ]
    for number in range(5):
        for which, head in enumerate((ours, theirs)):
            optimizers[which] = _do(case, number, head, optimizers[which], row)
    for name, value in theirs.state_dict().items():
        _assert_close(name, ours.state_dict()[name], value, allowed)
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        for name, value in optimizers[1].state[other].items():
            if name != "step" and value is not None and name in optimizers[0].state[parameter]:
                _assert_close(f"state {name}", optimizers[0].state[parameter][name], value, allowed)


def _options(case):
    common = {name: case[name] for name in ("lr", "weight_decay", "maximize")}
    if case["rule"] == "SGD":
        return common | {"momentum": case["momentum"], "nesterov": case["nesterov"]}
    return common | {"betas": case["betas"], "eps": case["eps"]}


def _do(case, number, head, optimizer, row):
    what = case[f"step_{number}"]
    if what == "nothing":
        return optimizer
    if what == "smaller lr":
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
    if what == "saved and loaded":
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = type(optimizer)(head.parameters(), **_options(case))
        optimizer.load_state_dict(saved)
    for part in range(2 if what == "two batches" else 1):
        features, _, labels, *_ = batch(
            row, dtype=head.weight.dtype, num_rows=case["rows"], num_classes=case["classes"], seed=10 * number + part
        )
        loss = head(features * (torch.nan if what == "not finite" else 1), labels)
        loss.backward()
    is_plain = type(optimizer).__module__.startswith("torch.optim")
    if what != "forgotten" and not (what == "not finite" and is_plain):  # which ours leaves out, and theirs would not
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _assert_close(name, ours, theirs, allowed):
    assert ours.shape == theirs.shape and torch.isfinite(ours).all(), name
    error, size = (ours.double() - theirs.double()).abs().max(), theirs.double().abs().max()
    assert error <= allowed * max(size, 1e-30), f"{name}: differs by {error:.3e}, size {size:.3e}"
