"""Is a converted table the same, bit for bit, and is anything but a whole table refused without a trace?"""

import argparse
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from glob import glob
from pathlib import Path

import pytest
import torch

from cosface_kernels import CosFaceLoss, MarginSoftmaxLoss
from cosface_kernels.margins import Softmax
from cosface_kernels.tools import cli
from cosface_kernels.tools import convert as module
from cosface_kernels.validation import FLOAT_DTYPES

ROOT = Path(__file__).parents[1]
# The section of the document that is about files.
DOCUMENT = (ROOT / "docs" / "migrate.md").read_text().split("## Tables trained elsewhere")[1].split("\n## ")[0]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SIZE = 5  # D; C in these tests is no multiple of the ranks, and never D


def bits(tensor):
    return tensor.contiguous().view(INTEGERS[tensor.itemsize])


def table(num_classes, dtype=torch.float32, size=SIZE):
    """Numbers of which no two are equal, so that no rows or columns can change places unseen."""
    return (torch.arange(num_classes * size).view(num_classes, size) + 1).to(dtype)


def wild(num_classes, dtype):
    """Any bits: NaNs with payloads, signalling ones too, infinities, subnormals, and -0."""
    info = torch.iinfo(INTEGERS[dtype.itemsize])
    found = torch.empty(num_classes, SIZE, dtype=INTEGERS[dtype.itemsize]).random_(info.min, info.max)
    infinity = int(torch.tensor(torch.inf, dtype=dtype).view(found.dtype))
    found.view(-1)[:6] = torch.tensor([info.min, 1, infinity + 1, infinity, info.max, -1])  # -0, subnormal, NaN, inf, NaN, -NaN
    return found.view(dtype)


