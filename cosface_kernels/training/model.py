"""The objects that a config trains: backbone, head, optimisers, and how learning rate and margin move with the step."""

import ast
import copy
import dataclasses
import math

import torch
import torch.distributed as dist
from torch import nn

from .. import margins
from ..distributed.dtensors import first_row
from ..heads import float8
from ..heads.sharded import ShardedMarginSoftmaxLoss
from ..ops.formats import TABLE_FORMATS
from ..ops.memory import total_memory
from ..optim import FusedAdamW, FusedSGD
from . import backbones, faces
from .config import ConfigError

_TABLE, _ROWS = 5, 4096  # the stream of random numbers of the class table, and how many rows one generator draws


class Model(nn.Module):
    """backbone, head and, with config.ema, the running mean of the backbone: what a checkpoint holds."""

    def __init__(self, config, num_classes, device, ranks):
        super().__init__()
        _check_memory(config, num_classes, device, ranks)
        torch.manual_seed(config.seed)
        self.backbone = backbones.build(config.backbone, config.embedding_size, config.image_size)
        if ranks.size > 1 and config.sync_batchnorm:
            sync_batchnorm(self.backbone)
        elif config.batch_size == config.accumulate * ranks.size:
            _check_alone(config, self.backbone)
        self.backbone.to(device)
        self.head = _head(config, num_classes, device)
        if config.ema is not None:
            self.ema = copy.deepcopy(self.backbone).requires_grad_(False).eval()

    @torch.no_grad()
    def update_ema(self, decay):
        """Move the running mean towards the backbone; its statistics are the backbone's present ones."""
        here, mean = self.backbone.parameters(), self.ema.parameters()
        torch._foreach_lerp_(list(mean), list(here), 1 - decay)
        for own, new in zip(self.ema.buffers(), self.backbone.buffers(), strict=True):
            own.copy_(new)


def _check_memory(config, num_classes, device, ranks):
    """Raise where the class table alone is larger than the memory: the labels are at fault, as a rule."""
    size = num_classes * config.centers_per_class * config.embedding_size
    size *= TABLE_FORMATS[config.table_format].itemsize
    there = total_memory(device) * ranks.size
    if size > there:
        raise ConfigError(
            f"data: {num_classes:,} identities need a class table of {size / 1e9:,.1f} GB, and the memory has "
            f"{there / 1e9:,.1f} GB: number the identities from 0 without gaps; `cosface plan` says what fits"
        )


def _check_alone(config, backbone):
    """Raise where one image at a time is too few for the backbone's batch statistics."""
    images = torch.zeros(1, 3, config.image_size, config.image_size, dtype=torch.float32, device="cpu")
    try:
        copy.deepcopy(backbone).train()(images)
    except ValueError as error:
        raise ConfigError(
            f"batch_size={config.batch_size} gives {config.backbone} one image at a time, and its batch statistics need two: a "
            "larger batch_size, or a smaller accumulate"
        ) from error


