"""One training of the paper's experiments with the paper's settings, on any data of `cosface train`; judged on lists of pairs.

    64 layers, 512 images a step, D = 512, s = 64; SGD with lr 0.1, divided by 10 after 16, 24 and 28 of 30 thousand steps
    test features: those of an image and of its mirror image side by side

Source: CosFace, arXiv 1801.09414, section 4.1, for CASIA-WebFace. Not the paper's are: square images of 112 pixels, and batches
of 128 identities with 4 images each, which the losses of pairs need; all losses get the same.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ..checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from ..distributed.ranks import ONE_PROCESS
from . import backbones, evaluate, pairs, recipes
from .config import Config
from .data import batches, open_source, prepare
from .embed import embed
from .log import Log

STEPS = 30_000


class Settings(NamedTuple):
    """The settings of a training; the paper's by default."""

    backbone: str = "sphere64"
    image_size: int = 112
    embedding_size: int = 512
    scale: float = 64.0  # of losses of cosines
    identities: int = 128  # of a batch
    images: int = 4  # of each
    lr: float = recipes.LEARNING_RATE
    milestones: tuple = (16 / 30, 24 / 30, 28 / 30)
    momentum: float = recipes.MOMENTUM
    weight_decay: float = recipes.WEIGHT_DECAY
    checkpoint_every: int = 1000


PAPER = Settings()


def settings(steps):
    """The settings that a result depends on, beside data, loss and seed."""
    known = PAPER._asdict() | {"steps": steps, "milestones": list(PAPER.milestones)}
    del known["checkpoint_every"]
    return known


def train(make_loss, data, seed, steps, folder):
    """The network, in eval mode, trained with make_loss(classes, recipes.Sizes) on `data`, as `cosface train` names it.

    folder: where its checkpoints are; a training that was stopped goes on from the last.

    Raises:
        ConfigError, RuntimeError: the data cannot be used.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = Config(data=data, image_size=PAPER.image_size, seed=seed, flip=True, workers=min(8, os.cpu_count()))
    source = open_source(config)
    torch.manual_seed(seed)
    network = backbones.build(PAPER.backbone, PAPER.embedding_size, PAPER.image_size)
    loss = make_loss(source.num_classes, recipes.Sizes(PAPER.embedding_size, PAPER.scale))
    model = nn.ModuleDict({"network": network, "loss": loss}).to(device)
    optimizer = torch.optim.SGD(model.parameters(), PAPER.lr, PAPER.momentum, weight_decay=PAPER.weight_decay)
    found = latest_checkpoint(folder)
    start = load_checkpoint(found, model, optimizer)["step"] if found else 0
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder, start, ONE_PROCESS, Config(tensorboard=False))
    loader = batches(source, config, order(source, seed, start, steps), device.type == "cuda")
    with log.progress(steps, start) as bar:
        for step, (images, labels, damaged) in enumerate(loader, start):
            log.damaged(damaged, config.max_damaged)
            optimizer.param_groups[0]["lr"] = PAPER.lr * 0.1 ** sum(step >= each * steps for each in PAPER.milestones)
            optimizer.zero_grad()
            value = loss(network(prepare(images.to(device))), labels.to(device))
            value.backward()
            optimizer.step()
            bar.update()
            if (step + 1) % PAPER.checkpoint_every == 0 or step + 1 == steps:
                if not value.isfinite():
                    raise FloatingPointError(
                        f"the loss of step {step + 1} is not finite, nothing since the last checkpoint is kept"
                    )
                save_checkpoint(folder / f"step-{step + 1}", model, optimizer, extra={"step": step + 1}, keep=1)
    return network.eval()


def order(source, seed, start, steps):
    """Yield (step, indices) of each batch, a function of the seed and the step."""
    labels = np.asarray(source.labels)
    kept = np.flatnonzero((labels >= 0) & (labels < source.num_classes))
    members = [each for each in recipes.members_of(labels[kept]) if len(each)]
    for step in range(start, steps):
        random = np.random.default_rng([seed, step])
        yield step, kept[recipes.batch(random, members, PAPER.identities, PAPER.images)]


def score(network, listed):
    """recipes.Scores of pairs.Pairs, as a dict: no ranks."""
    encoded = [image for template in listed.templates for image in template]
    scores = evaluate.scores_of(listed, embed(network, encoded, PAPER.image_size, "concat"))
    return recipes.scores_of(scores[listed.same], scores[~listed.same], scores, listed.same)._asdict()


def read(paths, images=None):
    """{name in reports: pairs.Pairs} of lists of pairs, all of them before hours of training.

    Raises:
        ValueError: a list cannot be used; the message names it.
    """
    found = {Path(path).stem: pairs.read(path, images) for path in paths}
    if len(found) < len(paths):
        raise ValueError(f"two lists of pairs have one name, which reports go by: {', '.join(map(str, paths))}")
    return found
