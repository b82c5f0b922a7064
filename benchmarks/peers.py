"""What is compared: callables (features, weight, labels) -> mean loss, each ready for backward."""

from functools import partial

import torch
import torch.nn.functional as F

from cosface_kernels import cosface_loss


def plain(features, weight, labels, *, scale=64.0, margin=0.35):
    """What people write today."""
    cosines = F.linear(F.normalize(features), F.normalize(weight))
    return F.cross_entropy(scale * (cosines - margin * F.one_hot(labels, len(weight))), labels)


def _autocast(function):
    def wrapped(features, weight, labels):
        with torch.autocast(features.device.type, dtype=torch.bfloat16):
            return function(features, weight, labels)

    return wrapped


PEERS = {
    "plain PyTorch": plain,
    "plain PyTorch, bf16 autocast": _autocast(plain),
    "cosface_loss": cosface_loss,
    "cosface_loss, memory_budget=0": partial(cosface_loss, memory_budget=0),
    "cosface_loss, bf16 autocast": _autocast(cosface_loss),
    "cosface_loss, bf16 autocast, memory_budget=0": _autocast(partial(cosface_loss, memory_budget=0)),
}


def inputs(num_rows, num_classes, size, device="cpu", seed=0):
    """(features, weight, labels) with classes in groups of four at cosine 0.8: negatives that matter, as in training."""
    generator = torch.Generator().manual_seed(seed)

    def units(*shape):
        return F.normalize(torch.randn(*shape, generator=generator))

    groups = units(-(-num_classes // 4), size)
    weight = 0.8**0.5 * groups[torch.arange(num_classes) // 4] + 0.2**0.5 * units(num_classes, size)
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    features = 0.8**0.5 * groups[labels // 4] + 0.2**0.5 * units(num_rows, size)
    return features.to(device).requires_grad_(), weight.to(device).requires_grad_(), labels.to(device)


def step(function, features, weight, labels):
    """One forward and backward; (loss, dX, dW)."""
    loss = function(features, weight, labels)
    return loss.detach(), *torch.autograd.grad(loss, (features, weight))
