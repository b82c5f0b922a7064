"""The paper's toy experiment (CosFace, arXiv 1801.09414, fig. 4) on real images: what the margin does to 2-D features.

Eight identities, the handwritten digits 0 to 7 of scikit-learn (8 x 8 pixels), and a small CNN with two features, trained with
one recipe for four losses: plain softmax cross-entropy on the features as they are, and LMCL with a growing margin. In a plane
one identity can get stuck behind another, so each loss is trained from three seeds, and the run with the middle gap is shown.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from tqdm import tqdm

from ... import CosFaceLoss

IDENTITIES = 8
# None is plain softmax. In two dimensions the paper bounds the margin of eight classes by 1 - cos(2π/8) = 0.29.
MARGINS = (None, 0.0, 0.1, 0.2)
# Twice the paper's lower bound, (C-1)/C log((C-1) P/(1-P)) = 7.7 for a probability P = 0.999 at the class centres.
SCALE = 16.0
SEEDS = (0, 1, 2)
EPOCHS, BATCH, LEARNING_RATE, PIXEL_NOISE = 50, 128, 5e-3, 0.1


class Result(NamedTuple):
    loss: str
    smallest_gap: float  # degrees between the regions of neighbouring identities, the narrowest; negative where they overlap
    intra_class_angle: float  # degrees between a feature and the mean direction of its identity, on average
    held_out_accuracy: float


class Training(NamedTuple):
    losses: list[float]  # the mean loss of each epoch
    held_out_accuracy: float
    features: torch.Tensor  # (N, D), of the training images
    labels: torch.Tensor  # (N,)
    head: nn.Module


class Trained(NamedTuple):
    result: Result
    training: Training


class SoftmaxLoss(nn.Module):
    """The baseline: cross-entropy of a linear layer, with the interface of CosFaceLoss."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(2, IDENTITIES).weight.detach())

    def forward(self, features, labels):
        return F.cross_entropy(self.logits(features), labels)

    def logits(self, features):
        return F.linear(features, self.weight)


def run(out, device):
    """Train all, draw toy_features.png into `out`, return the Result of each loss."""
    threads = torch.get_num_threads()
    # Work this small gains little from a second thread, and on a busy machine waits for it.
    torch.set_num_threads(1)
    try:
        trained = train_all(device)
    finally:
        torch.set_num_threads(threads)
    draw(trained).savefig(out / "toy_features.png")
    return [each.result for each in trained]


def train_all(device, seeds=SEEDS):
    """The run of each margin, on the CPU, whose smallest gap is the median over the seeds."""
    with tqdm(total=len(MARGINS) * len(seeds) * EPOCHS, desc="toy experiment", unit="epoch") as bar:
        runs = [[_train_margin(margin, device, seed, bar.update) for seed in seeds] for margin in MARGINS]
    return [sorted(each, key=lambda run: run.result.smallest_gap)[len(seeds) // 2] for each in runs]


def _digits(seed):
    """(training images, held-out images, their labels): (N, 1, 8, 8) in [0, 1], three to one."""
    images, labels = load_digits(n_class=IDENTITIES, return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    return train_test_split(images, torch.tensor(labels), test_size=0.25, random_state=seed, stratify=labels)


def _train_margin(margin, device, seed, epoch_done):
    done = train(partial(_head, margin), device, seed, EPOCHS, epoch_done=epoch_done)
    name = "softmax" if margin is None else f"LMCL, m = {margin:g}"
    gap, angle = smallest_gap(done.features, done.labels), intra_class_angle(done.features, done.labels)
    return Trained(Result(name, gap, angle, done.held_out_accuracy), done)


def _head(margin):
    head = SoftmaxLoss() if margin is None else CosFaceLoss(2, IDENTITIES, scale=SCALE, margin=margin)
    # The same start for all four: who is whose neighbour decides how hard the plane is to share.
    angles = torch.arange(IDENTITIES) * (2 * math.pi / IDENTITIES)
    head.weight.data.copy_(torch.stack([angles.cos(), angles.sin()], 1))
    return head


def train(make_head, device, seed, epochs, *, size=2, epoch_done=lambda: None):
    """The demo's recipe for any loss: the network, with `size` features, and a head, trained on the digits.

    make_head() is called after the seed is set: a module with forward(features, labels), logits(features) and weight.
    """
    images, held_out_images, labels, held_out_labels = (part.to(device) for part in _digits(seed))
    torch.manual_seed(seed)
    net = _network(size).to(device)
    head = make_head().to(device)
    steps = epochs * (len(labels) // BATCH)
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    losses = []
    for _ in range(epochs):
        order = torch.randperm(len(labels), device=device)
        losses.append([])
        for batch in order[: steps // epochs * BATCH].split(BATCH):
            noisy = images[batch] + PIXEL_NOISE * torch.randn_like(images[batch])
            optimizer.zero_grad()
            loss = head(net(noisy), labels[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses[-1].append(loss.detach())
        epoch_done()
    net.eval(), head.eval()
    with torch.no_grad():
        accuracy = (head.logits(net(held_out_images)).argmax(1) == held_out_labels).float().mean().item()
        features, labels = net(images).cpu(), labels.cpu()
    means = [torch.stack(epoch).mean().item() for epoch in losses]
    return Training(means, accuracy, features, labels, head)


def _network(size):
    def convolution(inputs, outputs, stride):
        layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return layer, nn.BatchNorm2d(outputs), nn.PReLU(outputs)

    hidden = nn.Linear(32 * 2 * 2, 128), nn.BatchNorm1d(128), nn.PReLU(128)
    return nn.Sequential(
        *convolution(1, 16, 1), *convolution(16, 32, 2), *convolution(32, 32, 2), nn.Flatten(), *hidden, nn.Linear(128, size)
    )


def smallest_gap(features, labels):
    """The narrowest gap, degrees. A region spans the middle 95% of an identity's angles, so single strays do not decide."""
    regions = sorted(_region(features[labels == identity]) for identity in range(IDENTITIES))
    first_again = tuple(angle + 360 for angle in regions[0])
    ends_and_starts = zip(regions, [*regions[1:], first_again], strict=True)
    return min(start - end for (_, _, end), (_, start, _) in ends_and_starts)


def intra_class_angle(features, labels):
    """The mean angle between a feature and the mean direction of its identity, degrees."""
    return torch.cat([_deviations(features[labels == identity])[1].abs() for identity in range(IDENTITIES)]).mean().item()


def _region(features):
    """(centre, start, end) of the region of one identity, degrees, counterclockwise."""
    centre, deviations = _deviations(features)
    start, end = deviations.quantile(torch.tensor([0.025, 0.975], dtype=deviations.dtype)).tolist()
    return centre, centre + start, centre + end


def _deviations(features):
    """(mean direction, each feature's signed angle from it (N,)), degrees."""
    mean = F.normalize(features.double()).mean(0)
    centre = math.degrees(math.atan2(mean[1], mean[0]))
    angles = torch.atan2(features[:, 1], features[:, 0]).double().rad2deg()
    return centre, torch.remainder(angles - centre + 180, 360) - 180


def draw(trained):
    """The paper's figure 4: features as they are above, their directions below."""
    figure = Figure(figsize=(12, 6.6), dpi=100, layout="constrained")
    figure.suptitle(f"Features of eight identities (digits 0 to 7) in two dimensions; LMCL with s = {SCALE:g}", fontsize=14)
    legend = "Above: the features. Below: their directions, the class weights (lines), and 95% of each identity (arcs)."
    figure.supxlabel(legend, fontsize=11)
    for column, each in enumerate(trained):
        plane, circle = (figure.add_subplot(2, len(trained), row * len(trained) + column + 1, aspect="equal") for row in (0, 1))
        plane.set_title(each.result.loss, fontsize=13)
        limit = 1.05 * each.training.features.abs().max().item()
        plane.set(xlim=(-limit, limit), ylim=(-limit, limit))
        plane.tick_params(labelsize=8)
        circle.set(xlim=(-1.32, 1.32), ylim=(-1.32, 1.32))
        circle.axis("off")
        circle.set_title(
            f"gap {each.result.smallest_gap:.1f}°, within identity {each.result.intra_class_angle:.1f}°", y=-0.08, fontsize=11
        )
        for identity in range(IDENTITIES):
            _draw_identity(plane, circle, each.training, identity)
    return figure


def _draw_identity(plane, circle, training, identity):
    color = f"C{identity}"
    features = training.features[training.labels == identity]
    unit, direction = F.normalize(features), F.normalize(training.head.weight[identity].detach().cpu(), dim=0)
    plane.scatter(*features.T, s=5, color=color, alpha=0.6, linewidths=0)
    circle.plot([0, direction[0]], [0, direction[1]], color=color, linewidth=1.2)
    circle.scatter(*unit.T, s=22, color=color, alpha=0.35, linewidths=0)
    centre, start, end = _region(features)
    arc = torch.linspace(start, end, 50).deg2rad()
    circle.plot(1.09 * arc.cos(), 1.09 * arc.sin(), color=color, linewidth=3.5, solid_capstyle="butt")
    x, y = 1.23 * math.cos(math.radians(centre)), 1.23 * math.sin(math.radians(centre))
    circle.text(x, y, str(identity), color=color, ha="center", va="center", fontsize=12)


def table(results):
    """Lines of text."""
    yield f"Toy experiment of the paper: digits 0 to 7, 2-D features, s = {SCALE:g}, the middle of three runs (toy_features.png)"
    yield f"  {'loss':<14}{'smallest gap':>14}{'intra-class angle':>20}{'held-out accuracy':>20}"
    for loss, gap, angle, accuracy in results:
        yield f"  {loss:<14}{gap:>13.1f}°{angle:>19.2f}°{accuracy:>20.1%}"
