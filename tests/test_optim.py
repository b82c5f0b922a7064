"""Do the fused optimisers do what torch.optim does with the gradient that they never have?"""

import copy
import gc
import inspect
import io
import itertools
import math
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint
from cases import make
from margin_rows import every_row
from selection import interpreted, pairs, repeats_when, slow_when
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.utils import prune

from cosface_kernels import CosFaceLoss, FusedAdamW, FusedSGD, MarginSoftmaxLoss, margin_softmax_loss, save_checkpoint
from cosface_kernels.distributed import ranks
from cosface_kernels.heads import float8
from cosface_kernels.margins import ArcFace, Softmax
from cosface_kernels.ops import class_tables, formats, recording, slabs
from cosface_kernels.ops.backends import cpu_library, cpu_loop
from cosface_kernels.optim import rules, table_state

SIZE, NUM_CLASSES, ROWS = 20, 300, 9  # three slabs, the last one short; not a multiple of any vector

SGD_OPTIONS = [
    {"lr": 0.5},
    {"lr": 0.5, "weight_decay": 0.01, "maximize": True},
    {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01},
    {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    {"lr": 0.5, "momentum": 0.9, "maximize": True, "nesterov": True},
]
ADAMW_OPTIONS = [{"lr": 1e-2}, {"lr": 1e-2, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.5, "maximize": True}]
RULES = [(FusedSGD, torch.optim.SGD, o) for o in SGD_OPTIONS] + [(FusedAdamW, torch.optim.AdamW, o) for o in ADAMW_OPTIONS]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join([rule[0].__name__, *map(str, rule[2].values())]))

pytestmark = pytest.mark.usefixtures("small_slabs")


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    """Both forms of the update."""
    if request.param == "torch":
        monkeypatch.setattr(rules.Part, "is_native", lambda part: False)
    elif not cpu_library.available():
        pytest.skip("the native library was not built here")
    return request.param


def batches(count, device="cpu", dtype=torch.float32, num_rows=ROWS, num_classes=NUM_CLASSES):
    for seed in range(count):
        features, _, labels = make("uniform", num_rows, num_classes, SIZE, seed=seed)
        yield features.to(device, dtype), labels.to(device)


def twins(device="cpu", head=CosFaceLoss, **options):
    """Two equal heads. Rows of norm 1, so that a step of theirs turns them."""
    torch.manual_seed(0)
    first = head(SIZE, NUM_CLASSES, device=device, **options)
    float8.fill(first.weight, first.weight_scale, torch.Tensor.normal_)
    return first, copy.deepcopy(first)


def largest_error(ours, exact):
    ours, exact = ours.detach().double(), exact.detach().double()
    size = float(exact.abs().max())
    return float((ours - exact).abs().max()) / (size or 1.0)


def test_float64_is_torch_optim_to_the_last_digits(device):
    for fused, plain, options in RULES:
        ours, theirs = twins(device, dtype=torch.float64)
        optimizers = fused(ours.parameters(), **options), plain(theirs.parameters(), **options)
        for features, labels in batches(4, device, torch.float64):
            for head, optimizer in zip((ours, theirs), optimizers, strict=True):
                head(features, labels).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert ours.weight.grad is None
        assert largest_error(ours.weight, theirs.weight) < 1e-12, options
        for name, buffer in optimizers[1].state[theirs.weight].items():
            if buffer is not None:
                assert largest_error(optimizers[0].state[ours.weight][name], buffer) < 1e-12, (name, options)


