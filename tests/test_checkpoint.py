"""Is a checkpoint whole or not there, refused when it is damaged or another's, and does training go on from it to the bit?"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import checkpoint_worker
import pytest
import torch
from checkpoint_worker import SIZE, TRAININGS, Model, assert_equal, flip, left_over, optimizers_of, train, trained, whole
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cosface_kernels import (
    CorruptCheckpointError,
    CosFaceLoss,
    FusedAdamW,
    FusedSGD,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from cosface_kernels.checkpoint import files

WORKER = Path(checkpoint_worker.__file__)


@pytest.fixture(autouse=True, scope="module")
def small_pieces():
    """Two rows to a piece, so that a table of seven has four, the last one short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cosface_kernels.checkpoint.pieces.PIECE_BYTES", 2 * SIZE * 4)
        yield


@pytest.fixture(autouse=True)
def no_waits_for_the_disk(monkeypatch):
    """No crash threatens here; the order of writes and fsyncs has a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def one_thread():
    """As the workers have: sums over another number of threads are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(scenario, folder, world_size=1, killed=()):
    """Runs a scenario of checkpoint_worker on all ranks; those in `killed` die of SIGKILL."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(WORKER.parents[1]), str(WORKER.parent)])}
    commands = [[sys.executable, WORKER, scenario, folder, str(rank), str(world_size)] for rank in range(world_size)]
    ranks = [subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    try:
        ends = [process.communicate(timeout=900) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, (process, (_, errors)) in enumerate(zip(ranks, ends, strict=True)):
        assert process.returncode == (-9 if rank in killed else 0), f"rank {rank}:\n{errors}"


def saved(folder, rows=7, **options):
    """A model and optimizers that took a step, saved as `folder`."""
    model = Model(rows, **options)
    optimizers = optimizers_of(model)
    train(model, optimizers, 1)
    save_checkpoint(folder, model, optimizers, extra={"epoch": 3})
    return model, optimizers


@pytest.mark.slow
def test_any_number_of_ranks(tmp_path):
    run("two_ranks", tmp_path, 2, killed=[1])
    wanted = torch.load(tmp_path / "wanted.pt")

    plain = Model(7, value=5.0)
    optimizers = optimizers_of(plain)
    with pytest.warns(UserWarning, match="saved by 2 ranks and is loaded by 1"):
        assert load_checkpoint(tmp_path / "sharded", plain, optimizers) == {"rank": 0}
    assert_equal(whole(plain, optimizers), wanted["saved"])
    save_checkpoint(tmp_path / "plain", plain, optimizers, extra={"rank": 0})
    train(plain, optimizers, 2)
    assert_equal(whole(plain, optimizers), wanted["trained"])

    run("three_ranks", tmp_path, 3)
    small = Model(4, value=5.0)
    with pytest.warns(UserWarning, match="saved by 3 ranks"):
        load_checkpoint(tmp_path / "empty", small)
    trained_once = Model(4)
    train(trained_once, optimizers_of(trained_once), 1)
    assert_equal(whole(small, {}), whole(trained_once, {}))


@pytest.mark.slow
def test_killed_at_any_point_and_full_disks(tmp_path):
    run("killed_saves", tmp_path)


@pytest.mark.slow
def test_full_disk_under_torchs_writer(tmp_path):
    run("full_disk_under_torchs_writer", tmp_path)


@pytest.mark.parametrize("fresh_process", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_resumed_training_is_the_same_to_the_bit(fresh_process, tmp_path, one_thread, monkeypatch):
    monkeypatch.setattr("cosface_kernels.checkpoint.pieces.PIECE_BYTES", 2**11)  # a table in three
    wanted = {}
    for name, training in TRAININGS.items():
        model, optimizer, step = trained(*training)
        for _ in range(3):
            step()
        save_checkpoint(tmp_path / name, model, optimizer, extra={"epoch": 3})
        wanted[name] = [step() for _ in range(3)], model.state_dict()
    run("resume", tmp_path) if fresh_process else checkpoint_worker.resume(tmp_path)
    for name, (losses, state) in wanted.items():
        resumed = torch.load(tmp_path / f"{name}-resumed.pt")
        assert resumed["losses"] == losses
        assert_equal(resumed["state"], state)


def test_loads_in_place(tmp_path):
    """Into the tensors that exist; state that the checkpoint has not got is dropped."""
    model, optimizers = saved(tmp_path / "a")
    wanted = whole(model, optimizers)
    state = optimizers["table"].state[model.weight]
    train(model, optimizers, 1)
    addresses = model.weight.data_ptr(), *(state[key].data_ptr() for key in ("momentum_buffer", "codes", "scale"))
    assert load_checkpoint(tmp_path / "a", model, optimizers) == {"epoch": 3}
    state = optimizers["table"].state[model.weight]
    assert addresses == (model.weight.data_ptr(), *(state[key].data_ptr() for key in ("momentum_buffer", "codes", "scale")))
    assert_equal(whole(model, optimizers), wanted)

    unstepped = Model(7)
    save_checkpoint(tmp_path / "b", unstepped, optimizers_of(unstepped))
    load_checkpoint(tmp_path / "b", model, optimizers)
    assert not optimizers["table"].state and not optimizers["backbone"].state


class LargestNew(TorchDispatchMode):
    """The most bytes of a storage that an operator made and was not given."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, each.untyped_storage().nbytes())
        return result


