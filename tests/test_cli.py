"""Does the `cosface` command do what it says, and refuse clearly what it cannot do?"""

import json
import math
import os
import subprocess
import sys
from functools import partial

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

import torch

from cosface_kernels import __version__
from cosface_kernels.tools import cli
from cosface_kernels.tools.demo import million, toy


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "demo" in text and "info" in text


def test_no_command_is_wrong_usage(capsys):
    assert cli.main([]) == 2
    assert "usage: cosface" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["bnech"], "did you mean bench?"),
        (["reproduce", "losess"], "did you mean losses?"),
        (["plan", "--memroy=24GiB"], "required: --identities, --dim, --batch; did you mean --memory?"),
        (["bench", "--clases", "9"], "unrecognized arguments: --clases 9; did you mean --classes?"),
        (["train", "out=x", "--resum"], "--resum is no option; settings are KEY=VALUE; did you mean --resume?"),
        (["bench", "--peers", "plain", "--device", "gpu"], "invalid choice: 'gpu'"),  # a value is like no option
        (["nothing", "plain"], "invalid choice: 'nothing'"),
    ],
)
def test_mistyped_names(capsys, words, answer):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and answer in last and ("?" in answer) == ("did you mean" in last)


def test_info_names_versions_and_backends(capsys):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  cosface_kernels ") and __version__ in line for line in lines)
    assert any(line.startswith("  torch on cpu ") and line.endswith("usable") for line in lines)


def test_nobody_reads_what_is_printed():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "cosface_kernels", "info"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.slow
def test_info_says_what_is_usable():
    """Without the interpreter, as a user has it, and as `python -m cosface_kernels`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "cosface_kernels", "info"]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    lines = {line.split("  ")[1].strip(): line for line in text.splitlines() if line.startswith("  ")}
    assert __version__ in lines["cosface_kernels"] and torch.__version__ in lines["torch"]
    assert lines["torch on cpu"].endswith("usable")
    assert "needs tensors on a GPU" in lines["triton on cpu"]


@pytest.mark.parametrize("missing", ["matplotlib", "sklearn", "tqdm"])
def test_demo_without_its_extras(monkeypatch, capsys, tmp_path, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    for name in [name for name in sys.modules if name.startswith(("cosface_kernels.tools.demo", f"{missing}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("cosface_kernels.tools.demo", raising=False)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert missing in message and 'pip install "cosface-kernels[demo]"' in message and message.count("\n") == 1


def test_demo_refuses_an_out_that_is_a_file(capsys, tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    assert cli.main(["demo", "--out", str(path)]) == 1
    assert f"cannot write to --out {path}" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_demo_says_before_any_work_that_memory_is_short(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(million, "available_bytes", lambda device: 10**9)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert "1.00 GB" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_demo_in_small(monkeypatch, capsys, tmp_path):
    """All of it, with fewer epochs and identities: the files, the table, and a loss that falls."""
    monkeypatch.setattr(toy, "EPOCHS", 1)
    monkeypatch.setattr(toy, "train_all", partial(toy.train_all, seeds=(0,)))
    monkeypatch.setattr(million, "CLASSES", 2048)
    monkeypatch.setattr(million, "STEPS", {"cpu": 4, "cuda": 4})
    assert cli.main(["demo", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"toy_features.png", "million_loss.png", "summary.json"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["loss"] for row in summary["toy"]] == ["softmax", "LMCL, m = 0", "LMCL, m = 0.1", "LMCL, m = 0.2"]
    losses = summary["million"]["losses"]
    assert len(losses) == 4 and losses[-1] < losses[0]
    printed = capsys.readouterr().out
    assert "LMCL, m = 0.2" in printed and "2,048 identities" in printed


def test_demo_runs_plain_pytorch_for_seconds(monkeypatch):
    """In the faster dtype, with as many classes as the time allows; its time and memory are then those of all."""
    monkeypatch.setattr(million, "CLASSES", 3000)
    ran = []

    def seconds(features, weight, labels, dtype, repeats):
        ran.append((dtype, len(weight)))
        return len(weight) * {torch.bfloat16: 10.0, torch.float32: 0.02}[dtype]

    monkeypatch.setattr(million, "_plain_seconds", seconds)
    features, weight = torch.ones(million.ROWS, million.EMBEDDING), torch.ones(3000, million.EMBEDDING)
    plain = million._measure_plain(features, weight, torch.zeros(million.ROWS, dtype=torch.int64))
    result = million.Result("CPU", 1, 1.0, 1, [2.0, 1.0], **plain)
    assert (result.plain_dtype, result.plain_classes) == ("torch.float32", 1000) and ran[-1] == (torch.float32, 1000)
    assert math.isclose(result.plain_seconds, 60) and result.plain_peak_bytes > 5 * million.ROWS * 3000 * 4
    assert "extrapolated from 1,000" in "".join(million.table(result))


@pytest.mark.parametrize(("spread", "gap"), [(0.0, 45.0), (4.0, 37.4), (30.0, -12.0)])
def test_angles_of_the_toy_experiment(spread, gap):
    """Eight fans of directions, 45 degrees apart: the middle 95% of each spans 2 * 0.95 * spread."""
    offsets = torch.linspace(-spread, spread, 101)
    angles = (45 * torch.arange(8)[:, None] + offsets).flatten().deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.linspace(1, 9, len(angles))[:, None]
    labels = torch.arange(8).repeat_interleave(101)
    assert math.isclose(toy.smallest_gap(features, labels), gap, abs_tol=0.01)
    assert math.isclose(toy.intra_class_angle(features, labels), offsets.abs().mean(), abs_tol=0.05)