@every_rule
@slow_when(lambda backend, path, rule: interpreted(backend) and (path == "native" or rule not in (RULES[3], RULES[-2])))
@repeats_when(
    lambda backend, path, rule: (
        interpreted(backend) and rule not in (RULES[3], RULES[-2]) and (path, backend) != ("torch", "triton")
    )
)
def test_same_as_torch_optim(rule, backend, device, path):
    fused, plain, options = rule
    ours, theirs = twins(device, backend=backend)
    optimizers = fused(ours.parameters(), **options), plain(theirs.parameters(), **options)
    for features, labels in batches(2 if interpreted(backend) else 3, device):
        for head, optimizer in zip((ours, theirs), optimizers, strict=True):
            head(features, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    # Step by step the two tables part and so do their gradients: s = 64 roundings each time.
    assert largest_error(ours.weight, theirs.weight) < 3 * 64 * 2**-23
    if "momentum" in options:
        buffers = (o.state[h.weight]["momentum_buffer"] for o, h in zip(optimizers, (ours, theirs), strict=True))
        assert largest_error(*buffers) < 3 * 64 * 2**-20


def of_norm(rows, longest):
    """Rows, made `longest` long where they are longer."""
    return rows * (longest / rows.norm(dim=1, keepdim=True)).clamp(max=1.0)


@pytest.mark.parametrize("rule", [RULES[0], RULES[1], RULES[3], RULES[-1]], ids=["plain", "SGD", "nesterov", "AdamW"])
def test_max_row_norm(rule, device, path):
    """Half of the rows are shortened, of the sum of two batches of different scales."""
    fused, plain, options = rule
    ours, theirs = twins(device)
    theirs.double()
    theirs(*next(batches(1, device, torch.float64))).backward()
    longest = theirs.weight.grad.norm(dim=1).median().item()
    theirs.zero_grad()
    optimizers = fused(ours.parameters(), **options, max_row_norm=longest), plain(theirs.parameters(), **options)
    for features, labels in batches(3, device):
        for head, optimizer in zip((ours, theirs), optimizers, strict=True):
            for head.scale in (64.0, 60.0):
                head(features.to(head.weight.dtype), labels).backward()
            if head is theirs:
                shortened = head.weight.grad.norm(dim=1) > longest
                assert shortened.any() and not shortened.all()
                head.weight.grad = of_norm(head.weight.grad, longest)
            optimizer.step()
            optimizer.zero_grad()
    assert largest_error(ours.weight, theirs.weight) < 3 * 64 * 2**-23


def test_max_row_norm_of_a_bias_and_of_a_sample(path):
    """A bias is a row of one number; rows that took no part stay. Twice the bits, from kept and from new exponentials."""
    tables = []
    for budget in ("auto", 0):
        head, whole = twins(head=MarginSoftmaxLoss, margin=Softmax(), bias=True, sample_rate=0.3, memory_budget=budget)
        optimizer = FusedSGD(head.parameters(), lr=1.0, max_row_norm=1e-3)
        features, labels = next(batches(1))
        head(features, labels).backward()
        whole(features, labels).backward()
        optimizer.step()
        for ours, before in zip(head.parameters(), whole.parameters(), strict=True):
            grad = before.grad.to_dense()
            rows = grad if grad.dim() == 2 else grad[:, None]
            exact = before.detach() - of_norm(rows, 1e-3).nan_to_num(0.0).view_as(before)
            assert grad.abs().max() > 1e-3 and largest_error(ours, exact) < 64 * 2**-23
        tables.append(head.weight.detach())
    assert torch.equal(*tables)


def test_a_norm_that_no_row_reaches_changes_no_bit(path):
    found = []
    for longest in (None, 1e30):
        head, _ = twins(table_format="bfloat16")
        optimizer = FusedAdamW(head.parameters(), lr=0.1, max_row_norm=longest, state_format="int8")
        for features, labels in batches(2):
            head(features, labels).backward()
            optimizer.step()
        found.append([head.weight.detach(), *optimizer.state[head.weight].values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@every_row
def test_every_margin(row, device):
    torch.manual_seed(0)
    ours, theirs = (
        MarginSoftmaxLoss(
            *(SIZE, NUM_CLASSES // row.centers),
            **{"margin": row.margin, "bias": row.bias, "dtype": torch.float64, "device": device, **row.options},
        )
        for _ in range(2)
    )
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01}
    optimizers = FusedSGD(ours.parameters(), **options), torch.optim.SGD(theirs.parameters(), **options)
    for features, labels in batches(3, device, torch.float64, num_classes=NUM_CLASSES // row.centers):
        gradients = []
        for head, optimizer in zip((ours, theirs), optimizers, strict=True):
            leaf = features.clone().requires_grad_()
            head(leaf, labels).backward()
            gradients.append(leaf.grad)
            optimizer.step()
            optimizer.zero_grad()
        assert largest_error(*gradients) < 1e-10
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert one.grad is None and largest_error(one, other) < 1e-10


def test_bias_with_hyperparameters_of_its_own(path, device):
    ours, theirs = twins(device, head=MarginSoftmaxLoss, margin=Softmax(), bias=True)
    optimizers = []
    for head, optimizer in ((ours, FusedSGD), (theirs, torch.optim.SGD)):
        groups = [{"params": [head.weight], "weight_decay": 0.1}, {"params": [head.bias], "lr": 2.0}]
        optimizers.append(optimizer(groups, lr=0.5, momentum=0.9))
        for features, labels in batches(3, device):
            head(features, labels).backward()
            optimizers[-1].step()
            optimizers[-1].zero_grad()
    assert theirs.bias.abs().max() > 0.1
    assert largest_error(ours.bias, theirs.bias) < 1e-5 and largest_error(ours.weight, theirs.weight) < 1e-5


def train(head, optimizer, steps, changed=lambda head, features, labels: head(features, labels).backward(), device="cpu"):
    for features, labels in batches(steps, device, torch.float64):
        changed(head, features, labels)
        optimizer.step()
        optimizer.zero_grad()
    return head.weight.detach()


def several_batches(head, features, labels):
    for part in range(3):
        head(features[part::3], labels[part::3]).backward()


def one_loss_of_several_forwards(head, features, labels):
    (head(features[:2], labels[:2]) + 3 * head(features[2:], labels[2:])).backward()


def retained_graph(head, features, labels):
    loss = head(features, labels)
    loss.backward(retain_graph=True)
    (0.5 * loss).backward()


def scale_between_forwards(head, features, labels):
    """Exponentials of two scales have no sum; gradients have."""
    head.scale = 16.0
    head(features[:4], labels[:4]).backward()
    head.scale = 64.0
    head(features[4:], labels[4:]).backward()


def very_different_gradients(head, features, labels):
    (1e-30 * head(features[:4], labels[:4])).backward()
    (1e3 * head(features[4:], labels[4:])).backward()


def nothing_counted(head, features, labels):
    head(features, labels.fill_(-100)).backward()


def no_rows(head, features, labels):
    head(features[:0], labels[:0]).backward()


def frozen_half_way(head, features, labels):
    head.weight.requires_grad_(False)
    head(features[:2].requires_grad_(), labels[:2]).backward()
    head.weight.requires_grad_(True)
    head(features[2:].detach(), labels[2:]).backward()


def frozen_before_the_step(head, features, labels):
    head.weight.requires_grad_(True)
    head(features, labels).backward()
    head.weight.requires_grad_(False)


def trained_features(head, features, labels):
    head(features.requires_grad_(), labels).backward()


def per_row_losses(head, features, labels):
    head.reduction = "none"
    head(features, labels).backward(torch.linspace(-1, 1, len(labels), dtype=torch.float64, device=features.device))


def some_kept(head, features, labels):
    head.memory_budget = ROWS * 128 * 8  # one slab of three
    head(features, labels).backward()


def all_kept(head, features, labels):
    head.memory_budget = 10**9
    head(features, labels).backward()


def all_kept_of_several(head, features, labels):
    head.memory_budget = 10**9
    several_batches(head, features, labels)


WAYS = [
    some_kept,
    all_kept,
    all_kept_of_several,
    several_batches,
    one_loss_of_several_forwards,
    retained_graph,
    scale_between_forwards,
    very_different_gradients,
]
WAYS += [nothing_counted, no_rows, frozen_half_way, frozen_before_the_step, trained_features, per_row_losses]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_to_a_gradient(way, device):
    options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01}
    ours, theirs = twins(device, dtype=torch.float64)
    before = ours.weight.detach().clone()
    got = train(ours, FusedSGD(ours.parameters(), **options), 3, way, device)
    exact = train(theirs, torch.optim.SGD(theirs.parameters(), **options), 3, way, device)
    assert ours.weight.grad is None and not torch.equal(exact, before)
    assert largest_error(got, exact) < 1e-12


def test_only_the_tables_gradient_records(device):
    head, _ = twins(device)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    features, labels = next(batches(1, device))
    loss = head(features.requires_grad_(), labels)
    (gradient,) = torch.autograd.grad(loss, features, retain_graph=True)
    before = head.weight.detach().clone()
    optimizer.step()
    assert torch.equal(head.weight, before)  # no weight decay, no momentum either: nothing was recorded
    loss.backward()
    assert torch.equal(features.grad, gradient)
    optimizer.step()
    assert not torch.equal(head.weight, before)


@pytest.mark.parametrize(
    "options",
    [
        {"margin": margin, "sample_rate": rate, "bias": isinstance(margin, Softmax)}
        for margin in (ArcFace(), Softmax())
        for rate in (1.0, 0.2)
    ],
    ids=["whole", "sampled", "bias", "sampled bias"],
)
def test_autograd_grad_returns_the_gradient_and_records_nothing(device, options):
    ours, theirs = twins(device, head=MarginSoftmaxLoss, **options)
    optimizer = FusedSGD(ours.parameters(), lr=0.5)
    features, labels = next(batches(1, device))
    losses = [head(features, labels) for head in (ours, theirs)]
    for names in (["weight"], [*dict(ours.named_parameters())]):
        got, wanted = (
            torch.autograd.grad(loss, [head.get_parameter(name) for name in names], retain_graph=True)
            for loss, head in zip(losses, (ours, theirs), strict=True)
        )
        assert all(one.layout == other.layout for one, other in zip(got, wanted, strict=True))
        assert all(torch.equal(one.to_dense(), other.to_dense()) for one, other in zip(got, wanted, strict=True))
        assert not recording.pending(ours.weight).records
    before = [parameter.detach().clone() for parameter in ours.parameters()]
    optimizer.step()
    assert all(torch.equal(parameter, was) for parameter, was in zip(ours.parameters(), before, strict=True))
    losses[0].backward()
    assert len(recording.pending(ours.weight).records) == 1


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    "register", ["register_hook", "register_post_accumulate_grad_hook", "leaf's register_hook", "leaf's register_prehook"]
)
def test_a_hook_for_the_gradient_is_refused(device, register, name):
    head, _ = twins(device, head=MarginSoftmaxLoss, margin=Softmax(), bias=True)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    features, labels = next(batches(1, device))
    place = head.get_parameter(name)
    if register.startswith("leaf's "):  # where Horovod registers its own
        place, register = torch.autograd.graph.get_gradient_edge(place).node, register.split()[1]
    hook = getattr(place, register)(lambda *given: None)
    with pytest.raises(RuntimeError, match=f"the head's {name} has a hook.*a fused optimiser.*torch.optim"):
        head(features, labels).backward()
    before = head.weight.detach().clone()
    optimizer.step()
    assert torch.equal(head.weight, before)
    hook.remove()
    head(features, labels).backward()
    optimizer.step()
    assert not torch.equal(head.weight, before)


def test_step_and_zero_grad_forget(device):
    head, _ = twins(device)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    features, labels = next(batches(1, device))
    head(features, labels).backward()
    optimizer.step()
    before = head.weight.detach().clone()
    optimizer.step()
    head(features, labels).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(head.weight, before)


def test_closure_and_learning_rate_schedule(device):
    ours, theirs = twins(device, dtype=torch.float64)
    features, labels = next(batches(1, device, torch.float64))
    for head, kind in ((ours, FusedSGD), (theirs, torch.optim.SGD)):
        optimizer = kind(head.parameters(), lr=0.5, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)

        def closure(head=head, optimizer=optimizer):
            optimizer.zero_grad()
            loss = head(features, labels)
            loss.backward()
            return loss

        losses = []
        for _ in range(3):
            losses.append(float(optimizer.step(closure).detach()))
            schedule.step()
        assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    assert largest_error(ours.weight, theirs.weight) < 1e-12


@pytest.mark.parametrize("bad", ["features", "upstream", "table"])
def test_not_finite_changes_nothing(bad, device, path):
    head, _ = twins(device)
    optimizer = FusedAdamW(head.parameters(), lr=0.5, state_format="int8")
    (features, labels), *_ = batches(1, device)
    head(features, labels).backward()
    optimizer.step()
    if bad == "table":
        with torch.no_grad():
            head.weight[3, 2] = torch.inf
    before = copy.deepcopy((head.state_dict(), optimizer.state_dict()["state"]))
    upstream = torch.tensor(torch.nan if bad == "upstream" else 1.0, device=device)
    head(features, labels).backward()  # a good one beside it
    head(features * (torch.nan if bad == "features" else 1), labels).backward(upstream)
    optimizer.step()
    after = (head.state_dict(), optimizer.state_dict()["state"])
    assert torch.equal(before[0]["weight"].nan_to_num(), after[0]["weight"].nan_to_num())
    (was,), (now,) = before[1].values(), after[1].values()
    for name in was:
        assert torch.equal(was[name], now[name]) == (name not in ("skipped", "rounding_step")), name
    assert optimizer.skipped_steps == 1
    if bad != "table":
        head(features, labels).backward()
        optimizer.step()
        assert optimizer.skipped_steps == 1 and not torch.equal(head.weight, before[0]["weight"])


def test_forgotten_optimizer_is_said(device, monkeypatch):
    monkeypatch.setattr(recording, "MANY_RECORDS", 3)
    head, _ = twins(device)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    (features, labels), *_ = batches(1, device)
    said = []
    for _ in range(4):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            head(features, labels).backward()
        said.append(any("never called" in str(each.message) for each in found))
    optimizer.zero_grad()
    assert said == [False, False, True, False]


def test_step_under_autocast(device):
    """Forward chose the precision: torch's products of a step are not autocast."""
    found = []
    for inside in (False, True):
        head, _ = twins(device, head=MarginSoftmaxLoss, margin=Softmax(), backend="torch", memory_budget=0)
        optimizer = FusedSGD(head.parameters(), lr=0.5)
        (features, labels), *_ = batches(1, device)
        head(features, labels).backward()
        with torch.autocast(device.type, torch.bfloat16, enabled=inside):
            optimizer.step()
        found.append(head.weight.detach())
    assert torch.equal(*found)


def test_bias_frozen_between_two_backward_passes(device):
    head, _ = twins(device, head=MarginSoftmaxLoss, margin=Softmax(), bias=True)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    (features, labels), *_ = batches(1, device)
    head(features, labels).backward()
    head.bias.requires_grad_(False)
    head(features, labels).backward()
    before = head.weight.clone()
    with pytest.raises(RuntimeError, match="frozen for some of the backward passes"):
        optimizer.step()
    assert torch.equal(head.weight, before)


def test_own_error_where_the_ranks_cannot_agree(device, monkeypatch):
    """A rank that raises is why another one waits: its own error is what it says."""

    def times_out(*arguments, **options):
        raise RuntimeError("timed out")

    head, _ = twins(device)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    monkeypatch.setattr(optimizer, "_ranks", lambda: {ranks.Ranks(group): device})
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: "cpu:gloo")
    monkeypatch.setattr(ranks, "_all_gather", times_out)
    with pytest.raises(RuntimeError, match=r"agreement on a step failed or timed out.*timed out"):
        optimizer.step()
    head.weight.grad = torch.zeros_like(head.weight)
    with pytest.raises(RuntimeError, match=r"^the class table has an ordinary gradient"):
        optimizer.step()


def test_overflow_in_the_target_s_share_changes_nothing(device, path):
    """Features and upstream gradient are finite, their product overflows."""
    head = MarginSoftmaxLoss(SIZE, NUM_CLASSES, margin=Softmax(), device=device)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    before = head.weight.clone()
    (features, labels), *_ = batches(1, device)
    (head(features.float() * 1e20, labels) * 1e20).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1 and torch.equal(head.weight, before)


def scaled_steps(device, head, table_optimizer, overflow_at=None, **scaler_options):
    torch.manual_seed(1)
    backbone = torch.nn.Linear(SIZE, SIZE, device=device)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=2, **scaler_options)
    for step, (features, labels) in enumerate(batches(5, device)):
        loss = head(backbone(features), labels) * (torch.inf if step == overflow_at else 1)
        scaler.scale(loss).backward()
        for one in (optimizer, table_optimizer):
            scaler.step(one)
            one.zero_grad()
        scaler.update()
    return scaler


