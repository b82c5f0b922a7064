"""The peers of the comparison: every way to compute one forward and backward of LMCL, its memory, and the inputs for all.

A peer's function takes features (N, D) and weight (C, D), both float32, and labels (N,). It returns the mean loss, ready for
backward.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cosface_kernels import cosface_loss
from cosface_kernels.ops import backends
from cosface_kernels.tools.info import why_unusable

SCALE, MARGIN = 64.0, 0.35
PRECISIONS = ("float32", "bfloat16")
SAMPLE_RATE = 0.1
PLAIN = "plain PyTorch"
FEATURE_BYTES = 48  # bytes of a step for each of the N x D features, about: features, gradient, both normalised, float64 sums


class Peer(NamedTuple):
    name: str
    precision: str  # of the matrix products: "float32", or "bfloat16", which is autocast
    function: Callable
    logit_bytes: float  # bytes for each of the N x C logits, at the peak in forward
    weight_bytes: float  # bytes for each of the C x D weights, at the peak in backward; neither counts W and dW
    flops: float = 6.0  # of a step, in N C D
    missing: str | None = None  # the reason why it cannot run here
    another_loss: bool = False  # computes something else than LMCL over all classes
    compiled: bool = False  # its first call at each size compiles

    @property
    def key(self):
        return f"{self.name}, {self.precision}"

    def bytes_needed(self, num_rows, num_classes, size):
        """Approximate bytes of a step at its peak, with its inputs and gradients in float32."""
        features, logits, weights = num_rows * size, num_rows * num_classes, num_classes * size
        return int(FEATURE_BYTES * features + 8 * weights + max(self.logit_bytes * logits, self.weight_bytes * weights))


def peers(device, precisions=PRECISIONS):
    """All peers, the most important first: bfloat16 and ours, and last those that compile at each size.

    A peer that cannot run on `device` has the reason in `missing`.
    """
    found = [peer for precision in precisions for peer in _peers(torch.device(device), precision)]
    return sorted(found, key=lambda peer: (peer.compiled, peer.precision == "float32"))


def _peers(device, precision):
    """Yield peers. Bytes are rounded from peaks measured on a CPU; the gradient of F.normalize alone holds 16 for each weight."""
    low = precision == "bfloat16"

    def peer(name, function, *held, **options):
        return Peer(name, precision, in_precision(precision, function), *held, **options)

    for backend in backends.NAMES:
        missing = _backend_missing(backend, device, getattr(torch, precision))
        ours = functools.partial(cosface_loss, backend=backend)
        yield peer(f"cosface_loss, {backend}", ours, 0, 4, missing=missing)
        if device.type == "cuda":  # where the default keeps a part of E at the sizes of interest
            kept = functools.partial(ours, memory_budget=2**60)
            yield peer(f"cosface_loss, {backend}, all of E kept", kept, 2 if low else 4, 4, missing=missing)
        ours = functools.partial(ours, memory_budget=0)
        yield peer(f"cosface_loss, {backend}, memory_budget=0", ours, 0, 0, flops=8.0, missing=missing)
    yield peer(PLAIN, plain, 17 if low else 20, 16)
    yield peer("torch.compile of plain PyTorch", compiled_plain, *((6, 2) if low else (8, 5)), compiled=True)
    missing = _package_missing("pytorch_metric_learning")
    yield peer("pytorch-metric-learning", metric_learning, 18, 16, missing=missing)
    missing = None if hasattr(torch.nn, "LinearCrossEntropyOptions") else f"torch {torch.__version__} has none, 2.13 has"
    yield peer("F.linear_cross_entropy", torch_linear, 1.5, 18, missing=missing)
    yield peer("sampled 10% (PartialFC)", sampled, 2, 2, flops=6 * SAMPLE_RATE, another_loss=True)
    for name, module, function, *held in (
        ("cut-cross-entropy", "cut_cross_entropy", cut, 0, 16),
        ("Liger-Kernel", "liger_kernel", liger, 0, 20),
        ("quack", "quack", quack, 4 if low else 8, 16),
    ):
        missing = "needs a GPU" if device.type != "cuda" else _package_missing(module)
        yield peer(name, function, *held, missing=missing)


def _backend_missing(backend, device, dtype):
    if backend == "triton" and device.type == "cpu":
        return "needs a GPU"  # its interpreter is for tests
    return why_unusable(backend, device, dtype)


def _package_missing(module):
    return None if importlib.util.find_spec(module) else f"{module.replace('_', '-')} is not installed"


def in_precision(precision, function):
    return autocast(function) if precision == "bfloat16" else function


def autocast(function):
    """The function with products in bfloat16."""

    def wrapped(features, *others):
        with torch.autocast(features.device.type, dtype=torch.bfloat16):
            return function(features, *others)

    return wrapped


def plain(features, weight, labels):
    """The usual expression in PyTorch."""
    cosines = F.linear(F.normalize(features), F.normalize(weight))
    return F.cross_entropy(SCALE * (cosines - MARGIN * F.one_hot(labels, len(weight))), labels)


def compiled_plain(features, weight, labels):
    return _compiled_plain()(features, weight, labels)


@functools.cache
def _compiled_plain():
    return torch.compile(plain, fullgraph=True, dynamic=False)


def metric_learning(features, weight, labels):
    from pytorch_metric_learning.losses import CosFaceLoss

    loss = CosFaceLoss(num_classes=1, embedding_size=1, margin=MARGIN, scale=SCALE)
    loss.num_classes = len(weight)
    del loss.W  # its own parameter; W is (D, C) there
    loss.W = weight.T
    return loss(features, labels)


def sampled(features, weight, labels):
    """PartialFC in one process: the softmax is over a tenth of all classes, those of the batch and random others."""
    num_classes = len(weight)
    priority = torch.rand(num_classes, device=weight.device).index_fill_(0, labels, 2.0)
    count = max(int(SAMPLE_RATE * num_classes), len(labels.unique()))
    classes = priority.topk(count).indices.sort().values
    return plain(features, weight.index_select(0, classes), torch.searchsorted(classes, labels))


def with_margin(cross_entropy):
    """LMCL's mean from each row's cross-entropy without a margin, ce_n = log Σ_j e^{s cos_nj} - s cos_ny.

    The negatives over the target are Σ_{j≠y} e^{s cos_nj} / e^{s cos_ny} = e^ce - 1, so loss_n = log(1 + (e^ce - 1) e^{s m}).
    """
    ce = cross_entropy.float().clamp(min=torch.finfo(torch.float32).tiny)
    return F.softplus(ce + torch.log(-torch.expm1(-ce)) + SCALE * MARGIN).mean()


def _scaled_units(features, weight):
    """s x̂ and ŵ, in bfloat16 under autocast, because the peers below do not look at autocast."""
    device = features.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
    return (SCALE * F.normalize(features)).to(dtype), F.normalize(weight).to(dtype)


def torch_linear(features, weight, labels):
    """PyTorch's, in four chunks of rows; without options it is the plain expression. Every chunk reads W and adds to all of dW,
    and its own choice would be chunks of 2 or 4 rows where there are 200 times as many classes as columns.
    """
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=-(-len(features) // 4))
    return with_margin(F.linear_cross_entropy(*_scaled_units(features, weight), labels, reduction="none", options=options))


def cut(features, weight, labels):
    from cut_cross_entropy import linear_cross_entropy

    return with_margin(linear_cross_entropy(*_scaled_units(features, weight), labels, reduction="none"))


def liger(features, weight, labels):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return with_margin(liger_fused_linear_cross_entropy(*_scaled_units(features, weight), labels, reduction="none"))


def quack(features, weight, labels):
    """quack's, not chunked: its chunked form has no reduction="none", without which no margin can be applied outside."""
    from quack.linear_cross_entropy import linear_cross_entropy_func

    return with_margin(linear_cross_entropy_func(*_scaled_units(features, weight), None, labels, reduction="none"))