def _head(config, num_classes, device):
    options = {name: getattr(config, name) for name in ("scale", "centers_per_class", "sample_rate", "table_format")}
    margin = margin_of(config.margin)
    try:
        head = ShardedMarginSoftmaxLoss(config.embedding_size, num_classes, margin=margin, device=device, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the head cannot be made: {error}") from error
    rows, row_scale, first = head.placement.local(head.weight), head._row_scale(), first_row(head.weight)
    with torch.no_grad():  # by blocks, so that the table does not depend on the number of processes
        for block in range(first // _ROWS, -(-(first + len(rows)) // _ROWS)):
            key = int(faces.mix(config.seed, _TABLE, block) >> 1)
            block_rows = torch.empty(_ROWS, config.embedding_size, dtype=torch.float32, device="cpu")
            drawn = block_rows.normal_(std=0.01, generator=torch.Generator().manual_seed(key))
            start = block * _ROWS
            low, high = max(first, start), min(first + len(rows), start + _ROWS)
            float8.put(rows, row_scale, slice(low - first, high - first), drawn[low - start : high - start])
    return head


def margin_of(text):
    """The margin of a text such as "ArcFace(0.5)" or "AdaFace(m=0.4, h=0.333)". Nothing is run but a constructor of margins."""
    kinds = {
        kind.__name__: kind for kind in vars(margins).values() if isinstance(kind, type) and issubclass(kind, margins.Margin)
    }
    kinds.pop("Margin")
    try:
        call = ast.parse(text, mode="eval").body
        name = call.func if isinstance(call, ast.Call) else call
        make = kinds[name.id]
    except (SyntaxError, KeyError, AttributeError):
        raise ConfigError(f'margin must be one of {", ".join(kinds)}, as in margin="ArcFace(0.5)", got {text!r}') from None
    try:
        arguments = [ast.literal_eval(each) for each in getattr(call, "args", ())]
        options = {each.arg: ast.literal_eval(each.value) for each in getattr(call, "keywords", ())}
    except ValueError:
        raise ConfigError(f"margin={text!r}: its arguments must be plain numbers, such as 0.5") from None
    try:
        return make(*arguments, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"margin={text!r}: {error}") from error


def optimizers(config, model):
    """{"backbone": ..., "head": ...}; the table's is fused unless config.fused is false."""
    is_sgd = config.optimizer == "sgd"
    plain, fused = (torch.optim.SGD, FusedSGD) if is_sgd else (torch.optim.AdamW, FusedAdamW)
    options = {"lr": config.lr, "weight_decay": config.weight_decay} | ({"momentum": config.momentum} if is_sgd else {})
    of_fused = {"state_format": config.state_format, "seed": config.seed}
    table, trained = model.head.parameters(), [each for each in model.backbone.parameters() if each.requires_grad]
    head = fused(table, **options, **of_fused) if config.fused else plain(table, **options)
    return {"backbone": plain(trained, **options), "head": head}


def learning_rate(config, step, total):
    """The learning rate of step 0 .. total - 1."""
    warm = config.warmup * total
    if step < warm:
        return config.lr * min(1.0, (step + 1) / warm)
    part = (step - warm) / max(total - warm, 1)
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * part)) / 2
    if config.schedule == "poly":
        return config.lr * (1 - part) ** 2
    return config.lr * 0.1 ** (sum(step >= each * total for each in config.milestones) if config.schedule == "step" else 0)


def margin_at(config, margin, step, total):
    """The margin of a step, while config.margin_warmup lets m rise from 0."""
    if not config.margin_warmup:
        return margin
    return dataclasses.replace(margin, m=margin.m * min(1.0, (step + 1) / (config.margin_warmup * total)))


def check_margin_warmup(config, margin):
    """Raise unless the margin vanishes at m = 0."""
    if config.margin_warmup and not isinstance(margin, margins.CosFace | margins.ArcFace | margins.AdaFace):
        raise ConfigError(
            f"margin_warmup needs CosFace, ArcFace or AdaFace, whose m may rise from 0, got margin={config.margin!r}"
        )


def sync_batchnorm(module):
    """Make each usual BatchNorm in the module a SyncedBatchNorm; its parameters and buffers stay as they are. One with a forward
    of its own, such as BatchNorm with an activation, stays what it is, with each process's own statistics.
    """
    for each in module.modules():
        usual = getattr(type(each), "forward", None) is nn.modules.batchnorm._BatchNorm.forward
        if usual and each.affine and each.track_running_stats and each.momentum:
            each.__class__ = SyncedBatchNorm


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the rows of all processes, on a CPU too, where torch.nn.SyncBatchNorm does not run."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        places = [0, *range(2, x.dim())]
        wide = x.float()
        count = wide.new_full((1,), x.numel() / x.shape[1])
        sums = torch.cat([count, wide.sum(places), wide.square().sum(places)])
        count, total, squares = _Sum.apply(sums).split([1, x.shape[1], x.shape[1]])
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        shape = [1, -1] + [1] * (x.dim() - 2)
        factor = (variance + self.eps).rsqrt() * self.weight
        return ((wide - mean.view(shape)) * factor.view(shape) + self.bias.view(shape)).to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over the processes; so is its gradient, as each process has a loss's gradient for its own rows."""

    @staticmethod
    def forward(ctx, numbers):
        total = numbers.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad
