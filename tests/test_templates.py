"""Are templates, their pairs and their searches those of IJB's protocols, by hand, and their rates those of scikit-learn?"""

import json

import numpy as np
import pytest
import torch

from cosface_kernels.tools import cli
from cosface_kernels.training import evaluate, identification

metrics = pytest.importorskip("sklearn.metrics")


def run(folder, *more):
    """The exit status of eval with those of IJB's files that are in a folder."""
    command = [
        "eval",
        "--embeddings",
        folder / "e.npy",
        "--templates",
        folder / "tid_mid.txt",
        "--json",
        folder / "o.json",
        *more,
    ]
    return cli.main([str(part) for part in command])


def record(folder):
    return json.loads((folder / "o.json").read_text())


def test_pairs(tmp_path, capsys):
    """Template 5 is of media 1 (two images) and 2 (one): its mean weighs the two as one. Each other image is a template."""
    rows = np.random.default_rng(0).normal(size=(12, 16)).astype(np.float32)
    np.save(tmp_path / "e.npy", rows)
    owner, medium = [5, 5, 5, *range(10, 19)], [1, 1, 2, *[1] * 9]
    lists = tmp_path / "tid_mid.txt", tmp_path / "pairs.txt"
    lists[0].write_text("".join(f"{n}.jpg {t} {m}\n" for n, (t, m) in enumerate(zip(owner, medium, strict=True))))
    lists[1].write_text("".join(f"{5} {template} {int(template < 12)}\n" for template in range(10, 19)))
    assert run(tmp_path, "--template-pairs", lists[1]) == 0
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    template = (unit[0] + unit[1]) / 2 + unit[2]
    scores = unit[3:] @ template / np.linalg.norm(template)
    found = record(tmp_path)
    assert found["verification"]["pairs"] == {"genuine": 2, "impostor": 7} and found["embeddings"]["templates"] == 10
    assert found["verification"]["auc"] == (scores[:2, None] > scores[2:]).mean() and "identification" not in found
    np.testing.assert_allclose(found["verification"]["roc"]["threshold"][-1], scores.min(), atol=1e-6)
    for place, text, message in (
        (0, "0.jpg 5 1\n", "tid_mid.txt: has 1 lines for 12 embeddings"),
        (0, "0.jpg 5\n" * 12, "tid_mid.txt: line 1 must be 'image template medium'"),
        (1, "5 10 1\n5 99 0\n", "pairs.txt: line 2 names template 99, which"),
        (1, "5 10 2\n", "pairs.txt: not lines of 'template template 0-or-1'"),
        (1, "5 x 1\n", "pairs.txt: not lines of 'template template 0-or-1'"),
    ):
        before = lists[place].read_text()
        lists[place].write_text(text)
        assert run(tmp_path, "--template-pairs", lists[1]) == 1 and message in capsys.readouterr().err
        lists[place].write_text(before)


# Templates and their subjects, whose names are their angles in a plane, in degrees. Template 9 has two images, 10 degrees to both
# sides, and a line for each.
GALLERIES = {"g1.csv": {9: 0, 8: 90}, "g2.csv": {7: 180}}
# Probes of 0: at 10 (rank 1, cos 10) and at 60, which is nearer to 90 (rank 2). Of 90: at 120 (rank 1, cos 30). Of 180: at 170.
MATED = {20: (10, 0), 21: (60, 0), 22: (120, 90), 23: (170, 180)}
# Ten of subjects in no gallery, below the axis: in the first gallery 0 is the nearest of all, from 11 to 65 degrees away.
UNKNOWN = {30 + place: (-11 - 6 * place, 1000 + place) for place in range(10)}


@pytest.fixture
def ijb(tmp_path):
    angles = [(9, -10), (9, 10), (8, 90), (7, 180), *((template, angle) for template, (angle, _) in {**MATED, **UNKNOWN}.items())]
    turned = np.radians([angle for _, angle in angles])
    np.save(tmp_path / "e.npy", np.stack([np.cos(turned), np.sin(turned)], 1) * np.arange(1, len(angles) + 1)[:, None])
    (tmp_path / "tid_mid.txt").write_text("".join(f"{row}.jpg {each[0]} {row}\n" for row, each in enumerate(angles)))
    for name, gallery in GALLERIES.items():
        lines = [f"{template},{subject},img/{template}.png,1.5\n" for template, subject in gallery.items()]
        (tmp_path / name).write_text("TEMPLATE_ID,SUBJECT_ID,FILENAME,FACE_X\n" + lines[0] + "".join(lines))
    lines = [f"{template},{subject},frames/1.png\n" for template, (_, subject) in {**MATED, **UNKNOWN}.items()]
    (tmp_path / "probes.csv").write_text("TEMPLATE_ID,SUBJECT_ID,FILENAME\n" + "".join(lines))
    return tmp_path


