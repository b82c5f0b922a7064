"""Calls with what is no such argument: an error of the kinds that the docstrings name, or a result; never a crash or a hang."""

import contextlib
import io

import torch
from cases import make
from torch._subclasses.fake_tensor import FakeTensorMode

from cosface_kernels import (
    CosFaceLoss,
    FusedAdamW,
    FusedSGD,
    MarginSoftmaxLoss,
    cosface_loss,
    cosine_lse,
    margin_softmax_loss,
    margins,
    sample_classes,
    theory,
)
from cosface_kernels.tools import cli

ERRORS = (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError)


def _freed(tensor):
    """Without memory: adding 1 to it ends a process of plain PyTorch."""
    tensor = tensor.detach().clone()
    tensor.untyped_storage().resize_(0)
    return tensor


# Made when they are used: {name: what is put in an argument's place, of what was there}.
VALUES = {
    "as it is": lambda value: value,
    "None": lambda value: None,
    "text": lambda value: "auto",
    "list": lambda value: [1, 2],
    **{repr(number): lambda value, number=number: number for number in (0, -1, 1, 3, 2**31, 2**63, 10**400, 0.5, 1e300, -0.0)},
    **{str(number): lambda value, number=number: number for number in (float("nan"), float("inf"), True, 1j)},
    **{
        f"tensor {name}": lambda value, change=change: change(value if isinstance(value, torch.Tensor) else torch.ones(3, 4))
        for name, change in {
            "meta": lambda t: t.to("meta"),
            "sparse": lambda t: t.to_sparse(),
            "nested": lambda t: torch.nested.nested_tensor([t, t]),
            "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
            "complex": lambda t: t.to(torch.complex64),
            "bool": lambda t: t.to(torch.bool),
            "int64": lambda t: t.long(),
            "uint64": lambda t: t.to(torch.uint64),
            "float8": lambda t: t.to(torch.float8_e4m3fn),
            "0-dim": lambda t: t.sum(),
            "3-dim": lambda t: t[None],
            "no rows": lambda t: t[:0],
            "no columns": lambda t: t[..., :0],
            "one row more": lambda t: torch.cat([t, t[:1]]),
            "without memory": _freed,
            "fake": lambda t: FakeTensorMode(allow_non_fake_inputs=True).from_tensor(t),
            "expanded": lambda t: t[:1].expand(len(t), *t.shape[1:]),
            "negative": lambda t: -t,
            "huge": lambda t: t * 2**62,
            "requires grad": lambda t: t.float().requires_grad_(),
            "conjugated": lambda t: t.to(torch.complex64).conj().imag,
            "flat": lambda t: t.flatten(),
        }.items()
    },
}

CALLS = {
    "cosface_loss": [
        "features",
        "weight",
        "labels",
        "scale",
        "margin",
        "reduction",
        "ignore_index",
        "memory_budget",
        "backend",
        "classes",
    ],
    "margin_softmax_loss": ["features", "weight", "labels", "bias", "margin", "scale", "normalize_features", "centers_per_class"],
    "cosine_lse": ["features", "weight", "labels", "scale", "memory_budget"],
    "sample_classes": ["labels", "num_classes", "rate", "seed"],
    "CosFaceLoss": ["embedding_size", "num_classes", "scale", "sample_rate", "sample_seed", "table_format", "device", "dtype"],
    "MarginSoftmaxLoss": ["embedding_size", "num_classes", "margin", "bias", "centers_per_class", "memory_budget"],
    "forward": ["features", "labels"],
    "topk": ["features", "k"],
    "grow": ["count", "optimizer"],
    "remove": ["ids", "optimizer"],
    "FusedSGD": ["lr", "momentum", "weight_decay", "state_format", "seed"],
    "FusedAdamW": ["lr", "betas", "eps", "weight_decay", "state_format"],
    "theory": ["num_classes", "embedding_size", "probability"],
    "torch.func.grad": ["features", "weight", "labels", "scale"],
    "cosface plan": ["identities", "dim", "batch", "memory", "devices", "sample_rate"],
    "cosface convert": ["inputs", "out", "key", "ranks"],
}
SPACE = {
    "call": [*CALLS],
    "argument": [*range(10)],
    "value": [*VALUES],
    "other_argument": [*range(10)],
    "other_value": ["as it is", "as it is", *VALUES],
    "backend": ["torch", "cpu", "auto"],
}


def settle(case):
    count = len(CALLS[case["call"]])
    case = case | {"argument": case["argument"] % count, "other_argument": case["other_argument"] % count}
    return case | {"other_value": "as it is"} if case["argument"] == case["other_argument"] else case  # one change to each


