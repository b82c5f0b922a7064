"""Do two and three ranks compute what one process does with the whole batch, and do all of them end when one fails?

What each rank checks is in sharded_*.py. All checks for one number of ranks share its processes, which take seconds to
start; each is a test here.
"""

import copy
import functools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_worker
import sharded_world
import torch
from cases import evaluate
from rounding import NUM_CLASSES, SIZE, assert_close, draw, tolerance
from selection import slab_loop_when, slow_when
from torch import library

from cosface_kernels import CosFaceLoss, MarginSoftmaxLoss, ShardedCosFaceLoss, ShardedMarginSoftmaxLoss, margins, reference
from cosface_kernels.before_margin import Inputs, LossOptions, negatives
from cosface_kernels.compat import insightface
from cosface_kernels.heads import data_parallel
from cosface_kernels.heads.over_ranks import FOREIGN, IGNORED, INVALID, _labels_here
from cosface_kernels.margins import NormSoftmax
from cosface_kernels.ops.operands import Needs, Options, Problem

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}

# The ranks are started once, in one of pytest's workers.
pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """outcomes(size) -> ({check: [traceback or None of each rank]}, exit codes, what the ranks printed)."""
    checks = [item for item in request.session.items if item.parent is request.node and item.originalname == "test_ranks"]
    sizes = {item.callspec.params["size"] for item in checks} or {3}
    folder = tmp_path_factory.mktemp("ranks")
    for size in sizes:
        (folder / str(size)).mkdir()
    command = [sys.executable, HERE / "sharded_worker.py", folder, *map(str, sizes)]
    process = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True)

    @functools.cache
    def collect(size):
        # They take seconds where the machine is theirs, minutes where it is not; a collective that waits in vain ends by itself.
        process.wait(timeout=1200)
        here, found = folder / str(size), {}
        for rank in range(size):
            for name, outcome in map(json.loads, (here / f"outcomes.{rank}").read_text().splitlines()):
                found.setdefault(name, []).append(outcome and f"rank {rank}: {outcome}")
        logs = [(here / f"log.{rank}").read_text(errors="replace") for rank in range(size)]
        return found, json.loads((here / "codes").read_text()), logs

    yield collect
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    "name, size", [(name, size) for name, (sizes, _) in sharded_worker.CHECKS.items() for size in sizes if "killed" not in name]
)
@slow_when(lambda size: size != 2)  # test_one_process is one
def test_ranks(name, size, outcomes):
    found, _, logs = outcomes(size)
    assert len(found.get(name, [])) == size, "a rank did not come so far:\n" + "\n".join(log[-2000:] for log in logs)
    assert not any(found[name]), "\n".join(filter(None, found[name]))


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_all(outcomes):
    found, codes, logs = outcomes(3)
    assert codes == [0, -signal.SIGKILL, 0], logs
    assert found["a rank that is killed"] == [None, None], found["a rank that is killed"]


# Around the examples. PyTorch 2.13 with a DeviceMesh over gloo aborts at a normal exit, one time in ten, whoever made the mesh.
BEFORE = """
import os, pathlib, sys, types
from test_compat_insightface import CombinedToday
sys.modules["losses"] = types.SimpleNamespace(CombinedMarginLoss=CombinedToday)
"""
AFTER = """
path = pathlib.Path(sys.argv[1], os.environ["RANK"])
path.write_text(f"{tuple(head.weight.to_local().shape)} {loss.item()}")
torch.distributed.barrier()
os._exit(0)
"""


WITHOUT_A_GROUP = """
import torch
from cosface_kernels import FusedSGD, ShardedCosFaceLoss

head = ShardedCosFaceLoss(32, 10_000)
optimizer = FusedSGD(head.parameters(), lr=0.1)
loss = head(torch.randn(8, 32), torch.randint(10_000, (8,)))
loss.backward()
optimizer.step()
"""


