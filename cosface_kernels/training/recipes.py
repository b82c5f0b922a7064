"""One training of the paper's experiments in small: each loss gets the same images, network and steps, and is
tested on identities that were never trained.

    train(LOSSES["Softmax"], faces(seed), seed, steps=500)    # the Scores of one network

faces: rendered (faces.py), 1,000 identities of 10 images; tested on 100 others of 10, with 1,000 others as distractors.
faces20000: 20,000 identities of 10 images; tested on 1,000 others of 5, with 10,000 others as distractors.
digits: scikit-learn's, seven of the ten, tested on the other three.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ..heads import CosFaceLoss, MarginSoftmaxLoss
from ..margins import CosFace, LSoftmax, Softmax, SphereFace
from . import faces as renderer
from . import identification, verification
from .all_pairs import AllPairs
from .backbones import convolutions
from .data import Digits, prepare

EMBEDDING, SCALE, MARGIN = 64, 16.0, 0.35
# s and the learning rate: the best of 16, 32, 64 and of 0.03, 0.1, 0.3 for LMCL and softmax, on a seed that no result is of.
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
# A batch is some identities with some images each, for all losses: those of pairs need it.
IDENTITIES, IMAGES = 32, 4
SIZE, STEPS = 24, 500


class Sizes(NamedTuple):
    """The settings of a loss, beside the number of classes."""

    embedding: int = EMBEDDING
    scale: float = SCALE  # of losses of cosines


TRAINED = {"faces": 1000, "faces20000": 20_000}  # identities
PAIRS = 3000  # of each kind, for the accuracy in ten folds


class Data(NamedTuple):
    images: torch.Tensor  # uint8 (N, 3, S, S), to train
    labels: torch.Tensor
    test_images: torch.Tensor  # of other identities
    test_labels: torch.Tensor
    distractors: torch.Tensor | None  # of others again


class Scores(NamedTuple):
    """Rates of a trained network on the identities of the test, shares of 1."""

    accuracy: float  # of pairs, half of them genuine, in ten folds: as LFW and YTF
    rank1: float | None  # MegaFace's identification
    tar_1e3: float | None  # TAR at FAR 1e-3, MegaFace's verification at a FAR that this many pairs resolve
    tar_1e4: float | None  # at 1e-4, where they resolve that
    eer: float


def _rendered(start, identities, images):
    """(images, identity of each, from 0 on) of identities from number `start` on."""
    who, which = np.divmod(np.arange(identities * images), images)
    return torch.from_numpy(renderer.render(start + who, which, SIZE)), torch.from_numpy(who)


def faces(seed):
    first = 1_000_000 * seed  # each seed has faces of its own
    trained, tested = _rendered(first, TRAINED["faces"], 10), _rendered(first + 10_000, 100, 10)
    return Data(*trained, *tested, _rendered(first + 20_000, 1000, 1)[0])


def faces20000(seed):
    first = 1_000_000 * seed + 100_000
    trained, tested = _rendered(first, TRAINED["faces20000"], 10), _rendered(first + 100_000, 1000, 5)
    return Data(*trained, *tested, _rendered(first + 200_000, 10_000, 1)[0])


def digits(seed):
    source = Digits(SIZE)
    held_out = np.random.default_rng(seed).permutation(10)[:3]
    is_test = np.isin(source.labels.numpy(), held_out)
    labels = torch.from_numpy(np.unique(source.labels[~is_test], return_inverse=True)[1].ravel())
    return Data(source.images[~is_test], labels, source.images[is_test], source.labels[is_test], None)


DATA = {"faces": faces, "faces20000": faces20000, "digits": digits}


class Alone(nn.Module):
    """A loss of embeddings, with an optional head and an optional center for each identity, summed."""

    def __init__(self, classes, sizes, *, head=None, triplet=False, contrastive=0.0, center=0.0):
        super().__init__()
        from pytorch_metric_learning.losses import ContrastiveLoss, TripletMarginLoss
        from pytorch_metric_learning.miners import TripletMarginMiner

        self.head, self.weights = head, (contrastive, center)
        self.contrastive, self.triplet = ContrastiveLoss(), TripletMarginLoss(margin=0.2) if triplet else None
        self.miner = TripletMarginMiner(margin=0.2)
        self.centers = nn.Parameter(torch.zeros(classes, sizes.embedding, dtype=torch.float32, device="cpu")) if center else None

    def forward(self, features, labels):
        contrastive, center = self.weights
        loss = features.new_zeros(()) if self.head is None else self.head(features, labels)
        if self.triplet is not None:
            loss = loss + self.triplet(features, labels, self.miner(features, labels))
        if contrastive:
            loss = loss + contrastive * self.contrastive(features, labels)
        if center:
            loss = loss + center * (features - self.centers[labels]).square().sum(1).mean() / 2
        return loss


def _margin_loss(margin, classes, sizes, *, of_cosines=False, **options):
    options |= {"scale": sizes.scale} if of_cosines else {}
    return MarginSoftmaxLoss(sizes.embedding, classes, margin=margin(), **options)


def lmcl(margin, classes, sizes):
    """CosFace with a margin of its own."""
    return CosFaceLoss(sizes.embedding, classes, scale=sizes.scale, margin=margin)


def _with_softmax(classes, sizes, **more):
    return Alone(classes, sizes, head=_margin_loss(Softmax, classes, sizes, bias=True), **more)


_sphere = partial(SphereFace, 4, annealing=True)
# The nine of the paper's tables 1 and 2; each makes a module forward(features, labels) of the number of classes and Sizes.
LOSSES = {
    "Softmax": partial(_margin_loss, Softmax, bias=True),
    "Softmax + Contrastive": partial(_with_softmax, contrastive=1.0),
    "Triplet": partial(Alone, triplet=True),
    "L-Softmax": partial(_margin_loss, partial(LSoftmax, 4, annealing=True)),
    "Softmax + Center": partial(_with_softmax, center=0.01),
    "A-Softmax": partial(_margin_loss, _sphere, normalize_features=False),
    "A-Softmax-NormFea": partial(_margin_loss, _sphere, of_cosines=True),
    "LMCL without feature normalisation": partial(_margin_loss, partial(CosFace, MARGIN), normalize_features=False),
    f"LMCL, m = {MARGIN}": partial(lmcl, MARGIN),
}


def settings(steps, data="faces"):
    """The settings that a result depends on, beside data, loss and seed."""
    return {
        **{"steps": steps, "batch": f"{IDENTITIES} x {IMAGES}", "lr": LEARNING_RATE, "momentum": MOMENTUM},
        **{"weight_decay": WEIGHT_DECAY, "embedding_size": EMBEDDING, "scale": SCALE, "image_size": SIZE},
        "trained": TRAINED.get(data, TRAINED["faces"]),
    }


def network(size=SIZE):
    return nn.Sequential(*convolutions((16, 32, 64), (2, 2, 2), EMBEDDING, size))


def train(make_loss, data, seed, steps):
    """The Scores of a new network trained with make_loss(classes, Sizes())."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # work this small gains nothing from a second
    try:
        torch.manual_seed(seed)
        net = network()
        loss = make_loss(int(data.labels.max()) + 1, Sizes())
        optimizer = torch.optim.SGD([*net.parameters(), *loss.parameters()], LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, cycle_momentum=False)
        random = np.random.default_rng(seed)
        members = members_of(data.labels.numpy())
        for _ in range(steps):
            chosen = batch(random, members)
            images = prepare(data.images[chosen])
            optimizer.zero_grad()
            loss(net(images), data.labels[chosen]).backward()
            optimizer.step()
            schedule.step()
        return score(net.eval(), data, seed)
    finally:
        torch.set_num_threads(threads)