def check(case):
    features, weight, labels = make("uniform", 3, 8, 4)
    head = CosFaceLoss(4, 8, backend=case["backend"])
    usual = {
        "features": features.requires_grad_(),
        "weight": weight.requires_grad_(),
        "labels": labels,
        "classes": torch.arange(8),
        "bias": torch.zeros(8),
        "ids": torch.tensor([1]),
        "margin": margins.CosFace() if case["call"] in ("margin_softmax_loss", "MarginSoftmaxLoss") else 0.35,
        **{"scale": 16.0, "reduction": "mean", "ignore_index": -100, "memory_budget": "auto", "backend": case["backend"]},
        **{"normalize_features": True, "centers_per_class": 1, "num_classes": 8, "rate": 0.5, "seed": 0, "embedding_size": 4},
        **{"sample_rate": 1.0, "sample_seed": 0, "table_format": "float32", "device": None, "dtype": None, "k": 2, "count": 1},
        **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "state_format": "float32", "betas": (0.9, 0.999), "eps": 1e-8},
        **{"probability": 0.9, "optimizer": None},
        **{"identities": "1e6", "dim": "64", "batch": "8", "memory": "1GB", "devices": "1"},
        **{"inputs": "/dev/null", "out": "/dev/null/out", "key": "weight", "ranks": "1"},
    }
    if case["call"] == "MarginSoftmaxLoss":
        usual["bias"] = False
    elif case["call"] == "margin_softmax_loss" and "bias" not in _changed(case):
        usual["bias"] = None
    names = CALLS[case["call"]]
    arguments = {name: usual[name] for name in names}
    try:
        for which in ("", "other_"):
            name = names[case[f"{which}argument"]]
            arguments[name] = VALUES[case[f"{which}value"]](arguments[name])
    except ERRORS:  # there is no such tensor
        return
    if any(isinstance(value, int) and not isinstance(value, bool) and 10**6 < value < 2**63 for value in arguments.values()):
        return  # a table of 2^31 rows is right, and too large for here
    try:
        _call(case["call"], head, arguments)
    except ERRORS as error:
        assert str(error), "an error without a word"


def _changed(case):
    return {CALLS[case["call"]][case[f"{which}argument"]] for which in ("", "other_") if case[f"{which}value"] != "as it is"}


def _call(call, head, arguments):
    match call:
        case "cosface_loss" | "margin_softmax_loss" | "cosine_lse":
            result = {"cosface_loss": cosface_loss, "margin_softmax_loss": margin_softmax_loss, "cosine_lse": cosine_lse}[call](
                **arguments
            )
            result = result[0] if isinstance(result, tuple) else result
            if result.requires_grad:
                result.sum().backward()
        case "torch.func.grad":
            torch.func.grad(cosface_loss)(*(arguments.pop(name) for name in ("features", "weight", "labels")), **arguments)
        case "cosface plan" | "cosface convert":
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
                status = _command(call, arguments)
            assert status in (0, 1, 2) and (status == 0) == (not said.getvalue()), (status, said.getvalue())
        case "sample_classes":
            sample_classes(**arguments)
        case "CosFaceLoss" | "MarginSoftmaxLoss":
            made = {"CosFaceLoss": CosFaceLoss, "MarginSoftmaxLoss": MarginSoftmaxLoss}[call](**arguments)
            made(torch.randn(3, made.weight.shape[1]), torch.zeros(3, dtype=torch.int64))
        case "forward":
            head(**arguments).sum().backward()
        case "topk" | "grow" | "remove":
            getattr(head, call)(**arguments)
        case "FusedSGD" | "FusedAdamW":
            optimizer = {"FusedSGD": FusedSGD, "FusedAdamW": FusedAdamW}[call](head.parameters(), **arguments)
            head(torch.randn(3, 4), torch.arange(3)).backward()
            optimizer.step()
        case "theory":
            theory.min_scale(arguments["num_classes"], arguments["probability"])
            theory.suggest(arguments["num_classes"], arguments["embedding_size"])


def _command(call, arguments):
    """The exit status. What has no memory cannot be printed."""
    words = [call.split()[1]]
    for name, value in arguments.items():
        value = "tensor" if isinstance(value, torch.Tensor) else value
        words += [str(value)] if name in ("inputs", "out") else [f"--{name.replace('_', '-')}={value}"]
    try:
        return cli.main(words)
    except SystemExit as end:
        return end.code
