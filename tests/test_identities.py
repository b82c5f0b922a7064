"""Do rows, bias and an optimizer's state follow when identities come and go, and does training go on?"""

import re

import numpy as np
import pytest
import torch

from cosface_kernels import CosFaceLoss, FusedAdamW, FusedSGD, MarginSoftmaxLoss, margins
from cosface_kernels.heads import confusions, own_centers
from cosface_kernels.heads.grow import follow

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
}
SIZE, CLASSES = 4, 6
HEADS = {
    "cosface": lambda classes, **options: CosFaceLoss(SIZE, classes, scale=8.0, **options),
    "sub-centres": lambda classes, **options: MarginSoftmaxLoss(
        SIZE, classes, margin=margins.CosFace(0.2), centers_per_class=3, **options
    ),
    "bias": lambda classes, **options: MarginSoftmaxLoss(SIZE, classes, margin=margins.Softmax(), bias=True, **options),
}


def step(head, optimizer, labels):
    torch.manual_seed(1)
    optimizer.zero_grad()
    head(torch.randn(len(labels), SIZE, device=head.weight.device, dtype=head.weight.dtype), labels).backward()
    optimizer.step()


@pytest.fixture(params=HEADS)
def make_head(request):
    return HEADS[request.param]


@pytest.fixture(params=OPTIMIZERS)
def stepped(request, make_head, device):
    """(head, optimizer) after a step in which all classes had a sample."""
    head = make_head(CLASSES, device=device)
    optimizer = OPTIMIZERS[request.param](head.parameters())
    step(head, optimizer, torch.arange(CLASSES, device=device))
    return head, optimizer


def rows_of(head, optimizer):
    """[parameter or state with a row for each of the table's]."""
    parameters = [*head.parameters()]
    return [*parameters, *(value for p in parameters for value in optimizer.state[p].values() if value.dim())]


def test_sparse_momentum(device):
    """That of torch.optim.SGD for sampled classes: rows that were never sampled have none, and new ones neither."""
    head = CosFaceLoss(SIZE, 30, sample_rate=0.4, device=device)
    optimizer = OPTIMIZERS["sgd"](head.parameters())
    step(head, optimizer, torch.arange(3, device=device))
    state = optimizer.state[head.weight]
    before = state["momentum_buffer"].to_dense()
    assert state["momentum_buffer"].is_sparse and before.any()
    head.grow(2, optimizer)
    head.remove([0, 7, 30], optimizer)
    wanted = torch.cat([before[1:7], before[8:], before.new_zeros(1, SIZE)])
    assert torch.equal(state["momentum_buffer"].to_dense(), wanted)
    step(head, optimizer, torch.arange(29, device=device))


def test_grow(stepped, device):
    head, optimizer = stepped
    objects = [*head.parameters()]
    before = [rows.detach().clone() for rows in rows_of(head, optimizer)]
    torch.manual_seed(7)
    assert head.grow(2, optimizer) == range(CLASSES, CLASSES + 2)
    assert all(now is then and now.grad is None for now, then in zip(head.parameters(), objects, strict=True))
    after = rows_of(head, optimizer)
    for now, then in zip(after, before, strict=True):
        assert len(now) == (CLASSES + 2) * head.centers_per_class and now.dtype == then.dtype
        assert torch.equal(now[: len(then)], then)
        assert now is head.weight or not now[len(then) :].any()
    torch.manual_seed(7)
    drawn = torch.empty(2 * head.centers_per_class, SIZE, device=device)
    head.draw(drawn)
    assert torch.equal(head.weight[-len(drawn) :], drawn) and drawn.any()
    step(head, optimizer, torch.arange(CLASSES + 2, device=device))
    assert not any(torch.equal(now[: len(then)], then) for now, then in zip(rows_of(head, optimizer), before, strict=True))


def test_remove(stepped, device):
    head, optimizer = stepped
    objects = [*head.parameters()]
    before = [rows.detach().clone() for rows in rows_of(head, optimizer)]
    new_ids = head.remove([4, 1, 4], optimizer)
    assert new_ids.tolist() == [0, -1, 1, 2, -1, 3] and (new_ids.dtype, new_ids.device.type) == (torch.int64, "cpu")
    assert all(now is then and now.grad is None for now, then in zip(head.parameters(), objects, strict=True))
    for now, then in zip(rows_of(head, optimizer), before, strict=True):
        classes = then.unflatten(0, (CLASSES, head.centers_per_class))
        assert torch.equal(now, classes[[0, 2, 3, 5]].flatten(0, 1))
    step(head, optimizer, torch.arange(4, device=device))


def test_trains_on_as_if_the_removed_had_never_been(stepped, device):
    """Removing what was added leaves nothing of it, steps of Adam's included."""
    head, optimizer = stepped
    wanted = [rows.detach().clone() for rows in rows_of(head, optimizer)]
    added = head.grow(3, optimizer)
    head.remove(added, optimizer)
    assert all(torch.equal(now, then) for now, then in zip(rows_of(head, optimizer), wanted, strict=True))


def test_state_of_every_kind():
    """Other dtypes, a scale for each row, numbers, and what is no tensor."""
    head = HEADS["cosface"](CLASSES)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    codes = torch.arange(CLASSES * SIZE, dtype=torch.int8).reshape(CLASSES, SIZE)
    state = {
        "codes": codes,
        "half": codes.bfloat16(),
        "scale": torch.arange(CLASSES) + 1.0,
        "step": torch.tensor(3.0),
        "columns": torch.ones(SIZE),
        "none": None,
    }
    optimizer.state[head.weight] = dict(state)
    head.grow(1, optimizer)
    grown = dict(optimizer.state[head.weight])
    for key in ("codes", "half", "scale"):
        assert grown[key].dtype == state[key].dtype
        assert torch.equal(grown[key][:-1], state[key]) and not grown[key][-1].any()
    head.remove([0], optimizer)
    for key in ("codes", "half", "scale"):
        assert torch.equal(optimizer.state[head.weight][key], grown[key][1:])
    for key in ("step", "columns", "none"):
        assert optimizer.state[head.weight][key] is grown[key] is state[key]


def test_follow_changes_nothing_itself():
    head = HEADS["cosface"](CLASSES)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    step(head, optimizer, torch.arange(CLASSES))
    state = optimizer.state[head.weight]
    momentum = state["momentum_buffer"]
    ((owner, key, tensor),) = follow(optimizer, head.weight, lambda rows: rows[1:])
    assert owner is state and key == "momentum_buffer" and torch.equal(tensor, momentum[1:])
    assert state["momentum_buffer"] is momentum


def test_without_optimizer():
    """The table alone; the state of another shape is not passed over in silence."""
    head = HEADS["cosface"](CLASSES)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    step(head, optimizer, torch.arange(CLASSES))
    head.grow(1)
    assert len(head.weight) == CLASSES + 1 and len(optimizer.state[head.weight]["momentum_buffer"]) == CLASSES
    with pytest.raises(RuntimeError, match="size of tensor"):
        step(head, optimizer, torch.arange(CLASSES))


def test_dtype_and_a_gradient_of_the_old_shape():
    head = CosFaceLoss(SIZE, CLASSES, dtype=torch.bfloat16)
    head(torch.randn(CLASSES, SIZE), torch.arange(CLASSES)).backward()
    head.grow(2)
    assert head.weight.dtype == torch.bfloat16 and head.weight.requires_grad and head.weight.grad is None
    head(torch.randn(CLASSES, SIZE), torch.arange(CLASSES)).backward()
    assert head.weight.grad.shape == (CLASSES + 2, SIZE)


IDS = {
    "tensor": torch.tensor([1, 2]),
    "int32": torch.tensor([1, 2], dtype=torch.int32),
    "array": np.array([1, 2]),
    "range": range(1, 3),
    "set": {1, 2},
    "generator": (id for id in (1, 2)),
}


@pytest.mark.parametrize("ids", IDS)
def test_kinds_of_ids(ids):
    head = HEADS["cosface"](CLASSES)
    assert head.remove(IDS[ids]).tolist() == [0, -1, -1, 1, 2, 3]


