"""Programs of a head's other calls: identities that come and go, all that is saved, and what is looked up in the table.

Rows, their state and their numbers keep their bits whatever happens to others; what is looked up is that of the decoded table in
float64.
"""

import copy
import random
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from margin_rows import ROWS, batch
from rounding import SIZE

from cosface_kernels import FusedAdamW, FusedSGD, MarginSoftmaxLoss, latest_checkpoint, load_checkpoint, margins, save_checkpoint
from cosface_kernels.ops import formats

from . import tables

OPTIMIZERS = {
    "FusedSGD": (FusedSGD, {"momentum": 0.9}),
    "FusedAdamW": (FusedAdamW, {}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {}),
}
STEPS = ("grow", "remove", "step", "looked up", "state dict", "checkpoint", "grown checkpoint", "converted")
MOST = 0.01 * 7  # a number of N(0, 0.01²) that is as good as never drawn
SPACE = {
    "margin": ["CosFace", "ArcFace x3", "Softmax bias", "Softmax bias x3", "AdaFace", "CosFace raw", "LSoftmax 2 x3"],
    "table": ["float32", "float64", "bfloat16", "float8"],
    "optimizer": ["", *OPTIMIZERS],
    "state": ["float32", "bfloat16", "int8"],
    "classes": [2, 3, 7, 130, 300],
    "rows": [1, 2, 5, 20],
    "by_class": [False, True],  # whether the margin's numbers are
    "class_weight": [False, True],
    "hard_classes": [0, 0, 1, 3],
    "sample_rate": [1.0, 1.0, 0.4],
    **{f"step_{number}": ["nothing", *STEPS] for number in range(5)},
    "seed": [*range(1000)],
}


def settle(case):
    case = dict(case)
    if case["table"] in ("bfloat16", "float8") and case["optimizer"] in ("SGD", "AdamW"):
        case["optimizer"] = "Fused" + case["optimizer"]
    if case["table"] == "float64" and case["optimizer"].startswith("Fused"):
        case["state"] = "float32"  # as it is told
    if case["optimizer"] == "AdamW":
        case["sample_rate"] = 1.0  # which has no sparse gradient
    return case | {"by_class": case["by_class"] and case["margin"] == "CosFace"}


def check(case):
    torch.set_num_threads(1)
    torch.manual_seed(case["seed"])
    generator = random.Random(case["seed"])
    hard = tables.hard_classes(case)
    head = _head(case, case["classes"], hard)
    optimizer = _optimizer(case, head)
    for number in range(5):
        before = _by_class(head, optimizer)
        match case[f"step_{number}"]:
            case "grow":
                _grow(head, optimizer, before, generator.choice((1, 2, 200)))
            case "remove":
                count = generator.randrange(1, max(2, head.num_classes))
                _remove(head, optimizer, before, generator.choices(range(head.num_classes), k=count))
            case "step" if optimizer is not None:
                _step(case, head, optimizer, number)
            case "looked up":
                _look_up(case, head, number)
            case "state dict":
                other = _head(case, head.num_classes, None)
                other.load_state_dict(copy.deepcopy(head.state_dict()))
                _assert_same(before, _by_class(other, None), but="state")
            case "checkpoint" | "grown checkpoint" if _has_sparse_state(head, optimizer):
                _assert_not_saved(head, optimizer)
            case "checkpoint" | "grown checkpoint" as what:
                head, optimizer = _saved_and_loaded(case, head, optimizer, before, 3 if what.startswith("grown") else 0)
            case "converted":
                other = copy.deepcopy(head).double()
                assert torch.equal(other.weight.detach(), _decoded(head)), "another number after double()"
                _assert_same(before, _by_class(head, optimizer))


def _head(case, num_classes, hard):
    row, generator = ROWS[case["margin"]], torch.Generator().manual_seed(case["seed"])
    kept = {"dtype": torch.float64} if case["table"] == "float64" else {"table_format": case["table"]}
    numbers = torch.rand(2, num_classes, generator=generator)
    margin = margins.CosFace(numbers[0]) if case["by_class"] else row.margin
    options = {"class_weight": numbers[1] if case["class_weight"] else None, "hard_classes": hard, **row.options, **kept}
    sampled = {"sample_rate": case["sample_rate"], "sample_seed": case["seed"]}
    return MarginSoftmaxLoss(SIZE, num_classes, margin=margin, bias=row.bias, **sampled, **options)