def search(folder, *galleries):
    return run(folder, "--gallery", *(folder / name for name in galleries), "--probes", folder / "probes.csv")


def test_open_set_by_hand(ijb, capsys):
    """In the first gallery the probe of 180 is one of eleven without a mate. One, at 11 degrees, may score the threshold, and
    the next, at 17 degrees, may not: of the three probes with a mate the one at 10 degrees is found, that at 30 is not."""
    assert search(ijb, "g1.csv", "g2.csv") == 0
    found = record(ijb)["identification"]
    first, second = (found["galleries"][str(ijb / name)] for name in GALLERIES)
    assert (first["searches"], first["probes"], first["gallery"]) == (3, 11, 2)
    assert first["cmc"][:2] == [2 / 3, 1] and first["tpir"]["1e-1"] == 1 / 3
    assert first["threshold"]["1e-1"] == pytest.approx(np.cos(np.radians(11)), abs=1e-7)
    # In the second nobody else is enrolled, so the rank is 1; of the thirteen others none is as near as the mate.
    assert (second["searches"], second["probes"], second["gallery"], second["rank1"]) == (1, 13, 1, 1)
    assert second["tpir"]["1e-1"] == 1 and second["unresolved"]["1e-2"] == "needs 100 probes, there are 13"
    assert found["rank1"] == pytest.approx(5 / 6) and found["tpir"] == {"1e-1": pytest.approx(2 / 3), "1e-2": None, "1e-3": None}
    printed = capsys.readouterr().out
    assert "g1: searches" in printed and "3 probes, and 11 of others, among 2 templates" in printed
    assert "mean: TPIR at FPIR 1e-1  66.67%" in printed
    assert run(ijb, "--gallery", ijb / "g1.csv", "--probes", ijb / "probes.csv", "--html", ijb / "o.html") == 0
    assert (ijb / "o.html").read_text().count("<svg") == 1


def test_rates_are_those_of_scikit_learn():
    """TPIR over FPIR is the ROC of the mates' scores, none where another was nearer, against the best scores of the unknown."""
    random = np.random.default_rng(0)
    gallery = torch.nn.functional.normalize(torch.from_numpy(random.normal(size=(60, 8)))).float()
    subjects = random.integers(90, size=3000)
    probes = gallery[np.minimum(subjects, 59)].double() + 0.5 * torch.from_numpy(random.normal(size=(3000, 8)))
    probes[subjects >= 60] = torch.from_numpy(random.normal(size=(int((subjects >= 60).sum()), 8)))
    probes = torch.nn.functional.normalize(probes).float()
    searches = identification.search_gallery(gallery, np.arange(60), probes, subjects)
    known = subjects < 60
    scores = (probes.double() @ gallery.double().T).numpy()
    mates = scores[known, subjects[known]]
    ranks = (scores[known] >= mates[:, None]).sum(1)
    np.testing.assert_allclose(searches.mates, mates, atol=1e-12)
    assert searches.ranks.tolist() == np.minimum(ranks, identification.CMC_RANKS + 1).tolist() and len(set(ranks)) > 20
    np.testing.assert_allclose(searches.best, scores[~known].max(1), atol=1e-12)
    kinds = np.repeat([1, 0], [known.sum(), (~known).sum()])
    found = np.concatenate([np.where(searches.ranks == 1, searches.mates, -2), searches.best])
    fpir, tpir, _ = metrics.roc_curve(kinds, found, drop_intermediate=False)
    for exponent in (1, 2):
        at = np.flatnonzero(fpir <= 10.0**-exponent)[-1]
        assert identification.tpir_at_fpir(searches, exponent)[0] == tpir[at] > 0
    assert evaluate.identification_of(searches)["tpir"]["1e-3"] is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("g1.csv", "9,0\n99,3\n", "g1.csv: line 2 names template 99, which"),
        ("g1.csv", "A,B\n9,0\n8,0\n", "g1.csv: subject 0 has several templates; a gallery has one for each"),
        ("g1.csv", "A,B\n9,5\n", "no probe's subject is in the gallery"),
        ("g1.csv", "A,B\n", "g1.csv: has no lines 'template,subject,...'"),
        ("probes.csv", "A,B\n20,0\n21\n", "probes.csv: line 3 must be 'template,subject,...', got '21"),
        ("probes.csv", "A,B\n20,0\n20,1\n", "probes.csv: line 3 has template 20 of subject 1, an earlier one of another"),
    ],
)
def test_bad_files(ijb, capsys, name, text, message):
    (ijb / name).write_text(text)
    assert search(ijb, "g1.csv") == 1
    assert message in capsys.readouterr().err and not (ijb / "o.json").exists()


def test_wrong_usage(ijb):
    for more in ([], ["--gallery", "g1.csv"], ["--probes", "probes.csv"]):
        with pytest.raises(SystemExit) as stop:
            run(ijb, *more)
        assert stop.value.code == 2
