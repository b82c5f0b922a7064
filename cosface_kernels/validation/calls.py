"""Checks of how a head is called and configured, with hints for those who come from another library."""

import difflib

import torch

from .tensors import INTEGER_DTYPES

# Names in other libraries, and those of the same things here.
ELSEWHERE = {
    "s": "scale",
    "m": "margin",
    "W": "weight",
    "w": "weight",
    "kernel": "weight",
    "K": "centers_per_class",
    "sub_centers": "centers_per_class",
    "in_features": "embedding_size",
    "feat_dim": "embedding_size",
    "out_features": "num_classes",
    "predict": "topk(features, k)",
    "get_logits": "logits(features)",
    "forward_backward": "head(features, labels).backward()",
}


def check_names(kind, options, known):
    """Check the names of a class's keyword arguments that it passes on."""
    for name in options:
        if name not in known:
            alike = [ELSEWHERE[name]] if name in ELSEWHERE else difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {alike[0]}?" if alike else ""
            raise TypeError(f"{kind} has no option {name}{hint}")


def check_attribute(kind, name):
    """Raise for an attribute of other libraries' heads, which could be set without any effect."""
    if name in ELSEWHERE:
        raise AttributeError(f"{kind} has no attribute {name}; did you mean {ELSEWHERE[name]}?")


def check_call(features, labels, others, named):
    """Check that a head was called with features and labels, and nothing else."""
    if others or named:
        got = ", ".join([*(type(each).__name__ for each in others), *(f"{name}=" for name in named)])
        raise TypeError(f"a head is called as head(features, labels), got {got} too; {_instead(labels, others, named)}")
    if labels is None and isinstance(features, (tuple, list, dict)):
        raise TypeError(f"a head is called as head(features, labels), got one {type(features).__name__}: pass its parts apart")
    if features is None:
        raise TypeError("a head is called as head(features, labels), got no features")
    if labels is None:
        raise TypeError(
            "a head is called as head(features, labels), got no labels; without them head.logits(features) has the logits, "
            "N x C, and head.topk(features, k) the largest of them"
        )


def _instead(labels, others, named):
    """Advice for a call in the shape of another library."""
    first = others[0] if others else None
    if named.keys() & {"embeddings", "input", "x", "label", "target", "targets", "y"}:
        return "its two arguments are named features and labels"
    if isinstance(first, tuple) or named.keys() & {"indices_tuple", "ref_emb", "ref_labels"}:
        return "a miner's pairs go to the heads of cosface_kernels.compat.pytorch_metric_learning"
    if _are_integers(first) and _are_integers(labels):
        return "two classes of a row, as mixup has, are labels (N, 2) with label_weights (N, 2)"
    if _are_integers(first) and isinstance(labels, torch.Tensor):
        return "norms are not passed: margins.AdaFace takes them from features that were not normalised"
    if isinstance(first, torch.Tensor) or named.keys() & {"weight", "weights", "sample_weight"}:
        return 'for weights of rows make the head with reduction="none", and take (weights * losses).sum() / weights.sum()'
    if isinstance(first, torch.optim.Optimizer) or named.keys() & {"optimizer", "opt"}:
        return "an optimizer is not passed: it is given head.parameters(), and takes its step after backward"
    return "options are the constructor's, and many are attributes of the head"


def _are_integers(value):
    return isinstance(value, torch.Tensor) and value.dtype in INTEGER_DTYPES


def check_optimizer(optimizer, parameter):
    """Check that optimizer is a torch.optim.Optimizer with this parameter."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
    if not any(parameter is each for group in optimizer.param_groups for each in group["params"]):
        raise ValueError("optimizer must be the one that has the head's weight among its parameters")
