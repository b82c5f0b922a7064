"""Checks of sharded_worker.py: sampled classes, fused steps, storage formats and checkpoints of shards."""

import math

import torch
import torch.distributed as dist
from margin_rows import ROWS, batch, steepness
from rounding import NUM_CLASSES, SIZE, assert_close, tolerance
from sharded_world import FUSED, assert_equals_single, check, draw, fill, fused_pair, heads, partial_fc, raises, sharded
from torch.distributed.tensor import DTensor

from cosface_kernels import (
    CosFaceLoss,
    FusedSGD,
    ShardedCosFaceLoss,
    functional,
    load_checkpoint,
    save_checkpoint,
)
from cosface_kernels.distributed import dtensors
from cosface_kernels.heads import float8


@check("sampled shards want a fused optimiser", 2, 3)
def _(world):
    features, weight, labels = draw()
    head = sharded(world, weight, sample_rate=0.5, sample_seed=2**62)
    with raises(RuntimeError, "trains with FusedSGD or FusedAdamW alone"):
        head(world.mine(features), world.mine(labels))
    head.eval()
    assert_equals_single(world, head, features, weight, labels)
    head.train()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    head(world.mine(features), world.mine(labels)).backward()
    optimizer.step()


def sampled_like_one_process(name, correction, num_classes=NUM_CLASSES, num_labels=NUM_CLASSES, hard=False):
    """Two steps over what the ranks drew: the loss of all of it in one process, and SGD written out for its rows.

    hard: whether each class has two others that are drawn along with it, and with a correction one for each class.
    """

    def function(world):
        row = ROWS[name]
        features, *tables = batch(row, num_classes=num_classes)
        labels = tables.pop(1) % num_labels
        options = {"sample_rate": 0.2, "sample_seed": 3, "sample_correction": correction}
        head, _ = heads(world, row, tables, dtype=torch.float64, **options)
        certain = labels
        if hard:
            head.hard_classes = torch.randint(-1, num_classes, (num_classes, 2), generator=torch.Generator().manual_seed(2))
            certain = torch.cat([labels, head.hard_classes[labels].flatten().long()])
            certain = certain[certain >= 0]
        drawn, sample = [], head._sample
        head._sample = lambda *arguments: drawn.append(sample(*arguments)) or drawn[-1]
        optimizer = FusedSGD(head.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01)
        tables, momenta = [table.requires_grad_() for table in tables], [torch.zeros_like(table) for table in tables]
        for _ in range(2):
            relative = 10 * tolerance(torch.float64, steepness(row, features, tables[0].detach()))
            local, everything = world.mine(features).requires_grad_(), features.clone().requires_grad_()
            loss = head(local, world.mine(labels))
            loss.backward()
            optimizer.step()
            parts, held = [None] * world.size, world.shard(torch.arange(num_classes))
            here, by_class = drawn[-1]
            dist.all_gather_object(parts, (held[here], by_class) if len(held) else (held, torch.zeros(0)))
            num_certain = world.shard(certain.bincount(minlength=num_classes)).count_nonzero()
            most = len(labels) * (3 if hard else 1)
            assert len(parts[world.rank][0]) == min(max(most, round(0.2 * len(held)), 1), len(held))
            if hard and correction and len(held) > len(here) > num_certain:
                share = math.log((len(held) - num_certain) / (len(here) - num_certain))
                assert_close(by_class.sum(), torch.tensor(share * (len(here) - num_certain)), 1e-5)
            classes = torch.cat([classes for classes, _ in parts])
            assert torch.isin(certain, classes).all()
            exact = functional.margin_softmax_loss(
                *(everything, tables[0], labels),
                margin=row.margin,
                bias=tables[1] if row.bias else None,
                classes=classes,
                sample_correction=torch.cat([by_class for _, by_class in parts]) if hard and correction else correction,
                **row.options,
            )
            exact.backward()
            assert_close(loss.detach(), exact.detach(), relative, "loss")
            assert_close(local.grad, world.mine(everything.grad), relative, "dX", size=everything.grad.norm())
            rows = (classes[:, None] * row.centers + torch.arange(row.centers)).flatten()
            with torch.no_grad():
                for ours, table, momentum in zip(head.parameters(), tables, momenta, strict=True):
                    momentum[rows] = 0.9 * momentum[rows] + table.grad.to_dense()[rows] + 0.01 * table[rows]
                    table[rows] -= 0.5 * momentum[rows]
                    assert_close(ours.to_local(), world.shard(table), relative, "table", size=table.norm())
                    table.grad = None

    return function


for name in ("CosFace", "Softmax bias x3"):
    for correction in (False, True):
        what = f"{name}, sampled, as in one process" + ", corrected" * correction
        check(what, 2, 3)(sampled_like_one_process(name, correction))
# One class of the batch: a rank draws it alone, another draws one that is not, and the last has none to draw from.
check("CosFace, sampled where a shard is empty", 3)(sampled_like_one_process("CosFace", True, 4, 1))
check("CosFace, sampled with hard classes", 2, 3)(sampled_like_one_process("CosFace", True, num_labels=7, hard=True))
check("CosFace, sampled with hard classes where a shard is empty", 3)(sampled_like_one_process("CosFace", True, 4, 1, hard=True))


