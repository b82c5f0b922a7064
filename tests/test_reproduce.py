"""Does an experiment train what it says, go on where it was stopped, and say of a claim what the numbers say?"""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pytorch_metric_learning")
pytest.importorskip("sklearn")

from cosface_kernels.tools import cli
from cosface_kernels.training import recipes, reproduce

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "reproduction.md"
COMMANDS = re.findall(r"^    (cosface reproduce .*)$", DOCUMENT.read_text(), re.M)


def made_up(experiment, score):
    """Lines of three seeds; score(loss, seed) is the accuracy, and rank 1 is one for all."""
    return [
        {"data": "faces", "loss": loss, "seed": seed, "settings": recipes.settings(500)}
        | recipes.Scores(score(loss, seed), 0.5, -score(loss, seed), None, 0.1)._asdict()
        for seed in range(3)
        for loss in reproduce.EXPERIMENTS[experiment]
    ]


def test_verdicts():
    """Rank 1 is equal for all, so nothing separates; the rate is the accuracy turned round."""
    results = made_up("normalization", lambda loss, seed: 0.1 * seed + (0.02 if loss == reproduce.OURS else 0))
    text = "\n".join(reproduce.report("normalization", results))
    cells = "held (+2.00 to +2.00) | did not separate (+0.00 to +0.00) | did not hold (-2.00 to -2.00)"
    assert f"| normalised features are better | {cells} |" in text
    assert "- By pair accuracy, of 1 claims of the paper 1 held." in text
    assert "| 12.00 ± 10.00 | 50.00 ± 0.00 | -12.00 ± 10.00 | 10.00 ± 0.00 | 99.33 | 96.1 | 77.11 | 89.88 |" in text


def test_claims_are_the_papers():
    """Of the paper's own rank-1 numbers all claims of its tables hold, and the margins rise to 0.35."""
    for experiment in ("losses", "normalization"):
        results = made_up(experiment, lambda loss, seed: reproduce.PAPER[loss][2])
        assert all(reproduce.verdict(results, "accuracy", *pair)[0] == "held" for _, *pair in reproduce.claims(experiment))
    results = made_up("margins", lambda loss, seed: -abs(float(loss.split()[-1]) - 0.35))
    claims = reproduce.claims("margins")
    assert [reproduce.verdict(results, "accuracy", *pair)[0] == "held" for _, *pair in claims] == [True] * len(claims)
    assert len(claims) == 9 and len(reproduce.claims("losses")) == 8
    results = made_up("nsl", lambda loss, seed: float(loss.split()[-1]))
    assert reproduce.verdict(results, "accuracy", *reproduce.claims("nsl")[0][1:])[0] == "held"


def test_a_batch_has_several_images_of_each_identity():
    members = [np.arange(10 * who, 10 * who + 10 + who) for who in range(40)]
    labels = recipes._batch(np.random.default_rng(0), members) // 10
    assert sorted(np.bincount(labels).tolist())[-1] <= 8 and len(labels) == 128
    assert len(recipes._batch(np.random.default_rng(0), members[:7])) == 7 * 18


@pytest.fixture
def small(monkeypatch):
    """A few random images."""

    def data(seed):
        images = torch.randint(256, (120, 3, recipes.SIZE, recipes.SIZE), dtype=torch.uint8)
        labels = torch.arange(60) // 6
        return recipes.Data(images[:60], labels, images[60:], labels, images[:9])

    for name in ("faces", "faces20000"):
        monkeypatch.setitem(recipes.DATA, name, data)


@pytest.mark.slow
def test_command(small, tmp_path, capsys):
    """All nine losses, stopped twice: at a whole line and within one. The second run trains what is missing, and nothing else."""
    command = ["reproduce", "losses", "--seeds", "2", "--steps", "2", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    lines = (tmp_path / "results.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 18 and {json.loads(line)["loss"] for line in lines} == recipes.LOSSES.keys()
    report = (tmp_path / "losses-faces.md").read_text()
    assert report.strip() in capsys.readouterr().out and "| LMCL is better than Triplet |" in report
    (tmp_path / "results.jsonl").write_bytes(b"".join(lines[:-2]) + lines[-2][:40])
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^faces, seed \d: .*", printed, re.M) == [f"faces, seed 1: {loss}" for loss in list(recipes.LOSSES)[-2:]]
    assert (tmp_path / "results.jsonl").read_bytes().splitlines(keepends=True)[:-2] == lines[:-2]
    assert cli.main(["reproduce", "normalization", "--seeds", "1", "--steps", "2", "--out", str(tmp_path)]) == 0
    assert "faces, seed" not in capsys.readouterr().out  # both were trained for the other experiment
    (tmp_path / "results.jsonl").write_bytes(lines[0] + b'{"loss": 1}\n')
    assert cli.main(command) == 1 and "results.jsonl: line 2 is no result of a training" in capsys.readouterr().err


@pytest.fixture(scope="module")
def digits():
    """(data, the equal error rate of an untrained network)"""
    data = recipes.digits(0)
    assert set(data.labels.tolist()) == set(range(7)) and len(set(data.test_labels.tolist())) == 3
    torch.manual_seed(0)
    return data, recipes.score(recipes.network().eval(), data).eer


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes.LOSSES)
def test_every_loss_learns(digits, name):
    """After 60 steps each tells digits that it never saw apart better than an untrained network does."""
    data, untrained = digits
    assert recipes.train(recipes.LOSSES[name], data, 0, steps=60).eer < untrained


def test_document_is_what_was_measured():
    """Each report in docs/reproduction.md is made of benchmarks/results/reproduction.jsonl."""
    known = reproduce.read(ROOT / "benchmarks" / "results" / "reproduction.jsonl")
    found = re.findall(r"cosface reproduce (\w+) --data (\w+) --seeds (\d) --steps (\d+)", "\n".join(COMMANDS))
    assert len(found) == len(COMMANDS) - 1 == 4  # and the toy
    for experiment, data, seeds, steps in found:
        lines = [line for line in known if line["data"] == data and line["settings"] == recipes.settings(int(steps), data)]
        lines = [line for line in lines if line["loss"] in reproduce.EXPERIMENTS[experiment]]
        assert len(lines) == int(seeds) * len(reproduce.EXPERIMENTS[experiment])
        assert "\n".join(reproduce.report(experiment, lines)).lstrip("# ") in DOCUMENT.read_text()


@pytest.mark.slow
def test_commands_of_the_document(small, tmp_path, monkeypatch):
    """In short, on images of noise."""
    monkeypatch.setattr("cosface_kernels.tools.demo.toy.EPOCHS", 1)
    for command in COMMANDS:
        shorter = ["--steps", "1", "--seeds", "1", "--out", str(tmp_path)]
        assert cli.main([*shlex.split(command)[1:], *shorter]) == 0
    assert (tmp_path / "toy.md").read_text().count("LMCL, m") == 3 and (tmp_path / "toy_features.png").exists()
