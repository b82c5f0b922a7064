"""Image files: decoding them, and a folder of them as a source (data.py says what that is)."""

import io
import os

import numpy as np
import torch

from .config import ConfigError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")


class Files:
    """A source of image files. A subclass has encoded(index) -> (name, bytes or the error in their place, label)."""

    def batch(self, indices):
        images, labels, damaged = [], [], {}
        for index in indices:
            name, data, label = self.encoded(index)
            try:
                images.append(decode(data, self.image_size))
                labels.append(label)
            except Exception as error:  # a decoder of damaged bytes may raise anything
                damaged[int(index)] = str(name), f"{type(error).__name__}: {error}"
        none = torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8, device="cpu")
        stacked = torch.stack(images) if images else none
        return stacked, torch.tensor(labels, dtype=torch.int64, device="cpu"), damaged

    def remarks(self):
        """Lines of text that tell a user what may be unknown of the data. A subclass has named(label)."""
        counts = np.bincount(self.labels)
        if len(alone := np.flatnonzero(counts == 1)):
            yield (
                f"{len(alone)} of {np.count_nonzero(counts)} identities have one image, such as {self.named(alone[0])}: "
                "a class learns little from it; add images, or leave it out"
            )


class Folder(Files):
    """A folder with a folder of images for each identity; identities are numbered in the order of their names."""

    def __init__(self, path, image_size):
        self.path, self.image_size, self.names, labels, self.identities = path, image_size, [], [], []
        for folder in sorted(each.name for each in os.scandir(path) if each.is_dir()):
            found = sorted(each.name for each in os.scandir(path / folder) if each.name.lower().endswith(IMAGES))
            if found:
                self.names += [f"{folder}/{name}" for name in found]
                labels += [len(self.identities)] * len(found)
                self.identities.append(folder)
        self.labels, self.num_classes = np.array(labels, dtype=np.int64), len(self.identities)
        if not self.names:
            raise ConfigError(
                f"data: {path} has no images: it needs a folder for each identity, with {', '.join(IMAGES)} files in it"
            )

    def __len__(self):
        return len(self.names)

    def encoded(self, index):
        name = self.path / self.names[index]
        try:
            return name, name.read_bytes(), int(self.labels[index])
        except OSError as error:
            return name, error, 0

    def named(self, label):
        return self.path / self.identities[label]


def decode(data, size):
    """uint8 (3, size, size) of an image file's bytes, or raises the error that took their place."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(data, Exception):
        raise data
    try:
        opened = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:  # its own message has an address, which is another each time
        raise ValueError(f"its {len(data):,} bytes are no image that Pillow knows") from None
    with opened as image:
        image = image.convert("RGB")
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