@pytest.mark.parametrize("overflow_at", [None, 2])
def test_grad_scaler(device, overflow_at, path):
    ours, theirs = twins(device)
    options = {"lr": 0.5, "momentum": 0.9}
    scaler = scaled_steps(device, ours, FusedSGD(ours.parameters(), **options), overflow_at)
    scaled_steps(device, theirs, torch.optim.SGD(theirs.parameters(), **options), overflow_at)
    assert scaler.get_scale() == 2.0 ** (12 if overflow_at is None else 11)
    assert largest_error(ours.weight, theirs.weight) < 5 * 64 * 2**-23


def test_unscale_is_refused(device):
    head, _ = twins(device)
    optimizer, scaler = FusedSGD(head.parameters(), lr=0.5), torch.amp.GradScaler(device.type)
    features, labels = next(batches(1, device))
    scaler.scale(head(features, labels)).backward()
    before = head.weight.detach().clone()
    with pytest.raises(RuntimeError, match="don't call it for FusedSGD"):
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
    assert torch.equal(head.weight, before)
    optimizer.grad_scale = scaler.scale(torch.ones((), device=device))  # as without unscale_: nothing was lost
    optimizer.step()
    assert not torch.equal(head.weight, before)


RESUMED = [FusedSGD, FusedAdamW], [*formats.TABLE_FORMATS], [*formats.STATE_FORMATS]
RESUMED_PAIRS = pairs(*RESUMED)


@pytest.mark.parametrize(("kind", "table_format", "state_format"), itertools.product(*RESUMED))
@slow_when(lambda kind, table_format, state_format: (kind, table_format, state_format) not in RESUMED_PAIRS)
def test_resumed_run_has_the_same_bits(kind, table_format, state_format, device, path):
    def new(seed=5):
        head = twins(device, table_format=table_format)[0]
        options = {"momentum": 0.9} if kind is FusedSGD else {}
        return head, kind(head.parameters(), lr=0.1, state_format=state_format, seed=seed, **options)

    def go(head, optimizer, some):
        for features, labels in some:
            head(features, labels).backward()
            optimizer.step()

    whole, first, other = new(), new(), new(seed=6)
    everything = list(batches(4, device))
    go(*whole, everything)
    go(*other, everything)
    go(*first, everything[:2])
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    resumed = new(seed=7)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    go(*resumed, everything[2:])
    assert torch.equal(*(each.float().weight for each in copy.deepcopy([whole[0], resumed[0]])))
    for name, tensor in whole[1].state[whole[0].weight].items():
        found = resumed[1].state[resumed[0].weight][name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
    rounded = table_format != "float32" or state_format != "float32"
    assert torch.equal(whole[0].weight.float(), other[0].weight.float()) != rounded


def test_slabs_of_any_size_and_threads_round_the_same(monkeypatch):
    def go(largest_slab, threads, is_native):
        monkeypatch.setattr("cosface_kernels.ops.slabs.SLAB_CLASSES_MAX", largest_slab)
        monkeypatch.setattr(rules.Part, "is_native", lambda part: is_native)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        head, _ = twins(table_format="bfloat16", backend="torch")
        optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9, state_format="bfloat16", weight_decay=0.1)
        head(
            torch.zeros(3, SIZE), torch.zeros(3, dtype=torch.int64)
        ).backward()  # no gradient but the decay's: no rounding but ours
        optimizer.step()
        torch.set_num_threads(before)
        return head.weight.detach(), optimizer.state[head.weight]["momentum_buffer"]

    first = go(128, 1, False)
    others = [go(256, 2, False)] + ([go(128, 1, True), go(384, 2, True)] if cpu_library.available() else [])
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one, two)


def test_a_table_of_16_bits_refuses_other_optimisers(device):
    head, _ = twins(device, table_format="bfloat16")
    features, labels = next(batches(1, device))
    loss = head(features.requires_grad_(), labels)
    with pytest.raises(RuntimeError, match="trains with FusedSGD or FusedAdamW"):
        loss.backward()
    with torch.no_grad():
        head(features, labels)
    head.requires_grad_(False)
    head(features, labels).backward()  # a frozen one is as good as any
    assert features.grad.isfinite().all()
    CosFaceLoss(SIZE, NUM_CLASSES, dtype=torch.bfloat16, device=device)(features, labels).backward()  # asked for