@pytest.mark.slow
@pytest.mark.parametrize("has_group", [True, False])
def test_torchrun(has_group, tmp_path):
    """The examples of the document; and a head that makes the process group itself."""
    document = (HERE.parent / "docs" / "distributed.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", document, re.S) if has_group else [WITHOUT_A_GROUP]
    script = tmp_path / "train.py"
    script.write_text("\n".join([BEFORE, *examples, AFTER]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, tmp_path]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    shapes, losses = zip(*((tmp_path / rank).read_text().rsplit(" ", 1) for rank in "01"), strict=True)
    assert shapes == ("(5000, 32)", "(5000, 32)") and losses[0] == losses[1]


def test_one_process(device, small_slabs):
    """Without a process group: CosFaceLoss, to the last bit."""
    features, weight, labels = draw(device, torch.float32)
    results = []
    for kind in (CosFaceLoss, ShardedCosFaceLoss):
        head = kind(SIZE, NUM_CLASSES, device=device)
        head.weight.data.copy_(weight)
        loss = head(features.requires_grad_(), labels)
        results.append([loss, *torch.autograd.grad(loss, (features, head.weight))])
        assert head.logits(features).shape == (7, NUM_CLASSES) and head.topk(features, 3)[1].shape == (7, 3)
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(*results, strict=True))
    with pytest.raises(IndexError, match=r"^labels\[2\] is 300"):
        head.cpu()(features.cpu(), torch.tensor([0, 1, 300, 0, 0, 0, 0]))


def test_one_process_draws_with_the_default_generator():
    torch.manual_seed(3)
    first, second = (ShardedCosFaceLoss(SIZE, 40).weight for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(ShardedCosFaceLoss(SIZE, 40).weight, first) and not first.eq(second).any()


def test_names_that_ddp_leaves_out():
    """Of shards that are there when DDP asks, at any depth; a copy has its own."""
    shards = MarginSoftmaxLoss(4, 6, margin=margins.Softmax(), bias=True)
    data_parallel.leave_out(shards)
    outer = torch.nn.ModuleDict({"model": torch.nn.ModuleList([torch.nn.Linear(3, 4), shards])})
    copied = copy.deepcopy(outer)
    again = pickle.loads(pickle.dumps(copied))
    outer["model"][1] = CosFaceLoss(4, 6)
    outer["other"] = torch.nn.Sequential(torch.nn.Identity(), None, CosFaceLoss(4, 6))
    names = "_ddp_params_and_buffers_to_ignore"
    found = {each: [*getattr(module, names)] for each, module in {"outer": outer, "copied": copied, "again": again}.items()}
    assert found == {"outer": [], "copied": ["model.1.weight", "model.1.bias"], "again": ["model.1.weight", "model.1.bias"]}
    assert [*getattr(shards, names)] == ["weight", "bias"]
    mine = torch.nn.ModuleDict()
    setattr(mine, names, ["theirs"])
    mine["head"] = shards
    assert getattr(mine, names) == ["theirs", "head.weight", "head.bias"]


@pytest.mark.slow
def test_names_that_ddp_leaves_out_of_a_compiled_module():
    shards = CosFaceLoss(4, 6)
    data_parallel.leave_out(shards)
    module = torch.nn.ModuleList([shards])
    compiled = torch.compile(module)
    assert [*compiled._ddp_params_and_buffers_to_ignore] == ["_orig_mod.0.weight"]
    assert [*module._ddp_params_and_buffers_to_ignore] == ["0.weight"]


def test_partial_fc_in_one_process(small_slabs):
    features, weight, labels = draw("cpu")
    labels[2] = -1
    module = insightface.PartialFC_V2(sharded_world.CosFace(), SIZE, NUM_CLASSES).double()
    module.load_state_dict({"weight": weight})
    head = insightface.head(sharded_world.CosFace(), SIZE, NUM_CLASSES).double()
    head.load_state_dict(module.state_dict())
    assert torch.equal(module(features, labels), head(features, labels))


def test_every_rank_must_have_a_process_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="init_process_group"):
        insightface.PartialFC_V2(sharded_world.CosFace(), SIZE, 5)