def _optimizer(case, head):
    if not case["optimizer"]:
        return None
    make, options = OPTIMIZERS[case["optimizer"]]
    return make(head.parameters(), lr=0.1, **options, **({"state_format": case["state"]} if make.__name__[0] == "F" else {}))


def _decoded(head):
    """(R, D) float64."""
    table = head.weight.detach().double().clone()
    return table if head.weight_scale is None else table * head.weight_scale.double()[:, None]


def _by_class(head, optimizer):
    """{name: copy (C, ...)} of all that has a row or more for each class."""
    found, rows = dict(head.state_dict()), len(head.weight)
    for name, parameter in head.named_parameters():
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        found |= {f"state of {name}: {key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    found = {name: value.detach() for name, value in found.items() if value.dim() and len(value) in (rows, head.num_classes)}
    found = {name: value.to_dense() if value.is_sparse else value.clone() for name, value in found.items()}
    return {
        name: (value.view(torch.uint8) if value.dtype == formats.FLOAT8 else value).unflatten(0, (head.num_classes, -1))
        for name, value in found.items()
    }


def _assert_same(before, after, *, but=" "):
    for name, value in before.items():
        assert name.startswith(but) or torch.equal(after[name], value), f"{name} changed"


def _grow(head, optimizer, before, count):
    weight, old = head.weight, head.num_classes
    assert head.grow(count, optimizer) == range(old, old + count) and head.num_classes == old + count
    assert head.weight is weight and len(weight) == head.num_classes * head.centers_per_class
    after = _by_class(head, optimizer)
    assert after.keys() == before.keys()
    _assert_same(before, {name: value[:old] for name, value in after.items()})
    _assert_new(head, before, after, old)
    drawn = _decoded(head)[old * head.centers_per_class :]
    assert drawn.abs().max() < MOST and drawn.any(1).all(), "rows were not drawn as the first ones were"


def _assert_new(head, before, after, old):
    for name, value in after.items():
        new = value[old:]
        if name in ("class_weight", "margin_m"):
            mean = before[name].double().mean()
            assert ((new.double() - mean).abs() <= 1e-6 * mean).all(), f"{name} of new identities is not the mean"
        elif name == "hard_classes":
            assert (new == -1).all()
        elif name not in ("weight", "weight_scale"):
            assert not new.any(), f"{name} of new identities is not 0"


def _remove(head, optimizer, before, ids):
    old, weight = head.num_classes, head.weight
    kept = [j for j in range(old) if j not in {*ids}]
    if not kept:
        return
    new_ids = head.remove(torch.tensor(ids) if len(ids) % 2 else ids, optimizer)
    assert new_ids.tolist() == [kept.index(j) if j in {*kept} else -1 for j in range(old)]
    assert head.num_classes == len(kept) and head.weight is weight
    after = _by_class(head, optimizer)
    expected = {name: value[kept] for name, value in before.items()}
    if "hard_classes" in expected:
        hard = expected["hard_classes"]
        expected["hard_classes"] = torch.cat([new_ids, torch.tensor([-1])]).to(hard.dtype)[hard.long()]
    assert after.keys() == before.keys()
    _assert_same(expected, after)


def _labelled(case, head, seed):
    row = ROWS[case["margin"]]
    features, _, labels, *_ = batch(row, num_rows=case["rows"], num_classes=head.num_classes, seed=seed)
    return features.to(torch.float64 if case["table"] == "float64" else torch.float32), labels


def _step(case, head, optimizer, seed):
    features, labels = _labelled(case, head, seed)
    before = _decoded(head)
    loss = head(features, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    has_negatives = head.num_classes * head.sample_rate > 1.5
    assert loss.isfinite() and (not has_negatives or not torch.equal(before, _decoded(head))), "a step that changed nothing"


def _has_sparse_state(head, optimizer):
    """True for the momentum of torch.optim.SGD for sampled classes."""
    return optimizer is not None and any(
        isinstance(value, torch.Tensor) and value.is_sparse for value in optimizer.state[head.weight].values()
    )


def _assert_not_saved(head, optimizer):
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_checkpoint(Path(folder, "step-1"), head, optimizer)
        except TypeError as error:
            assert "is a sparse tensor" in str(error) and not [*Path(folder).iterdir()], error
        else:
            raise AssertionError("sparse state was saved")


def _saved_and_loaded(case, head, optimizer, before, count):
    """What a checkpoint gives to a new head and optimiser, with so many more identities; each call with another option."""
    old, other = head.num_classes, _head(case, head.num_classes + count, None)
    if head.hard_classes is not None:  # a buffer that is there only once it is set
        other.hard_classes = torch.full((old + count, head.hard_classes.shape[1]), -1)
    its_optimizer, drawn = _optimizer(case, other), _by_class(other, None)
    grown = [name for name, value in other.state_dict().items() if count and value.dim()]
    with tempfile.TemporaryDirectory() as folder:
        for number in (1, 2, 3):
            save_checkpoint(Path(folder, f"step-{number}"), head, optimizer, extra={"epoch": number}, keep=2)
        save_checkpoint(Path(folder, "step-3"), head, optimizer, extra={"epoch": 4}, overwrite=True)
        assert sorted(path.name for path in Path(folder).iterdir()) == ["step-2", "step-3"]
        extra = load_checkpoint(latest_checkpoint(folder), other, its_optimizer, grow=grown, strict=not count)
    assert extra == {"epoch": 4}
    after = _by_class(other, its_optimizer)
    assert after.keys() == before.keys()
    _assert_same(before, {name: value[:old] for name, value in after.items()})
    for name, value in after.items():
        new = value[old:]
        assert torch.equal(new, drawn[name][old:]) if name in drawn else not new.any(), f"{name} of new identities"
    return other, its_optimizer


def _look_up(case, head, seed):
    features, labels = _labelled(case, head, seed)
    row, centers, num_classes = ROWS[case["margin"]], head.centers_per_class, head.num_classes
    table, x = _decoded(head), features.double()
    unit = F.normalize(table)
    products = (x if row.raw else F.normalize(x)) @ (table if "weight" in row.raw else unit).T
    products = products + (head.bias.detach().double() if row.bias else 0.0)
    exact = row.scale * products.unflatten(1, (-1, centers)).amax(2)
    length = x.norm(dim=1).amax() if row.raw else 1.0
    length = length * (table.norm(dim=1).amax() if "weight" in row.raw else 1.0)
    eps = torch.finfo(features.dtype).eps
    within = 4 * (SIZE + 4) * eps
    logits = head.logits(features).detach()
    assert ((logits.double() - exact).abs() <= row.scale * length * within).all(), "logits"
    _assert_largest("topk", head.topk(features, min(5, num_classes)), exact, row.scale * length * within)

    cosines = (unit @ unit.T).unflatten(1, (-1, centers)).amax(2).unflatten(0, (-1, centers)).amax(1)
    cosines.fill_diagonal_(-torch.inf)
    _assert_largest("confusions", head.confusions(min(5, num_classes - 1)), cosines, within)

    labels[::3] = -100
    own = head.own_cosines(features, labels)
    wanted = (F.normalize(x)[:, None] * unit.unflatten(0, (-1, centers))[labels.clamp(min=0)]).sum(2)
    assert own[::3].isnan().all() and ((own.double() - wanted).abs() <= within)[labels >= 0].all(), "own_cosines"
    found = head.dominant_centers(own, labels)
    counts = torch.zeros(num_classes, centers, dtype=torch.int64)
    for label, centre in zip(labels.tolist(), own.argmax(1).tolist(), strict=True):
        if label >= 0:
            counts[label, centre] += 1
    assert (
        torch.equal(found < 0, counts.sum(1) == 0)
        and (counts.gather(1, found.clamp(min=0)[:, None])[:, 0] == counts.amax(1)).all()
    )


def _assert_largest(what, found, exact, within):
    """The k largest of each row of exact, descending, and where they are; equal ones in any order."""
    values, places = found
    wanted = exact.topk(values.shape[1], 1).values
    assert ((values.double() - wanted).abs() <= within).all() and (values.diff(dim=1) <= 0).all(), what
    assert ((exact.gather(1, places) - wanted).abs() <= 2 * within).all(), f"{what}: other classes"
    assert all(len({*row}) == len(row) for row in places.tolist()), f"{what}: a class twice"