def shards(whole, ranks):
    """By PartialFC_V2's own words, class_start and num_local."""
    num_classes = len(whole)
    for rank in range(ranks):
        start = num_classes // ranks * rank + min(rank, num_classes % ranks)
        yield whole[start : start + num_classes // ranks + int(rank < num_classes % ranks)].clone()


def checkpoint(weight):
    """A checkpoint as InsightFace's train_v2.py saves it."""
    backbone = {"fc.weight": torch.randn(7, 9), "fc.bias": torch.randn(7)}
    momenta = {0: {"momentum_buffer": torch.randn(7, 9)}, 1: {"momentum_buffer": torch.randn_like(weight.float())}}
    optimizer = {"state": momenta, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}
    return {
        "epoch": 3,
        "state_dict_backbone": backbone,
        "state_dict_softmax_fc": {"weight": weight},
        "state_optimizer": optimizer,
        "state_lr_scheduler": {"base_lrs": [0.1], "last_epoch": 5},
    }


def save_shards(folder, whole, ranks, wrap=lambda weight: {"weight": weight}, name="rank_{}.pt"):
    for rank, weight in enumerate(shards(whole, ranks)):
        torch.save(wrap(weight), folder / name.format(rank))
    return sorted(glob(str(folder / name.format("*"))))


def run(*arguments):
    return cli.main(["convert", *map(str, arguments)])


def converted(path, key="weight"):
    content = torch.load(path, weights_only=True)
    assert list(content) == [key] and content[key].is_contiguous() and type(content[key]) is torch.Tensor
    return content[key]


def refusal(capsys, *arguments):
    """The one line with which a conversion is refused, and nothing is changed."""
    before = contents(Path.cwd())
    assert run(*arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("cosface: ") and err.count("\n") == 1
    assert contents(Path.cwd()) == before
    return err


def fresh_process(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def contents(folder):
    """Everything under a folder, names and bytes, to compare before and after."""
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


def test_a_bias_is_not_dropped_in_silence(here, capsys):
    torch.save(MarginSoftmaxLoss(SIZE, 11, margin=Softmax(), bias=True).state_dict(), "head.pt")
    assert "bias" in refusal(capsys, "head.pt", "loss.pt", "--to", "pml")
    assert run("head.pt", "loss.pt", "--key", "weight", "--to", "pml") == 0


@pytest.mark.parametrize("out, to", [("out.pt", "insightface"), ("out_{rank}.pt", "pml"), ("out_{rank}.pt", None)])
def test_function_refuses_ranks_that_would_overwrite_each_other(here, out, to):
    torch.save({"weight": table(11)}, "in.pt")
    with pytest.raises(ValueError, match="several ranks"):
        module.convert(["in.pt"], out, to=to, ranks=3, force=True)
    assert sorted(os.listdir()) == ["in.pt"]


# Reading


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("wrap", [checkpoint, lambda weight: {"weight": weight}], ids=["checkpoint", "state dict"])
def test_insightface(here, capsys, wrap, dtype):
    """11 classes over 3 ranks: 4, 4 and 3."""
    whole = table(11, dtype)
    assert run(*save_shards(here, whole, 3, wrap), "out.pt", "--from", "insightface") == 0
    assert converted("out.pt").dtype == dtype and bits(converted("out.pt")).equal(bits(whole))
    key = "state_dict_softmax_fc.weight" if wrap is checkpoint else "weight"
    line = f"wrote out.pt: C = 11, D = 5, {dtype}, from {key} of 3 files, rank_0.pt to rank_2.pt\n"
    assert capsys.readouterr().out == line


def older_insightface(folder, whole, ranks):
    """The files of PartialFC before V2, momentum beside each."""
    save_shards(folder, torch.zeros_like(whole), ranks, lambda weight: weight, name="rank_{}_softmax_weight_mom.pt")
    return save_shards(folder, whole, ranks, lambda weight: weight, name="rank_{}_softmax_weight.pt")


@pytest.mark.parametrize("pattern", ["rank_*_softmax_weight.pt", "rank_*.pt"], ids=["tables", "momentum mixed in"])
def test_older_insightface(here, capsys, pattern):
    whole = table(25)
    older_insightface(here, whole, 11)
    assert run(*sorted(glob(pattern)), "out.pt", "--from", "insightface") == 0
    assert converted("out.pt").equal(whole)
    assert "from bare-tensor of 11 files, rank_0_softmax_weight.pt to rank_10_softmax_weight.pt\n" in capsys.readouterr().out


def test_momentum_is_no_table(here, capsys):
    older_insightface(here, table(25), 3)
    assert "the file without _mom, is not given" in refusal(capsys, *glob("*_mom.pt"), "out.pt", "--from", "insightface")
    Path("rank_2_softmax_weight.pt").unlink()
    assert "rank_2_softmax_weight_mom.pt" in refusal(capsys, *glob("*.pt"), "out.pt", "--from", "insightface")


@pytest.mark.parametrize("num_classes", [22, 25], ids=["equal shards", "unequal shards"])
@pytest.mark.parametrize("name", ["rank_{r}.pt", "{r}/head.pt", "{r}/head_{r}.pt", "r{r:02}.pt", "v2.0-gpu{r}of11.pt"])
def test_order_of_eleven_ranks(here, num_classes, name):
    """Equal shards betray no wrong order by their sizes."""
    files = [name.format(r=rank) for rank in range(11)]
    for file, weight in zip(files, shards(table(num_classes), 11), strict=True):
        Path(file).parent.mkdir(exist_ok=True)
        torch.save({"weight": weight}, file)
    assert run(*sorted(files), "out.pt", "--from", "insightface") == 0
    assert converted("out.pt").equal(table(num_classes))


@pytest.mark.parametrize(
    "names",
    [
        ["data2/rank_0.pt", "data1/rank_1.pt", "data1/rank_2.pt"],
        ["step_100_rank_0.pt", "step_99_rank_1.pt", "step_98_rank_2.pt"],
        ["2024-01-02_rank0.pt", "2024-01-01_rank1.pt", "2024-01-01_rank2.pt"],
    ],
    ids=str,
)
def test_other_numbers_than_the_rank(here, names):
    for name, weight in zip(names, shards(table(12), 3), strict=True):
        Path(name).parent.mkdir(exist_ok=True)
        torch.save({"weight": weight}, name)
    assert run(*sorted(names), "out.pt", "--from", "insightface") == 0
    assert converted("out.pt").equal(table(12))


@pytest.mark.parametrize("names", [["r0.pt", "r00.pt"], ["1/rank_0.pt", "2/rank_0.pt"], ["a1_b0.pt", "a0_b1.pt"]], ids=str)
def test_ranks_that_are_not_clear(here, capsys, names):
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        torch.save({"weight": table(2)}, name)
    assert "must be the ranks 0 to 1" in refusal(capsys, *names, "out.pt", "--from", "insightface")


@pytest.mark.parametrize("numbers", [(0, 1, 3), (1, 2, 3), (1, 2)], ids=str)
def test_a_missing_rank(here, capsys, numbers):
    """Of equal sizes the others look like all shards of a smaller table."""
    for rank in numbers:
        torch.save({"weight": table(2)}, f"rank_{rank}_of_4.pt")
    error = refusal(capsys, *glob("*.pt"), "out.pt", "--from", "insightface")
    assert f"must be the ranks 0 to {len(numbers) - 1}: rank_{numbers[0]}_of_4.pt, " in error


def test_names_without_a_rank_keep_the_order_given(here):
    whole = table(11)
    for name, weight in zip("cab", shards(whole, 3), strict=True):
        torch.save({"weight": weight}, name)
    assert run("c", "a", "b", "out.pt", "--from", "insightface") == 0
    assert converted("out.pt").equal(whole)


@pytest.mark.parametrize("key", ["W", "loss.W", "a.b.W"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_pml(here, capsys, key, dtype):
    torch.save({"epoch": 1, "other": table(2), key: table(11, dtype).T.contiguous()}, "loss.pt")
    assert run("loss.pt", "out.pt", "--from", "pml") == 0
    assert converted("out.pt").dtype == dtype and converted("out.pt").equal(table(11, dtype))
    assert f"from {key}\n" in capsys.readouterr().out


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(
    ("key", "transpose"), [("head.kernel", True), ("state_dict.head.kernel", True), ("w", False), ("bare-tensor", True)]
)
def test_any_key(here, key, transpose, ranks):
    """Sizes that PartialFC_V2 would not give: others shard in their own way."""
    whole = table(11)
    for rank, weight in enumerate(whole.split([11] if ranks == 1 else [2, 8, 1])):
        content = weight.T.contiguous() if transpose else weight.clone()
        names = [] if key == "bare-tensor" else key.split(".", 1) if key.startswith("state_dict.") else [key]
        for name in reversed(names):
            content = {name: content, "step": rank}
        torch.save(content, f"{rank}.pt")
    files = [f"{rank}.pt" for rank in reversed(range(ranks))]
    assert run(*files, "out.pt", "--key", key, *["--transpose"] * transpose) == 0
    assert converted("out.pt").equal(whole)


def test_parameters_views_and_tensors_of_a_gpu(here):
    """A state dict of parameters, the table a column slice of a larger storage, saved from cuda:3."""
    whole = table(11)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
        torch.save({"weight": torch.nn.Parameter(torch.cat([torch.ones(11, 1000), whole], 1)[:, 1000:])}, "0.pt")
    assert b"cuda:3" in Path("0.pt").read_bytes()
    assert run("0.pt", "out.pt", "--from", "insightface") == 0
    assert converted("out.pt").equal(whole)
    assert os.path.getsize("out.pt") < 4000 < os.path.getsize("0.pt")


def test_files_older_than_torch_1_6(here):
    torch.save({"weight": table(11)}, "old.pt", _use_new_zipfile_serialization=False)
    assert run("old.pt", "out.pt", "--from", "insightface") == 0
    assert converted("out.pt").equal(table(11))


MEMORY = """
import re, sys
import torch
from cosface_kernels.tools import cli

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

save, before = torch.save, anonymous()
torch.save = lambda *arguments: (print(anonymous() - before), save(*arguments))
sys.exit(cli.main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon from /proc, which only Linux has")
@pytest.mark.parametrize("to", [[], ["--to", "pml"]], ids=["CosFaceLoss", "pml"])
def test_memory_is_one_copy(here, to):
    """In a fresh process, when the file is written: 64 MB for the copy, and nothing for the mapped inputs."""
    files = save_shards(here, torch.ones(2**17, 128), 4)
    output = fresh_process(MEMORY, *files, here / "out.pt", "--from", "insightface", *to).stdout
    assert 0.9 * 2**26 < int(output.splitlines()[0]) < 1.3 * 2**26, output


# Writing


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_round_trips_keep_every_bit(here, dtype):
    whole = wild(11, dtype)
    assert not whole.isfinite().all() and (whole.abs() < torch.finfo(dtype).tiny).any()
    torch.save({"weight": whole}, "head.pt")
    assert run("head.pt", "pml.pt", "--to", "pml") == 0
    assert bits(converted("pml.pt", "W")).equal(bits(whole.T))
    assert run("head.pt", "r{rank}.pt", "--to", "insightface", "--ranks", 3) == 0
    for rank, shard in enumerate(shards(whole, 3)):
        assert bits(converted(f"r{rank}.pt")).equal(bits(shard))
    assert run("head.pt", "one.pt", "--to", "insightface") == 0
    assert bits(converted("one.pt")).equal(bits(whole))
    assert run("pml.pt", "back_from_pml.pt", "--from", "pml") == 0
    assert run("r0.pt", "r1.pt", "r2.pt", "back_from_shards.pt", "--from", "insightface") == 0
    assert run("pml.pt", "t{rank}.pt", "--from", "pml", "--to", "insightface", "--ranks", 2) == 0
    assert run("t1.pt", "t0.pt", "again.pt", "--from", "insightface", "--to", "pml") == 0
    for name in ("back_from_pml.pt", "back_from_shards.pt"):
        assert bits(converted(name)).equal(bits(whole)), name
    assert bits(converted("again.pt", "W")).equal(bits(whole.T))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_safetensors_keep_every_bit(here, dtype):
    safetensors = pytest.importorskip("safetensors.torch")
    whole = wild(11, dtype)
    safetensors.save_file({"backbone.weight": torch.randn(3, 3), "head.weight": whole}, "model.safetensors")
    assert run("model.safetensors", "head.pt", "--key", "head.weight") == 0
    assert bits(converted("head.pt")).equal(bits(whole))
    assert run("head.pt", "r{rank}.safetensors", "--to", "insightface", "--ranks", 3) == 0
    for rank, shard in enumerate(shards(whole, 3)):
        (found,) = safetensors.load_file(f"r{rank}.safetensors").items()
        assert found[0] == "weight" and bits(found[1]).equal(bits(shard))
    assert run(*(f"r{rank}.safetensors" for rank in range(3)), "pml.safetensors", "--from", "insightface", "--to", "pml") == 0
    assert run("pml.safetensors", "back.safetensors", "--from", "pml") == 0
    assert bits(safetensors.load_file("back.safetensors")["weight"]).equal(bits(whole))
    assert int.from_bytes(Path("back.safetensors").read_bytes()[:8], "little") % 8 == 0  # numbers begin where they can be mapped


def test_a_damaged_file_of_safetensors(here, capsys):
    pytest.importorskip("safetensors.torch")
    torch.save({"weight": table(11)}, "head.pt")
    assert run("head.pt", "head.safetensors", "--key", "weight") == 0
    capsys.readouterr()
    Path("head.safetensors").write_bytes(Path("head.safetensors").read_bytes()[:-1])
    message = refusal(capsys, "head.safetensors", "out.pt", "--key", "weight")
    assert "head.safetensors: not a file of torch.save or safetensors, or a damaged one" in message


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_cosface_loss_loads_it_and_is_converted_back(here, dtype):
    torch.save({"W": torch.randn(SIZE, 11, dtype=dtype)}, "loss.pt")
    assert run("loss.pt", "head.pt", "--from", "pml") == 0
    head = CosFaceLoss(SIZE, 11, dtype=dtype)
    head.load_state_dict(torch.load("head.pt", weights_only=True))
    assert head.weight.equal(torch.load("loss.pt")["W"].T)
    torch.save(head.state_dict(), "trained.pt")
    assert run("trained.pt", "back.pt", "--to", "pml") == 0
    assert converted("back.pt", "W").equal(torch.load("loss.pt")["W"])


def test_shards_hold_their_own_rows_alone(here):
    """torch.save of a view writes the whole table."""
    torch.save({"weight": torch.ones(1000, 100)}, "head.pt")
    assert run("head.pt", "r{rank}.pt", "--to", "insightface", "--ranks", 10) == 0
    assert all(40_000 < os.path.getsize(f"r{rank}.pt") < 45_000 for rank in range(10))


def test_rows_that_are_not_finite_are_counted(here, capsys, monkeypatch):
    monkeypatch.setattr(module, "SLAB", 4)
    whole = table(11)
    whole[1, 0], whole[1, 1], whole[6, 3], whole[10, 4] = torch.inf, torch.nan, -torch.inf, torch.nan
    for arguments in (["out.pt"], ["pml.pt", "--to", "pml"], ["r{rank}.pt", "--to", "insightface", "--ranks", 4]):
        assert run(*save_shards(here, whole, 2, name="in{}.pt"), *arguments, "--from", "insightface") == 0
        assert capsys.readouterr().out.endswith("; rows that are not finite: 3\n")
    assert bits(converted("out.pt")).equal(bits(whole))


def test_permissions_of_the_file_are_those_of_any_new_file(here):
    torch.save({"W": table(11)}, "loss.pt")
    for out in ("out.pt", "out.safetensors"):
        assert run("loss.pt", out, "--from", "pml") == 0
        assert os.stat(out).st_mode == os.stat("loss.pt").st_mode


def test_two_ranks_that_are_one_file(here, capsys):
    torch.save({"weight": table(12)}, "head.pt")
    Path("folder").mkdir()
    for rank in range(2):
        Path(f"to_{rank}").symlink_to("folder")
    assert "files of several ranks are one file" in refusal(
        capsys, "head.pt", "to_{rank}/r.pt", "--to", "insightface", "--ranks", 2
    )


def test_force_replaces_and_follows_a_link(here):
    torch.save({"W": table(11)}, "loss.pt")
    Path("old.pt").write_text("old")
    Path("link.pt").symlink_to("old.pt")
    assert run("loss.pt", "link.pt", "--from", "pml", "--force") == 0
    assert Path("link.pt").is_symlink() and converted("old.pt").equal(table(11).T)


# Refusals


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([table(3), table(4)], "in 4, 3 rows: rank_0.pt (3, 5) torch.float32, rank_1.pt (4, 5) torch.float32"),
        ([table(4), table(2)], "in 3, 3 rows: rank_0.pt (4, 5)"),
        ([table(3), table(3, size=6)], "agree in D and dtype: rank_0.pt (3, 5) torch.float32, rank_1.pt (3, 6) "),
        ([table(3), table(3, torch.float16)], "rank_0.pt (3, 5) torch.float32, rank_1.pt (3, 5) torch.float16"),
    ],
)
def test_shards_that_do_not_fit(here, capsys, weights, message):
    for rank, weight in enumerate(weights):
        torch.save({"weight": weight}, f"rank_{rank}.pt")
    assert message in refusal(capsys, "rank_0.pt", "rank_1.pt", "out.pt", "--from", "insightface")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("content", "arguments", "messages"),
    [
        (
            {"fc": table(3), "bias": table(3)[0]},
            ["--from", "insightface"],
            ["no tensor at weight or state_dict_softmax_fc.weight", "--key NAME chooses from: fc (3, 5), bias (5,)\n"],
        ),
        ({"W": table(3), "b": {"W": table(3)}}, ["--from", "pml"], ["several tensors at W or *.W", "W (3, 5), b.W (3, 5)"]),
        ({"weight": table(2), "state_dict_softmax_fc": {"weight": table(3)}}, ["--from", "insightface"], ["several tensors"]),
        ({"head.weight": table(3)}, ["--to", "pml"], ["no tensor at weight;", "head.weight (3, 5)"]),
        ({"a.b": table(2), "a": {"b": table(3)}}, ["--key", "a.b"], ["several tensors at a.b"]),
        ({"weight": [1.0]}, ["--from", "insightface"], ["chooses from: nothing\n"]),
        (table(3), ["--from", "pml"], ["no tensor at W or *.W; --key NAME chooses from: bare-tensor (3, 5)"]),
        ([table(3)], ["--from", "insightface"], ["holds a list"]),
        ({"weight": table(3)[0]}, ["--from", "insightface"], ["must be a 2-D tensor", "got (5,) torch.float32"]),
        ({"weight": table(3)[None]}, ["--from", "insightface"], ["got (1, 3, 5) torch.float32"]),
        ({"weight": table(3, torch.int32)}, ["--from", "insightface"], ["got (3, 5) torch.int32"]),
        ({"weight": table(3, torch.float8_e4m3fn)}, ["--from", "insightface"], ["got (3, 5) torch.float8_e4m3fn"]),
        ({"weight": table(3, torch.complex64)}, ["--from", "insightface"], ["got (3, 5) torch.complex64"]),
        ({"weight": table(3).to_sparse()}, ["--from", "insightface"], ["torch.sparse_coo"]),
        ({"weight": table(3).to("meta")}, ["--from", "insightface"], ["meta"]),
        ({"weight": torch.empty(0, 5)}, ["--from", "insightface"], ["got (0, 5) torch.float32"]),
        ({"weight": table(3), "x": argparse.Namespace()}, ["--from", "insightface"], ["object of argparse.Namespace"]),
        ({"weight": table(3), "x": Payload()}, ["--from", "insightface"], ["may run code"]),
        ({"weight": table(3)}, ["--to", "insightface", "--ranks", 4], ["3 classes cannot be sharded over 4 ranks"]),
        ({"weight": table(3)}, ["--to", "insightface", "--ranks", 10**12], ["over 1,000,000,000,000 ranks"]),  # no list of paths
    ],
)
def test_files_without_such_a_table(here, capsys, content, arguments, messages):
    torch.save(content, "in.pt")
    line = refusal(capsys, "in.pt", "out{rank}.pt" if "--ranks" in arguments else "out.pt", *arguments)
    assert all(message in line for message in messages), line
    assert "in.pt" in line or "--ranks" in arguments


def test_a_long_list_of_keys_ends_and_has_the_largest_matrices_first(here, capsys):
    layers = {f"layer{number}": torch.ones(3, 3, 3, 3) for number in range(30)}
    torch.save({**layers, "fc": torch.ones(9, 9), "head": torch.ones(50, 9)}, "in.pt")
    line = refusal(capsys, "in.pt", "out.pt", "--from", "pml")
    assert "from: head (50, 9), fc (9, 9), layer0 (3, 3, 3, 3), " in line and line.endswith("layer17 (3, 3, 3, 3) and 12 more\n")


def truncated(path, fraction):
    Path(path).write_bytes(Path(path).read_bytes()[: int(os.path.getsize(path) * fraction)])


def a_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photo.jpg", "pixels")


DAMAGES = {
    **{f"truncated to {f}": lambda path, f=f: truncated(path, f) for f in (0.002, 0.05, 0.3, 0.9, 0.99, 0.9999)},
    "empty": lambda path: truncated(path, 0),
    "garbage": lambda path: Path(path).write_bytes(bytes(range(255, -1, -1)) * 40),
    "garbage after the magic": lambda path: Path(path).write_bytes(b"PK\x03\x04" + bytes(range(256)) * 40),
    "text": lambda path: Path(path).write_text("weight: 1.0\n"),
    "a zip of something else": a_zip,
    "TorchScript": lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("zipped", [True, False], ids=["format of today", "before 1.6"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(here, capsys, damage, zipped):
    files = save_shards(here, torch.ones(2000, 10), 2)
    torch.save({"weight": torch.ones(1000, 10)}, files[1], _use_new_zipfile_serialization=zipped)
    DAMAGES[damage](files[1])
    line = refusal(capsys, *files, "out.pt", "--from", "insightface")
    assert line.startswith(f"cosface: {files[1]}: not a file of torch.save or safetensors, or a damaged one ("), line
    assert len(line) < 400, line


def test_any_flipped_bit(here):
    """Refused, or, in what is padding or a date, without a trace in the table."""
    whole = table(40)
    torch.save({"weight": whole}, "in.pt")
    data = Path("in.pt").read_bytes()
    start = data.index(whole.numpy().tobytes())
    positions = {*range(0, len(data), 7), *range(start, start + whole.nbytes, 13)}
    refused = 0
    for position in sorted(positions):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        Path("in.pt").write_bytes(changed)
        try:
            module.convert(["in.pt"], "out.pt", system="insightface", force=True)
        except ValueError:
            refused += 1
            assert os.listdir() == ["in.pt"] or converted("out.pt").equal(whole), position
        else:
            assert converted("out.pt").equal(whole), position
            os.unlink("out.pt")
    assert refused > whole.nbytes // 13


@pytest.mark.parametrize("arguments", [["--key", "weight"], ["--to", "insightface"], ["--to", "pml"]], ids=" ".join)
def test_float8_is_read_as_what_it_stands_for(arguments, here):
    head = CosFaceLoss(SIZE, 7, table_format="float8")
    torch.save(head.state_dict(), "narrow.pt")
    assert run("narrow.pt", "wide.pt", *arguments) == 0
    (wide,) = torch.load("wide.pt", weights_only=True).values()
    assert torch.equal(wide.T if "pml" in arguments else wide, head.float().weight)


def test_file_without_checksums(here, capsys):
    compute = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": table(11)}, "in.pt")
    finally:
        torch.serialization.set_crc32_options(compute)
    assert "without checksums" in refusal(capsys, "in.pt", "out.pt", "--from", "insightface")


def test_compressed_entries_are_read_as_what_they_hold(here):
    """torch.save compresses none, and a map of the file would have their bytes for numbers."""
    torch.save({"weight": table(11)}, "in.pt")
    with zipfile.ZipFile("in.pt") as archive, zipfile.ZipFile("small.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for name in archive.namelist():
            small.writestr(name, archive.read(name))
    assert run("small.pt", "out.pt", "--from", "insightface") == 0
    assert converted("out.pt").equal(table(11))


@pytest.mark.parametrize("name", ["in.pt", "in.safetensors"])
def test_a_pipe_is_not_opened(here, capsys, monkeypatch, name):
    os.mkfifo(name)
    monkeypatch.setattr("builtins.open", partial(_no_pipe, open))
    assert f"cannot read {name}: it is not a regular file\n" in refusal(capsys, name, "out.pt", "--from", "insightface")


def _no_pipe(opened, path, *arguments, **options):
    """open, which would wait for ever for a pipe's writer: fails instead."""
    assert not Path(path).is_fifo(), f"{path} was opened"
    return opened(path, *arguments, **options)


def test_inputs_that_cannot_be_read(here, capsys):
    torch.save({"weight": table(3)}, "a.pt")
    Path("folder").mkdir()
    for name, message in {
        "b.pt": "cannot read b.pt: No such file or directory",
        "folder": "cannot read folder: it is not a regular file",
        "folder/../a.pt": "the same file twice: a.pt, folder/../a.pt",
    }.items():
        assert message in refusal(capsys, "a.pt", name, "out.pt", "--from", "insightface")


def test_outputs_that_are_refused_before_all_of_a_file_is_read(here, capsys, monkeypatch):
    save_shards(here, table(5), 2)
    Path("mine.pt").write_text("mine")
    Path("folder").mkdir()
    os.mkfifo("fifo")
    os.link("rank_0.pt", "again.pt")
    os.symlink("rank_1.pt", "link.pt")
    monkeypatch.setattr(module, "_check_sums", lambda _: pytest.fail("read"))
    for out, message in {
        "rank_1.pt": "it is also read",
        "again.pt": "it is also read",
        "link.pt": "it is also read",
        "folder": "it exists; --force replaces a file, and nothing else",
        "fifo": "it exists; --force replaces a file, and nothing else",
        "nowhere/out.pt": "No such file or directory",
        "mine.pt/out.pt": "Not a directory",
    }.items():
        for force in [], ["--force"]:
            line = refusal(capsys, "rank_0.pt", "rank_1.pt", out, "--from", "insightface", *force)
            assert line.startswith("cosface: cannot write ") and message in line
    assert "it exists; --force" in refusal(capsys, "rank_0.pt", "mine.pt", "--from", "insightface")
    assert "rank_0.pt: it exists" in refusal(capsys, "link.pt", "rank_{rank}.pt", "--to", "insightface", "--ranks", 2)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["in.pt"],
        ["in.pt", "out.pt"],
        ["in.pt", "out.pt", "--from", "tensorflow"],
        ["in.pt", "out.pt", "--from", "pml", "--key", "W"],
        ["in.pt", "out.pt", "--key", ""],
        ["in.pt", "out.pt", "--from", "pml", "--transpose"],
        ["a.pt", "b.pt", "out.pt", "--from", "pml"],
        ["a.pt", "b.pt", "out.pt", "--to", "pml"],
        ["in.pt", "out.pt", "--to", "insightface", "--ranks", "2"],
        ["in.pt", "out{rank}.pt", "--to", "insightface"],
        ["in.pt", "out{rank}.pt", "--to", "pml", "--ranks", "2"],
        ["in.pt", "out{rank}.pt", "--from", "pml"],
        ["in.pt", "out{rank}.pt", "--to", "insightface", "--ranks", "0"],
    ],
)
def test_wrong_usage(here, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: cosface convert IN... OUT")


# Nothing half-written


OUTPUTS = {
    "one file": ["out.pt", "--from", "insightface"],
    "shards": ["out{rank}.pt", "--from", "insightface", "--to", "insightface", "--ranks", "3"],
}


CALLS = {
    "one file": {"tempfile.TemporaryDirectory": 1, "torch.save": 1, "os.fsync": 1, "os.replace": 1},
    "shards": {"tempfile.TemporaryDirectory": 3, "torch.save": 3, "os.fsync": 3, "os.replace": 3},
}
# In a rename but the first of several, the shards before it are there.
FAILURES = [
    (outputs, where, turn)
    for outputs, calls in CALLS.items()
    for where, count in calls.items()
    for turn in range(1 if where == "os.replace" else count)
]


def prepared(outputs):
    """Arguments of a conversion that replaces files; out1.pt is new, the others are there."""
    files = save_shards(Path.cwd(), table(11), 2, name="in{}.pt")
    for name in ("out.pt", "out0.pt", "out2.pt"):
        Path(name).write_text(f"precious {name}")
    return [*files, *OUTPUTS[outputs], "--force"]


def failing(function, error, turn):
    """`function`, which in its turn raises."""
    turns = iter(range(100))

    def wrapper(*arguments, **options):
        if next(turns) == turn:
            raise error
        return function(*arguments, **options)

    return wrapper


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("iostream error"), KeyboardInterrupt()])
@pytest.mark.parametrize(("outputs", "where", "turn"), FAILURES)
def test_failure_leaves_everything_as_it_was(here, capsys, monkeypatch, outputs, where, turn, error):
    arguments = prepared(outputs)
    before = contents(here)
    module_name, name = where.split(".")
    owner = {"tempfile": tempfile, "torch": torch, "os": os}[module_name]
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), error, turn))
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(type(error)):
            run(*arguments)
        assert contents(here) == before
    else:
        line = refusal(capsys, *arguments)
        assert line.startswith("cosface: cannot write ") and (getattr(error, "strerror", None) or "iostream error") in line