def test_nobody_removed():
    head = HEADS["cosface"](CLASSES)
    before = head.weight.detach().clone()
    assert head.remove([]).tolist() == [*range(CLASSES)]
    assert torch.equal(head.weight, before)


OTHER = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
WRONG = {
    "count 0": (lambda head: head.grow(0), ValueError, "count must be 1 or more, got 0"),
    "count 1.5": (lambda head: head.grow(1.5), TypeError, "count must be an int, got 1.5"),
    "out of range": (lambda head: head.remove([2, 6]), IndexError, "ids must be from 0 to 5, got [6]"),
    "negative": (lambda head: head.remove([-1]), IndexError, "ids must be from 0 to 5, got [-1]"),
    "all": (lambda head: head.remove(range(6)), ValueError, "ids must leave at least one class, got all 6"),
    "mask": (lambda head: head.remove(torch.ones(6) > 0), TypeError, "ids must be class ids, ints, got torch.bool"),
    "floats": (lambda head: head.remove([1.0]), TypeError, "ids must be class ids, ints, got torch.float32"),
    "an int": (lambda head: head.remove(1), TypeError, "ids must be class ids, a sequence or tensor of ints, got 1"),
    "names": (lambda head: head.remove(["a"]), TypeError, "ids must be class ids, a sequence or tensor of ints, got ['a']"),
    "two dimensions": (lambda head: head.remove([[1], [2]]), ValueError, "ids must have one dimension, got shape (2, 1)"),
    "other optimizer": (lambda head: head.grow(1, OTHER), ValueError, "optimizer must be the one that has the head's weight"),
    "no optimizer": (lambda head: head.remove([1], [OTHER]), TypeError, "torch.optim.Optimizer or None, got list"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong):
    call, kind, message = WRONG[wrong]
    head = HEADS["cosface"](CLASSES)
    head(torch.randn(CLASSES, SIZE), torch.arange(CLASSES)).backward()
    before, gradient = head.weight.detach().clone(), head.weight.grad
    with pytest.raises(kind, match=re.escape(message)):
        call(head)
    assert torch.equal(head.weight, before) and head.weight.grad is gradient


def test_out_of_memory_changes_nothing(monkeypatch):
    """Running out of memory never leaves a table with new rows and a momentum without them."""
    head = HEADS["bias"](CLASSES)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    step(head, optimizer, torch.arange(CLASSES))
    before = [rows.detach().clone() for rows in rows_of(head, optimizer)]
    for calls in range(4):
        left, cat = [calls], torch.cat

        def failing(tensors, left=left, cat=cat):
            if left[0] == 0:
                raise torch.OutOfMemoryError
            left[0] -= 1
            return cat(tensors)

        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(torch, "cat", failing)
            head.grow(1, optimizer)
        assert all(torch.equal(now, then) for now, then in zip(rows_of(head, optimizer), before, strict=True))
        assert head.weight.grad is not None


def test_sharded_tables_say_what_to_do(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        from torch.distributed.tensor import Shard, distribute_tensor

        head = HEADS["cosface"](CLASSES)
        mesh = dist.init_device_mesh("cpu", (1,))
        head.weight = torch.nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(NotImplementedError, match=r"larger sharded head load_checkpoint\(\.\.\., grow="):
            head.grow(1)
        with pytest.raises(NotImplementedError, match="plain head"):
            head.remove([1])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("state_format", ["float32", "int8"])
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_fused_optimisers_follow_without_being_named(kind, state_format, device):
    """The same further steps as a head that had the new rows, or never had the removed ones, all along."""
    torch.manual_seed(0)
    head = CosFaceLoss(8, 40, device=device)
    optimizer = kind(head.parameters(), lr=0.1, state_format=state_format, **({"momentum": 0.9} if kind is FusedSGD else {}))
    features, labels = torch.randn(6, 8, device=device), torch.arange(6, device=device)
    for _ in range(2):
        head(features, labels).backward()
        optimizer.step()
    before = {name: tensor.clone() for name, tensor in optimizer.state[head.weight].items()}
    rows = head.weight.detach().clone()
    head(features, labels).backward()  # a gradient of a table that will be another
    assert head.grow(3) == range(40, 43)
    state = optimizer.state[head.weight]
    for name, tensor in before.items():
        if tensor.dim():
            assert torch.equal(state[name][:40], tensor) and not state[name][40:].any() and len(state[name]) == 43
    new_ids = head.remove([0, 41])
    assert torch.equal(head.weight[:39], rows[1:]) and len(head.weight) == 41
    grown = head.weight.detach().clone()
    optimizer.step()
    assert torch.equal(head.weight, grown)  # what was recorded is forgotten
    labels = new_ids.to(device)[labels + 1]
    losses = []
    for _ in range(5):
        loss = head(features, labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and head.weight.grad is None


@pytest.mark.parametrize("centers", [1, 3])
def test_confusions_are_each_classs_nearest_others(centers, monkeypatch):
    """Looked up five classes at a time; 3 and 8 are the same person, and a class's own sub-centres are not its neighbours."""
    monkeypatch.setattr(confusions, "ROWS", 5)
    head = MarginSoftmaxLoss(SIZE, 12, margin=margins.CosFace(0.2), centers_per_class=centers, dtype=torch.float64)
    with torch.no_grad():
        head.weight.view(12, centers, SIZE)[8, 0] = 3 * head.weight.view(12, centers, SIZE)[3, -1]
    unit = torch.nn.functional.normalize(head.weight.detach()).view(12, centers, SIZE)
    exact = torch.einsum("ikd,jld->ijkl", unit, unit).amax((2, 3)).fill_diagonal_(-2)
    cosines, classes = head.confusions(4)
    torch.testing.assert_close(cosines, exact.topk(4).values, rtol=0, atol=1e-15)
    torch.testing.assert_close(exact.gather(1, classes), cosines, rtol=0, atol=1e-15)  # 3 and 8 may change places
    assert all(len(set(row)) == 4 for row in classes.tolist())
    assert classes[3, 0] == 8 and classes[8, 0] == 3
    assert head.confusions(0)[1].shape == (12, 0) and head.confusions(11)[1].shape == (12, 11)
    with pytest.raises(ValueError, match="k must be from 0 to the number of other classes, 11, got 12"):
        head.confusions(12)


@pytest.mark.parametrize("centers", [1, 3])
def test_rows_beside_their_own_centres(centers, device, monkeypatch):
    """Looked up four rows at a time; class 2 has no row, ignored rows count for nothing."""
    monkeypatch.setattr(own_centers, "ROWS", 4)
    head = MarginSoftmaxLoss(SIZE, 6, margin=margins.CosFace(0.2), centers_per_class=centers, ignore_index=-7, device=device)
    features = torch.randn(30, SIZE, dtype=torch.float64, device=device)
    labels = torch.tensor([0, 1, 3, 4, 5, -7], dtype=torch.int32, device=device).repeat(5)
    cosines = head.own_cosines(features, labels)
    assert cosines.isnan().all(1).tolist() == (labels == -7).tolist() and cosines.dtype == torch.float64
    dominant = head.dominant_centers(cosines, labels).tolist()
    unit = torch.nn.functional.normalize(head.weight.detach().double()).view(6, centers, SIZE)
    for number in range(6):
        rows = labels == number
        exact = torch.nn.functional.normalize(features[rows]) @ unit[number].T
        torch.testing.assert_close(cosines[rows], exact, rtol=0, atol=1e-14)
        counts = exact.argmax(1).bincount(minlength=centers).tolist() if rows.any() else [0]
        assert dominant[number] == (counts.index(max(counts)) if any(counts) else -1)
    assert dominant[2] == -1
    with pytest.raises(IndexError, match=r"labels\[0\] is 6, but a label must be in \[0, 6\)"):
        head.own_cosines(features.cpu(), torch.full((30,), 6)) if device.type == "cpu" else None
    with pytest.raises(ValueError, match=rf"^cosines must have shape \(N, K\), K = {centers} .* got \(30, 9\) and \(30,\)"):
        head.dominant_centers(torch.zeros(30, 9, device=device), labels)