def test_copies_pickles_and_former_tables_have_ordinary_gradients(device):
    head, _ = twins(device)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    features, labels = next(batches(1, device))
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    for other in (copy.deepcopy(head), torch.load(file, weights_only=False)):
        other(features, labels).backward()
        assert other.weight.grad is not None
        other.weight.grad = None
        trained = FusedSGD(other.parameters(), lr=0.5)  # and are tables
        other(features, labels).backward()
        assert other.weight.grad is None
        trained.step()
    del optimizer
    gc.collect()
    head(features, labels).backward()
    assert head.weight.grad is not None


def test_second_optimiser_takes_over(device):
    head, _ = twins(device)
    first = FusedSGD(head.parameters(), lr=0.5)
    second = FusedSGD(head.parameters(), lr=0.5)
    del first
    gc.collect()
    features, labels = next(batches(1, device))
    head(features, labels).backward()
    assert head.weight.grad is None
    before = head.weight.detach().clone()
    second.step()
    assert not torch.equal(head.weight, before)


def test_compiled_head(device):
    ours, theirs = twins(device)
    optimizers = FusedSGD(ours.parameters(), lr=0.5), torch.optim.SGD(theirs.parameters(), lr=0.5)
    compiled = torch.compile(ours, backend="aot_eager")
    for features, labels in batches(2, device):
        for head, optimizer in zip((compiled, theirs), optimizers, strict=True):
            head(features, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert largest_error(ours.weight, theirs.weight) < 2 * 64 * 2**-23


def test_autocast(device):
    ours, theirs = twins(device)
    optimizers = FusedSGD(ours.parameters(), lr=0.5), torch.optim.SGD(theirs.parameters(), lr=0.5)
    features, labels = next(batches(1, device))
    before = ours.weight.detach().clone()
    for head, optimizer in zip((ours, theirs), optimizers, strict=True):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = head(features, labels)
        loss.backward()
        optimizer.step()
    # The same bfloat16 products, so the same gradient but for float32 roundings.
    assert largest_error(ours.weight - before, theirs.weight - before) < 64 * 2**-20


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda head: FusedSGD(torch.nn.Linear(3, 3).parameters()), r"trains class tables alone.* shape \(3, 3\)"),
        (lambda head: FusedSGD([*head.parameters(), torch.nn.Parameter(torch.ones(2))]), r"shape \(2,\)"),
        (lambda head: FusedSGD([head.weight]), "give both"),
        (lambda head: FusedSGD([head.bias]), "give both"),
        (lambda head: FusedSGD(head.parameters(), lr=-1), "lr must be 0 or more, got -1"),
        (lambda head: FusedSGD(head.parameters(), momentum=-1), "momentum must be 0 or more"),
        (lambda head: FusedSGD(head.parameters(), weight_decay=-1), "weight_decay must be 0 or more"),
        (lambda head: FusedSGD(head.parameters(), nesterov=True), "nesterov needs a momentum"),
        (lambda head: FusedSGD(head.parameters(), state_format="int4"), "state_format must be one of .*int8.*int4"),
        (lambda head: FusedSGD([{"params": head.parameters(), "lr": -1}]), "lr must be 0 or more, got -1"),
        (lambda head: FusedSGD([{"params": head.parameters(), "state_format": "int4"}]), "state_format must be one of"),
        (lambda head: FusedSGD(head.double().parameters(), state_format="int8"), "float64 table has state of its own dtype"),
        (lambda head: FusedAdamW(head.parameters(), betas=(0.9,)), "betas must be two numbers"),
        (lambda head: FusedAdamW(head.parameters(), betas=0.9), "betas must be two numbers"),
        (lambda head: FusedSGD(head.parameters(), max_row_norm=0.0), "max_row_norm must be more than 0, got 0.0"),
        (lambda head: FusedAdamW(head.parameters(), max_row_norm=math.nan), "max_row_norm must be finite, got nan"),
        (lambda head: FusedAdamW(head.parameters(), betas=(0.9, 1.0)), r"betas\[1\] must be in \[0, 1\), got 1.0"),
        (lambda head: FusedAdamW(head.parameters(), eps=-1), "eps must be 0 or more"),
        (lambda head: CosFaceLoss(3, 4, table_format="int8"), "table_format must be one of .*'bfloat16'.*'int8'"),
        (lambda head: CosFaceLoss(3, 4, table_format="bfloat16", dtype=torch.float32), "makes the table torch.bfloat16"),
        (lambda head: FusedSGD(head.half().parameters()), "float32, bfloat16, float64 or float8, got torch.float16"),
    ],
)
def test_wrong_arguments(wrong, message):
    head = MarginSoftmaxLoss(SIZE, NUM_CLASSES, margin=Softmax(), bias=True)
    with pytest.raises(ValueError, match=message):
        wrong(head)
    head(torch.ones(1, SIZE, dtype=head.weight.dtype), torch.zeros(1, dtype=torch.int64)).backward()
    assert head.weight.grad is not None  # a constructor that failed left no trace


def test_wrong_use(device):
    head, _ = twins(device)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    features, labels = next(batches(1, device))
    loss = head(features, labels)
    with torch.no_grad():
        head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        loss.backward()
    head(features, labels).backward()
    with torch.no_grad():
        head.weight.mul_(2)
    before = head.weight.detach().clone()
    with pytest.raises(RuntimeError, match="changed between backward and step"):
        optimizer.step()
    (head(features, labels) + head.weight.sum()).backward()
    with pytest.raises(RuntimeError, match="has an ordinary gradient"):
        optimizer.step()
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize("shape", [(1, SIZE), (NUM_CLASSES, SIZE)])
@pytest.mark.parametrize("write", [lambda weight: weight.data.mul_(0.5), lambda weight: weight.detach().numpy().fill(1.0)])
def test_a_write_that_pytorch_does_not_count_is_noticed(write, shape):
    """As weights of an average that are put in for an evaluation, or SAM's step up."""
    head = CosFaceLoss(SIZE, shape[0])
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    features, labels = next(batches(1, num_classes=shape[0]))
    kept = head.weight.detach().clone()
    loss = head(features, labels)
    write(head.weight)
    with pytest.raises(RuntimeError, match=r"changed \(through .data or a NumPy array\) between forward and backward"):
        loss.backward()
    head(features, labels).backward()
    head.weight.data.copy_(kept)
    with pytest.raises(RuntimeError, match=r"changed \(through .data or a NumPy array\) between backward and step"):
        optimizer.step()
    assert torch.equal(head.weight, kept)
    optimizer.zero_grad()
    head(features, labels).backward()
    write(head.weight)
    head.weight.data.copy_(kept)  # as it was
    optimizer.step()
    assert not torch.equal(head.weight, kept) or shape[0] == 1


@pytest.mark.parametrize("change", [torch.nn.utils.parametrizations.weight_norm, prune.identity])
def test_a_table_that_no_head_has_any_more_is_not_stepped(change):
    """In silence torch.optim and ours would train a parameter that nothing reads."""
    head = CosFaceLoss(SIZE, NUM_CLASSES)
    with pytest.raises(ValueError, match=r"torch.nn.utils.parametrize or prune makes a table, .* needs another optimiser"):
        FusedSGD(change(copy.deepcopy(head), "weight").parameters(), lr=0.5)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    change(head, "weight")
    with pytest.raises(RuntimeError, match=r"no head has the class table|has an ordinary gradient"):
        head(*next(batches(1))).backward()
        optimizer.step()