def fused_like_one_process(name, num_classes, margin="CosFace"):
    def function(world):
        kind, options = FUSED[name]
        features, weight, labels, *bias = batch(ROWS[margin], num_classes=num_classes)
        (head, optimizer), (whole, other) = fused_pair(world, (weight, *bias), options, kind, margin)
        for step in range(3):
            turned = features.roll(step, 1)
            local = world.mine(turned).requires_grad_()
            head(local, world.mine(labels)).backward()
            head(world.mine(turned), world.mine(labels.flip(0))).backward()
            whole(turned, labels).backward()
            whole(turned, labels.flip(0)).backward()
            assert all(parameter.grad is None for parameter in head.parameters()) and local.grad is not None
            for each in (optimizer, other):
                each.step()
                each.zero_grad()
        for ours, exact in zip(head.parameters(), whole.parameters(), strict=True):
            assert_close(ours.to_local().detach(), world.shard(exact.detach()), 1e-11, size=exact.detach().norm())
            for key, buffer in other.state[exact].items():
                if buffer.dim() and len(ours.to_local()):
                    found = optimizer.state[ours][key]
                    assert type(found) is DTensor and found.shape == buffer.shape
                    assert_close(found.to_local(), world.shard(buffer), 1e-11, size=buffer.norm())

    return function


for optimizer_name in FUSED:
    check(f"{optimizer_name} as in one process", 1, 2, 3)(fused_like_one_process(optimizer_name, NUM_CLASSES))
    check(f"{optimizer_name} where a shard is empty", 3)(fused_like_one_process(optimizer_name, 4))
    for name in ("Softmax bias", "AdaFace x3"):
        check(f"{optimizer_name} of {name} as in one process", 2, 3)(fused_like_one_process(optimizer_name, NUM_CLASSES, name))


def rounded_like_one_process(name):
    """Random bits belong to a row of the whole table: sums in another order tip few, those of another row many."""

    def function(world):
        kind, options = FUSED[name]
        features, weight, labels = draw(dtype=torch.float32)
        options = options | {"state_format": "int8", "seed": 5}
        (head, optimizer), (whole, other) = fused_pair(world, [weight], options, kind, dtype=None, table_format="bfloat16")
        for step in range(3):
            turned = features.roll(step, 1)
            head(world.mine(turned), world.mine(labels)).backward(), whole(turned, labels).backward()
            optimizer.step(), other.step()
        local, exact = head.weight.to_local().detach(), world.shard(whole.weight.detach())
        assert local.dtype == torch.bfloat16 and (local != world.shard(weight.bfloat16())).double().mean() > 0.5
        assert (local != exact).double().mean() < 0.01
        for key, buffer in other.state[whole.weight].items():
            found = optimizer.state[head.weight][key]
            if buffer.dim() == 2:
                assert found.dtype == buffer.dtype and not buffer.is_floating_point()
                assert (found.to_local() != world.shard(buffer)).double().mean() < 0.01
            elif buffer.dim():
                assert_close(found.to_local(), world.shard(buffer).double(), 1e-3, key)

    return function


for optimizer_name in FUSED:
    check(f"{optimizer_name} rounds as in one process", 2, 3)(rounded_like_one_process(optimizer_name))


@check("a shard of 16 bits wants a fused optimiser", 2)
def _(world):
    features, weight, labels = draw(dtype=torch.float32)
    head = sharded(world, weight, dtype=None, table_format="bfloat16")
    loss = head(world.mine(features).requires_grad_(), world.mine(labels))
    with raises(RuntimeError, "trains with FusedSGD or FusedAdamW alone"):
        loss.backward()
    assert head.weight.grad is None


@check("fused, sampled and in 16 bits", 2, 3)
def _(world):
    """Only sampled rows change, on every rank; two runs have the same bits, another seed other ones."""
    features, weight, labels = draw(dtype=torch.float32)
    results = []
    for seed in (1, 1, 2):
        head = ShardedCosFaceLoss(SIZE, NUM_CLASSES, table_format="bfloat16", sample_rate=0.2, sample_seed=3)
        fill(world, head, weight.bfloat16())
        options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.5}  # decay moves every row that has a gradient, however small
        optimizer = FusedSGD(head.parameters(), state_format="int8", seed=seed, **options)
        for _ in range(2):
            loss = head(world.mine(features), world.mine(labels))
            loss.backward()
            optimizer.step()
        local = head.weight.to_local().detach()
        changed = (local != world.shard(weight.bfloat16())).any(1)
        assert 0.2 * len(local) <= changed.sum() < 0.6 * len(local) and loss.isfinite()
        results.append(local.clone())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@check("float8 shards", 2, 3)