class Interrupted(io.FileIO):
    """A file in whose third write the user presses Ctrl-C."""

    writes = 0

    def write(self, data):
        self.writes += 1
        if self.writes == 3:
            raise KeyboardInterrupt
        return super().write(data)


def test_interrupt_within_torch_save_stays_one(here, monkeypatch):
    """Its writer answers with an error of its own."""
    arguments = prepared("one file")
    before = contents(here)
    monkeypatch.setattr(module, "open", lambda path, mode: {"wb": Interrupted}.get(mode, open)(path, mode), raising=False)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    assert contents(here) == before


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_all_files_are_written_before_one_is_renamed(here, monkeypatch, outputs):
    done = []
    for owner, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, name=name, function=function: (done.append(name), function(*a)))
    arguments = prepared(outputs)
    done.clear()
    assert run(*arguments) == 0
    assert done == ["save", "fsync"] * CALLS[outputs]["torch.save"] + ["replace"] * CALLS[outputs]["os.replace"]
    whole = converted("out.pt") if outputs == "one file" else torch.cat([converted(f"out{rank}.pt") for rank in range(3)])
    assert whole.equal(table(11))
    assert set(os.listdir()) <= {"in0.pt", "in1.pt", "out.pt", "out0.pt", "out1.pt", "out2.pt"}


