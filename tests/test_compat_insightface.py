"""Do InsightFace's margin objects, of every release, become heads that compute the same, and are others refused?

The classes here compute what theirs do (recognition/arcface_torch/losses.py, from 2020 to today), and have the same attributes:
called with cosines (N, C) and labels (N,), -1 for none, they write into the cosines and return s times them.
"""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import evaluate, make
from rounding import NUM_CLASSES, SIZE, assert_close, draw, tolerance

from cosface_kernels import FusedSGD, MarginSoftmaxLoss
from cosface_kernels.compat import insightface
from cosface_kernels.margins import ArcFace, Combined, CosFace, InterclassFiltering

pytestmark = pytest.mark.usefixtures("small_slabs")


def targets_of(cosines, labels):
    rows = torch.where(labels != -1)[0]
    return rows, labels[rows].view(-1)


def with_threshold(cosine, margin):
    """cos(θ + m) by the addition theorem, continued linearly below cos(π - m), or unchanged below 0."""
    bent = cosine * margin.cos_m - (1 - cosine**2).sqrt() * margin.sin_m
    if margin.easy_margin:
        return torch.where(cosine > 0, bent, cosine)
    return torch.where(cosine > margin.theta, bent, cosine - margin.sinmm)


def straight_through(cosines, where, m):
    with torch.no_grad():
        cosines[where] = torch.cos(torch.acos(cosines[where]) + m)
    return cosines


def constants(margin, m):
    margin.cos_m, margin.sin_m = math.cos(m), math.sin(m)
    margin.theta, margin.sinmm, margin.easy_margin = math.cos(math.pi - m), math.sin(math.pi - m) * m, False