def _(world):
    """Loss, nearest classes and rows after a step are those of one process with the same numbers, also where a shard is empty."""
    for num_classes in (NUM_CLASSES, 2):
        features, weight, labels = draw(num_classes, dtype=torch.float32)
        head = ShardedCosFaceLoss(SIZE, num_classes, table_format="float8", ddp_average=False)
        whole = CosFaceLoss(SIZE, num_classes, table_format="float8")
        float8.put(whole.weight, whole.weight_scale, slice(None), weight)
        float8.put(head.weight.to_local(), head.weight_scale.to_local(), slice(None), world.shard(weight))
        options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "state_format": "int8"}
        optimizers = FusedSGD(head.parameters(), **options), FusedSGD(whole.parameters(), **options)
        loss, expected = head(world.mine(features), world.mine(labels)), whole(features, labels)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        (_, ours), (_, others) = head.topk(world.mine(features), 2), whole.topk(world.mine(features), 2)
        assert torch.equal(ours, others)
        loss.backward(), expected.backward()
        for each in optimizers:
            each.step()
        ours = head.weight.to_local().float() * head.weight_scale.to_local()[:, None]
        exact = world.shard(whole.weight.detach().float() * whole.weight_scale[:, None])
        differ = ours != exact  # numbers near the border of a rounding, whose gradient was added up in another order
        assert differ.double().mean() < 0.02 if len(ours) else differ.numel() == 0
        assert ours.shape == exact.shape and (ours - exact).abs().le(exact.abs() / 8 + 1e-6).all()


# Rows in a DTensor, and in a plain tensor on each rank.
SHARDED = {"ShardedCosFaceLoss": sharded, "PartialFC_V2": partial_fc}


def skipped_together(make):
    def function(world):
        features, weight, labels = draw()
        head = make(world, weight)
        optimizer = FusedSGD(head.parameters(), lr=0.5, momentum=0.9)
        features[0] = torch.nan  # of rank 0
        head(world.mine(features), world.mine(labels)).backward()
        optimizer.step()
        assert torch.equal(dtensors.local(head.weight).detach(), world.shard(weight)) and optimizer.skipped_steps == 1
        found = torch.tensor([float(world.rank == 1)])  # a scaler's finding on one rank
        head(world.mine(features.nan_to_num()), world.mine(labels)).backward()
        optimizer.found_inf, optimizer.grad_scale = found.squeeze(), torch.tensor(1.0)
        optimizer.step()
        assert torch.equal(dtensors.local(head.weight).detach(), world.shard(weight)) and optimizer.skipped_steps == 2

    return function


def made_by_none(make):
    def function(world):
        features, weight, labels = draw()
        head = make(world, weight)
        optimizer = FusedSGD(head.parameters(), lr=0.5, momentum=0.9)
        head(world.mine(features), world.mine(labels)).backward()
        if world.rank == 1:
            with torch.no_grad():
                head.weight.add_(1)
        before = dtensors.local(head.weight).detach().clone()
        with raises(RuntimeError, "^rank 1: RuntimeError: the class table.*changed between"):
            optimizer.step()
        assert torch.equal(dtensors.local(head.weight).detach(), before)
        optimizer.zero_grad()
        head(world.mine(features), world.mine(labels)).backward()
        optimizer.step()  # and on it goes
        assert not torch.equal(dtensors.local(head.weight).detach(), before)

    return function


for name, make in SHARDED.items():
    check(f"what is not finite is skipped on every rank: {name}", 2, 3)(skipped_together(make))
    check(f"a step that one rank cannot make is made by none: {name}", 2, 3)(made_by_none(make))


@check("skipped steps are counted where a shard is empty", 3)
def _(world):
    features, weight, labels = draw(4)
    (head, optimizer), _ = fused_pair(world, [weight], {"lr": 0.5, "momentum": 0.9})
    features[0] = torch.nan
    head(world.mine(features), world.mine(labels)).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1


@check("checkpoint of a fused run", 2, 3)
def _(world):
    """Saved on these ranks, and on with it: on these ranks again, and in one process."""
    features, weight, labels = draw(dtype=torch.float32)
    options = {"lr": 0.1, "momentum": 0.9, "state_format": "int8"}
    (head, optimizer), _ = fused_pair(world, [weight], options, dtype=None, table_format="bfloat16")
    folder = world.done.with_suffix(".checkpoint")

    def step(head, optimizer):
        head(world.mine(features), world.mine(labels)).backward()
        optimizer.step()

    step(head, optimizer)
    save_checkpoint(folder, head, optimizer)
    (again, other), (whole, single_optimizer) = fused_pair(world, [weight], options, dtype=None, table_format="bfloat16")
    load_checkpoint(folder, again, other)
    load_checkpoint(folder, whole, single_optimizer)
    assert torch.equal(world.shard(whole.weight.detach()), head.weight.to_local().detach())
    for name, buffer in single_optimizer.state[whole.weight].items():
        found = optimizer.state[head.weight][name]
        assert torch.equal(world.shard(buffer), found.to_local()) if buffer.dim() else torch.equal(buffer, found)
    for each in ((head, optimizer), (again, other)):
        step(*each)
    assert torch.equal(again.weight.to_local(), head.weight.to_local())