def test_no_copy_of_a_table(tmp_path, monkeypatch):
    """Neither saving nor loading makes or reads more than a piece: 16 KB of a table of 160, and more than a generator's 5."""
    monkeypatch.setattr("cosface_kernels.checkpoint.pieces.PIECE_BYTES", 16_000)
    head = CosFaceLoss(40, 1000)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    head(torch.randn(8, 40), torch.arange(8)).backward()
    optimizer.step()
    load, read = torch.load, []

    def recorded_load(*arguments, **options):
        found = load(*arguments, **options)
        read.append(found.nbytes if isinstance(found, torch.Tensor) else 0)
        return found

    monkeypatch.setattr(torch, "load", recorded_load)
    with LargestNew() as largest:
        save_checkpoint(tmp_path / "a", head, optimizer)
        load_checkpoint(tmp_path / "a", head, optimizer)
    assert largest.nbytes <= 16_000 and max(read) == 16_000 and sum(read) == 2 * 160_000


def test_options_are_loaded(tmp_path):
    """Options of the groups load as with torch's load_state_dict, by the names of parameters and not their order."""
    model = Model(7)
    optimizer = torch.optim.SGD([{"params": [model.weight, model.bias], "lr": 0.5}, {"params": [*model.backbone.parameters()]}])
    optimizer.param_groups[1]["lr"] = torch.tensor(0.25)
    save_checkpoint(tmp_path / "a", model, optimizer)
    other = torch.optim.SGD([{"params": [model.bias, model.weight]}, {"params": [*model.backbone.parameters()]}], lr=1.0)
    load_checkpoint(tmp_path / "a", model, [other])
    assert [group["lr"] for group in other.param_groups] == [0.5, 0.25]
    assert other.param_groups[0]["params"] == [model.bias, model.weight]


def test_other_parameter_groups(tmp_path):
    """The backbone and the table in one group or in two, as the documents' examples have them."""

    def trained(count, **options):
        model = Model(7)
        head, backbone = [model.weight, model.bias], [*model.backbone.parameters()]
        groups = [[*head, *backbone]] if count == 1 else [head, backbone]
        optimizer = torch.optim.SGD([{"params": group} for group in groups], momentum=0.9, **options)
        train(model, {"": optimizer}, 1)
        return model, optimizer

    for count, lr in ((1, 0.5), (2, torch.tensor(0.5))):
        model, optimizer = trained(count, lr=lr)
        save_checkpoint(tmp_path / f"{count}", model, optimizer)
        other, own = trained(3 - count, lr=0.1)
        load_checkpoint(tmp_path / f"{count}", other, own)
        assert {float(group["lr"]) for group in own.param_groups} == {0.5}
        assert_equal(whole(other, {"": own}), whole(model, {"": optimizer}))
    optimizer.param_groups[1]["lr"] = 0.25
    save_checkpoint(tmp_path / "differ", model, optimizer)
    other, own = trained(1, lr=0.1)
    before = whole(other, {"": own})
    with pytest.raises(ValueError, match="'weight'] in one group here, and in the checkpoint in groups whose options differ"):
        load_checkpoint(tmp_path / "differ", other, own)
    assert_equal(whole(other, {"": own}), before)


