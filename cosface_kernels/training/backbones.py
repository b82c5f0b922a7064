"""Networks from an image (N, 3, S, S) in [-1, 1] to features (N, D), by name, and those that a run has trained."""

import importlib
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..checkpoint import latest_checkpoint, load_checkpoint
from . import config as settings
from .config import ConfigError

IRESNET = {"iresnet18": (2, 2, 2, 2), "iresnet50": (3, 4, 14, 3), "iresnet100": (3, 13, 30, 3)}
SPHERE = {"sphere4": (0, 0, 0, 0), "sphere20": (1, 2, 4, 1), "sphere64": (3, 8, 16, 3)}


def build(name, embedding_size, image_size):
    """The nn.Module that `backbone=name` means: small, iresnet18/50/100, sphere4/20/64, timm:NAME, or MODULE:FUNCTION.

    FUNCTION is called with embedding_size and image_size, and returns the module.

    Raises:
        ConfigError: there is none of that name.
    """
    if name == "small":
        return Small(embedding_size, image_size)
    if name in IRESNET:
        return IResNet(IRESNET[name], embedding_size, image_size)
    if name in SPHERE:
        return Sphere(SPHERE[name], embedding_size, image_size)
    module, colon, function = name.partition(":")
    if not colon:
        names = ", ".join(["small", *IRESNET, *SPHERE])
        raise ConfigError(f"backbone must be one of {names}, timm:NAME or MODULE:FUNCTION, got {name!r}")
    try:
        make = partial(_timm, function) if module == "timm" else getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"backbone={name} cannot be imported: {error}; its module must be on PYTHONPATH or installed"
        ) from error
    try:
        backbone = make(embedding_size=embedding_size, image_size=image_size)
        with torch.no_grad():
            images = torch.zeros(2, 3, image_size, image_size, dtype=torch.float32, device="cpu")
            shape = tuple(backbone.eval()(images).shape)
    except ConfigError:
        raise
    except Exception as error:  # a function of somebody else's
        raise ConfigError(
            f"backbone={name} fails, called with embedding_size={embedding_size} and image_size={image_size}, or its module with "
            f"two images: {type(error).__name__}: {error}"
        ) from error
    if shape != (2, embedding_size):
        raise ConfigError(f"backbone={name} makes {shape} of two images, and (2, {embedding_size}) is wanted")
    return backbone.train()


def load_backbone(run):
    """(backbone on the CPU in eval mode, the run's Config) of the latest checkpoint of a run's folder; of its EMA if it has one.

    Raises:
        FileNotFoundError: the folder is no run, or has no checkpoint yet.
        CorruptCheckpointError: a file of the checkpoint is damaged.
    """
    run = Path(run)
    config = settings.parse([str(settings.of_run(run))])
    found = latest_checkpoint(run / "checkpoints")
    if found is None:
        raise FileNotFoundError(f"{run} has no checkpoint yet: `cosface train --resume out={run}` goes on with it")
    part = "backbone" if config.ema is None else "ema"
    backbone = build(config.backbone, config.embedding_size, config.image_size)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*random number generators were not restored")
        load_checkpoint(found, nn.ModuleDict({part: backbone}), strict=False)
    return backbone.eval(), config


def _timm(name, embedding_size, image_size):
    try:
        import timm
    except ImportError:
        raise ConfigError(f"backbone=timm:{name} needs timm, which is not installed: pip install timm") from None
    try:
        return timm.create_model(name, num_classes=embedding_size, img_size=image_size)
    except TypeError:  # a network for images of any size
        return timm.create_model(name, num_classes=embedding_size)
    except RuntimeError as error:
        raise ConfigError(f"backbone=timm:{name} cannot be made: {error}; timm.list_models() has the names") from error


def _halved(size, times):
    """The size after so many convolutions of stride 2."""
    return -(-size // 2**times)


class Small(nn.Sequential):
    """Five convolutions, for images of 16 to 64 pixels: half a million parameters at 32 pixels and D = 128."""

    def __init__(self, embedding_size, image_size):
        strides = (1, 2, 1, 2, 1) if image_size <= 40 else (2, 2, 1, 2, 1)
        super().__init__(*convolutions((24, 48, 48, 96, 96), strides, embedding_size, image_size))


def convolutions(channels, strides, embedding_size, image_size):
    """Layers from an image to features: convolutions to these channels, with these strides, and a linear layer."""
    layers = []
    for inputs, outputs, stride in zip((3, *channels), channels, strides, strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.PReLU(outputs)]
    size = channels[-1] * _halved(image_size, strides.count(2)) ** 2
    return [*layers, nn.Flatten(), nn.Linear(size, embedding_size, bias=False), nn.BatchNorm1d(embedding_size)]


class IResNet(nn.Module):
    """InsightFace's improved ResNet, with its names of parameters, so that its published weights load.

    Source: deepinsight/insightface, recognition/arcface_torch/backbones/iresnet.py.
    """

    def __init__(self, blocks, embedding_size, image_size=112):
        super().__init__()
        self.conv1, self.bn1, self.prelu = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)
        channels = (64, 64, 128, 256, 512)
        for number, count in enumerate(blocks, 1):
            first = IResNetBlock(channels[number - 1], channels[number], 2)
            rest = [IResNetBlock(channels[number], channels[number], 1) for _ in range(count - 1)]
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
        self.bn2 = nn.BatchNorm2d(512)
        self.fc = nn.Linear(512 * _halved(image_size, 4) ** 2, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        self.features.weight.requires_grad = False
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0, 0.1)

    def forward(self, x):
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.bn2(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
        return self.features(self.fc(x.flatten(1)))


class IResNetBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn2, self.prelu = nn.BatchNorm2d(outputs), nn.PReLU(outputs)
        self.conv2, self.bn3 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        path = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return path + (x if self.downsample is None else self.downsample(x))


class Sphere(nn.Sequential):
    """The paper's CNN (sphere64: 64 layers) and its shorter relatives: convolutions and PReLU, no batch statistics.

    Source: CosFace, arXiv 1801.09414, section 4.1, which takes it from SphereFace, arXiv 1704.08063, table 2.
    """

    def __init__(self, blocks, embedding_size, image_size):
        channels, layers = (3, 64, 128, 256, 512), []
        for inputs, outputs, count in zip(channels, channels[1:], blocks, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.PReLU(outputs), *(SphereBlock(outputs) for _ in range(count))]
            nn.init.xavier_uniform_(layers[-2 - count].weight)
        super().__init__(*layers, nn.Flatten(), nn.Linear(512 * _halved(image_size, 4) ** 2, embedding_size))


class SphereBlock(nn.Sequential):
    def __init__(self, channels):
        layers = [layer for _ in range(2) for layer in (nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.PReLU(channels))]
        super().__init__(*layers)
        for convolution in (self[0], self[2]):
            nn.init.normal_(convolution.weight, 0, 0.01)

    def forward(self, x):
        return x + super().forward(x)
