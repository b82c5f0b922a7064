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
from rounding import assert_close, tolerance
from sharded_worker import World, heads

from cosface_kernels import FusedAdamW, FusedSGD, margin_softmax_loss

from .optimisers import BESIDE, beside, goes_with

RULES = {"SGD": (FusedSGD, torch.optim.SGD, {}), "AdamW": (FusedAdamW, torch.optim.AdamW, {"eps": 1e-3, "weight_decay": 0.1})}
SPACE = {
    "margin": [*ROWS],
    "beside": ["", "", "", *(name for name in BESIDE if name != "learnt scale")],
    "ranks": [1, 2, 3],
    "rows": [2, 5, 9, 20],
    "classes": [2, 1, 3, 7, 130, 300],
    "dtype": ["float64", "float64", "float32"],
    "rule": ["", *RULES],  # without one, the gradients themselves
    "sample_rate": [1.0, 1.0, 0.4],
    "ignored": [0, 0, 2, 3],  # 0: none, k: every k-th row
    "seed": [*range(1000)],
}


def settle(case):
    if case["dtype"] == "float32" and ROWS[case["margin"]].jumps(1.0):  # rounding says on which side an angle is
        case = case | {"margin": "CosFace"}
    if case["sample_rate"] < 1:  # such shards want a fused optimiser; and without it rows have no AdamW of theirs
        case = case | {"rule": "SGD"} | ({} if not ROWS[case["margin"]].state else {"margin": "CosFace"})
    if ROWS[case["margin"]].centers > 1:  # shards of whole classes
        case = case | {"classes": -(-case["classes"] // case["ranks"]) * case["ranks"]}
    case = case | ({} if goes_with(case) else {"beside": ""})
    if case["beside"] == "smoothing" and case["classes"] == 1:  # whose gradient is exactly 0, and the rounding of it no error
        case = case | {"classes": 2}
    if case["rule"] == "AdamW" or case["beside"] == "hard negatives":  # whose thresholds are jumps
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
    row, dtype = ROWS[case["margin"]], getattr(torch, case["dtype"])
    world = World(rank, case["ranks"], done=None)
    cuts = sorted(random.Random(case["seed"]).choices(range(case["rows"] + 1), k=case["ranks"] - 1))
    world.counts = [stop - start for start, stop in zip([0, *cuts], [*cuts, case["rows"]], strict=True)]
    features, *tables = batch(row, num_rows=case["rows"], num_classes=case["classes"], seed=case["seed"])
    labels, tables = tables.pop(1), [table.to(dtype) for table in tables]
    if case["ignored"]:
        labels[:: case["ignored"]] = -100
    features = features.to(dtype)
    sampled = {"sample_rate": case["sample_rate"], "sample_seed": case["seed"]} | beside(case)
    head, _ = heads(world, row, tables, dtype=dtype, **sampled)
    whole = heads(world, row, tables, dtype=dtype, whole_dtype=torch.float64, **beside(case))[1]
    optimizer, plain = _optimizers(case, head, whole)
    drawn, sample = [], head._sample
    head._sample = lambda *arguments: drawn.append(sample(*arguments)) or drawn[-1]

    relative = 10 * tolerance(dtype, steepness(row, features.double(), tables[0].double()))
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
    loss.backward()
    exact.backward()
    assert_close(loss.detach(), exact.detach(), relative, "loss", size=1.0)
    assert_close(local.grad, world.mine(everything.grad), relative, "dX", size=everything.grad.norm())
    if optimizer is not None:
        optimizer.step(), plain.step()
    for (name, ours), other in zip(head.named_parameters(), whole.parameters(), strict=True):
        found, wanted = (ours.grad, other.grad.to_dense()) if optimizer is None else (ours.detach(), other.detach())
        assert_close(found.to_local(), world.shard(wanted), relative, name, size=wanted.norm())


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
    dist.all_gather_object(parts, held[drawn[-1][0]] if len(held) else held)
    options = {"bias": whole.bias} if row.bias else {}
    options |= {
        "margin": row.margin,
        "classes": torch.cat(parts),
        "label_weights": weights,
        "return_statistics": case["beside"] == "statistics",
        **beside(case),
        **row.options,
    }
    return margin_softmax_loss(features, whole.weight, labels, **options)
