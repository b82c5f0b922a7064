"""The images of a step, their order and their augmentation, all functions of (seed, step).

A source has `num_classes`, `len()`, `labels` (N,), and `batch(indices)` -> (images uint8 (N, 3, S, S), labels int64, damaged):
damaged images are left out of the batch and named, {index: (name, reason)}.
"""

import signal
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from . import faces
from .config import ConfigError
from .files import Folder
from .records import Records, Shards

_AUGMENTATION = 4  # a stream of random numbers beside those of faces.py
IMAGES_PER_FACE = 20


def open_source(config):
    """The source that config.data names."""
    name, _, rest = config.data.partition(":")
    if name == "faces":
        return Faces(rest, config.image_size, config.seed)
    if config.data == "digits":
        return Digits(config.image_size)
    path = Path(config.data)
    if path.suffix == ".rec" or (path / "train.rec").exists():
        return Records(path if path.suffix == ".rec" else path / "train.rec", config.image_size)
    if path.suffix == ".tar" and path.is_file():
        return Shards([path], config.image_size)
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        return Shards(shards, config.image_size) if shards else Folder(path, config.image_size)
    what = "a file of another kind" if path.exists() else "not there"
    raise ConfigError(
        f"data: {path} is {what}; data takes faces:IDENTITIES, digits, a folder of folders of images, one for each identity, "
        "a .rec file, or tar shards"
    )


class Faces:
    """faces:IDENTITIES[:IMAGES]: rendered, IMAGES (20) of each identity."""

    def __init__(self, sizes, image_size, seed):
        try:
            self.num_classes, self.images = ([int(part) for part in sizes.split(":")] + [IMAGES_PER_FACE])[:2]
            if min(self.num_classes, self.images) < 1 or sizes.count(":") > 1:
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"data=faces:{sizes} must be faces:IDENTITIES or faces:IDENTITIES:IMAGES, as in faces:100:50"
            ) from None
        self.image_size, self.seed = image_size, seed

    @property
    def labels(self):
        return np.arange(len(self)) // self.images

    def __len__(self):
        return self.num_classes * self.images

    def batch(self, indices):
        labels, images = np.divmod(np.asarray(indices), self.images)
        return torch.from_numpy(faces.render(labels, images, self.image_size, self.seed)), torch.from_numpy(labels), {}


class Digits:
    """scikit-learn's handwritten digits, 1,797 of ten classes."""

    num_classes = 10

    def __init__(self, image_size):
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images = torch.tensor(images, dtype=torch.float32, device="cpu").view(-1, 1, 8, 8) * (255 / 16)
        images = F.interpolate(images, (image_size, image_size), mode="bilinear")
        self.images = images.round().to(torch.uint8).expand(-1, 3, -1, -1)
        self.labels = torch.tensor(labels, dtype=torch.int64, device="cpu")

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        return self.images[indices], self.labels[indices], {}


def prepare(images):
    """float32 in [-1, 1], a backbone's input, of uint8 images."""
    return images.float() / 127.5 - 1


def order(count, config, ranks, start, total):
    """Yield (epoch, indices) of each piece of each step, this rank's part of it: batch t is a function of seed and t alone."""
    size, steps, shuffled_for = config.batch_size, count // config.batch_size, None
    for step in range(start, total):
        epoch, place = divmod(step, steps)
        if epoch != shuffled_for:
            shuffled_for = epoch
            generator = torch.Generator().manual_seed(int(faces.mix(config.seed, epoch) >> np.uint64(1)))
            shuffled = torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu").numpy()
        own = shuffled[place * size :][:size].reshape(config.accumulate, ranks.size, -1)
        for piece in own[:, ranks.rank]:
            yield epoch, piece


class _Batches(Dataset):
    def __init__(self, source, config):
        self.source, self.config = source, config

    def __getitem__(self, key):
        epoch, indices = key
        images, labels, damaged = self.source.batch(indices)
        # Not the places of damaged images, so that what happens to one does not depend on the others.
        whole = [index for index in indices if index not in damaged]
        numbers = faces.uniform(4, self.config.seed, _AUGMENTATION, epoch, whole)
        return augment(images, self.config, numbers), labels, damaged


def batches(source, config, order, pin=False):
    """Iterator of (images, labels, damaged), in this process or in config.workers others."""
    options = {"num_workers": config.workers, "worker_init_fn": _ignore_signals, "pin_memory": pin}
    # A generator of its own: the global one belongs to the backbone, and its state to the checkpoint.
    return DataLoader(_Batches(source, config), None, sampler=order, generator=torch.Generator(), **options)


def _ignore_signals(_):
    """Let a worker outlive Ctrl-C, which reaches every process of a terminal: the main one saves, and needs it until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def augment(images, config, numbers):
    """Mirror, shift and blur uint8 images by random numbers (4, N) in [0, 1)."""
    mirrored, right, down, blurred = numbers
    size = images.shape[-1]
    if config.flip:
        images = torch.where(torch.from_numpy(mirrored < 0.5)[:, None, None, None], images.flip(3), images)
    if config.crop:
        places = [torch.from_numpy(np.rint((each * 2 - 1) * config.crop * size)).long()[:, None] for each in (down, right)]
        steps = torch.arange(size, dtype=torch.int64, device="cpu")
        rows, columns = ((steps + place).clamp(0, size - 1) for place in places)
        each = torch.arange(len(images), dtype=torch.int64, device="cpu")[:, None, None]
        images = images[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    for factor, low, high in ((2, 0, 0.5), (4, 0.5, 1)):
        chosen = torch.from_numpy((low * config.downscale <= blurred) & (blurred < high * config.downscale)).nonzero()[:, 0]
        if len(chosen):
            small = F.interpolate(images[chosen].float(), (size // factor, size // factor), mode="area")
            images = images.index_copy(0, chosen, F.interpolate(small, (size, size), mode="bilinear").round().to(torch.uint8))
    return images