class WithExtraState(nn.Linear):
    counted = 0

    def get_extra_state(self):
        return {"counted": self.counted}

    def set_extra_state(self, state):
        self.counted = state["counted"]


def test_extra_state_of_a_module(tmp_path):
    module = WithExtraState(2, 2)
    module.counted = 5
    save_checkpoint(tmp_path / "a", module)
    again = WithExtraState(2, 2)
    load_checkpoint(tmp_path / "a", again)
    assert again.counted == 5
    with pytest.raises(ValueError, match=r"extra state \['_extra_state'\] in the checkpoint, \[\] here"):
        load_checkpoint(tmp_path / "a", nn.Linear(2, 2))


def test_without_optimizer_the_module_alone(tmp_path):
    model, _ = saved(tmp_path / "a")
    again = Model(7, value=5.0)
    load_checkpoint(tmp_path / "a", again)
    assert_equal(whole(again, {}), whole(model, {}))


FILES = ["__0_0.distcp", ".metadata", "shared.pt", "rank_0.pt"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path):
    path.write_bytes(b"")


DAMAGES = {
    **{f"{name} {damage.__name__}": (damage, name) for name in FILES for damage in (flip, truncate, emptied, Path.unlink)},
    **{f"manifest {damage.__name__}": (damage, "manifest.json") for damage in (truncate, emptied, Path.unlink)},
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact") / "a"
    saved(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "manifest.json"])
    return folder


def assert_corrupt(folder, match):
    """It is refused, and nothing is touched."""
    model = Model(7, value=5.0)
    optimizers = optimizers_of(model)
    train(model, optimizers, 1)
    before, generator = whole(model, optimizers), torch.get_rng_state()
    with pytest.raises(CorruptCheckpointError, match=match):
        load_checkpoint(folder, model, optimizers)
    assert_equal(whole(model, optimizers), before)
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(damage, intact, tmp_path):
    function, name = DAMAGES[damage]
    shutil.copytree(intact, tmp_path / "a")
    function(tmp_path / "a" / name)
    assert_corrupt(tmp_path / "a", name.replace(".", r"\."))


def test_any_flipped_byte_of_the_manifest(intact, tmp_path):
    """Each of its bytes matters, but for spaces and the like."""
    text = (intact / "manifest.json").read_bytes()
    meaning = json.loads(text)
    shutil.copytree(intact, tmp_path / "a")
    model = Model(7)
    for position in range(len(text)):
        changed = bytearray(text)
        changed[position] ^= 1
        (tmp_path / "a" / "manifest.json").write_bytes(changed)
        try:
            same = json.loads(changed) == meaning
        except ValueError:
            same = False
        if not same:
            with pytest.raises(CorruptCheckpointError):
                load_checkpoint(tmp_path / "a", model)


@pytest.mark.parametrize("name", FILES)
def test_file_that_the_manifest_lacks(name, intact, tmp_path):
    shutil.copytree(intact, tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"][name]
    path.write_text(json.dumps(manifest))
    assert_corrupt(tmp_path / "a", f"it has .*{re.escape(name)}")


def test_shard_of_another_checkpoint(intact, tmp_path):
    """Intact in itself, of the same size: what DCP itself would load."""
    saved(tmp_path / "b", value=1.0)
    shutil.copytree(intact, tmp_path / "a")
    shutil.copy(tmp_path / "b" / "__0_0.distcp", tmp_path / "a" / "__0_0.distcp")
    assert_corrupt(tmp_path / "a", r"__0_0\.distcp was changed")


def test_no_checkpoint(tmp_path):
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got dict"):
        load_checkpoint(tmp_path, {})
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "a", Model(7))
    with pytest.raises(CorruptCheckpointError, match="no finished checkpoint"):
        load_checkpoint(tmp_path, Model(7))
    torch.save({}, tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError, match=r"a\.pt is a file, and a checkpoint is a folder"):
        load_checkpoint(tmp_path / "a.pt", Model(7))