FULL_DISK = """
import resource, sys
from cosface_kernels.tools import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(cli.main(["convert", *sys.argv[2:]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files by setrlimit")
@pytest.mark.parametrize("limit", [50_000, 100, 80_400])
def test_disk_that_is_really_full(here, limit):
    """As far as torch.save's own writer can tell: every write beyond the limit fails."""
    torch.save({"weight": torch.ones(2000, 10)}, "in.pt")
    Path("out.pt").write_text("precious")
    before = contents(here)
    process = fresh_process(FULL_DISK, limit, here / "in.pt", here / "out.pt", "--from", "insightface", "--force")
    assert process.returncode == 1 and process.stderr == f"cosface: cannot write {here / 'out.pt'}: File too large\n"
    assert contents(here) == before


# The document


def save_what_the_document_names(whole):
    """The files of its table, in each system's layout."""
    columns = whole.T.contiguous()
    Path("models").mkdir()
    older_insightface(Path("models"), whole, 11)
    for rank, weight in enumerate(shards(whole, 11)):
        torch.save(checkpoint(weight), f"checkpoint_gpu_{rank}.pt")
        torch.save({"weight": weight}, f"rank_{rank}.pt")
        torch.save({"partial_fc.weight": weight, "partial_fc.batch_mean": torch.ones(1)}, f"classifier_rank{rank}.pt")
        tface = {"NAME": {"kernel": weight.T.contiguous()}, "OTHER": {"kernel": torch.ones(SIZE, 2)}}
        torch.save(tface, f"HEAD_Epoch_18_Split_{rank}_checkpoint.pth")
    module = {"model.fc.weight": torch.ones(7, 9), "head.kernel": columns, "head.t": torch.zeros(1)}
    for name, content in {
        "loss.pt": {"W": columns},
        "adaface.pt": {"kernel": columns, "t": torch.zeros(1), "batch_mean": torch.ones(1)},
        "module.pt": module,
        "last.ckpt": {"epoch": 3, "state_dict": module, "hyper_parameters": {"m": 0.4, "head": "adaface"}},
        "facex.pt": {"weight": columns},
        "Epoch_17.pt": {"state_dict": {"backbone.fc.weight": torch.ones(7, 9), "head.weight": columns}, "epoch": 17},
        "sphere.pth": {"w": whole},
        "model_70000.pth": {"backbone": {"fc.weight": torch.ones(7, 9)}, "head": {"w": whole}},
    }.items():
        torch.save(content, name)


