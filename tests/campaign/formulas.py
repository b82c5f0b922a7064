"""The formulas of docs/margins.md and of the margins' papers, with N x C logits, for options.py."""

import math
from typing import NamedTuple

import torch
from margin_rows import ROWS, Row, adaface_statistics, continued_once

from cosface_kernels import margins

from .tables import Sample


class Hard(NamedTuple):
    negatives: margins.HardNegatives
    # (the target's cosine after the margin, t, the cosines with other classes, descending) -> (τ, p0, p1, p2), from the papers
    polynomial: object
    momentum: float = 0.0  # of t


class Linear(margins.HardNegatives):
    """Every coefficient."""

    bound = 1.5

    def polynomial(self, cosine, target, state):
        return 0.2, 0.1, torch.full_like(cosine, 0.8), 0.6


class LeftOut(margins.HardNegatives):
    def polynomial(self, cosine, target, state):
        return 0.3, -math.inf, 0.0, 0.0


def between(others, k):
    """(N,) a threshold that the k largest of each row pass, all where there are no more."""
    return torch.nn.functional.pad(others, (0, k + 1), value=-math.inf)[:, k - 1 : k + 1].mean(1)


HARD = {
    "filtering": Hard(margins.InterclassFiltering(0.4), lambda own, *_: (0.4, 0.0, 0.0, 0.0)),
    "MV": Hard(margins.MVSoftmax(1.2), lambda own, *_: (own, 0.2, 1.2, 0.0)),
    "MV, not adaptive": Hard(margins.MVSoftmax(1.2, adaptive=False), lambda own, *_: (own, 0.2, 1.0, 0.0)),
    "CurricularFace": Hard(margins.CurricularFace(0.5), lambda own, t, _: (own, 0.0, t, 1.0), 0.5),
    "InterTopK 1": Hard(margins.InterTopK(1, 0.1), lambda own, t, others: (between(others, 1), 0.1, 1.0, 0.0)),
    "InterTopK 5": Hard(margins.InterTopK(), lambda own, t, others: (between(others, 5), 0.06, 1.0, 0.0)),
    "own": Hard(Linear(), lambda own, *_: (0.2, 0.1, 0.8, 0.6)),
    "left out": Hard(LeftOut(), lambda own, *_: (0.3, -math.inf, 0.0, 0.0)),
}

# Numbers by class: the margin made of them, their ranges, and its row, whose ψ finds each row's in the state.
BY_CLASS = {
    "CosFace": (margins.CosFace, {"m": (-0.1, 0.5)}, lambda t, _, s: t.cos() - s["m"]),
    "ArcFace": (margins.ArcFace, {"m": (0.0, 0.2)}, lambda t, _, s: (t + s["m"]).cos()),  # θ + m <= π in every batch
    "Combined": (
        margins.Combined,
        {"m1": (0.9, 1.1), "m2": (0.0, 0.3), "m3": (-0.1, 0.3)},
        lambda t, _, s: continued_once(s["m1"] * t + s["m2"]) - s["m3"],
    ),
}
MARGINS = {name: row for name, row in ROWS.items() if row.exact}
MARGINS |= {f"{name} by class": Row(None, psi, (0, 0), lipschitz=1.1) for name, (_, _, psi) in BY_CLASS.items()}


class Batch(NamedTuple):
    features: torch.Tensor  # (N, D)
    weight: torch.Tensor  # (C K, D)
    bias: torch.Tensor | None  # (C K,)
    labels: torch.Tensor  # (N,), or (N, K) with -1 for none
    label_weights: torch.Tensor | None  # (N, K)
    class_weight: torch.Tensor | None  # (C,)
    numbers: dict  # of the margin, by class
    scale: float
    sample: Sample | None = None  # of the classes

    def kept(self, case):
        """(M,) the classes that take part."""
        return torch.arange(case["classes"]) if self.sample is None else self.sample.classes

    def leaves(self, dtype):
        """The tensors that a gradient is for, in a dtype, None for as they are: {name: tensor}."""
        named = {"dX": self.features, "dW": self.weight, "db": self.bias, **self.numbers}
        return {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in named.items() if t is not None}


class Oracle(NamedTuple):
    losses: torch.Tensor  # (N,)
    products: torch.Tensor  # (N, M): of features and table, the largest of a class's centres
    logits: torch.Tensor  # (N, M), with margins, changed negatives, and the correction for sampling
    lse: torch.Tensor  # (N,): A_n
    own: torch.Tensor  # (N, M): which classes are the row's
    targets: torch.Tensor  # (N, M): with which weights
    threshold: torch.Tensor | None  # (N, 1), of hard negatives
    counted: torch.Tensor  # (N,)


def oracle_of(case, given, leaves, scale):
    """By the formulas of docs/margins.md. Pairs (line, place) are the rows' own classes, each once."""
    row = MARGINS[case["margin"]]
    features, table, bias = (leaves.get(name) for name in ("dX", "dW", "db"))
    labels = given.labels if case["positives"] else given.labels[:, None]
    weights = given.label_weights if case["positives"] else torch.ones_like(labels)
    counted = (labels >= 0).any(1)
    features = torch.where(counted[:, None], features, 1.0)
    kept = given.kept(case)
    rows = (kept[:, None] * row.centers + torch.arange(row.centers)).flatten()
    table, norm = table[rows], features.norm(dim=1)
    table = table if "weight" in row.raw else table / table.norm(dim=1, keepdim=True)
    products = (features if "features" in row.raw else features / norm[:, None]) @ table.T
    products = products.to(torch.promote_types(products.dtype, torch.float32))
    products = products if bias is None else products + bias[rows]
    products, nearest = products.unflatten(1, (-1, row.centers)).max(2)

    places = torch.where(labels >= 0, torch.searchsorted(kept, labels.clamp(0, int(kept[-1]))), -1)
    line, column = (places >= 0).nonzero().T
    place = places[line, column]
    targets = torch.zeros_like(products).index_put((line, place), weights[line, column].to(products), accumulate=True)
    own = torch.zeros_like(products, dtype=torch.bool).index_put((line, place), torch.tensor(True))
    line, place = own.nonzero().T

    chosen = place * row.centers + nearest[line, place]
    length = (norm[line] if "features" in row.raw else 1.0) * (table.norm(dim=1)[chosen] if "weight" in row.raw else 1.0)
    own_bias = 0.0 if bias is None else bias[rows][chosen]
    cosine = (products[line, place] - own_bias) / length
    state = {name: leaves.get(name, values.to(norm))[kept[place]] for name, values in given.numbers.items()}
    if "batch_mean" in row.state and counted.any():
        state |= dict(zip(("batch_mean", "batch_std"), adaface_statistics(norm[counted]), strict=True))
    if is_head(case):
        moves = case["training"] and counted.any()
        state |= row.advance(dict(row.state), norm[counted].detach()) if moves else dict(row.state)
    psi = length * row.psi(cosine.clamp(-1, 1).acos(), norm[line], state).to(products.dtype) + own_bias

    scale = torch.as_tensor(scale, dtype=products.dtype).expand(len(products))[:, None]
    changed, threshold = _changed(case, products, own, line, cosine, psi)
    logits = scale * changed.index_put((line, place), psi.to(products.dtype))
    shift = 0.0 if given.sample is None else given.sample.by_class.to(logits)
    shifted = torch.where(own, logits, logits + shift).clamp(min=-1e6)
    lse = torch.where(own, -torch.inf, shifted).detach().logsumexp(1)
    others = shifted[line].scatter(1, place[:, None], -1e6).logsumexp(1)
    each = torch.logaddexp(others - logits[line, place], others.new_zeros(()))
    losses = others.new_zeros(len(products)).index_add(0, line, targets[line, place] * each)
    epsilon = case["label_smoothing"]
    if epsilon:
        losses = losses.index_add(0, line, epsilon * (logits[line, place] - logits[line].mean(1)))
    losses = losses + torch.where(counted, row.penalty(norm), 0.0)
    return Oracle(losses, products.detach(), shifted.detach(), lse, own, targets, threshold, counted)


