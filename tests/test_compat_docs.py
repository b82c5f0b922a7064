"""Do the examples of docs/migrate.md run, and does a head with a loss of pairs or triplets beside it learn?"""

import copy
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("pytorch_metric_learning.losses")
pytest.importorskip("sklearn")

import numpy
import torch
from pytorch_metric_learning.losses import ContrastiveLoss, TripletMarginLoss
from pytorch_metric_learning.reducers import MeanReducer
from pytorch_metric_learning.samplers import MPerClassSampler
from sklearn.datasets import load_digits
from test_compat_insightface import CombinedToday

from cosface_kernels import CosFaceLoss, FusedSGD
from cosface_kernels.compat import insightface
from cosface_kernels.compat import pytorch_metric_learning as compat

DOCUMENT = (Path(__file__).parents[1] / "docs" / "migrate.md").read_text()
METRIC_LEARNING, INSIGHTFACE, ONE_OPTIMIZER, TWO_OPTIMIZERS, _, BESIDE = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)


def execute(example):
    """The names that it leaves. It must have trained its table and its backbone."""
    torch.manual_seed(0)
    names = {}
    exec(example, names)
    head = names.get("head") or names["loss_function"]
    assert names["loss"].isfinite() and all(parameter.grad.any() for parameter in head.parameters())
    assert names["backbone"].weight.grad.any()
    return names


def test_from_pytorch_metric_learning():
    names = execute(METRIC_LEARNING)
    assert isinstance(names["loss_function"], compat.CosFaceLoss)


def test_from_insightface(monkeypatch):
    monkeypatch.setitem(sys.modules, "losses", SimpleNamespace(CombinedMarginLoss=CombinedToday))
    head = execute(INSIGHTFACE)["head"]
    assert (head.margin.m, head.margin.gradient, head.ignore_index) == (0.5, "exact", -1)


def test_moving_to_a_fused_optimiser():
    """The step after it is that of the one optimiser."""
    torch.manual_seed(0)
    names = {}
    exec(ONE_OPTIMIZER, names)
    plain = copy.deepcopy({name: names[name] for name in ("backbone", "head", "optimizer")})
    exec(TWO_OPTIMIZERS.replace(", max_row_norm=100.0", ""), names)
    plain["head"](plain["backbone"](names["images"]), names["labels"]).backward()
    torch.nn.utils.clip_grad_norm_(plain["backbone"].parameters(), 5.0)
    plain["optimizer"].step()
    assert names["fused"].state[names["head"].weight]["momentum_buffer"].any()
    for name in ("backbone", "head"):
        torch.testing.assert_close(names[name].weight, plain[name].weight, rtol=1e-5, atol=1e-6)
    assert "max_row_norm=100.0" in TWO_OPTIMIZERS
    names["fused"].load_state_dict(names["split_optimizer_state"](names["state_optimizer"])[1])
    (group,) = names["fused"].param_groups
    assert group["lr"] == 0.1 and group["max_row_norm"] is None


@pytest.mark.parametrize("wrong, kind", [([], TypeError), ({"state": {}}, ValueError)])
def test_state_that_is_none_is_not_split(wrong, kind):
    with pytest.raises(kind, match=r"state_dict must be that of a torch\.optim\.Optimizer"):
        insightface.split_optimizer_state(wrong)


@pytest.mark.parametrize("kind", [compat.CosFaceLoss, compat.SubCenterArcFaceLoss])
def test_a_fused_optimiser_says_which_head_to_use(kind):
    loss = kind(num_classes=5, embedding_size=8)
    with pytest.raises(ValueError, match=rf"W \(8, \d+\) of {kind.__name__} has a column: take MarginSoftmaxLoss"):
        FusedSGD(loss.parameters(), lr=0.1)


def test_beside_other_losses():
    names = execute(BESIDE)
    assert names["loss"].isfinite() and names["centers"].weight.grad.is_sparse and names["head"].weight.grad.any()


def heads():
    """(head, its logits)."""
    ours = CosFaceLoss(16, 10, scale=16.0, margin=0.2)
    yield ours, ours.logits
    theirs = compat.CosFaceLoss(num_classes=10, embedding_size=16, scale=16.0, margin=0.2)
    yield theirs, theirs.get_logits


class CenterLoss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.centers = torch.nn.Embedding(10, 16)

    def forward(self, embeddings, labels):
        return 0.1 * (embeddings - self.centers(labels)).square().sum(1).mean() / 2


# Triplets and pairs that cost nothing count in the mean here: that of the others alone need not fall.
OTHERS = {
    "triplet": lambda: TripletMarginLoss(margin=0.2, reducer=MeanReducer()),
    "contrastive": lambda: ContrastiveLoss(reducer=MeanReducer()),
    "center": CenterLoss,
}


@pytest.mark.parametrize("which", [0, 1], ids=["head", "compat"])
@pytest.mark.parametrize("make_other", OTHERS)
def test_digits_are_learnt(make_other, which):
    """Forty steps on half of scikit-learn's digits: both losses fall, and the other half is recognised."""
    torch.manual_seed(0)
    numpy.random.seed(0)  # the sampler's
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    half = len(images) // 2
    backbone = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
    (head, logits), beside = list(heads())[which], OTHERS[make_other]()
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters(), *beside.parameters()], lr=5e-3)
    sampler = MPerClassSampler(labels[:half], m=4, batch_size=40, length_before_new_iter=40 * 40)

    def held_out_accuracy():
        with torch.no_grad():
            return (logits(backbone(images[half:])).argmax(1) == labels[half:]).double().mean()

    before, history = held_out_accuracy(), []
    for rows in torch.tensor(list(sampler)).split(40):
        embeddings = backbone(images[rows])
        terms = torch.stack([head(embeddings, labels[rows]), beside(embeddings, labels[rows])])
        optimizer.zero_grad()
        terms.sum().backward()
        optimizer.step()
        history.append(terms.detach())
    first, last = torch.stack(history[:5]).mean(0), torch.stack(history[-5:]).mean(0)
    assert last[0] < 0.5 * first[0] and last[1] < 0.9 * first[1], f"{first} -> {last}"
    assert before < 0.3 and held_out_accuracy() > 0.85, f"{before} -> {held_out_accuracy()}"
