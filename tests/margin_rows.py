"""Every margin, one row each: the margin, its formula written out from its paper, and what is known of the shape of its ψ.

A new margin is one row of ROWS: test_margins.py, test_margin_modules.py and test_digits.py then run on it. Nothing here calls the
package but to name the margin: N x C logits in plain PyTorch, θ from an arc cosine, or cos mθ from its polynomial.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from rounding import NUM_CLASSES, SIZE
from selection import slow_when

from cosface_kernels.margins import (
    AdaFace,
    ArcFace,
    Combined,
    CosFace,
    LSoftmax,
    MagFace,
    Margin,
    NormSoftmax,
    Softmax,
    SphereFace,
)

PI = math.pi


class Row(NamedTuple):
    margin: Margin
    psi: Callable  # (θ (N,), ‖x‖ (N,), running statistics) -> ψ (N,), differentiable as its paper or its docstring says
    ends: tuple[float, float]  # ψ(0) and ψ(π), where ‖x‖ is norms[0]
    lipschitz: float = 1.0  # of ψ(θ) between its jumps, and of its dependence on ‖x‖
    jumps: Callable = lambda norm: {}  # ‖x‖ -> {θ: by how much ψ rises there}
    norms: tuple = (0.5, 1.0, 2.0, 3.0)  # the ‖x‖ to test with, in turn
    raw: str = ""  # what is not divided by its norm: "features", or "features and weight"
    centers: int = 1
    bias: bool = False
    penalty: Callable = lambda norm: 0 * norm  # (N,) -> what is added to each loss
    state: Mapping = MappingProxyType({})  # the first running statistics
    advance: Callable = lambda state, norm: state  # (them, ‖x‖ of the counted rows) -> them in the next training step
    exact: bool = True  # the gradient is that of the loss; False: by its docstring it is another one
    digits: Margin | None = None  # what to train the digits with in its place, where that is too small a problem for it

    @property
    def options(self):
        """Options of margin_softmax_loss and MarginSoftmaxLoss for this row. Margins that leave the weight raw imply that."""
        return {"centers_per_class": self.centers, **({"normalize_features": False} if self.raw == "features" else {})}

    @property
    def scale(self):
        return 1.0 if self.raw else 64.0


def arcface(theta, m):
    return torch.where(theta <= PI - m, (theta + m).cos(), theta.cos() - m * math.sin(m))


def arcface_jump(m):
    return {PI - m: 1 - math.cos(m) - m * math.sin(m)}


def arcface_easy(theta, m):
    return torch.where(theta < PI / 2, (theta + m).cos(), theta.cos())


def straight_through(theta, m):
    """∂ψ/∂cos θ = 1."""
    return theta.cos() + (arcface(theta, m) - theta.cos()).detach()


def sphereface_2(theta):
    """cos 2θ = 2 cos²θ - 1, continued past π/2."""
    cos = theta.cos()
    return torch.where(theta <= PI / 2, 2 * cos**2 - 1, 1 - 2 * cos**2 - 2)


def sphereface_4(theta):
    """cos 4θ = 8 cos⁴θ - 8 cos²θ + 1, continued past π/4, π/2 and 3π/4."""
    cos, k = theta.cos(), (theta[:, None] > PI / 4 * torch.arange(1, 4).to(theta)).sum(1)
    return (-1.0) ** k * (8 * cos**4 - 8 * cos**2 + 1) - 2 * k


def annealed(theta, step):
    weight = max(5.0, 1000.0 / (1 + 0.12 * step))
    return (weight * theta.cos() + sphereface_4(theta)) / (1 + weight)


def continued_once(angle):
    """cos(angle) up to π, and -cos(angle) - 2 up to 2π."""
    return torch.where(angle <= PI, angle.cos(), -angle.cos() - 2)


def adaface_statistics(norm):
    """(mean, standard deviation) of a batch."""
    norm = norm.detach().clip(1e-3, 100)
    return norm.mean(), norm.std() if len(norm) > 1 else norm.new_zeros(())


def adaface(theta, norm, state, h=0.333):
    mean, std = (state["batch_mean"], state["batch_std"]) if state else adaface_statistics(norm)
    quality = (h * (norm.detach().clip(1e-3, 100) - mean) / (std + 1e-3)).clip(-1, 1)
    return (theta - 0.4 * quality).clip(1e-3, PI - 1e-3).cos() - (0.4 + 0.4 * quality)


def adaface_advance(state, norm):
    mean, std = adaface_statistics(norm)
    return {
        "batch_mean": 0.01 * mean + 0.99 * state["batch_mean"],
        "batch_std": 0.01 * std + 0.99 * state["batch_std"],
    }


def magface_margin(norm):
    """From 0.45 at ‖x‖ = 10 to 0.8 at 110, and level outside."""
    return 0.45 + 0.35 * (torch.as_tensor(norm, dtype=torch.float64).clip(10, 110) - 10) / 100


def magface(theta, norm):
    m = magface_margin(norm).to(theta.dtype)
    return torch.where(theta <= PI - m, (theta + m).cos(), theta.cos() - m * m.sin())


def magface_penalty(norm):
    a = norm.clip(10, 110)
    return 35 * (1 / a + a / 110**2)


# Below, between and above the ends of 10 and 110; AdaFace's quality -1, within (-1, 1), and 1 beyond its clip of 100.
MAGFACE_NORMS, ADAFACE_NORMS = (5.0, 30.0, 60.0, 100.0, 150.0), (0.5, 18.0, 24.0, 150.0)
ARCFACE_ENDS = math.cos(0.5), -1 - 0.5 * math.sin(0.5)

ROWS = {
    "CosFace": Row(CosFace(0.35), lambda t, *_: t.cos() - 0.35, (0.65, -1.35)),
    "CosFace 0": Row(CosFace(0), lambda t, *_: t.cos(), (1, -1)),
    "CosFace raw": Row(CosFace(0.35), lambda t, *_: t.cos() - 0.35, (0.65, -1.35), raw="features"),
    "NormSoftmax": Row(NormSoftmax(), lambda t, *_: t.cos(), (1, -1)),
    "ArcFace": Row(ArcFace(0.5), lambda t, *_: arcface(t, 0.5), ARCFACE_ENDS, jumps=lambda _: arcface_jump(0.5)),
    "ArcFace raw": Row(
        ArcFace(0.5), lambda t, *_: arcface(t, 0.5), ARCFACE_ENDS, jumps=lambda _: arcface_jump(0.5), raw="features"
    ),
    "ArcFace x3": Row(ArcFace(0.5), lambda t, *_: arcface(t, 0.5), ARCFACE_ENDS, jumps=lambda _: arcface_jump(0.5), centers=3),
    "ArcFace easy": Row(
        ArcFace(0.5, easy_margin=True),
        lambda t, *_: arcface_easy(t, 0.5),
        (math.cos(0.5), -1),
        jumps=lambda _: {PI / 2: math.sin(0.5)},
    ),
    "ArcFace straight-through": Row(
        ArcFace(0.5, gradient="straight_through"),
        lambda t, *_: straight_through(t, 0.5),
        ARCFACE_ENDS,
        jumps=lambda _: arcface_jump(0.5),
        exact=False,
    ),
    "SphereFace 4": Row(SphereFace(4), lambda t, *_: sphereface_4(t), (1, -7), 4),
    "SphereFace 4 raw": Row(SphereFace(4), lambda t, *_: sphereface_4(t), (1, -7), 4, raw="features"),
    "SphereFace 4 raw x3": Row(SphereFace(4), lambda t, *_: sphereface_4(t), (1, -7), 4, raw="features", centers=3),
    "SphereFace 1.35": Row(
        SphereFace(1.35), lambda t, *_: continued_once(1.35 * t), (1, -math.cos(1.35 * PI) - 2), lipschitz=1.35
    ),
    "SphereFace annealed": Row(
        SphereFace(4, annealing=True),
        lambda t, _, state: annealed(t, state.get("step", 0)),
        (1, (-1000 - 7) / 1001),
        lipschitz=1004 / 1001,
        state={"step": 0},
        advance=lambda state, _: {"step": state["step"] + 1},
    ),
    "Combined 1.1": Row(
        Combined(1.1, 0.3, 0.2),
        lambda t, *_: continued_once(1.1 * t + 0.3) - 0.2,
        (math.cos(0.3) - 0.2, -math.cos(1.1 * PI + 0.3) - 2.2),
        lipschitz=1.1,
    ),
    "Combined 0.9": Row(
        Combined(0.9, 0.4, 0.15),
        lambda t, *_: continued_once(0.9 * t + 0.4) - 0.15,
        (math.cos(0.4) - 0.15, -math.cos(0.9 * PI + 0.4) - 2.15),
    ),
    "AdaFace": Row(
        AdaFace(),
        adaface,
        (math.cos(0.4), -math.cos(1e-3)),
        norms=ADAFACE_NORMS,
        state={"batch_mean": 20.0, "batch_std": 100.0},
        advance=adaface_advance,
    ),
    "AdaFace x3": Row(
        AdaFace(),
        adaface,
        (math.cos(0.4), -math.cos(1e-3)),
        norms=ADAFACE_NORMS,
        state={"batch_mean": 20.0, "batch_std": 100.0},
        advance=adaface_advance,
        centers=3,
    ),
    "MagFace": Row(
        MagFace(),
        lambda t, norm, _: magface(t, norm),
        (math.cos(0.45), -1 - 0.45 * math.sin(0.45)),
        jumps=lambda norm: arcface_jump(magface_margin(norm).item()),
        norms=MAGFACE_NORMS,
        penalty=magface_penalty,
        digits=MagFace(l_a=1.0, u_a=30.0, lambda_g=2.0),  # for features of norm 2 to 5
    ),
    "MagFace easy": Row(
        MagFace(easy_margin=True),
        lambda t, norm, _: arcface_easy(t, magface_margin(norm).to(t.dtype)),
        (math.cos(0.45), -1),
        jumps=lambda norm: {PI / 2: magface_margin(norm).sin().item()},
        norms=MAGFACE_NORMS,
        penalty=magface_penalty,
        digits=MagFace(l_a=1.0, u_a=30.0, lambda_g=2.0, easy_margin=True),
    ),
    "Softmax": Row(Softmax(), lambda t, *_: t.cos(), (1, -1), raw="features and weight"),
    "Softmax bias": Row(Softmax(), lambda t, *_: t.cos(), (1, -1), raw="features and weight", bias=True),
    "Softmax bias x3": Row(Softmax(), lambda t, *_: t.cos(), (1, -1), raw="features and weight", bias=True, centers=3),
    "LSoftmax 2": Row(LSoftmax(2), lambda t, *_: sphereface_2(t), (1, -3), 2, raw="features and weight"),
    "LSoftmax 4": Row(
        LSoftmax(4),
        lambda t, *_: sphereface_4(t),
        (1, -7),
        4,
        raw="features and weight",
        digits=LSoftmax(4, annealing=True),  # from logits near 0 it needs some 500 steps otherwise
    ),
    "LSoftmax 2 x3": Row(LSoftmax(2), lambda t, *_: sphereface_2(t), (1, -3), 2, raw="features and weight", centers=3),
}


every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
# For what is the same for all numbers of a margin: the first row of each kind, one with a bias, one with several centres.
KINDS = [*{type(row.margin): name for name, row in reversed(ROWS.items())}.values(), "Softmax bias", "ArcFace x3"]
every_kind = pytest.mark.parametrize("row", [ROWS[name] for name in KINDS], ids=KINDS)
# For what takes long: a constant margin, one with statistics, a raw table with a bias.
REPRESENTATIVES = [ROWS[name] for name in ("CosFace", "AdaFace", "Softmax bias")]
slow_but_three = slow_when(lambda row: row not in REPRESENTATIVES)


def written_out(row, features, weight, labels, bias=None, *, scale=None, reduction="mean", state=None, **options):
    """The loss of a row of the table with all its N x C logits, in the dtype of the features; rows labelled -100 are left out.

    options: of F.cross_entropy.
    """
    counted = labels != -100
    x, y = features[counted], labels[counted, None]
    norm = x.norm(dim=1)
    table = weight if "weight" in row.raw else weight / weight.norm(dim=1, keepdim=True)
    products = (x if "features" in row.raw else x / norm[:, None]) @ table.T
    products = products if bias is None else products + bias
    logits, nearest = products.unflatten(1, (-1, row.centers)).max(2)
    # The target's logit: ‖x̃‖ ‖w̃‖ ψ(θ), + b.
    target = y * row.centers + nearest.gather(1, y)
    length = (norm if "features" in row.raw else 1.0) * table.norm(dim=1)[target[:, 0]]
    own_bias = 0.0 if bias is None else bias[target[:, 0]]
    cosine = (logits.gather(1, y)[:, 0] - own_bias) / length
    own = length * row.psi(cosine.clamp(-1, 1).acos(), norm, state or {}) + own_bias
    logits = logits.scatter(1, y, own[:, None].to(logits.dtype))
    scale = row.scale if scale is None else scale
    losses = F.cross_entropy(scale * logits, y[:, 0], reduction="none", **options) + row.penalty(norm)
    if reduction == "none":
        return losses.new_zeros(len(labels)).masked_scatter(counted, losses)
    return losses.mean() if reduction == "mean" else losses.sum()


def steepness(row, features, weight):
    """The largest derivative of a logit, or of its gradient, by an angle: a scale as `tolerance` wants it."""
    length = features.nan_to_num().norm(dim=1).max().item() if "features" in row.raw else 1.0
    length *= weight.norm(dim=1).max().item() if "weight" in row.raw else 1.0
    return row.scale * length * max(1, row.lipschitz) ** 2


def batch(row, device="cpu", *, num_rows=12, num_classes=NUM_CLASSES, dtype=torch.float64, seed=0, angles=(0.2, 2.9)):
    """(features, weight, labels[, bias]): targets at angles over all of (0, π), so on every branch of ψ, and norms in turn."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, labels = normal(num_classes * row.centers, SIZE), torch.randint(num_classes, (num_rows,), generator=generator)
    direction = F.normalize(weight[labels * row.centers])
    noise = normal(num_rows, SIZE)
    noise = F.normalize(noise - direction * (noise * direction).sum(1, keepdim=True))
    theta = torch.linspace(*angles, num_rows, dtype=torch.float64)[:, None]
    norms = torch.tensor([row.norms[n % len(row.norms)] for n in range(num_rows)], dtype=torch.float64)[:, None]
    features = norms * (theta.cos() * direction + theta.sin() * noise)
    bias = (normal(len(weight)).to(device, dtype),) if row.bias else ()
    return features.to(device, dtype), weight.to(device, dtype), labels.to(device), *bias
