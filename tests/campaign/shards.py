"""One step of a head in shards, on ranks of its own, against one process with the whole table and batch in float64."""

import os
import random
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from margin_rows import ROWS, batch, steepness
from rounding import SIZE, assert_close, tolerance
from sharded_world import World

from cosface_kernels import FusedAdamW, FusedSGD, MarginSoftmaxLoss, ShardedMarginSoftmaxLoss, margin_softmax_loss
from cosface_kernels.distributed.dtensors import local as own_rows
from cosface_kernels.ops.formats import FLOAT8

from . import tables
from .optimisers import BESIDE, beside, goes_with

RULES = {"SGD": (FusedSGD, torch.optim.SGD, {}), "AdamW": (FusedAdamW, torch.optim.AdamW, {"eps": 1e-3, "weight_decay": 0.1})}
SPACE = {
    "margin": [*ROWS],
    "beside": ["", "", "", *(name for name in BESIDE if name != "learnt scale")],
    "ranks": [1, 2, 3],
    "rows": [2, 5, 9, 20],
    "classes": [2, 1, 3, 7, 130, 300],
    "dtype": ["float64", "float64", "float32", "float8"],  # of the table
    "rule": ["", *RULES],  # without one, the gradients themselves
    "sample_rate": [1.0, 1.0, 0.4],
    "sample_correction": [False, True],
    "hard_classes": [0, 0, 1, 3],
    "ddp_average": [False, True],
    "reduction": ["mean", "mean", "sum", "none"],
    "ignored": [0, 0, 2, 3],  # 0: none, k: every k-th row
    "seed": [*range(1000)],
}


