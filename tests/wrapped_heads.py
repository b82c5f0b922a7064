"""Checks of sharded_worker.py: heads inside and beside DistributedDataParallel, FSDP2 and GradScaler, on two ranks."""

import copy
import functools
import warnings

import pytest
import torch
import torch.distributed as dist
from rounding import assert_close, tolerance
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cosface_kernels import CosFaceLoss, FusedSGD, ShardedCosFaceLoss, cosface_loss
from cosface_kernels.compat import insightface

SIZE, CLASSES, ROWS = 16, 40, 8
CHECKS = {}  # name: function(world)


def check(name):
    return functools.partial(CHECKS.__setitem__, name)


class Model(torch.nn.Module):
    """A backbone, the same on all ranks, and a head, in one module as Lightning and accelerate want it."""

    def __init__(self, head):
        super().__init__()
        torch.manual_seed(5)
        self.backbone, self.head = torch.nn.Linear(SIZE, SIZE, dtype=torch.float64), head

    def forward(self, features, labels):
        return self.head(self.backbone(features), labels)


class Outer(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.models = torch.nn.ModuleList([model])

    def forward(self, *batch):
        return self.models[0](*batch)


def table():
    return torch.randn(CLASSES, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def filled(kind, **options):
    """A head with the rows of `table()`: this rank's, if it is sharded."""
    head = kind(SIZE, CLASSES, **{"dtype": torch.float64} | options)
    with torch.no_grad():
        local = head.weight.to_local() if hasattr(head.weight, "to_local") else head.weight
        local.copy_(table().chunk(dist.get_world_size())[dist.get_rank()] if len(local) < CLASSES else table())
    return head


def batches(seed=0):
    """Features (W, N, D) and labels (W, N) of all ranks."""
    generator, ranks = torch.Generator().manual_seed(seed), dist.get_world_size()
    features = torch.randn(ranks, ROWS, SIZE, generator=generator, dtype=torch.float64)
    return features, torch.randint(CLASSES, (ranks, ROWS), generator=generator)


def gradients():
    """[those of backbone and table] for the global mean, in one process."""
    features, labels = batches()
    plain, weight = Model(None).backbone, table().requires_grad_()
    loss = cosface_loss(plain(features.flatten(0, 1)), weight, labels.flatten())
    return torch.autograd.grad(loss, (*plain.parameters(), weight))


def assert_gradients(model):
    for parameter, exact in zip((*model.backbone.parameters(), model.head.weight), gradients(), strict=True):
        grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        assert_close(grad, exact, 10 * tolerance(torch.float64), size=exact.norm())


def backward_in_ddp(model, features, labels):
    wrapped = DistributedDataParallel(model)  # which averages as long as it lives
    wrapped(features, labels).backward()


def everywhere(tensor):
    """Whether a tensor is the same on all ranks, bit for bit."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, tensor.detach())
    return all(torch.equal(found[0], each) for each in found)


@check("a sharded head inside DDP")
def _(world):
    features, labels = (each[world.rank] for each in batches())
    model = Model(filled(ShardedCosFaceLoss))
    outer = Outer(copy.deepcopy(model))
    for wrapped, inner in ((model, model), (outer, outer.models[0])):
        backward_in_ddp(wrapped, features, labels)
        assert_gradients(inner)
    # The tables of a PartialFC_V2 have no DTensor to say that each rank has other rows.
    torch.manual_seed(world.rank)
    module = insightface.PartialFC_V2(world.margin_loss(), SIZE, CLASSES).double()
    before = module.weight.detach().clone()
    backward_in_ddp(Model(module), features, labels)
    assert torch.equal(module.weight, before) and not everywhere(module.weight.grad)
    # Another head in its place is averaged.
    model.head = CosFaceLoss(SIZE, CLASSES, dtype=torch.float64)
    DistributedDataParallel(model)
    assert everywhere(model.head.weight)


@check("a fused optimiser and a head inside DDP")
def _(world):
    features, labels = (each[world.rank] for each in batches())
    exact = gradients()[-1]
    model = Model(filled(ShardedCosFaceLoss))
    wrapped, optimizer = DistributedDataParallel(model), FusedSGD(model.head.parameters(), lr=1.0)
    wrapped(features, labels).backward()
    optimizer.step()
    assert_close(table() - model.head.weight.detach().full_tensor(), exact, 10 * tolerance(torch.float64), size=exact.norm())
    model = Model(filled(CosFaceLoss))
    wrapped, optimizer = DistributedDataParallel(model, find_unused_parameters=True), FusedSGD(model.head.parameters(), lr=1.0)
    with pytest.raises(RuntimeError, match=r"inside DistributedDataParallel.*ShardedCosFaceLoss"):
        wrapped(features, labels)


@check("a sampled head inside DDP and FSDP2")
def _(world):
    features, labels = (each[world.rank] for each in batches())
    inside, sharded, alone = (Model(filled(CosFaceLoss, sample_rate=0.3)) for _ in range(3))
    backward_in_ddp(inside, features, labels)
    fully_shard(sharded)(features, labels).backward()
    alone(features, labels).backward()
    assert alone.head.weight.grad.is_sparse
    for by_ddp, by_fsdp, own in zip(inside.parameters(), sharded.parameters(), alone.parameters(), strict=True):
        mean = own.grad.to_dense() / dist.get_world_size()
        dist.all_reduce(mean)
        for grad in (by_ddp.grad, by_fsdp.grad.full_tensor()):
            assert_close(grad, mean, tolerance(torch.float64), size=mean.norm())


@check("one optimiser and GradScaler over a backbone and a sharded head")
def _(world):
    """The InsightFace recipe. An infinity in one rank's rows of the table stops all ranks."""
    features, labels = (each[world.rank] for each in batches())
    for bad_rank in (None, 1):
        model = Model(filled(ShardedCosFaceLoss))
        backbone = DistributedDataParallel(model.backbone)
        optimizer = torch.optim.SGD([{"params": backbone.parameters()}, {"params": model.head.parameters()}], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        scaler.scale(model.head(backbone(features), labels)).backward()
        if world.rank == bad_rank:
            model.head.weight.grad.to_local()[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        if bad_rank is None:
            assert_gradients(model)
        before = model.backbone.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model.backbone.weight) == (bad_rank is not None)
        assert scaler.get_scale() == (256.0 if bad_rank is None else 128.0)


@check("FSDP2 around a model with a head")
def _(world):
    features, labels = (each[world.rank] for each in batches())
    model = Model(filled(ShardedCosFaceLoss))
    fully_shard(model, ignored_params={*model.head.parameters()})
    model(features, labels).backward()
    assert_gradients(model)
    model = Model(filled(CosFaceLoss))  # whole: the mean of the ranks' means is that of all rows, as they are equally many
    fully_shard(model)
    model(features, labels).backward()
    assert_gradients(model)
    with pytest.raises(RuntimeError, match="register_fsdp_forward_method"):
        model.head.topk(features, 2)


def trained_beside(world, head, kind, average=lambda parameters: None, same_batch=False):
    """[warnings that name ranks] of three steps with a head beside a DDP backbone."""
    backbone = DistributedDataParallel(Model(None).backbone)
    optimizers = torch.optim.SGD(backbone.parameters(), lr=0.1), kind(head.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for step in range(3):
            features, labels = (each[0 if same_batch else world.rank] for each in batches(step))
            head(backbone(features), labels).backward()
            average([*head.parameters()])
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            dist.barrier()
    return [each for each in heard if "differ after an optimiser step" in str(each.message)]


def averaged(parameters):
    for parameter in parameters:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


@check("plain tables that nobody averages")
def _(world):
    for kind in (FusedSGD, torch.optim.AdamW):
        assert len(trained_beside(world, filled(CosFaceLoss), kind)) == 1
    torch.manual_seed(world.rank)  # averaged, but never alike
    assert len(trained_beside(world, CosFaceLoss(SIZE, CLASSES, dtype=torch.float64), torch.optim.SGD, averaged)) == 1


@check("plain tables that agree")
def _(world):
    assert not trained_beside(world, filled(CosFaceLoss), torch.optim.SGD, averaged)
    assert not trained_beside(world, filled(CosFaceLoss), FusedSGD, same_batch=True)
    assert not trained_beside(world, DistributedDataParallel(filled(CosFaceLoss)), torch.optim.SGD)
    assert not trained_beside(world, filled(ShardedCosFaceLoss), FusedSGD)
    head = filled(CosFaceLoss)
    if world.rank == 0:  # it alone trains a head
        features, labels = (each[0] for each in batches())
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        head(features, labels).backward()
        optimizer.step()