def _changed(case, products, own, line, cosine, target):
    """(the cosines with other classes (N, M) with those that are hard changed, the threshold (N, 1))."""
    if not case["negatives"]:
        return products, None
    hard = HARD[case["negatives"]]
    t = hard.momentum * cosine.detach().mean() if is_head(case) and case["training"] and len(cosine) else 0.0
    others = products.detach().masked_fill(own, -torch.inf)[line].sort(dim=1, descending=True).values
    numbers = hard.polynomial(target.detach(), t, others)
    threshold, p0, p1, p2 = (
        torch.zeros(len(products), dtype=products.dtype).index_put(
            (line,), torch.as_tensor(n, dtype=products.dtype).expand(len(line))
        )[:, None]
        for n in numbers
    )
    return torch.where(products > threshold, p0 + p1 * products + p2 * products**2, products), threshold


def _factors(case, given, counted):
    """(N,) what each row's loss is multiplied by."""
    weights = counted.double()
    if given.class_weight is not None:
        weights = weights * given.class_weight[given.labels.clamp(min=0)]
    return weights / (float(weights.sum()) or 1.0) if case["reduction"] == "mean" else weights


def expected(case, given, dtype, low=False):
    leaves = given.leaves(dtype)
    scale = torch.tensor(math.log(given.scale) if is_head(case) else given.scale, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        oracle = oracle_of(case, given, leaves, scale.exp() if is_head(case) else scale)
        losses = oracle.losses * _factors(case, given, oracle.counted).to(oracle.losses)
        losses = losses if case["reduction"] == "none" else losses.sum()
    leaves = trained(case, given, leaves)
    if case["scale"] == "learnt":
        leaves["ds"] = scale
    return with_gradients(losses, leaves), oracle


def is_head(case):
    return case["call"] in ("head", "CosFaceLoss")


def trained(case, given, leaves):
    """Those that autograd has a gradient for: a head's numbers by class are buffers, and a float8 table has a fused optimiser."""
    left_out = {*(given.numbers if is_head(case) else ()), *(("dW", "db") if case["weight"] == "float8" else ())}
    return {name: leaf for name, leaf in leaves.items() if name not in left_out}


def sizes_of(case, given, oracle):
    """Of each result that is a sum of terms of both signs, the sum of their absolute values, or more."""
    row, is_mixed = MARGINS[case["margin"]], case["label_smoothing"] > 0 or case["positives"] > 1
    share = oracle.logits.softmax(1)
    slopes = (share - oracle.targets).abs()  # ∂loss_n/∂z_nj, whose share - 1 of a row's one class is computed as a whole
    if is_mixed:
        spread = case["label_smoothing"] / share.shape[1]
        slopes = oracle.targets.sum(1, keepdim=True) * share + oracle.targets + spread + case["label_smoothing"] * oracle.own
    factors = _factors(case, given, oracle.counted)
    upstream = upstream_of(factors.shape if case["reduction"] == "none" else ()).abs()
    slopes = slopes * (factors * upstream)[:, None]
    logits = torch.where(oracle.own | (oracle.logits > -1e5), oracle.logits, 0.0).abs()
    sizes = {"ds": (slopes * logits).sum()[None] / (1 if is_head(case) else given.scale)}
    if not is_mixed:
        return sizes
    x, w = given.features.double().norm(dim=1), given.weight.double().norm(dim=1)
    whole = torch.zeros(len(x), len(w), dtype=torch.float64).index_copy(1, given.kept(case), given.scale * slopes)
    sizes["dX"] = (whole @ (w if "weight" in row.raw else torch.ones_like(w)) / (1 if row.raw else x))[:, None]
    sizes["dW"] = ((x if row.raw else torch.ones_like(x)) @ whole / (1 if "weight" in row.raw else w))[:, None]
    sizes["db"] = whole.sum(0)
    losses = case["label_smoothing"] * (oracle.own * logits + logits.mean(1, keepdim=True)).sum(1) * factors
    sizes["loss"] = losses if case["reduction"] == "none" else losses.sum()[None]
    return sizes


def with_gradients(losses, leaves):
    gradients = torch.autograd.grad(losses, [*leaves.values()], upstream_of(losses.shape).to(losses.dtype))
    named = zip(("loss", *leaves), (losses.detach(), *gradients), strict=True)
    return {name: torch.atleast_1d(tensor.to_dense()) for name, tensor in named}


def upstream_of(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
