"""Does an experiment train what it says, go on where it was stopped, and say of a claim what the numbers say?"""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("pytorch_metric_learning")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")
pytest.importorskip("yaml")

from test_pairs import png, write_bin
from test_training_records import write_rec

from cosface_kernels.tools import cli
from cosface_kernels.training import evaluate, photographs, recipes, reproduce

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
    labels = recipes.batch(np.random.default_rng(0), members) // 10
    assert sorted(np.bincount(labels).tolist())[-1] <= 8 and len(labels) == 128
    assert len(recipes.batch(np.random.default_rng(0), members[:7])) == 7 * 18


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
    assert len(found) == len(COMMANDS) - 2 == 4  # and the toy, and photographs
    for experiment, data, seeds, steps in found:
        lines = [line for line in known if line["data"] == data and line["settings"] == recipes.settings(int(steps), data)]
        lines = [line for line in lines if line["loss"] in reproduce.EXPERIMENTS[experiment]]
        assert len(lines) == int(seeds) * len(reproduce.EXPERIMENTS[experiment])
        assert "\n".join(reproduce.report(experiment, lines)).lstrip("# ") in DOCUMENT.read_text()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three rendered people in InsightFace's files, and two lists of pairs of others."""
    folder = tmp_path_factory.mktemp("photos")
    people = [(who, number) for who in range(3) for number in range(4)]
    write_rec(folder, payloads=[png(*each) for each in people], labels=[who for who, _ in people], ends=(13, 16))
    write_bin(folder / "lfw.bin", count=10), write_bin(folder / "cfp_fp.bin", count=12)
    return folder


def on_photographs(photos, out, *more, lists=("lfw.bin",), experiment="normalization"):
    paths = "--data", photos / "train.rec", "--out", out, "--pairs", *(photos / name for name in lists)
    return cli.main(["reproduce", experiment, "--seeds", "1", *map(str, paths), *more])


@pytest.fixture
def paper(monkeypatch):
    settings = photographs.PAPER._replace(
        backbone="sphere4", image_size=16, embedding_size=8, identities=4, images=2, checkpoint_every=2
    )
    monkeypatch.setattr(photographs, "PAPER", settings)
    monkeypatch.setattr(photographs.os, "cpu_count", lambda: 0)


def results_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_photographs(paper, photos, tmp_path, monkeypatch):
    """Stopped in mid-training it ends on the numbers of a run that was not; another list trains nothing."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert on_photographs(photos, whole, "--steps", "4") == 0
    once = results_of(whole)
    save = photographs.save_checkpoint

    def full(folder, *arguments, **options):
        if folder.name == "step-4":
            raise OSError("full")
        save(folder, *arguments, **options)

    monkeypatch.setattr(photographs, "save_checkpoint", full)
    assert on_photographs(photos, part, "--steps", "4") == 1 and not (part / "results.jsonl").exists()
    monkeypatch.setattr(photographs, "save_checkpoint", save)
    assert on_photographs(photos, part, "--steps", "4") == 0
    assert [line["pairs"] for line in results_of(part)] == [line["pairs"] for line in once]
    monkeypatch.setattr(photographs, "save_checkpoint", None)
    assert on_photographs(photos, whole, "--steps", "4", lists=("lfw.bin", "cfp_fp.bin")) == 0
    both = results_of(whole)[2:]
    assert [line["pairs"]["lfw"] for line in both] == [line["pairs"]["lfw"] for line in once]
    report = (whole / "normalization-train.md").read_text()
    assert report.count("| normalised features are better |") == 2 and "sphere4, 4 steps of 8 images of 16 pixels" in report
    accuracy = both[1]["pairs"]["cfp_fp"]["accuracy"]
    assert f"| {reproduce.OURS} | {100 * accuracy:.2f} ± 0.00 |" in report.split("## cfp_fp")[1] and "99.33 | 96.1" in report


def test_scores_of_photographs_are_those_of_eval(paper, photos, monkeypatch):
    """The network is judged as eval --pairs judges that of a run."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 8)).eval()
    found = photographs.score(network, photographs.read([photos / "lfw.bin"])["lfw"])
    run = network, SimpleNamespace(image_size=16)
    monkeypatch.setattr("cosface_kernels.training.backbones.load_backbone", lambda _: run)
    expected = evaluate.of_pairs(photos / "lfw.bin", "run", "concat")["verification"]
    assert (found["accuracy"], found["eer"]) == (expected["accuracy"], expected["eer"]) and found["rank1"] is None


def test_batches_are_functions_of_the_step(paper):
    """Two images of each of three people, also from the middle on; an image without a label is in none."""
    source = SimpleNamespace(labels=np.array([0, 1, -1, 1, 0, 2, 2, 2]), num_classes=3)
    whole = [chosen.tolist() for _, chosen in photographs.order(source, 7, 0, 5)]
    assert [chosen.tolist() for _, chosen in photographs.order(source, 7, 3, 5)] == whole[3:] and whole[0] != whole[1]
    assert all(np.bincount(source.labels[chosen]).tolist() == [2, 2, 2] for chosen in whole)


def test_the_papers_settings():
    assert photographs.settings(30_000) == {
        **{"backbone": "sphere64", "image_size": 112, "embedding_size": 512, "scale": 64.0, "identities": 128, "images": 4},
        **{"lr": 0.1, "milestones": [16 / 30, 24 / 30, 28 / 30], "momentum": 0.9, "weight_decay": 5e-4, "steps": 30_000},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("losses --data crops", "any other goes with --pairs, got 'crops'"),
        ("losses --pairs lfw.bin", "--pairs goes with --data DATA"),
        ("toy --data crops --pairs lfw.bin", "toy takes no --pairs"),
        ("losses --images crops", "--images goes with --pairs"),
    ],
)
def test_wrong_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", *arguments.split()])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_lists_are_looked_at_before_training(paper, photos, tmp_path, capsys):
    assert on_photographs(photos, tmp_path, lists=("lfw.bin", "lfw.bin")) == 1
    assert "two lists of pairs have one name" in capsys.readouterr().err
    assert on_photographs(photos, tmp_path, lists=("none.bin",)) == 1
    assert "none.bin: there is no such file" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_commands_of_the_document(small, paper, photos, tmp_path, monkeypatch):
    """In short, on images of noise, and on few rendered ones where it has photographs."""
    monkeypatch.setattr("cosface_kernels.tools.demo.toy.EPOCHS", 1)
    monkeypatch.chdir(photos)
    for command in COMMANDS:
        shorter = ["--steps", "1", "--seeds", "1", "--out", str(tmp_path)]
        assert cli.main([*shlex.split(command)[1:], *shorter]) == 0
    assert (tmp_path / "toy.md").read_text().count("LMCL, m") == 3 and (tmp_path / "toy_features.png").exists()
    found = [line for line in results_of(tmp_path) if line["data"] == "train.rec"]
    assert [line["loss"] for line in found] == [*recipes.LOSSES] and found[0]["pairs"].keys() == {"lfw", "cfp_fp"}