# Rows of `inputs` made at a time, a multiple of four: nothing C x D but the table itself.
CHUNK = 2**18


def inputs(num_rows, num_classes, size, device="cpu", dtype=torch.float32, seed=0):
    """(features (N, D) float32, weight (C, D) in dtype, labels (N,)), classes in groups of four at cosine 0.8.

    Each row has three hard negatives, at the cosine of its target: negatives that matter, as in training.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def units(*shape):
        return F.normalize(torch.randn(*shape, generator=generator, device=device))

    def near(directions):
        return units(*directions.shape).mul_(0.2**0.5).add_(directions, alpha=0.8**0.5)

    labels = torch.randint(num_classes, (num_rows,), generator=generator, device=device)
    weight = torch.empty(num_classes, size, device=device, dtype=dtype)
    directions = torch.empty(num_rows, size, device=device)
    for start in range(0, num_classes, CHUNK):
        stop = min(start + CHUNK, num_classes)
        groups = units(-(-(stop - start) // 4), size)
        weight[start:stop] = near(groups.repeat_interleave(4, 0)[: stop - start])
        inside = ((labels >= start) & (labels < stop))[:, None]
        directions = torch.where(inside, groups[((labels - start) // 4).clamp(0, len(groups) - 1)], directions)
    return near(directions).requires_grad_(), weight.requires_grad_(), labels


def step(function, features, weight, labels, *bias):
    """(loss, dX, dW) of one forward and backward, and db if there is a bias."""
    loss = function(features, weight, labels, *bias)
    return loss.detach(), *torch.autograd.grad(loss, (features, weight, *bias))
