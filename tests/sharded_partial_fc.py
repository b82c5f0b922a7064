"""Checks of sharded_worker.py: InsightFace's PartialFC_V2, whose ranks have plain tensors."""

import torch
import torch.distributed as dist
from rounding import NUM_CLASSES, SIZE, assert_close, tolerance
from sharded_world import FUSED, CosFace, assert_equals_single, check, draw, partial_fc, raises, single, theirs

from cosface_kernels import (
    cosface_loss,
    save_checkpoint,
)
from cosface_kernels.compat import insightface


@check("PartialFC_V2", 1, 2, 3)
def _(world):
    world.shard = lambda table: theirs(table, world.rank, world.size)
    # 301 classes: shards of 151 and 150, or of 101, 100 and 100; one class: empty ones.
    for num_classes in (301, 1):
        features, weight, labels = draw(num_classes)
        labels[3] = -1
        module = insightface.PartialFC_V2(CosFace(), SIZE, num_classes).double()
        assert [*module.state_dict()] == ["weight"] and type(module.weight.data) is torch.Tensor
        module.load_state_dict({"weight": world.shard(weight)})
        module.ddp_average = False
        assert_equals_single(world, module, features, weight, labels, margin=0.4, ignore_index=-1)
        module.ddp_average = True
    local = world.mine(features).requires_grad_()
    module(local, world.mine(labels)[:, None]).backward()
    _, dx, _ = single(weight, features, labels=labels, margin=0.4, ignore_index=-1)
    assert_close(local.grad, world.size * world.mine(dx), tolerance(torch.float64), size=dx.norm())
    assert module.weight.grad.shape == module.weight.shape


@check("PartialFC_V2 keeps their constructor", 1, 2)
def _(world):
    torch.manual_seed(1)
    module = insightface.PartialFC_V2(CosFace(), 16, 300, 1.0, True)
    assert (module.embedding_size, module.num_classes, module.fp16, module.rank) == (16, 300, True, world.rank)
    assert module.num_local == 300 // world.size and module.class_start == module.num_local * world.rank
    features, weight, labels = draw(dtype=torch.float32)
    module.load_state_dict({"weight": theirs(weight, world.rank, world.size)})
    loss = module(world.mine(features), world.mine(labels))
    with torch.autocast("cpu", torch.bfloat16):
        exact = cosface_loss(features, weight, labels, margin=0.4)
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < abs(loss - cosface_loss(features, weight, labels, margin=0.4)) / 4
    others = [torch.empty(300 // world.size, 16) for _ in range(world.size)]
    dist.all_gather(others, insightface.PartialFC_V2(CosFace(), 16, 300).weight.detach())
    assert len(torch.cat(others).unique(dim=0)) == 300


@check("PartialFC_V2 refuses what would lose rows", 2)
def _(world):
    module = insightface.PartialFC_V2(CosFace(), SIZE, NUM_CLASSES)
    for change in (lambda: module.grow(3), lambda: module.remove([0])):
        with raises(NotImplementedError, "on several ranks cannot be changed in place"):
            change()
    folder = world.done.with_suffix(".checkpoint")
    with raises(ValueError, "save its state_dict.. on every rank"):
        save_checkpoint(folder, module)
    assert not folder.exists() and len(module.weight) == module.num_local


@check("PartialFC_V2 samples", 1, 2)
def _(world):
    """As theirs: a rank draws of its own classes, and the gradient is dense; two backward passes add up."""
    features, weight, labels = draw()
    module = insightface.PartialFC_V2(CosFace(), SIZE, NUM_CLASSES, 0.2).double()
    assert [*module.state_dict()] == ["weight"]
    module.load_state_dict({"weight": theirs(weight, world.rank, world.size)})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(2):
        module(world.mine(features), world.mine(labels)).backward()
    touched = module.weight.grad.any(1)
    assert not module.weight.grad.is_sparse and 0.2 * module.num_local <= touched.sum() < 0.5 * module.num_local
    own = labels[(labels >= module.class_start) & (labels < module.class_start + module.num_local)] - module.class_start
    assert touched[own].all()
    optimizer.step()


@check("PartialFC_V2 with FusedSGD", 1, 2, 3)
def _(world):
    """A plain tensor of this rank's rows: what torch.optim makes of it."""
    features, weight, labels = draw(301)
    fused, options = FUSED["FusedSGD"]
    modules = [partial_fc(world, weight) for _ in range(2)]
    kinds = zip(modules, (fused, torch.optim.SGD), strict=True)
    pairs = [(module, kind(module.parameters(), **options)) for module, kind in kinds]
    for step in range(3):
        for module, optimizer in pairs:
            module(world.mine(features.roll(step, 1)), world.mine(labels)).backward()
            optimizer.step()
            optimizer.zero_grad()
    results = [(module.weight.detach(), optimizer.state[module.weight]["momentum_buffer"]) for module, optimizer in pairs]
    for ours, exact in zip(*results, strict=True):
        assert_close(ours, exact, 1e-11)
