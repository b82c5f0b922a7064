"""Each feature of docs/features.md in a tiny case, on each axis of its table, against N x C logits in float64.

`outcome` is "yes" where the loss and every gradient, or a fused optimiser's step, are those of the formula, "no" where the
package refuses with an error of its own; anything else raises.
"""

import itertools
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from margin_rows import ROWS
from rounding import SIZE, assert_close, tolerance

import cosface_kernels
from cosface_kernels import FusedSGD, MarginSoftmaxLoss, ShardedMarginSoftmaxLoss, margins
from cosface_kernels.heads import float8

PACKAGE = Path(cosface_kernels.__file__).parent
DOCUMENT = PACKAGE.parent / "docs" / "features.md"
AXES = ("shards", "sampling", "fused optimisers", "torch.compile", "torch", "cpu", "triton")
NUM_ROWS, NUM_CLASSES, SCALE = 6, 8, 16.0
STEEPEST = 4.0  # of a changed negative, or of ψ at these angles
BY_CLASS, BY_ROW = torch.linspace(0.1, 0.4, NUM_CLASSES), torch.linspace(0.0, 0.5, NUM_ROWS)
CLASS_WEIGHT = torch.linspace(0.5, 2.0, NUM_CLASSES)
SHARES = torch.tensor([[0.7, 0.3]]).repeat(NUM_ROWS, 1)
HARD_CLASSES = (torch.arange(NUM_CLASSES)[:, None] + torch.tensor([1, 3])) % NUM_CLASSES


@dataclass(frozen=True)
class Even(margins.Margin):
    """A margin for classes of even numbers alone."""

    m: float | torch.Tensor = 0.0

    def for_labels(self, labels):
        return Even(torch.where(labels % 2 == 0, 0.3, 0.0))

    def psi(self, cosine):
        return cosine - self.m


@dataclass(frozen=True)
class PerRow(margins.Margin):
    m: float | torch.Tensor = 0.0

    def psi(self, cosine):
        return cosine - self.m


class Feature(NamedTuple):
    options: Mapping = MappingProxyType({})  # of MarginSoftmaxLoss
    plain: Mapping = MappingProxyType({})  # what they mean, of `plain` below
    before: Callable = lambda head, mine, call: None  # ahead of the call; mine: this rank's rows of a tensor
    call: Mapping = MappingProxyType({})  # what a call has beside features and labels
    optimizer: dict | None = None  # options of the FusedSGD that it is a part of, or that it needs
    is_sampled: bool = False


def arcface(m):
    return lambda cosine, norm, labels: (cosine.clamp(-1, 1).acos() + m).cos()


def adaface(cosine, norm, labels):
    """With the statistics of the first training step."""
    row = ROWS["AdaFace"]
    return row.psi(cosine.clamp(-1, 1).acos(), norm, row.advance(dict(row.state), norm[:, 0]))


def beyond(threshold, change):
    """Negatives of which those beyond threshold(target before and after the margin, the other cosines) are changed."""
    return lambda cosines, own, target, others: torch.where(
        cosines > threshold(own, target, others), change(cosines, own), cosines
    )


def set_rows(head, mine, call):
    head.margin = PerRow(mine(BY_ROW))


def move(head, mine, call):
    head.eval()  # no statistics move
    call()
    head.train()
    head.margin, head.scale = margins.ArcFace(0.3), 12.0


def parametrize(head, mine, call):
    torch.nn.utils.parametrizations.weight_norm(head, "weight", dim=0)


def weight_norm(weight):
    """As a function of its direction alone."""
    return F.normalize(weight) * weight.detach().norm(dim=1, keepdim=True)


def _cosines(cosine, norm, labels):
    return cosine


FEATURES = {
    "numbers by class": Feature(
        {"margin": margins.CosFace(BY_CLASS)}, {"psi": lambda cosine, norm, labels: cosine - BY_CLASS.double()[labels]}
    ),
    "margins that see the labels": Feature(
        {"margin": Even()}, {"psi": lambda cosine, norm, labels: cosine - 0.3 * (labels % 2 == 0)}
    ),
    "a number for each row": Feature(
        {"margin": PerRow()}, {"psi": lambda cosine, norm, labels: cosine - BY_ROW.double()[:, None]}, before=set_rows
    ),
    "margins of ‖x‖": Feature({"margin": margins.AdaFace()}, {"psi": adaface}),
    "head.margin, head.scale that move": Feature(
        {"margin": margins.ArcFace(0.1)}, {"psi": arcface(0.3), "scale": 12.0}, before=move
    ),
    "a learnt scale": Feature({"learnable_scale": True}),
    "label_smoothing": Feature({"label_smoothing": 0.1}, {"smoothing": 0.1}),
    "class_weight": Feature({"class_weight": CLASS_WEIGHT}, {"class_weight": CLASS_WEIGHT}),
    "CurricularFace": Feature(
        {"negatives": margins.CurricularFace(0.5)},
        {"negatives": beyond(lambda own, target, others: target, lambda c, own: c * (0.5 * own.mean() + c))},
    ),
    "MVSoftmax": Feature(
        {"negatives": margins.MVSoftmax(1.2)},
        {"negatives": beyond(lambda own, target, others: target, lambda c, own: 1.2 * c + 0.2)},
    ),
    "InterTopK": Feature(
        {"negatives": margins.InterTopK(2, 0.1)},
        {"negatives": beyond(lambda own, target, others: others.topk(3, 1).values[:, 2:], lambda c, own: c + 0.1)},
    ),
    "InterclassFiltering": Feature(
        {"negatives": margins.InterclassFiltering(0.2)},
        {"negatives": beyond(lambda own, target, others: 0.2, lambda c, own: 0.0 * c)},
    ),
    "several classes to a row": Feature(plain={"shares": SHARES}, call={"label_weights": SHARES}),
    "return_statistics": Feature(call={"return_statistics": True}),
    "hard classes": Feature(
        {"sample_rate": 0.9, "hard_classes": HARD_CLASSES, "sample_correction": True}, optimizer={}, is_sampled=True
    ),
    "float8": Feature({"table_format": "float8"}, optimizer={}),
    "sub-centres": Feature({"centers_per_class": 3}, {"centers": 3}),
    "features as they are": Feature({"normalize_features": False, "scale": 1.0}, {"raw": "features", "scale": 1.0}),
    "a bias": Feature(
        {"margin": margins.Softmax(), "bias": True, "scale": 0.5}, {"psi": _cosines, "raw": "features and table", "scale": 0.5}
    ),
    "max_row_norm": Feature(optimizer={"max_row_norm": 0.05}),
    "weight_norm": Feature(plain={"table": weight_norm}, before=parametrize),
}


def inputs(centers=1):
    """(features, weight, bias, labels (N, 2)) in float64, the first of each row's classes its own."""
    generator = torch.Generator().manual_seed(0)
    features, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((NUM_ROWS, SIZE), (NUM_CLASSES * centers, SIZE), (NUM_CLASSES * centers,))
    )
    labels = torch.tensor([3, 0, 3, 6, 5, 1])
    return features, weight, bias, torch.stack([labels, (labels + 2) % NUM_CLASSES], 1)


def cosface(cosine, norm, labels):
    return cosine - 0.2


def plain(
    features,
    weight,
    bias,
    labels,
    *,
    scale=SCALE,
    psi=cosface,
    negatives=None,
    smoothing=0.0,
    class_weight=None,
    shares=None,
    centers=1,
    raw="",
    table=lambda weight: weight,
    kept=None,
    correction=None,
):
    """(the mean loss, products (N, M) of features and table before all changes); kept (M,): the classes that take part."""
    kept = torch.arange(NUM_CLASSES) if kept is None else kept
    norm = features.norm(dim=1, keepdim=True)
    rows = (kept[:, None] * centers + torch.arange(centers)).flatten()
    weight = table(weight)[rows]
    products = (features if raw else features / norm) @ (weight if "table" in raw else F.normalize(weight)).T
    products = products if bias is None else products + bias[rows]
    products = products.unflatten(1, (-1, centers)).amax(2)
    labels = labels[:, :1] if shares is None else labels
    place, length = torch.searchsorted(kept, labels.contiguous()), norm if raw == "features" else 1.0
    own = products.gather(1, place)
    target, cosines = length * psi(own / length, norm, labels), products
    if negatives is not None:
        others = products.detach().scatter(1, place, -torch.inf)
        cosines = negatives(products, own.detach(), target.detach(), others)
    logits = scale * cosines + (0.0 if correction is None else correction)
    logits = logits.scatter(1, place, scale * target)
    if shares is None:
        class_weight = None if class_weight is None else class_weight.double()[kept]
        return F.cross_entropy(logits, place[:, 0], weight=class_weight, label_smoothing=smoothing), products
    return (shares * (logits.logsumexp(1, keepdim=True) - logits.gather(1, place))).sum(1).mean(), products


def cells(title):
    """{feature: {column: cell}} of the table of the document whose first column has this title, without links."""
    lines = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", DOCUMENT.read_text()).replace("`", "").splitlines()
    table = itertools.takewhile(
        lambda line: line, lines[next(i for i, line in enumerate(lines) if line.startswith(f"| {title} |")) :]
    )
    (_, *columns), _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in table)
    return {name: dict(zip(columns, row, strict=True)) for name, *row in rows}


def can_be_together(one, other):
    """False for two values of one option."""
    return not _options(FEATURES[one]) & _options(FEATURES[other])


def _options(feature):
    return {*feature.options, *feature.plain, *(["margin"] if feature.before in (set_rows, move) else [])}


def outcome(names, axis, world=None):
    """Of one feature, or of several together, on an axis; world: sharded_world's, for shards."""
    try:
        ours = _Run([FEATURES[name] for name in names], axis, world)
        ours.make()
        ours.step()
    except Exception as error:
        if Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(PACKAGE):
            return f"no: {error}"
        raise
    ours.check()
    return "yes"


class _Run:
    """One call, backward, and step of a head."""

    def __init__(self, features, axis, world):
        self.features, self.axis, self.world = features, axis, world
        self.mine = (lambda rows: rows) if world is None else world.mine
        self.shard = (lambda rows: rows) if world is None else world.shard
        self.backend = axis if axis in ("cpu", "triton") else "torch"
        self.dtype = torch.float64 if self.backend == "torch" else torch.float32
        self.plain = {name: value for each in features for name, value in each.plain.items()}
        self.is_sampled = axis == "sampling" or any(each.is_sampled for each in features)
        self.optimizer_options = {name: value for each in features for name, value in (each.optimizer or {}).items()}
        needs_fused = any(each.optimizer is not None for each in features) or (world is not None and self.is_sampled)
        self.is_fused = needs_fused or axis == "fused optimisers"

    def make(self):
        options = {"margin": margins.CosFace(0.2), "scale": SCALE, "backend": self.backend, "dtype": self.dtype}
        options |= {"sample_rate": 0.9} if self.axis == "sampling" else {}
        options |= {name: value for each in self.features for name, value in each.options.items()}
        if "table_format" in options:
            del options["dtype"]
        kind = MarginSoftmaxLoss if self.world is None else ShardedMarginSoftmaxLoss
        options |= {} if self.world is None else {"ddp_average": False}
        self.head = head = kind(SIZE, NUM_CLASSES, **options)
        if self.dtype == torch.float64:  # what is float32 whatever the table is
            for name in head._states():
                setattr(head, name, getattr(head, name).double())
            if head._learns_scale():
                head.log_scale.data = head.log_scale.data.double()
        self.given = inputs(head.centers_per_class)
        with torch.no_grad():
            float8.put(_local(head.weight), head._row_scale(), slice(None), self.shard(self.given[1]))
            if head.bias is not None:
                _local(head.bias).copy_(self.shard(self.given[2]))
        self.x = self.mine(self.given[0]).to(self.dtype, copy=True).requires_grad_()
        self.drawn, sample = [], head._sample
        head._sample = lambda *arguments: self.drawn.append(sample(*arguments)) or self.drawn[-1]
        self.before = _rows(head)

    def step(self):
        head, call = self.head, {name: value for each in self.features for name, value in each.call.items()}
        labels = self.mine(self.given[3] if "label_weights" in call else self.given[3][:, 0])
        call |= {name: self.mine(value) for name, value in call.items() if isinstance(value, torch.Tensor)}
        trained = [each for each in (head.weight, head.bias) if each is not None]
        function = head
        if self.axis == "torch.compile":
            torch._dynamo.reset()
            function = torch.compile(head, backend="aot_eager", fullgraph=not self.is_fused)  # a record breaks the graph
        for each in self.features:
            each.before(head, self.mine, lambda: function(self.x, labels, **call))
        trained = trained if isinstance(head._parameters.get("weight"), torch.nn.Parameter) else [*head.parameters()]
        optimizer = FusedSGD(trained, lr=1.0, **self.optimizer_options) if self.is_fused else None
        self.drawn.clear()
        found = function(self.x, labels, **call)
        self.loss, self.statistics = found if isinstance(found, tuple) else (found, None)
        self.loss.backward()
        if optimizer is not None:
            optimizer.step()

    def check(self):
        head, sharded = self.head, self.world is not None
        log_scale = head.log_scale.detach() if head._learns_scale() else torch.zeros(())
        leaves = [self.given[0].clone(), *self._everyones_table(), log_scale.double()]
        features, weight, bias, log_scale = (each if each is None else each.requires_grad_() for each in leaves)
        plain_options = self._taking_part() | self.plain | ({"scale": log_scale.exp()} if head._learns_scale() else {})
        exact, products = plain(features, weight, bias, self.given[3], **plain_options)
        exact.backward()
        relative = tolerance(self.dtype, STEEPEST * SCALE)
        assert_close(self.loss.detach(), exact.detach(), relative, "loss")
        size = features.grad.norm() if sharded else 0.0
        assert_close(self.x.grad, self.mine(features.grad), relative, "dX", size)
        if head._learns_scale():
            assert_close(head.log_scale.grad, log_scale.grad, relative, "ds")
        if self.statistics is not None:
            self._check_statistics(products.detach(), plain_options.get("kept", torch.arange(NUM_CLASSES)), relative)
        self._check_table(self.shard(weight.grad), None if head.bias is None else self.shard(bias.grad), relative)

    def _everyones_table(self):
        """(weight, bias or None) of all ranks before the step, decoded."""
        parts = self._of_all_ranks((self.before["weight"], self.before.get("bias")))
        return (None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))

    def _of_all_ranks(self, value):
        if self.world is None:
            return [value]
        values = [None] * self.world.size
        dist.all_gather_object(values, value)
        return values

    def _taking_part(self):
        """The classes that all ranks drew, and their corrections."""
        if not self.is_sampled:
            return {}
        first = 0 if self.world is None else self.head.placement.first_class(self.head, self.head.weight)
        classes, correction = self.drawn[-1]
        kept, corrections = zip(*self._of_all_ranks((classes + first, correction)), strict=True)
        has_any = isinstance(corrections[0], torch.Tensor)
        return {"kept": torch.cat(kept), "correction": torch.cat(corrections).double() if has_any else None}

    def _check_statistics(self, products, kept, relative):
        place = torch.searchsorted(kept, self.given[3][:, :1].contiguous())
        own, others = products.gather(1, place)[:, 0], products.scatter(1, place, -torch.inf)
        assert_close(self.statistics.target_cosine, self.mine(own), relative, "target_cosine", size=NUM_ROWS**0.5)
        assert_close(self.statistics.negative_cosine, self.mine(others.amax(1)), relative, "negative_cosine", size=NUM_ROWS**0.5)
        assert torch.equal(self.statistics.negative_class, self.mine(kept[others.argmax(1)]))

    def _check_table(self, weight_grad, bias_grad, relative):
        longest = self.optimizer_options.get("max_row_norm")
        if longest is not None:
            weight_grad = weight_grad * (longest / weight_grad.norm(dim=1, keepdim=True)).clamp(max=1)
            bias_grad = None if bias_grad is None else bias_grad.clamp(-longest, longest)
        if not self.is_fused:
            grads = {name: _local(parameter.grad).to_dense() for name, parameter in self.head.named_parameters()}
            grads = {name.removesuffix("s.weight.original1"): grad for name, grad in grads.items()}
            found = grads.get("weight", grads.get("parametrization")), grads.get("bias")
        else:
            after = _rows(self.head)
            found = [self.before[name] - after[name] if name in after else None for name in ("weight", "bias")]
        if self.head.weight_scale is not None:  # rounded stochastically, to one of the two neighbours in e4m3
            off, exact = (found[0] - weight_grad).abs(), self.before["weight"] - weight_grad
            assert (off <= exact.abs() / 8 + 2.0**-9 * self.head._row_scale()[:, None]).all()
            assert (self.before["weight"] != after["weight"]).any()
            return
        for name, ours, exact in (("weight", found[0], weight_grad), ("bias", found[1], bias_grad)):
            assert (ours is None) == (exact is None)
            if ours is not None:  # of a step it is a difference of two numbers, each rounded
                rounded = torch.finfo(getattr(self.head, name).dtype).eps * self.before[name].norm() * self.is_fused
                assert_close(ours.double(), exact, relative, name, size=exact.norm() + rounded / relative)


def _local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _rows(head):
    """This rank's rows of weight, decoded, and of the bias, in float64."""
    weight = _local(head.weight).detach().double()
    weight = weight if head.weight_scale is None else weight * head._row_scale().double()[:, None]
    return {"weight": weight.clone()} | ({} if head.bias is None else {"bias": _local(head.bias).detach().double().clone()})