class Named:
    """A class of this module under InsightFace's name for it."""

    def __init_subclass__(cls, name, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.__name__ = name


class CosFaceToday(torch.nn.Module, Named, name="CosFace"):
    def __init__(self, s=64.0, m=0.40):
        super().__init__()
        self.s, self.m = s, m

    def forward(self, cosines, labels):
        where = targets_of(cosines, labels)
        cosines[where] = cosines[where] - self.m
        return cosines * self.s


class CosFace2020(CosFaceToday, name="CosFace"):
    def forward(self, cosines, labels):
        rows, classes = targets_of(cosines, labels)
        hot = torch.zeros(len(rows), cosines.shape[1], device=cosines.device)  # float32, whatever the cosines are
        hot.scatter_(1, classes[:, None], self.m)
        cosines[rows] -= hot
        return cosines * self.s


class ArcFaceToday(torch.nn.Module, Named, name="ArcFace"):
    def __init__(self, s=64.0, margin=0.5):
        super().__init__()
        self.scale = s
        constants(self, margin)

    def forward(self, cosines, labels):
        where = targets_of(cosines, labels)
        cosines[where] = with_threshold(cosines[where], self)
        return cosines * self.scale


class ArcFace2022(ArcFaceToday, name="ArcFace"):
    def __init__(self, s=64.0, margin=0.5):
        super().__init__(s, margin)
        self.s, self.margin = s, margin
        del self.scale

    def forward(self, cosines, labels):
        return straight_through(cosines, targets_of(cosines, labels), self.margin) * self.s


class ArcFace2020(torch.nn.Module, Named, name="ArcFace"):
    def __init__(self, s=64.0, m=0.5):
        super().__init__()
        self.s, self.m = s, m

    def forward(self, cosines, labels):
        rows, classes = targets_of(cosines, labels)
        hot = torch.zeros(len(rows), cosines.shape[1], device=cosines.device)
        hot.scatter_(1, classes[:, None], self.m)
        cosines.acos_()
        cosines[rows] += hot
        return cosines.cos_().mul_(self.s)


class CombinedToday(torch.nn.Module, Named, name="CombinedMarginLoss"):
    def __init__(self, s, m1, m2, m3, interclass_filtering_threshold=0):
        super().__init__()
        self.s, self.m1, self.m2, self.m3 = s, m1, m2, m3
        self.interclass_filtering_threshold = interclass_filtering_threshold
        constants(self, m2)

    def forward(self, cosines, labels):
        where = targets_of(cosines, labels)
        if self.m1 == 1.0 and self.m3 == 0.0:
            return self.angular(cosines, where) * self.s
        if self.m3 > 0:
            cosines[where] = cosines[where] - self.m3
            return cosines * self.s
        raise RuntimeError("No active exception to reraise")  # a bare raise, there

    def angular(self, cosines, where):
        cosines[where] = with_threshold(cosines[where], self)
        return cosines


class CombinedStraightThrough(CombinedToday, name="CombinedMarginLoss"):
    def angular(self, cosines, where):
        return straight_through(cosines, where, self.m2)


def easy(margin_loss):
    margin_loss.easy_margin = True
    return margin_loss


OBJECTS = {
    "CosFace": (CosFaceToday(), CosFace(0.4), 64),
    "CosFace, 2020": (CosFace2020(30.0, 0.35), CosFace(0.35), 30),
    "ArcFace": (ArcFaceToday(), ArcFace(0.5), 64),
    "ArcFace, easy": (easy(ArcFaceToday(32.0, 0.3)), ArcFace(0.3, easy_margin=True), 32),
    "ArcFace, beyond a right angle": (ArcFaceToday(32.0, 1.8), ArcFace(1.8), 32),
    "ArcFace, beyond a right angle, easy": (easy(ArcFaceToday(32.0, 1.8)), ArcFace(1.8, easy_margin=True), 32),
    "ArcFace, no margin": (ArcFaceToday(32.0, 0.0), ArcFace(0.0), 32),
    "ArcFace, 2022": (ArcFace2022(margin=0.4), ArcFace(0.4, gradient="straight_through"), 64),
    "ArcFace, 2020": (ArcFace2020(m=0.45), ArcFace(0.45), 64),
    "Combined, ArcFace": (CombinedToday(64, 1.0, 0.5, 0.0), ArcFace(0.5), 64),
    "Combined, easy": (easy(CombinedToday(64, 1.0, 0.5, 0.0)), ArcFace(0.5, easy_margin=True), 64),
    "Combined, straight": (CombinedStraightThrough(64, 1.0, 0.5, 0.0), ArcFace(0.5, gradient="straight_through"), 64),
    "Combined, straight, easy ignored": (
        easy(CombinedStraightThrough(64, 1.0, 0.5, 0.0)),
        ArcFace(0.5, gradient="straight_through"),
        64,
    ),
    "Combined, CosFace": (CombinedToday(64, 1.0, 0.0, 0.4), CosFace(0.4), 64),
    "Combined, CosFace, 2022": (CombinedStraightThrough(32, 1.0, 0.0, 0.35), CosFace(0.35), 32),
}


def same(margin, wanted):
    """Equal but for a margin that went through cos, sin and back."""
    assert type(margin) is type(wanted)
    for name, value in vars(wanted).items():
        got = getattr(margin, name)
        assert abs(got - value) <= 4 * torch.finfo(torch.float64).eps if isinstance(value, float) else got == value
    return True


@pytest.mark.parametrize("which", OBJECTS)
def test_translate(which):
    margin_loss, wanted, scale = OBJECTS[which]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        margin, s = insightface.translate(margin_loss)
    assert same(margin, wanted) and s == scale


def plain(margin_loss):
    """Theirs, N x C, over the rows that have a class; its loss is not capped."""

    def loss(x, w, y):
        x, y = x[y != -1], y[y != -1]
        cosines = F.normalize(x) @ F.normalize(w).T
        return F.cross_entropy(margin_loss(cosines, y), y)

    return loss


@pytest.mark.parametrize("which", [which for which in OBJECTS if "beyond" not in which])
def test_head_computes_the_same(which, device):
    margin_loss, _, scale = OBJECTS[which]
    features, weight, labels = draw(device, num_rows=24)
    labels[[3, 17]] = -1
    features[3] = torch.nan
    counted = labels != -1
    theta = F.cosine_similarity(features[counted], weight[labels[counted]]).acos()
    assert (theta > math.pi / 2).any() and (theta < math.pi / 2).any()
    assert (theta + 0.5 <= math.pi).all(), "a release without a threshold rises again there"
    head = insightface.head(margin_loss, SIZE, NUM_CLASSES).to(device, torch.float64)
    assert isinstance(head, MarginSoftmaxLoss) and head.ignore_index == -1
    upstream = torch.ones((), device=device)

    def ours(x, w, y):
        head._parameters["weight"] = w
        return head(x, y)

    results = evaluate(ours, features, weight, labels, upstream)
    # |ψ'| and |ψ''| multiply a rounding of cos θ; two of theirs hold the margin in float32, off by a rounding of it, times s.
    bend = 1 + 1 / theta.sin().min() ** 3
    held = torch.finfo(torch.float32).eps if "2020" in which else 0.0
    relative = (tolerance(torch.float64, scale) + scale * held) * bend
    exact = evaluate(plain(margin_loss), features, weight, labels, upstream)
    assert not results[1][~counted].any()
    for what, got, wanted in zip(("loss", "dX", "dW"), results, exact, strict=True):
        keep = counted if what == "dX" else slice(None)
        assert_close(got if what == "loss" else got[keep], wanted if what == "loss" else wanted[keep], relative, what)


@pytest.mark.parametrize("m1", [1.0, 1.2])
def test_a_dropped_margin_is_composed(m1):
    with pytest.warns(UserWarning, match=r"drops m1 and m2.*computes CosFace\(m=0.2\).*Combined\(m1=.*m2=0.3"):
        margin, scale = insightface.translate(CombinedToday(64, m1, 0.3, 0.2))
    assert (margin, scale) == (Combined(m1, 0.3, 0.2), 64)


class Composed(CombinedToday, name="CombinedMarginLoss"):
    """A copy that was put right."""

    def forward(self, cosines, labels):
        where = targets_of(cosines, labels)
        cosines[where] = torch.cos(self.m1 * torch.acos(cosines[where]) + self.m2) - self.m3
        return cosines * self.s


def test_a_composed_one_needs_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert insightface.translate(Composed(64, 1.1, 0.3, 0.2)) == (Combined(1.1, 0.3, 0.2), 64)


def test_options_reach_the_head():
    head = insightface.head(CosFaceToday(), 3, 5, reduction="sum", ignore_index=4)
    assert (head.reduction, head.ignore_index, head.scale) == ("sum", 4, 64)


class Otherwise(CosFaceToday, name="CosFace"):
    def forward(self, cosines, labels):
        return self.changed(cosines, labels, super().forward)


class TwiceTheMargin(Otherwise, name="CosFace"):
    def changed(self, cosines, labels, forward):
        return forward(forward(cosines, labels) / self.s, labels)


class FilteredNegatives(Otherwise, name="CosFace"):
    def changed(self, cosines, labels, forward):
        return forward(torch.where(cosines > 0.5, 0.0, cosines), labels)


class NoGradient(Otherwise, name="CosFace"):
    def changed(self, cosines, labels, forward):
        return forward(cosines.detach(), labels) + 0 * cosines


class NormAware(Otherwise, name="CosFace"):
    def changed(self, cosines, labels, forward):
        return forward(cosines, labels, norms=None)


@pytest.mark.parametrize(
    "margin_loss", [TwiceTheMargin(), FilteredNegatives(), NoGradient()], ids=lambda loss: type(loss).__qualname__
)
def test_something_else(margin_loss):
    with pytest.raises(ValueError, match=r"CosFace computes something else than scale 64.0 and CosFace\(m=0.4\)"):
        insightface.translate(margin_loss)


@pytest.mark.parametrize("margin_loss", [NormAware(), CombinedToday(64, 1.35, 0.0, 0.0)], ids=["TypeError", "bare raise"])
def test_one_that_raises(margin_loss):
    with pytest.raises(ValueError, match="raises when called on cosines"):
        insightface.translate(margin_loss)


def test_filtering_is_refused_by_name():
    with pytest.raises(ValueError, match=r"interclass_filtering_threshold.*0\.4"):
        insightface.head(CombinedToday(64, 1.0, 0.0, 0.4, 0.4), 3, 5)


def test_filtering_as_negatives(device):
    """The same loss from a head of theirs, filtered as `CombinedMarginLoss` does it, and from our PartialFC_V2."""
    features, _, labels = (tensor.to(device) for tensor in make("uniform", 9, 30, 3))
    head = insightface.head(CombinedToday(64, 1.0, 0.0, 0.4), 3, 30, negatives=InterclassFiltering(0.4), device=device)
    module = insightface.PartialFC_V2(CombinedToday(64, 1.0, 0.0, 0.4), 3, 30).to(device)
    module.weight.data.copy_(head.weight)
    module.negatives = InterclassFiltering(0.4)
    cosines = F.linear(*(F.normalize(each).double() for each in (features, head.weight)))
    others = torch.ones_like(cosines, dtype=torch.bool).scatter(1, labels[:, None], False)
    filtered = torch.where(others & (cosines > 0.4), 0.0, cosines)
    exact = F.cross_entropy(CombinedToday(64, 1.0, 0.0, 0.4)(filtered, labels), labels)
    loss, statistics = module(features, labels[:, None], return_statistics=True)
    assert torch.equal(loss, head(features, labels)) and statistics.correct.shape == (9,)
    torch.testing.assert_close(loss.double(), exact, rtol=100 * 2**-23, atol=0)


def test_unknown_kinds():
    with pytest.raises(TypeError, match="ArcFace, CombinedMarginLoss or CosFace, got Linear"):
        insightface.translate(torch.nn.Linear(3, 3))
    forgotten = CosFaceToday()
    del forgotten.s
    with pytest.raises(ValueError, match="no attribute s or scale"):
        insightface.translate(forgotten)


def test_the_object_is_left_alone():
    margin_loss = CombinedToday(64, 1.0, 0.5, 0.0)
    before = dict(vars(margin_loss))
    insightface.translate(margin_loss)
    assert vars(margin_loss) == before


@pytest.mark.parametrize("set_later", [False, True])
def test_a_sampled_partial_fc_trains_with_a_fused_optimiser(set_later):
    """Rows of classes that took no part stay; torch.optim gets a dense gradient."""
    module = insightface.PartialFC_V2(CosFaceToday(64.0, 0.4), 8, 50, sample_rate=1.0 if set_later else 0.2)
    module.sample_rate = 0.2
    assert "sample_step" not in module.state_dict()
    features, labels, before = torch.randn(4, 8), torch.arange(4), module.weight.detach().clone()
    module(features, labels).backward()
    assert not module.weight.grad.is_sparse and 4 <= module.weight.grad.any(1).sum() <= 10
    module.weight.grad = None
    optimizer = FusedSGD(module.parameters(), lr=0.1)
    module(features, labels).backward()
    optimizer.step()
    moved = (module.weight != before).any(1)
    assert moved[labels].all() and moved.sum() <= 10