def other_size():
    model = Model(7)
    model.weight = nn.Parameter(torch.zeros(7, SIZE + 1))
    return model


def other_names():
    model = Model(7)
    model.more = nn.Parameter(torch.zeros(1))
    del model.bias
    return model


OTHERS = {
    "fewer classes": (
        lambda: Model(6),
        r"weight has shape \(7, 3\) in the checkpoint, \(6, 3\) here: load it into one of 7 rows and then call grow or remove$",
    ),
    "more classes": (lambda: Model(8), r"\(7, 3\) in the checkpoint, \(8, 3\) here: load .*, or pass grow=\('weight',\)"),
    "other dimension": (other_size, r"weight has shape \(7, 3\) in the checkpoint, \(7, 4\) here$"),
    "other dtype": (
        lambda: Model(7, dtype=torch.float64),
        "weight is torch.float32 .*, torch.float64 here: load it into a module of",
    ),
    "other names": (
        other_names,
        r"bias is in the checkpoint and not in module; strict=False.*\n.*more is in module and not in the checkpoint; strict",
    ),
    "no memory": (lambda: Model(7).to("meta"), "weight has no memory here, on the meta device"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_checkpoint_of_another_model(other, intact):
    make, match = OTHERS[other]
    model = make()
    before = whole(model, {})
    with pytest.raises(ValueError, match=f"(?ms)does not fit, and nothing was loaded:.*{match}"):
        load_checkpoint(intact, model)
    if not model.weight.is_meta:
        assert_equal(whole(model, {}), before)


def test_checkpoint_of_another_table_format(tmp_path):
    """Of float8 the scales of rows are left out of the advice: without them its numbers are none. Its way into other formats."""
    narrow, wide = CosFaceLoss(3, 7, table_format="float8"), CosFaceLoss(3, 7)
    save_checkpoint(tmp_path / "narrow", narrow)
    with pytest.raises(ValueError, match=r"(?s)float8_e4m3fn in the checkpoint, torch.float32 here: load .*state_dict") as error:
        load_checkpoint(tmp_path / "narrow", wide)
    assert "weight_scale is in the checkpoint and not in module" in str(error.value) and "strict=False" not in str(error.value)
    again = CosFaceLoss(3, 7, table_format="float8")
    load_checkpoint(tmp_path / "narrow", again)
    wide.load_state_dict(again.state_dict())
    assert torch.equal(wide.weight, narrow.float().weight)


def test_checkpoint_of_other_optimizers(intact):
    model = Model(7, value=5.0)
    before = whole(model, {})
    optimizers = optimizers_of(model)
    others = {
        r"optimizers \['table', 'backbone'\] in the checkpoint, \['0'\] here": optimizers["table"],
        r"parameter groups \[\['bias', 'weight'\]\] in the checkpoint, \[\['weight'\]\] here": optimizers
        | {"table": torch.optim.SGD([model.weight], lr=0.1)},
    }
    for match, other in others.items():
        with pytest.raises(ValueError, match=match):
            load_checkpoint(intact, model, other)
    train(model, optimizers, 1)
    before = whole(model, optimizers)
    optimizers["table"].state[model.weight]["codes"] = before["table/weight/codes"] = torch.zeros(7, SIZE)
    with pytest.raises(ValueError, match=r"weight/codes is torch.int8 \(7, 3\) in the checkpoint, torch.float32 \(7, 3\) here"):
        load_checkpoint(intact, model, optimizers)
    assert_equal(whole(model, optimizers), before)


def test_checkpoint_of_another_rule(tmp_path):
    head = CosFaceLoss(4, 20)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    head(torch.randn(3, 4), torch.arange(3)).backward()
    optimizer.step()
    save_checkpoint(tmp_path / "a", head, optimizer)
    other = CosFaceLoss(4, 20)
    before = other.weight.detach().clone()
    with pytest.raises(ValueError, match=r"optimizer/0 is of another kind: SGD in the checkpoint, AdamW here"):
        load_checkpoint(tmp_path / "a", other, FusedAdamW(other.parameters()))
    with pytest.raises(ValueError, match=r"optimizer/0: FusedSGD has no dampening"):
        load_checkpoint(tmp_path / "a", other, FusedSGD(other.parameters()))
    assert torch.equal(other.weight, before)


def test_more_rows(intact):
    """`grow`: the checkpoint's rows and their state, then the head's own with state zero, whether it had state or not."""
    for steps in (0, 1):
        model = Model(9, value=5.0)
        optimizers = optimizers_of(model)
        train(model, optimizers, steps)
        before = model.weight.detach().clone()
        load_checkpoint(intact, model, optimizers, grow=("weight", "bias"))
        reference = Model(7)
        train(reference, optimizers_of(reference), 1)
        assert torch.equal(model.weight, torch.cat([reference.weight, before[7:]]))
        state = optimizers["table"].state[model.weight]
        assert state["codes"].shape == (9, SIZE) and state["codes"][:7].any() and not state["codes"][7:].any()
        assert state["scale"].shape == (9,) and not state["scale"][7:].any()
        train(model, optimizers, 1)
    with pytest.raises(ValueError, match=r"grow must have names .*, got \['table'\]"):
        load_checkpoint(intact, model, optimizers, grow=("table",))
    with pytest.raises(ValueError, match=r"weight has shape \(7, 3\) in the checkpoint, \(6, 3\) here"):
        load_checkpoint(intact, Model(6), grow=("weight", "bias"))


def test_not_strict(intact):
    """Names that one side lacks are left as they are; what both have is loaded, and must fit."""
    model = other_names()
    nn.init.constant_(model.more, 5.0)
    load_checkpoint(intact, model, strict=False)
    reference = Model(7)
    train(reference, optimizers_of(reference), 1)
    assert torch.equal(model.weight, reference.weight)
    assert model.more.item() == 5.0
    with pytest.raises(ValueError, match=r"weight has shape \(7, 3\) in the checkpoint, \(7, 4\) here"):
        load_checkpoint(intact, other_size(), strict=False)


def pair(wrap_head=lambda head: head, wrap=lambda model: model):
    """(a model, its head, its optimiser), trained for a step."""
    head = CosFaceLoss(4, 20)
    model = wrap(nn.ModuleDict({"backbone": nn.Linear(4, 4), "head": wrap_head(head)}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    head(torch.randn(3, 4), torch.arange(3)).backward()
    optimizer.step()
    return model, head, optimizer


WRAPPERS = {
    "compiled head": {"wrap_head": torch.compile},
    "compiled model": {"wrap": torch.compile},
    "DataParallel": {"wrap": nn.DataParallel},
    "DataParallel of a compiled model": {"wrap": lambda model: nn.DataParallel(torch.compile(model))},
}


@pytest.mark.parametrize("saved_plain", [False, True])
@pytest.mark.parametrize("wrappers", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_models(wrappers, saved_plain, tmp_path):
    """With names that differ by wrappers alone, table and momentum are loaded and go on as they were."""
    there, here = (pair(**options) for options in (({}, wrappers) if saved_plain else (wrappers, {})))
    save_checkpoint(tmp_path / "a", there[0], there[2])
    load_checkpoint(tmp_path / "a", here[0], here[2])
    assert torch.equal(here[1].weight, there[1].weight)
    momenta = [optimizer.state[head.weight]["momentum_buffer"] for _, head, optimizer in (there, here)]
    assert torch.equal(*momenta) and momenta[0].any()


def test_grow_of_a_wrapped_head(tmp_path):
    model, head, _ = pair(torch.compile)
    save_checkpoint(tmp_path / "a", model)
    larger = nn.ModuleDict({"backbone": nn.Linear(4, 4), "head": CosFaceLoss(4, 25)})
    load_checkpoint(tmp_path / "a", larger, grow=("head.weight",))
    assert torch.equal(larger["head"].weight[:20], head.weight)


def test_wrappers_that_leave_two_tensors_one_name_are_not_guessed(tmp_path):
    two = nn.ModuleDict({"a": nn.Linear(4, 4), "module": nn.ModuleDict({"a": nn.Linear(4, 4)})})
    save_checkpoint(tmp_path / "two", two)
    load_checkpoint(tmp_path / "two", copy.deepcopy(two))  # both as they are named
    with pytest.raises(ValueError, match=r"_orig_mod\.a\.weight is in module and not in the checkpoint"):
        load_checkpoint(tmp_path / "two", nn.ModuleDict({"_orig_mod": nn.ModuleDict({"a": nn.Linear(4, 4)})}))


def test_a_table_that_is_not_loaded_is_said(tmp_path):
    there, here = nn.ModuleDict({"other": CosFaceLoss(4, 20)}), nn.ModuleDict({"head": CosFaceLoss(4, 20)})
    save_checkpoint(tmp_path / "a", there)
    with pytest.warns(UserWarning, match="no head.weight, so the class table keeps its present values"):
        load_checkpoint(tmp_path / "a", here, strict=False)
    with pytest.warns(UserWarning, match=r"no weight, .*; \['module.weight'\] there have its shape"):
        here["head"].load_state_dict(nn.DataParallel(there["other"]).state_dict(), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        here.load_state_dict(here.state_dict() | {"more": torch.zeros(1)}, strict=False)


@pytest.mark.parametrize("rates", [(1.0, 0.5), (0.5, 1.0)])
def test_another_sample_rate(rates, tmp_path):
    before, after = (CosFaceLoss(4, 20, sample_rate=rate) for rate in rates)
    optimizers = [FusedSGD(head.parameters(), lr=0.1, momentum=0.9) for head in (before, after)]
    before(torch.randn(3, 4), torch.arange(3)).backward()
    optimizers[0].step()
    save_checkpoint(tmp_path / "a", before, optimizers[0])
    with pytest.raises(ValueError, match=r"sample_step is in .*strict=False"):
        load_checkpoint(tmp_path / "a", after, optimizers[1])
    load_checkpoint(tmp_path / "a", after, optimizers[1], strict=False)
    assert torch.equal(after.weight, before.weight)
    momenta = [
        optimizer.state[head.weight]["momentum_buffer"] for optimizer, head in zip(optimizers, (before, after), strict=True)
    ]
    assert torch.equal(*momenta) and momenta[0].any()


def test_never_over_another(tmp_path):
    saved(tmp_path / "a")
    files = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with pytest.raises(FileExistsError, match="save into a new folder for each step"):
        saved(tmp_path / "a", value=1.0)
    assert files == {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert not left_over(tmp_path)


def save_number(folder, value=0.0, **options):
    module = nn.Linear(1, 1)
    nn.init.constant_(module.weight, value)
    save_checkpoint(folder, module, **options)


@pytest.mark.parametrize("exchanges", [True, False], ids=["renameat2", "two renames"])
def test_overwrite(exchanges, tmp_path, monkeypatch):
    """The old one is whole until the new one is; what is no checkpoint is never replaced."""
    if not exchanges:
        monkeypatch.setattr(files, "_renameat2", lambda *_: -1)
    for value in (1.0, 2.0):
        save_number(tmp_path / "best", value=value, overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == ["best"]
        module = nn.Linear(1, 1)
        load_checkpoint(tmp_path / "best", module)
        assert module.weight == value
    monkeypatch.setattr(files, "_has_size", lambda path, size: False)
    with pytest.raises(RuntimeError, match="something else has removed"):
        save_number(tmp_path / "best", value=3.0, overwrite=True)
    load_checkpoint(tmp_path / "best", module)
    assert module.weight == 2 and [path.name for path in tmp_path.iterdir()] == ["best"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "link").symlink_to("best")
    for name in ("notes", "link"):
        with pytest.raises(FileExistsError, match="is no finished checkpoint"):
            save_number(tmp_path / name, overwrite=True)
    assert not left_over(tmp_path)


def test_keep(tmp_path):
    """The newest of the same name; others, larger numbers, and what is no checkpoint stay."""
    for name in ("step-9", "step-10", "step-x-8", "best", "step-300", "7"):
        save_number(tmp_path / name)
    (tmp_path / "step-4").mkdir()
    save_number(tmp_path / "step-11", keep=2)
    others = {"step-x-8", "best", "step-300", "7", "step-4"}
    assert {path.name for path in tmp_path.iterdir()} == {"step-10", "step-11", *others}
    save_number(tmp_path / "step-12", keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-12", *others}
    save_number(tmp_path / "step-13", keep=5)
    assert {path.name for path in tmp_path.iterdir()} == {"step-12", "step-13", *others}


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"keep": 0}, ValueError, "keep must be 1 or more, got 0"),
        ({"keep": 1.5}, TypeError, r"keep must be an int or None, got 1\.5"),
        ({"keep": 1}, ValueError, "keep needs a name that ends in a number, such as step-2000, got best"),
        ({"overwrite": 1}, TypeError, "overwrite must be True or False, got 1"),
    ],
)
def test_wrong_keep_and_overwrite(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        save_number(tmp_path / "best", **options)
    assert not [*tmp_path.iterdir()]


def test_an_older_one_that_stays_is_a_warning(tmp_path, monkeypatch):
    save_number(tmp_path / "step-1")

    def refuse(path, **_):
        raise PermissionError("read-only")

    monkeypatch.setattr(files.shutil, "rmtree", refuse)
    monkeypatch.setattr(files.os, "unlink", refuse)
    with pytest.warns(UserWarning, match=r"step-1 could not be removed: read-only"):
        files.remove_older(tmp_path / "step-2", 1)


def test_interrupted(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path / "a")
    assert not [*tmp_path.iterdir()]


def test_removes_what_killed_saves_of_that_name_left(tmp_path):
    kept = ["b.tmp-0123456789abcdef", "a.tmp-mine", "a.tmp-mine.tmp-0123456789abcdef", "a.tmp-0123456789abcdef.old"]
    for name in [*kept, "a.tmp-0123456789abcdef"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    saved(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "a"])


def test_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    """Every file is fsynced after its last byte, then the folder, then comes the rename, then the folder above."""
    events, fsync, rename = [], os.fsync, os.rename

    def recorded_fsync(descriptor):
        events.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, os.fstat(descriptor).st_size))
        fsync(descriptor)

    def recorded_rename(source, target):
        events.append(target.name)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    saved(tmp_path / "new" / "a")
    (above, _), *files, (folder, _) = events[: events.index("a")]
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "new" / "a").iterdir()}
    sizes[".metadata.tmp"] = sizes.pop(".metadata")
    assert {event[0]: event[1] for event in files if event != ".metadata"} == sizes
    assert above == tmp_path.name and folder.startswith("a.tmp-")
    assert [name for name, _ in events[events.index("a") + 1 :]] == ["new"]


def test_what_cannot_be_saved(tmp_path):
    model = Model(7)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer/0 has parameters of shapes \[\(2,\)\] that are not in module"):
        save_checkpoint(tmp_path / "a", model, optimizer)
    others = [
        ({"epoch": 1, "best": [0.5, model]}, r"\['extra'\]\['best'\]\[1\] is of <class .*Model'>"),
        (lambda: 0, r"\['extra'\] is of <class 'function'>"),
    ]
    for extra, where in others:
        with pytest.raises(TypeError, match=f"extra must be plain data.*: {where}"):
            save_checkpoint(tmp_path / "a", model, extra=extra)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, .* got '0'"):
        save_checkpoint(tmp_path / "a", model, [model])
    for no_module in ({"model": model}, optimizer):
        with pytest.raises(TypeError, match=rf"module must be an nn\.Module, got {type(no_module).__name__}: put several"):
            save_checkpoint(tmp_path / "a", no_module)
    assert not [*tmp_path.iterdir()]


def test_sparse_state_is_not_saved(tmp_path):
    head = CosFaceLoss(4, 30, sample_rate=0.4)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    head(torch.ones(2, 4), torch.tensor([1, 2])).backward()
    optimizer.step()
    with pytest.raises(TypeError, match=r"momentum_buffer is a sparse tensor, as .*: take FusedSGD, or momentum=0"):
        save_checkpoint(tmp_path / "a", head, optimizer)
    assert not [*tmp_path.iterdir()]


def test_latest(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for name in ("step-9", "step-10", "best"):
        save_checkpoint(tmp_path / name, nn.Linear(1, 1))
    shutil.copytree(tmp_path / "step-9", tmp_path / "step-11.tmp-0123456789abcd99")
    (tmp_path / "step-12").mkdir()
    assert latest_checkpoint(str(tmp_path)) == tmp_path / "step-10"


def test_head(tmp_path):
    """A grown head is saved and loaded as any other."""
    head = CosFaceLoss(4, 10)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    head(torch.randn(8, 4), torch.arange(8)).backward()
    optimizer.step()
    head.grow(5, optimizer)
    save_checkpoint(tmp_path / "a", head, optimizer)
    again = CosFaceLoss(4, 15)
    again_optimizer = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9)
    load_checkpoint(tmp_path / "a", again, again_optimizer)
    assert torch.equal(again.weight, head.weight)
    buffers = [each.state[of.weight]["momentum_buffer"] for each, of in ((optimizer, head), (again_optimizer, again))]
    assert torch.equal(*buffers) and buffers[0][:10].any()


def test_examples_of_the_document(tmp_path, monkeypatch):
    monkeypatch.setattr("cosface_kernels.checkpoint.pieces.PIECE_BYTES", 2**14)  # a table in four
    monkeypatch.chdir(tmp_path)
    document = WORKER.parents[1] / "docs" / "checkpoints.md"
    names = {}
    for block in re.findall(r"```python\n(.*?)```", document.read_text(), re.S):
        exec(block, names)
    assert names["extra"] == {"epoch": 0}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best", "step-3000"]
    assert names["new"] == range(1000, 1050) and names["labels"].tolist() == [2, -1, 3]
    assert len(names["larger"]["head"].weight) == 2000


@pytest.mark.parametrize(("table_format", "state_format"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float8", "int8")])
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_fused_optimisers_go_on_to_the_bit(kind, table_format, state_format, tmp_path):
    """State of every dtype, the place in the stream of rounding bits, and what was skipped."""

    def new(seed):
        head = CosFaceLoss(SIZE, 7, table_format=table_format)
        options = {"momentum": 0.9} if kind is FusedSGD else {}
        return head, kind(head.parameters(), lr=0.1, state_format=state_format, seed=seed, **options)

    def go(head, optimizer, seeds):
        for seed in seeds:
            features = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(seed))
            head(features * (torch.nan if seed == 1 else 1), torch.arange(5)).backward()
            optimizer.step()

    torch.manual_seed(0)
    head, optimizer = new(seed=1)
    go(head, optimizer, range(3))
    save_checkpoint(tmp_path / "one", head, optimizer)
    go(head, optimizer, range(3, 6))
    for started in (False, True):  # state allocated from the checkpoint, and state loaded in place
        resumed, other = new(seed=2)
        if started:
            go(resumed, other, range(2))
        load_checkpoint(tmp_path / "one", resumed, other)
        assert other.skipped_steps == 1
        go(resumed, other, range(3, 6))
        assert all(torch.equal(value.float(), resumed.state_dict()[name].float()) for name, value in head.state_dict().items())
        for name, tensor in optimizer.state[head.weight].items():
            found = other.state[resumed.weight][name]
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