def test_an_average_of_a_table(device):
    """torch.optim.swa_utils: the average of a 16-bit table is to be of 32 bits, where a thousandth of a step is a change."""
    head = CosFaceLoss(SIZE, NUM_CLASSES, table_format="bfloat16", device=device)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    ours = torch.optim.swa_utils.AveragedModel(
        copy.deepcopy(head).float(), avg_fn=lambda mean, now, count: mean.lerp(now.float(), 0.1)
    )
    mean = head.weight.detach().float().clone()
    for step, (features, labels) in enumerate(batches(3, device)):
        head(features, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        ours.update_parameters(head)
        mean = mean.lerp(head.weight.detach().float(), 0.1 if step else 1.0)
    assert ours.module.weight.dtype == torch.float32 and largest_error(ours.module.weight, mean) < 1e-6
    assert torch.equal(ours.module.topk(features, 2)[1], copy.deepcopy(ours.module).topk(features, 2)[1])


def test_step_is_a_change_that_autograd_sees(device, path):
    head, _ = twins(device)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    features, labels = next(batches(1, device))
    earlier = head(features, labels)
    head(features, labels).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        earlier.backward()


def test_state_of_another_table_is_refused(device):
    head, _ = twins(device)
    optimizer = FusedSGD(head.parameters(), lr=0.5, momentum=0.9)
    features, labels = next(batches(1, device))
    head(features, labels).backward()
    optimizer.step()
    larger = CosFaceLoss(SIZE, NUM_CLASSES + 1, device=device)
    other = FusedSGD(larger.parameters(), lr=0.5, momentum=0.9)
    with pytest.raises(ValueError, match=f"for the table of .{NUM_CLASSES + 1}, {SIZE}., got .{NUM_CLASSES}, {SIZE}."):
        other.load_state_dict(optimizer.state_dict())


def test_two_heads_and_added_group(device):
    first, second = twins(device, dtype=torch.float64), twins(device, margin=0.2, dtype=torch.float64)
    ours, theirs = FusedSGD(first[0].parameters(), lr=0.5), torch.optim.SGD(first[1].parameters(), lr=0.5)
    with pytest.raises(ValueError, match="trains class tables alone"):
        ours.add_param_group({"params": torch.nn.Linear(2, 3, device=device).parameters()})
    ours.add_param_group({"params": second[0].parameters(), "lr": 0.1})
    theirs.add_param_group({"params": second[1].parameters(), "lr": 0.1})
    for which, optimizer in enumerate((ours, theirs)):
        for features, labels in batches(2, device, torch.float64):
            (first[which](features, labels) + second[which](features, labels)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in (first, second):
        assert one.weight.grad is None and largest_error(one.weight, other.weight) < 1e-12


def test_nothing_to_do_is_no_step(device):
    head, _ = twins(device)
    optimizer = FusedSGD(head.parameters(), lr=0.5, momentum=0.9)
    optimizer.step()
    assert not optimizer.state and optimizer.skipped_steps == 0


@pytest.mark.parametrize("options", [{"margin": ArcFace()}, {"margin": Softmax(), "bias": True}], ids=["ArcFace", "bias"])
def test_margin_and_table_format_of_every_head(device, options):
    head = MarginSoftmaxLoss(SIZE, NUM_CLASSES, table_format="bfloat16", device=device, **options)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    features, labels = next(batches(1, device))
    losses = []
    for _ in range(10):
        losses.append(float(head(features, labels).detach()))
        head(features, labels).backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4 and head.weight.dtype == torch.bfloat16
    assert class_tables.head_of(head.weight) is head


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_exponentials_kept_beside_a_bias_are_read_as_they_were_written(monkeypatch, backend):
    if backend == "cpu" and not cpu_library.available():
        pytest.skip("the native library was not built here")
    # A slab then is 384 rows for D columns, and would be 256 for D + 1.
    monkeypatch.setattr("cosface_kernels.ops.slabs.SLAB_CLASSES_MAX", 2**16)
    monkeypatch.setattr(slabs, "SLAB_ELEMENTS", 257 * (ROWS + 2 * SIZE))
    grads = []
    for memory_budget in (0, 2**30):
        options = {"margin": Softmax(), "bias": True, "memory_budget": memory_budget, "backend": backend}
        torch.manual_seed(0)
        head = MarginSoftmaxLoss(SIZE, 1000, **options)
        torch.nn.init.normal_(head.bias)
        features, labels = next(batches(1, num_classes=1000))
        head(features, labels).backward()
        grads.append((head.weight.grad, head.bias.grad))
    for kept, again in zip(*grads, strict=True):
        assert largest_error(kept, again) < 1e-6


def test_a_loss_with_another_bias_is_refused():
    head, _ = twins(head=MarginSoftmaxLoss, margin=Softmax(), bias=True)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    features, labels = next(batches(1))
    for bias in (None, head.bias.detach().clone()):
        with pytest.raises(ValueError, match="takes that bias, and no other"):
            margin_softmax_loss(features, head.weight, labels, margin=Softmax(), bias=bias)
    plain, _ = twins()
    optimizer = FusedSGD(plain.parameters(), lr=0.5)
    with pytest.raises(ValueError, match="takes that bias, and no other"):
        margin_softmax_loss(features, plain.weight, labels, margin=Softmax(), bias=head.bias)
    before = plain.weight.detach().clone()
    optimizer.step()
    assert torch.equal(plain.weight, before)


@pytest.mark.parametrize("when", ["before backward", "after backward"])
def test_a_changed_bias_is_noticed(when):
    head, _ = twins(head=MarginSoftmaxLoss, margin=Softmax(), bias=True)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    loss = head(*next(batches(1)))
    if when == "after backward":
        loss.backward()
    with torch.no_grad():
        head.bias.add_(1)
    with pytest.raises(RuntimeError, match="between"):
        loss.backward() if when == "before backward" else optimizer.step()


@pytest.mark.parametrize("way", ["checkpoint", "save_on_cpu"])
def test_hooks_of_saved_tensors(way):
    ours, plain = twins()
    optimizers = FusedSGD(ours.parameters(), lr=0.5), FusedSGD(plain.parameters(), lr=0.5)
    features, labels = next(batches(1))
    if way == "checkpoint":
        loss = torch.utils.checkpoint.checkpoint(ours, features.requires_grad_(), labels, use_reentrant=False)
    else:
        with torch.autograd.graph.save_on_cpu():
            loss = ours(features, labels)
    loss.backward()
    plain(features, labels).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(ours.weight, plain.weight)


def test_features_wider_than_the_table(path):
    ours, theirs = twins()
    optimizers = FusedSGD(ours.parameters(), lr=0.5, momentum=0.9), torch.optim.SGD(theirs.parameters(), lr=0.5, momentum=0.9)
    for features, labels in batches(3, dtype=torch.float64):
        for head, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            head(features, labels).backward()
            optimizer.step()
    assert largest_error(ours.weight, theirs.weight) < 1e-6


def test_nothing_is_lost_where_step_raises():
    heads = [twins()[0] for _ in range(2)]
    optimizer = FusedSGD([parameter for head in heads for parameter in head.parameters()], lr=0.5)
    before = heads[0].weight.detach().clone()
    sum(head(*next(batches(1))) for head in heads).backward()
    heads[1].weight.grad = torch.zeros_like(heads[1].weight)
    with pytest.raises(RuntimeError, match="ordinary gradient"):
        optimizer.step()
    heads[1].weight.grad = None
    optimizer.step()
    assert not torch.equal(heads[0].weight, before)


@pytest.mark.parametrize("state_format", ["float32", "int8"])
def test_state_of_another_width_is_refused_and_strides_do_not_matter(state_format):
    head, other = twins()[0], CosFaceLoss(SIZE // 2, NUM_CLASSES)
    optimizer, narrow = (FusedSGD(h.parameters(), lr=0.5, momentum=0.9, state_format=state_format) for h in (head, other))
    features, labels = next(batches(1))
    head(features, labels).backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="momentum_buffer must have shape"):
        narrow.load_state_dict(saved)
    assert not narrow.state
    buffer = saved["state"][0]["momentum_buffer"]
    saved["state"][0]["momentum_buffer"] = buffer.t().contiguous().t()
    optimizer.load_state_dict(saved)
    head(features, labels).backward()
    optimizer.step()
    saved["state"][0]["momentum_buffer"] = None
    with pytest.raises(TypeError, match=r"momentum_buffer must be a tensor of shape .*, got NoneType"):
        optimizer.load_state_dict(saved)
    saved["state"][0]["momentum_buffer"] = buffer.half()
    with pytest.raises(ValueError, match=r"momentum_buffer must be one of .*float16"):
        optimizer.load_state_dict(saved)
    saved["state"][0] = {"momentum_buffer": buffer.char()}
    with pytest.raises(ValueError, match="there must be a momentum_buffer_scale"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("change", [lambda head: head.grow(3), lambda head: head.remove([0])])
def test_a_loss_of_other_identities_has_no_backward(change):
    head, _ = twins()
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    loss = head(*next(batches(1)))
    change(head)
    with pytest.raises(RuntimeError, match="between forward and backward"):
        loss.backward()
    before = head.weight.detach().clone()
    optimizer.step()
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize("fused, plain, options", [RULES[2], RULES[5]])
def test_goes_on_from_torch_optim(fused, plain, options):
    ours, theirs = twins()
    optimizer = plain(theirs.parameters(), **options)
    everything = list(batches(4))
    for features, labels in everything[:2]:
        optimizer.zero_grad()
        theirs(features, labels).backward()
        optimizer.step()
    ours.load_state_dict(theirs.state_dict())
    other = fused(ours.parameters(), lr=1e-9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for features, labels in everything[2:]:
        for head, each in ((ours, other), (theirs, optimizer)):
            each.zero_grad()
            head(features, labels).backward()
            each.step()
    assert largest_error(ours.weight, theirs.weight) < 1e-5


def test_an_optimiser_that_lost_its_table_says_so():
    head, _ = twins()
    first, second = (FusedSGD(head.parameters(), lr=0.5) for _ in range(2))
    head(*next(batches(1))).backward()
    before = head.weight.detach().clone()
    with pytest.raises(RuntimeError, match="made later"):
        first.step()
    first.zero_grad()
    second.step()
    assert not torch.equal(head.weight, before)
    del second
    gc.collect()
    with pytest.raises(RuntimeError, match="made later"):
        first.step()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows.t().contiguous().t(), "contiguous"),
        (lambda rows: rows[:1].expand(NUM_CLASSES, SIZE), "contiguous"),
        (lambda rows: rows.half(), "float16"),
    ],
)
def test_a_table_that_became_unfit_is_refused(change, message):
    head, _ = twins()
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    head.weight.data = change(head.weight.data)
    head(*next(batches(1))).backward()
    before = head.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(head.weight, before)


def test_learning_rate_as_a_tensor(device):
    ours, theirs = twins(device, dtype=torch.float64)
    for head, lr in ((ours, torch.tensor(0.5)), (theirs, 0.5)):
        optimizer = FusedSGD(head.parameters(), lr=lr)
        head(*next(batches(1, device, torch.float64))).backward()
        optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)


