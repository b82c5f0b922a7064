"""Inputs of every kind, and the one rule of accuracy that every backend is held to.

Rule: the error of each output against the float64 reference is at most that of the plain reference run in the same low precision
(under bfloat16 autocast for 16-bit products; float32, with FLOAT32_LUCK), plus one rounding of the output, for the whole tensor
and for its worst row.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from selection import interpreted

from cosface_kernels import cosface_loss, reference

# Two float32 computations of one thing differ by luck, most of all in their worst row (a 16-bit operand would show as a factor of
# 10^4), and each rounds an exponent of up to s: a relative error of s eps / 2 in a loss that one row dominates. Against a
# low-precision reference no luck is needed, but a CPU rounds a gradient's bfloat16 product once.
# How many such roundings: kernels that attend compute the exponents of backward in another order than those of forward, so the
# two errors do not cancel, and a row that one negative dominates has both in its gradient.
EXPONENT_ROUNDINGS = 1
FLOAT32_LUCK = {"": 3.0, " in the worst row": 4.0}


def draws(kind, shape, *dtypes, backend=None):
    """Enough draws of (features, weight, labels) to tell an error from chance; dtypes: of features and weight."""
    fewest, most = (1, 4) if interpreted(backend) else (3, 8)
    count = max(fewest, min(most, 2000 // (shape[0] * shape[1])))
    made = (make(kind, *shape, seed=seed) for seed in range(count))
    return [(features.to(dtypes[0]), weight.to(dtypes[1]), labels) for features, weight, labels in made]


def make(kind, num_rows, num_classes, size, seed=0):
    """(features, weight, labels) in float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    features, weight = normal(num_rows, size), normal(num_classes, size)
    if kind == "peaked":  # a trained table: target cosine 0.9
        features = _at_cosine(0.9, weight[labels], features)
    elif kind == "hard":  # classes in groups of four around one direction: three negatives near cosine 0.8
        directions = normal(-(-num_classes // 4), size)[torch.arange(num_classes) // 4]
        weight = _at_cosine(math.sqrt(0.8), directions, weight)
        features = _at_cosine(math.sqrt(0.8), directions[labels], features)
    elif kind == "adversarial":
        features, weight = _adversarial(features, weight, labels)
    return features, weight, labels


def _at_cosine(cosine, direction, noise):
    """Rows at about this cosine from `direction`, exactly so where the noise has an orthogonal part, with norms of 1 to 3."""
    unit = F.normalize(direction)
    noise = F.normalize(noise - unit * (noise * unit).sum(1, keepdim=True))
    rows = cosine * unit + math.sqrt(1 - cosine**2) * noise
    return rows * torch.linspace(1, 3, len(rows))[:, None]


def _adversarial(features, weight, labels):
    """Identical, zero, huge and tiny rows, and cosines of exactly 1 and -1, each wherever the sizes leave room for it."""
    weight[6::7] = weight[0]  # identical classes
    weight[2::11] = 0
    weight[3::7] *= 1e15
    weight[4::7] *= 1e-9
    weight[5::13] *= 1e-20  # below the norm that counts
    features[0::5] = 3 * weight[labels[0::5]]
    features[1::5] = -weight[labels[1::5]]
    features[2::7] = 0
    features[3::7] *= 1e15
    features[4::7] *= 1e-9
    return features, weight


def evaluate(loss, features, weight, labels, upstream):
    """(losses, dX, dW) of loss(features, weight, labels) -> (N,) for the upstream gradient of each row."""
    features, weight = features.detach().requires_grad_(), weight.detach().requires_grad_()
    losses = loss(features, weight, labels)
    return losses.detach(), *torch.autograd.grad(losses, (features, weight), upstream.to(losses.dtype))


def check_accuracy(backend, draws, *, device="cpu", memory_budget="auto", scale=64.0, autocast=False):
    """Check the rule for one backend, over draws [(features, weight, labels), ...] of one shape, in the dtypes to test."""
    constants = {"scale": scale, "reduction": "none"}
    ours = partial(cosface_loss, backend=backend, memory_budget=memory_budget, **constants)
    check_rule(ours, partial(reference.cosface_loss, **constants), draws, device=device, scale=scale, autocast=autocast)


def check_rule(ours, plain, draws, *, device="cpu", scale=64.0, autocast=False):
    """Check the rule for losses ours(features, weight, labels) -> (N,), against plain(...), the N x C expression.

    scale: how large an exponent may be.
    """
    low = autocast or draws[0][0].dtype in (torch.bfloat16, torch.float16)

    def run(function, enabled, *tensors):
        return evaluate(torch.autocast(tensors[0].device.type, dtype=torch.bfloat16, enabled=enabled)(function), *tensors)

    results = []
    for features, weight, labels in draws:
        upstream = torch.randn(len(labels), generator=torch.Generator().manual_seed(1))
        got = run(ours, autocast, *(tensor.to(device) for tensor in (features, weight, labels, upstream)))
        exact = run(plain, False, features.double(), weight.double(), labels, upstream)
        bound = run(plain, low, features.float(), weight.float(), labels, upstream)
        results.append([[tensor.cpu() for tensor in three] for three in zip(got, exact, bound, strict=True)])
    exponent = 0.0 if low else EXPONENT_ROUNDINGS * scale * torch.finfo(torch.float32).eps / 2
    product = torch.finfo(torch.bfloat16).eps / 2 if low and torch.device(device).type == "cpu" else exponent
    rounded = {"loss": exponent, "dX": product, "dW": product}
    for name, triples in zip(("loss", "dX", "dW"), zip(*results, strict=True), strict=True):
        assert_as_accurate(
            name, *(torch.cat(tensors) for tensors in zip(*triples, strict=True)), luck=not low, rounded=rounded[name]
        )


def assert_as_accurate(name, ours, exact, bound, *, luck, rounded):
    """‖ours - exact‖ <= ‖bound - exact‖ + (one rounding of the output + rounded) ‖exact‖, for all of it and for its worst row."""
    assert torch.isfinite(exact).all() and torch.isfinite(ours).all(), f"{name} is not finite"
    rounding = torch.finfo(ours.dtype).eps / 2 + rounded
    for what, norm in (("", lambda t: t.double().norm()), (" in the worst row", _largest_row)):
        factor = FLOAT32_LUCK[what] if luck else 1.0
        error, allowed = norm(ours.double() - exact), factor * norm(bound.double() - exact) + rounding * norm(exact)
        assert error <= allowed, f"{name}{what}: error {error:.3e}, allowed {allowed:.3e}, size {norm(exact):.3e}"


def _largest_row(tensor):
    rows = tensor.double().reshape(len(tensor), -1)
    return rows.norm(dim=1).amax() if rows.numel() else rows.new_zeros(())