def members_of(labels):
    """[the indices of each identity's images]"""
    return np.split(np.argsort(labels, kind="stable"), np.bincount(labels).cumsum()[:-1])


def batch(random, members, identities=IDENTITIES, images=IMAGES):
    """Indices of `images` images of each of some identities, each once where there are enough."""
    count = min(identities, len(members))
    each = identities * images // count
    who = random.choice(len(members), count, replace=False)
    return np.concatenate([random.choice(members[one], each, replace=len(members[one]) < each) for one in who])


@torch.no_grad()
def score(net, data, seed=0):
    rows, labels = _embeddings(net, data.test_images), data.test_labels.numpy()
    others = None if data.distractors is None else _embeddings(net, data.distractors)
    genuine, impostors = verification.scores_of(AllPairs(rows, labels))
    random = np.random.default_rng(seed)
    count = min(PAIRS, len(genuine), len(impostors))
    drawn = [random.choice(scores, count, replace=False) for scores in (genuine, impostors)]
    rank1 = identification.cmc(identification.search(rows, labels, others))[0]
    return scores_of(genuine, impostors, np.stack(drawn, 1).ravel(), np.tile([True, False], count), rank1)


def scores_of(genuine, impostors, scores, same, rank1=None):
    """Scores by the scores of all pairs, and for the accuracy by those of some in their order and whether each is genuine."""
    steps = verification.Steps.of(genuine, impostors)
    tar_1e3, tar_1e4 = (rate and rate.tar for rate in (verification.tar_at_far(steps, exponent) for exponent in (3, 4)))
    accuracy = float(np.mean(verification.folds(scores, same).accuracies))
    return Scores(accuracy, rank1, tar_1e3, tar_1e4, verification.equal_error_rate(steps)[0])


def _embeddings(net, images):
    return torch.cat([net(prepare(some)) for some in images.split(256)]).numpy()