def test_distributed_state_dict_would_lose_a_recorded_backward():
    head = CosFaceLoss(8, 20)
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    head(torch.randn(6, 8), torch.arange(6)).backward()
    with pytest.raises(RuntimeError, match=r"would lose the backward that is recorded.*: set it again"):
        get_state_dict(head, optimizer)
    before = head.weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert head.weight.grad is None and not torch.equal(head.weight, before)
    get_state_dict(head, optimizer)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("state_format", ["float32", "int8"])
@pytest.mark.parametrize("kind, options", [(FusedSGD, {}), (FusedSGD, {"momentum": 0.9, "weight_decay": 0.01}), (FusedAdamW, {})])
def test_state_dict_of_distributed_checkpoint(kind, options, state_format, steps):
    """get_state_dict and set_state_dict, which have an optimiser without state make a step with zeros; all go on to the bit."""
    untouched, saved = twins(head=MarginSoftmaxLoss, margin=Softmax(), bias=True)
    loaded = MarginSoftmaxLoss(SIZE, NUM_CLASSES, margin=Softmax(), bias=True)
    heads = untouched, saved, loaded
    optimizers = [kind(head.parameters(), lr=0.5, state_format=state_format, **options) for head in heads]
    first, *rest = batches(3)

    def step(head, optimizer, features, labels):
        head(features, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    for head, optimizer in list(zip(heads, optimizers, strict=True))[: 2 * steps]:
        step(head, optimizer, *first)
    model, state = copy.deepcopy(get_state_dict(saved, optimizers[1]))
    set_state_dict(loaded, optimizers[2], model_state_dict=model, optim_state_dict=state)
    for batch in rest:
        for head, optimizer in zip(heads, optimizers, strict=True):
            step(head, optimizer, *batch)
    for head, optimizer in zip(heads[1:], optimizers[1:], strict=True):
        for ours, wanted in zip(head.parameters(), untouched.parameters(), strict=True):
            assert torch.equal(ours, wanted)
            there = optimizers[0].state[wanted]
            assert optimizer.state[ours].keys() == there.keys()
            assert all(torch.equal(optimizer.state[ours][name], value) for name, value in there.items())


def test_an_optimiser_is_not_copied(device):
    head, _ = twins(device)
    optimizer = FusedSGD(head.parameters())
    with pytest.raises(TypeError, match="save its state_dict"):
        copy.deepcopy(optimizer)


def test_table_that_became_another_dtype(device):
    """Refused before anything has changed, records included."""
    head, _ = twins(device)
    optimizer = FusedSGD(head.parameters(), lr=0.5, momentum=0.9)
    for features, labels in batches(2, device):
        head(features, labels).backward()
        optimizer.step()
    head.double()
    before = copy.deepcopy((head.weight.detach(), optimizer.state_dict()["state"]))
    head(features.double(), labels).backward()
    with pytest.raises(ValueError, match=r"the table is torch\.float64 now: make the optimiser again"):
        optimizer.step()
    assert torch.equal(before[0], head.weight)
    (was,), (now,) = before[1].values(), optimizer.state_dict()["state"].values()
    assert all(torch.equal(was[name], now[name]) for name in was)


def test_the_batch_may_be_overwritten_before_step(device):
    """Buffers that hold one batch after another, as accumulation often has them."""
    ours, theirs = twins(device)
    optimizers = FusedSGD(ours.parameters(), lr=0.5), torch.optim.SGD(theirs.parameters(), lr=0.5)
    features, labels = torch.empty(ROWS, SIZE, device=device), torch.empty(ROWS, dtype=torch.int64, device=device)
    for batch in batches(3, device):
        for head in (ours, theirs):
            features.copy_(batch[0]), labels.copy_(batch[1])
            head(features, labels).backward()
            features.zero_(), labels.zero_()
    for optimizer in optimizers:
        optimizer.step()
    assert largest_error(ours.weight, theirs.weight) < 3 * 64 * 2**-23


def test_classes_that_were_overwritten_before_step(device):
    head, _ = twins(device)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    classes, (features, labels) = torch.arange(NUM_CLASSES, device=device), next(batches(1, device))
    before = head.weight.detach().clone()
    margin_softmax_loss(features, head.weight, labels, margin=ArcFace(), classes=classes).backward()
    classes += 1
    with pytest.raises(RuntimeError, match="classes that a loss was told to take, were changed between backward and step"):
        optimizer.step()
    assert torch.equal(head.weight, before)


OTHERS = {
    "FusedSGD has no dampening": (FusedSGD, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5)),
    "FusedAdamW has no amsgrad": (FusedAdamW, lambda p: torch.optim.AdamW(p, amsgrad=True)),
    "a group has no betas": (FusedAdamW, lambda p: FusedSGD(p, momentum=0.9)),
    "a group has no momentum": (FusedSGD, lambda p: torch.optim.AdamW(p)),
    "torch.optim.Adam adds the decay": (FusedAdamW, lambda p: torch.optim.Adam(p, weight_decay=0.1)),
    "square_avg is no state": (FusedSGD, lambda p: torch.optim.RMSprop(p, centered=True)),
}


@pytest.mark.parametrize("match", OTHERS)
def test_state_of_another_rule_is_refused(match):
    kind, other = OTHERS[match]
    ours, theirs = twins()
    optimizer, others = kind(ours.parameters()), other(theirs.parameters())
    features, labels = next(batches(1))
    theirs(features, labels).backward()
    others.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(others.state_dict())
    assert optimizer.state_dict() == before