def settle(case):
    if case["dtype"] != "float64" and ROWS[case["margin"]].jumps(1.0):  # rounding says on which side an angle is
        case = case | {"margin": "CosFace"}
    if case["sample_rate"] < 1:  # such shards want a fused optimiser; and without it rows have no AdamW of theirs
        case = case | {"rule": "SGD"} | ({} if not ROWS[case["margin"]].state else {"margin": "CosFace"})
    if ROWS[case["margin"]].centers > 1:  # shards of whole classes
        case = case | {"classes": -(-case["classes"] // case["ranks"]) * case["ranks"]}
    case = case | ({} if goes_with(case) else {"beside": ""})
    if case["beside"] == "smoothing":  # of one class the gradient is exactly 0, and the rounding of it no error
        case = case | {"classes": max(case["classes"], 7 if case["sample_rate"] < 1 else 2)}
    if case["rule"] == "AdamW" or case["beside"] in ("hard negatives", "nearest negatives"):  # whose thresholds are jumps
        case = case | {"dtype": "float64"}
    return case


def check(case):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        children = [_start(case, rank, Path(folder)) for rank in range(case["ranks"])]
        codes = [os.waitpid(child, 0)[1] for child in children]
        errors = [path.read_text() for path in sorted(Path(folder).glob("error.*"))]
    assert not any(codes), f"exit codes {codes}:\n" + "\n".join(errors)


def _start(case, rank, folder):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            store = dist.FileStore(str(folder / "store"), case["ranks"])
            dist.init_process_group("gloo", store=store, rank=rank, world_size=case["ranks"], timeout=timedelta(seconds=300))
            _one_step(case, rank)
            dist.barrier()  # who is done sooner takes no other with it
            status = 0
        except Exception:
            (folder / f"error.{rank}").write_text(traceback.format_exc())
        finally:
            os._exit(status)
    return child


def _one_step(case, rank):
    row, dtype = ROWS[case["margin"]], torch.float64 if case["dtype"] == "float64" else torch.float32  # of features
    world = World(rank, case["ranks"], done=None)
    cuts = sorted(random.Random(case["seed"]).choices(range(case["rows"] + 1), k=case["ranks"] - 1))
    world.counts = [stop - start for start, stop in zip([0, *cuts], [*cuts, case["rows"]], strict=True)]
    features, *numbers = batch(row, num_rows=case["rows"], num_classes=case["classes"], seed=case["seed"])
    labels, features = numbers.pop(1), features.to(dtype)
    if case["ignored"]:
        labels[:: case["ignored"]] = -100
    head, whole = _heads(case, world, row, numbers)
    optimizer, plain = _optimizers(case, head, whole)
    drawn, sample = [], head._sample
    head._sample = lambda *arguments: drawn.append(sample(*arguments)) or drawn[-1]

    relative = 10 * tolerance(dtype, steepness(row, features.double(), whole.weight.detach()))
    local, everything = world.mine(features).requires_grad_(), features.double().requires_grad_()
    labels, weights = _several(case, labels) if case["beside"] == "several classes" else (labels, None)
    call = {"return_statistics": case["beside"] == "statistics"}
    loss = head(local, world.mine(labels), **call, **({} if weights is None else {"label_weights": world.mine(weights)}))
    if case["sample_rate"] == 1:
        exact = whole(everything, labels, label_weights=weights, **call)
    else:
        exact = _of_classes(case, whole, everything, labels, weights, world, drawn)
    if case["beside"] == "statistics":
        (loss, found), (exact, wanted) = loss, exact
        _assert_same_statistics(found, [world.mine(each) for each in wanted], relative)
    wanted = exact.detach() if case["reduction"] != "none" else world.mine(exact.detach())
    assert_close(loss.detach(), wanted, relative, "loss", size=max(1.0, exact.detach().norm()))
    loss.sum().backward(inputs=[local] if case["dtype"] == "float8" and optimizer is None else None)
    exact.sum().backward()
    times = case["ranks"] if case["ddp_average"] else 1
    assert_close(local.grad / times, world.mine(everything.grad), relative, "dX", size=everything.grad.norm())
    if optimizer is not None:
        optimizer.step(), plain.step()
    elif case["dtype"] == "float8":  # such a table has no gradient
        return
    for (name, ours), other in zip(head.named_parameters(), whole.parameters(), strict=True):
        found, wanted = (ours.grad, other.grad.to_dense()) if optimizer is None else (ours.detach(), other.detach())
        found, wanted = found.to_local(), world.shard(wanted)
        if found.dtype == FLOAT8:  # each number is a neighbour of what was rounded
            scale = own_rows(head.weight_scale)[:, None]
            found = found.float() * scale
            between = torch.maximum(torch.maximum(found.abs(), wanted.abs()) / 8, scale * tables.LEAST)
            off = relative * other.detach().norm()
            assert ((found - wanted).abs() <= 1.001 * between + off).all(), name
        else:
            assert_close(found, wanted, relative, name, size=other.detach().norm() if optimizer else other.grad.norm())


def _heads(case, world, row, numbers):
    """A head in shards, and one in one process with the same numbers in float64."""
    shared = {"margin": row.margin, "bias": row.bias, "reduction": case["reduction"], **row.options, **beside(case)}
    sampled = {name: case[name] for name in ("sample_rate", "sample_correction")} | {"sample_seed": case["seed"]}
    sampled |= {"hard_classes": tables.hard_classes(case), "ddp_average": case["ddp_average"]}
    kept = {"table_format": "float8"} if case["dtype"] == "float8" else {"dtype": getattr(torch, case["dtype"])}
    head = ShardedMarginSoftmaxLoss(SIZE, case["classes"], **shared, **sampled, **kept)
    whole = MarginSoftmaxLoss(SIZE, case["classes"], **shared, dtype=torch.float64).double()
    numbers = [tables.stored(numbers[0], head.weight.dtype), *(each.to(head.bias.dtype) for each in numbers[1:])]
    row_scale = None if head.weight_scale is None else own_rows(head.weight_scale)
    with torch.no_grad():
        tables.fill(own_rows(head.weight.detach()), row_scale, world.shard(numbers[0]))
        if row.bias:
            own_rows(head.bias).copy_(world.shard(numbers[1]))
        for parameter, values in zip(whole.parameters(), numbers, strict=True):
            parameter.copy_(values)
    return head.double() if case["dtype"] == "float64" else head, whole


def _optimizers(case, *heads):
    if not case["rule"]:
        return None, None
    fused, plain, options = RULES[case["rule"]]
    return [make(head.parameters(), lr=0.1, **options) for make, head in zip((fused, plain), heads, strict=True)]


def _several(case, labels):
    """(labels (N, 2), weights (N, 2))."""
    labels = torch.stack([labels, torch.where(labels < 0, -100, (labels + 1) % case["classes"])], 1)
    return labels, torch.rand(labels.shape, generator=torch.Generator().manual_seed(case["seed"]))


def _assert_same_statistics(found, wanted, relative):
    """Classes exactly: two that are equally near are as rare as equal numbers."""
    for ours, exact in zip(found, wanted, strict=True):
        assert torch.equal(ours.isnan(), exact.isnan())
        if ours.dtype.is_floating_point:
            known = exact.isfinite()
            assert torch.equal(ours[~known].nan_to_num(), exact[~known].to(ours.dtype).nan_to_num())
            assert_close(ours[known], exact[known], relative, "statistics", size=len(exact) ** 0.5)
        else:
            assert torch.equal(ours, exact)


def _of_classes(case, whole, features, labels, weights, world, drawn):
    """The loss of what all ranks drew."""
    row, parts, held = ROWS[case["margin"]], [None] * world.size, world.shard(torch.arange(whole.num_classes))
    here, by_class = drawn[-1]
    dist.all_gather_object(parts, (held[here], by_class) if len(held) else (held, torch.zeros(0)))
    classes, is_by_class = torch.cat([mine for mine, _ in parts]), case["sample_correction"] and case["hard_classes"]
    known = labels[labels >= 0]
    certain = known if not case["hard_classes"] else torch.cat([known, tables.hard_classes(case)[known].flatten()])
    assert torch.isin(certain[certain >= 0], classes).all(), "a class that was certain is not there"
    options = {"bias": whole.bias} if row.bias else {}
    options |= {
        "margin": row.margin,
        "classes": classes,
        "sample_correction": torch.cat([each for _, each in parts]) if is_by_class else case["sample_correction"],
        "label_weights": weights,
        "return_statistics": case["beside"] == "statistics",
        "reduction": case["reduction"],
        **beside(case),
        **row.options,
    }
    return margin_softmax_loss(features, whole.weight, labels, **options)