@pytest.mark.parametrize(
    "options, kind", [({"ddp_average": 1}, TypeError), ({"scale": -1.0}, ValueError), ({"mesh": 2}, TypeError)]
)
def test_bad_options(options, kind):
    with pytest.raises(kind, match=f"{next(iter(options))} must be"):
        ShardedCosFaceLoss(SIZE, 5, **options)
    with pytest.raises(kind, match=f"{next(iter(options))} must be"):
        ShardedMarginSoftmaxLoss(SIZE, 5, margin=margins.ArcFace(), **options)


def test_labels_of_a_shard():
    labels = torch.tensor([10, 19, 9, 20, 0, 39, 40, -1, -100, -2, -(2**63), 2**63 - 1, 12])
    wanted = [0, 9, FOREIGN, FOREIGN, FOREIGN, FOREIGN, INVALID, INVALID, INVALID, INVALID, INVALID, INVALID, IGNORED]
    assert _labels_here(labels, 12, 40, 10, 10).tolist() == wanted


negative_lse = torch.ops.cosface_kernels.negative_lse.default


@pytest.mark.parametrize("centers", [1, 3])
@slab_loop_when(lambda centers: centers == 3)
def test_a_class_held_elsewhere_is_no_target(centers, backend, device, small_slabs):
    """Rows labelled foreign_index: features as they are, every class a negative; ignored ones and no classes as ever."""
    features, weight, labels = draw(device, torch.float32)
    labels = torch.where(torch.arange(7, device=device) % 2 == 0, FOREIGN, labels // centers)
    labels[3] = IGNORED

    def ours(x, w, labels):
        options = LossOptions(NormSoftmax(), 16.0, True, centers, ignore_index=IGNORED, backend=backend)
        found = negatives(Inputs(x, w, labels), options, FOREIGN)
        return torch.where(labels == IGNORED, 0.0, found.lse + found.product)

    def plain(x, w, labels):
        logits = reference.logits(x, w, scale=16.0, centers_per_class=centers)
        own = torch.zeros_like(logits, dtype=torch.bool).scatter(1, labels.clamp(min=0)[:, None], (labels >= 0)[:, None])
        sums = logits.masked_fill(own, -torch.inf).logsumexp(1) + torch.where(own, logits, 0.0).sum(1) / 16
        return torch.where(labels == IGNORED, 0.0, sums)

    upstream = torch.linspace(1, 2, 7, device=device)
    exact = evaluate(plain, features.double(), weight.double(), labels, upstream)
    for tensor, wanted in zip(evaluate(ours, features, weight, labels, upstream), exact, strict=True):
        assert_close(tensor, wanted, tolerance(torch.float32, 16.0))


def test_foreign_rows_of_no_class_are_nan(backend, device, monkeypatch):
    """As on a GPU, where labels are not looked at."""
    monkeypatch.setattr("cosface_kernels.ops.label_checks.check_labels", lambda *arguments: None)
    features, weight, _ = draw(device, torch.float32)
    labels = torch.tensor([FOREIGN, INVALID, IGNORED, 0, 1, 2, 3], device=device)
    options = Options(16.0, IGNORED, True, True, 1, torch.float32, 0, backend, FOREIGN)
    lse = negative_lse(*Problem(features, weight, None, labels, None), *options, *Needs(True, True))[0]
    assert lse.isnan().tolist() == [False, True, False, False, False, False, False]


def test_opcheck(device, small_slabs):
    features, weight, labels = draw(device, torch.float32)
    labels[:3] = FOREIGN
    options = Options(8.0, IGNORED, True, True, 1, torch.float32, 0, "auto", FOREIGN)
    problem = Problem(features.requires_grad_(), weight.requires_grad_(), None, labels, None)
    library.opcheck(negative_lse, (*problem, *options, *Needs(True, True, True)))