def commands(text):
    return re.findall(r"\| `cosface (convert [^`]+)` \|", text)


def test_commands_of_the_document(here):
    """Each on the files that it names, with the shell's order of a pattern."""
    there, back = DOCUMENT.split("And back:")
    whole = table(25)
    save_what_the_document_names(whole)
    assert len(commands(there)) == 13 and len(commands(back)) == 3
    for command in commands(there):
        Path("head.pt").unlink(missing_ok=True)
        assert cli.main([name for word in shlex.split(command) for name in (sorted(glob(word)) or [word])]) == 0, command
        assert converted("head.pt").equal(whole), command
    for name in [*glob("rank_*.pt"), "loss.pt"]:
        os.unlink(name)
    for command in commands(back):
        assert cli.main(shlex.split(command)) == 0, command
    assert converted("loss.pt", "W").equal(whole.T) and converted("partial_fc.pt").equal(whole)
    for rank, shard in enumerate(shards(whole, 8)):
        assert converted(f"rank_{rank}.pt").equal(shard)


def test_snippet_of_the_document(here):
    torch.save({"weight": table(11, torch.bfloat16)}, "head.pt")
    names = {"torch": torch, "CosFaceLoss": CosFaceLoss}
    exec(re.search(r"```python\n(.*?)```", DOCUMENT, re.S)[1], names)
    assert names["head"].weight.equal(table(11, torch.bfloat16))