@every_rule
def test_torch_optim_goes_on_with_the_state(rule):
    """Each loads the other's state, and both go on alike."""
    fused, plain, options = rule
    ours, theirs = twins()
    optimizers = fused(ours.parameters(), **options), plain(theirs.parameters(), lr=7.0)
    for step, (features, labels) in enumerate(batches(3)):
        if step == 2:
            theirs.load_state_dict(ours.state_dict())
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for head, optimizer in zip((ours, theirs), optimizers, strict=True):
            if head is ours or step == 2:
                head(features, labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert largest_error(ours.weight, theirs.weight) < 64 * 2**-23


def test_a_table_that_is_no_longer_bfloat16_is_an_ordinary_one():
    head = CosFaceLoss(SIZE, NUM_CLASSES, table_format="bfloat16").float()
    assert head.table_format == "float32" and "table_format" not in repr(head)
    features, labels = next(batches(1))
    head(features, labels).backward()
    assert head.weight.grad.any()


@pytest.mark.skipif(not cpu_library.available(), reason="the native library was not built here")
@pytest.mark.parametrize("table_format", formats.TABLE_FORMATS)
@pytest.mark.parametrize("state_format", formats.STATE_FORMATS)
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_rows_are_updated_as_they_are_made(kind, table_format, state_format, monkeypatch):
    """Without a slab of gradients between the two, and with the same bits."""

    def trained():
        torch.manual_seed(0)
        head = CosFaceLoss(SIZE, NUM_CLASSES, table_format=table_format, backend="cpu")
        momentum = {"momentum": 0.9} if kind is FusedSGD else {}
        optimizer = kind(head.parameters(), lr=0.1, state_format=state_format, **momentum)
        for features, labels in batches(2):
            head(features, labels).backward()
            optimizer.step()
        return head.weight.detach(), *(value for value in optimizer.state[head.weight].values() if value.dim())

    with monkeypatch.context() as patch:
        patch.setattr(rules.Update, "put", None)
        found = trained()
    monkeypatch.setattr(rules.Update, "native_update", lambda update: None)
    assert all(torch.equal(one, other) for one, other in zip(found, trained(), strict=True))


def by_data(head, rows):
    head.weight.data = rows


def by_set(head, rows):
    with torch.no_grad():
        head.weight.set_(rows)


@pytest.mark.parametrize("replace", [by_data, by_set])
@pytest.mark.parametrize("shape", [(301, SIZE), (20_000, SIZE), (10, SIZE), (NUM_CLASSES, 300)], ids=str)
@pytest.mark.parametrize("fused", [FusedSGD, FusedAdamW])
@pytest.mark.parametrize("state_format", ["float32", "int8"])
def test_a_table_of_another_shape_than_its_state_is_refused(replace, shape, fused, state_format, device):
    head, _ = twins(device)
    optimizer = fused(head.parameters(), lr=0.5, state_format=state_format, **({"momentum": 0.9} if fused is FusedSGD else {}))
    train(head, optimizer, 1, device=device)
    replace(head, torch.ones(shape, device=device))
    before = copy.deepcopy(optimizer.state[head.weight])
    head(torch.ones(ROWS, shape[1], device=device), torch.zeros(ROWS, dtype=torch.long, device=device)).backward()
    with pytest.raises(
        ValueError, match=rf"for the table of \({shape[0]}, {shape[1]}\), got .* was replaced; make the optimiser"
    ):
        optimizer.step()
    assert (head.weight == 1).all()
    assert all(torch.equal(before[name], value) for name, value in optimizer.state[head.weight].items())


@pytest.mark.parametrize("replace", [by_data, by_set])
@pytest.mark.parametrize("shape", [(NUM_CLASSES, SIZE), (4, SIZE), (20_000, SIZE)], ids=str)
def test_a_table_replaced_between_backward_and_step_is_noticed(replace, shape, device):
    """Also by one of the same shape, that would have the same address if the old one were not kept, and the same version."""
    head, _ = twins(device)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    head(*next(batches(1, device))).backward()
    replace(head, torch.empty(0, SIZE, device=device))
    replace(head, torch.ones(shape, device=device))
    with pytest.raises(RuntimeError, match=r"(replaced|changed).* between backward and step"):
        optimizer.step()
    assert (head.weight == 1).all()
    optimizer.zero_grad()
    head(*next(batches(1, device, num_classes=shape[0]))).backward()
    optimizer.step()
    assert (head.weight != 1).any()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda scale: scale.mul_(2), "changed between backward and step"),
        (torch.clone, "replaced by another tensor of its shape between backward and step"),
        (torch.Tensor.double, "weight_scale must be float32"),
        (lambda scale: scale[:, None].clone(), "weight_scale must be float32"),
        (lambda scale: scale.repeat_interleave(2)[::2], "weight_scale must be contiguous"),
    ],
)
def test_scales_of_float8_rows_changed_between_backward_and_step_are_noticed(change, error, device):
    head = CosFaceLoss(SIZE, NUM_CLASSES, table_format="float8").to(device)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    head(*next(batches(1, device))).backward()
    own, before = head.weight_scale, head.weight.float()
    head.weight_scale = change(own)
    with pytest.raises((RuntimeError, ValueError), match=error):
        optimizer.step()
    assert torch.equal(head.weight.float(), before)
    head.weight_scale = own
    optimizer.zero_grad()
    head(*next(batches(1, device))).backward()
    optimizer.step()
    assert not torch.equal(head.weight.float(), before)


def test_scales_of_float8_rows_changed_between_forward_and_backward_are_noticed(device):
    head = CosFaceLoss(SIZE, NUM_CLASSES, table_format="float8").to(device)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    loss = head(*next(batches(1, device)))
    head.weight_scale.mul_(2)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        loss.backward()
    assert optimizer.skipped_steps == 0


def test_a_table_replaced_between_forward_and_backward_is_noticed(device):
    head, _ = twins(device)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    loss = head(*next(batches(1, device)))
    head.weight.data = torch.ones(NUM_CLASSES, SIZE, device=device)
    with pytest.raises(RuntimeError, match="replaced by another tensor of its shape between forward and backward"):
        loss.backward()
    optimizer.step()
    assert (head.weight == 1).all()


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("momentum_buffer", lambda buffer: buffer[:-1], "must have shape"),
        ("momentum_buffer", lambda buffer: buffer.float().double(), "is torch.float64, but the table is torch.float32"),
        ("momentum_buffer", lambda buffer: buffer.half(), "must be one of"),
        ("momentum_buffer", lambda buffer: buffer.T.contiguous().T, "must be contiguous"),
        ("momentum_buffer", lambda buffer: buffer.to("meta"), "must have its numbers in memory"),
        ("momentum_buffer", lambda buffer: freed(buffer), "must have its numbers in memory"),
        ("momentum_buffer", lambda buffer: buffer.sum().char(), "must have shape"),
        ("momentum_buffer", lambda buffer: buffer.to(torch.uint8), "must be one of"),  # codes of squares
        ("momentum_buffer", lambda buffer: None, "must be a tensor"),
        ("skipped", lambda count: torch.tensor(-1), "must be a count"),
        ("rounding_step", lambda count: torch.tensor(True), "must be a count"),
        ("rounding_step", lambda count: torch.tensor(torch.nan), "must be a count"),
        ("momentum_buffer_scale", lambda scale: scale[:-1], "must have shape"),
        ("momentum_buffer_scale", lambda scale: scale.double(), "must be one of"),
    ],
)
def test_state_that_was_replaced_is_refused(name, change, message):
    head, _ = twins()
    optimizer = FusedSGD(head.parameters(), lr=0.5, momentum=0.9, state_format="int8")
    train(head, optimizer, 1)
    state = optimizer.state[head.weight]
    state[name] = change(state[name])
    head(*next(batches(1))).backward()
    before = head.weight.detach().clone()
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step()
    assert torch.equal(head.weight, before)
    state.clear()
    optimizer.step()
    assert not torch.equal(head.weight, before)


def freed(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


LOADED = {
    "freed": (lambda state: state[0].update(momentum_buffer=freed(state[0]["momentum_buffer"])), "its numbers in memory"),
    "meta": (lambda state: state[0].update(momentum_buffer=state[0]["momentum_buffer"].to("meta")), "its numbers in memory"),
    "sparse": (lambda state: state[0].update(momentum_buffer=torch.zeros(NUM_CLASSES, SIZE).to_sparse()), "must be a dense"),
    "a number": (lambda state: state[0].update(momentum_buffer=torch.tensor(1.0)), "must have shape"),
    "a count of three": (lambda state: state[0].update(skipped=torch.zeros(3)), "must have shape"),
    "a count of NaN": (lambda state: state[0].update(skipped=torch.tensor(torch.nan)), "skipped must be a count"),
    "a count below 0": (lambda state: state[0].update(rounding_step=torch.tensor(-1)), "rounding_step must be a count"),
    "half a count": (lambda state: state[0].update(rounding_step=torch.tensor(0.5)), "rounding_step must be a count"),
    "of nobody": (lambda state: state.update({7: state.pop(0)}), "must be of a parameter that param_groups has"),
}


@pytest.mark.parametrize("change, message", LOADED.values(), ids=LOADED)
def test_state_to_load_that_is_none_is_refused(change, message):
    """Freed memory was read, and ended the process."""
    head, _ = twins()
    optimizer = FusedSGD(head.parameters(), lr=0.5, momentum=0.9, state_format="int8")
    train(head, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved["state"])
    before = {name: value.clone() for name, value in optimizer.state[head.weight].items()}
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.load_state_dict(saved)
    assert all(torch.equal(optimizer.state[head.weight][name], value) for name, value in before.items())


@pytest.mark.parametrize("stored", [0, 16])
@pytest.mark.parametrize("table_format", ["float32", "float8"])
def test_a_table_without_memory_is_not_used(stored, table_format):
    """As FSDP leaves a parameter between its uses; or a part of it."""
    head = CosFaceLoss(SIZE, NUM_CLASSES, table_format=table_format)
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    features, labels = next(batches(1))
    head(features, labels).backward()
    head.weight.untyped_storage().resize_(stored)
    for use in (optimizer.step, lambda: head(features, labels), lambda: head.topk(features, 1)):
        with pytest.raises(ValueError, match="must have its numbers in memory"):
            use()


def test_state_without_counts_goes_on():
    head, _ = twins()
    optimizer = FusedSGD(head.parameters(), lr=0.5, momentum=0.9)
    train(head, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["rounding_step"]
    optimizer.load_state_dict(saved)
    train(head, optimizer, 1)
    assert optimizer.state[head.weight]["rounding_step"] == 1


NUMBERS = {
    "meta": (lambda: torch.tensor(0.1, device="meta"), "its numbers in memory"),
    "fake": (lambda: FakeTensorMode().from_tensor(torch.tensor(0.1)), "its numbers in memory"),
    "freed": (lambda: freed(torch.tensor(0.1)), "its numbers in memory"),
    "two": (lambda: torch.ones(2), "or a tensor of one"),
    "nan": (lambda: torch.tensor(torch.nan), "must be finite"),
    "complex": (lambda: torch.tensor(1j), "must be a real number"),
}


@pytest.mark.parametrize("number, message", NUMBERS.values(), ids=NUMBERS)
def test_hyperparameters_that_are_no_numbers_are_refused(number, message):
    """Given, or set later as a scheduler does; then no step is made, and its batch is not lost."""
    head, _ = twins()
    with pytest.raises((TypeError, ValueError), match=message):
        FusedSGD(head.parameters(), lr=number())
    with pytest.raises((TypeError, ValueError), match=message):
        FusedAdamW(head.parameters(), betas=(0.9, number()))
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    head(*next(batches(1))).backward()
    optimizer.param_groups[0]["lr"] = number()
    before = head.weight.detach().clone()
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step()
    assert torch.equal(head.weight, before)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    optimizer.step()
    assert not torch.equal(head.weight, before)


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.0), (0.0, 0.0)])
def test_adamw_without_memory(betas, path):
    """m is the gradient itself, however much smaller than the one before: its rounding may not become a step of lr."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(8, SIZE, generator=generator), torch.randn(8, SIZE, generator=generator)
    theirs = torch.nn.Parameter(start.clone())
    options = {"lr": 0.1, "betas": betas, "eps": 1e-12, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([theirs], **options)
    ours, first, second = start.clone(), torch.zeros(8, SIZE), torch.zeros(8, SIZE)
    for count, size in enumerate((1.0, 1e-9, 1e-3), 1):
        theirs.grad = size * gradient.roll(count, 0)
        optimizer.step()
        rule = rules.AdamW(*options.values(), False, torch.tensor(float(count)))
        rules.Part(ours, [(first, None), (second, None)], rule, 1, 0, None).apply(slice(0, 8), theirs.grad)
        if betas[0] == 0:
            assert torch.equal(first, theirs.grad)
        # The step is lr times a quotient of a few roundings, and is rounded with the table's number.
        bound = 2**-23 * (8 * 0.1 * count + count * theirs.detach().abs())
        assert ((ours - theirs.detach()).abs() <= bound).all()


def test_every_thread_s_backward_is_recorded():
    head, _ = twins()
    optimizer = FusedSGD(head.parameters(), lr=0.5)
    every = [head(*batch) for batch in batches(4) for _ in range(40)]

    def backward(losses):
        for loss in losses:
            loss.backward()

    threads = [threading.Thread(target=backward, args=(every[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recording.pending(head.weight).records) == len(every)
    optimizer.step()


def test_ctrl_c_at_any_line_of_a_step_loses_no_records_silently():
    """The table is as before, with its records, or as after, or said to be between."""
    codes = inspect.unwrap(FusedSGD.step).__code__, recording.Pending.take.__code__

    def stepped(interrupted_at):
        """(the table before, after, how many records are left, whether it is said to be between steps, lines that ran)."""
        torch.manual_seed(0)
        head, _ = twins()
        optimizer = FusedSGD(head.parameters(), lr=0.5)
        head(*next(batches(1))).backward()
        before, lines = head.weight.detach().clone(), 0

        def trace(frame, event, argument):
            nonlocal lines
            if frame.f_code not in codes:
                return None
            lines += event == "line"
            if event == "line" and lines == interrupted_at:
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            optimizer.step()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        said = table_state.INTERRUPTED in optimizer.state[head.weight]
        return before, head.weight.detach(), len(recording.pending(head.weight).records), said, lines

    _, after, _, _, lines = stepped(None)
    assert lines > 8
    for line in range(1, lines + 1):
        before, found, records, said, _ = stepped(line)
        assert said or torch.equal(found, after) or (records and torch.equal(found, before)), line


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@slow_when(lambda backend, error, path: interpreted(backend) and (error is MemoryError or path == "native"))
def test_an_interrupted_step_is_said_until_the_table_is_another(error, backend, path, device, monkeypatch, tmp_path):
    head, _ = twins(device, backend=backend)
    optimizer = FusedSGD(head.parameters(), lr=0.5, momentum=0.9)
    every_slab = slabs.Plan.slabs

    def interrupted(plan, table):
        every = every_slab(plan, table)
        yield next(every)
        raise error

    def step(head, optimizer):
        head(*next(batches(1, device))).backward()
        optimizer.step()

    step(head, optimizer)
    saved = copy.deepcopy((head.state_dict(), optimizer.state_dict()))
    head(*next(batches(1, device))).backward()
    version = head.weight._version
    with monkeypatch.context() as patch:
        patch.setattr(slabs.Plan, "slabs", interrupted)
        patch.setattr(cpu_loop, "MOST_IN_ONE_CALL", 0)
        with pytest.raises(error):
            optimizer.step()
    assert head.weight._version > version  # a graph from before has another table
    for call in (optimizer.step, optimizer.state_dict, lambda: step(head, optimizer)):
        with pytest.raises(RuntimeError, match="the class table is between steps"):
            call()
    with pytest.raises(RuntimeError, match="interrupted in a step"):
        save_checkpoint(tmp_path / "saved", head, optimizer)
    assert not [*tmp_path.iterdir()]
    optimizer.zero_grad()
    head.load_state_dict(saved[0]), optimizer.load_state_dict(copy.deepcopy(saved[1]))
    step(head, optimizer)
    again, _ = twins(device, backend=backend)
    other = FusedSGD(again.parameters(), lr=0.5, momentum=0.9)
    again.load_state_dict(saved[0]), other.load_state_dict(saved[1])
    step(again, other)
    assert torch.equal(head.weight, again.weight)


@pytest.mark.parametrize("table_format, state_format", [("float32", "float32"), ("bfloat16", "int8")])
def test_a_step_has_the_same_bits_on_any_number_of_threads(table_format, state_format, path):
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            head, _ = twins(table_format=table_format)
            train(head, FusedAdamW(head.parameters(), lr=0.1, state_format=state_format), 2)
        finally:
            torch.set_num_threads(before)
        results.append(head.weight.detach())
    assert all(torch.equal(results[0], other) for other in results[1:])
