"""Are the numbers of `cosface eval` those of scikit-learn and of cases worked by hand, however the pairs are counted?"""

import json
from pathlib import Path

import fresh
import numpy as np
import pytest
import torch

from cosface_kernels.tools import cli
from cosface_kernels.training import all_pairs, evaluate, identification, verification
from cosface_kernels.training.verification import Steps

ROOT = Path(__file__).parents[1]
metrics = pytest.importorskip("sklearn.metrics")


class Blocks:
    """Given scores as `steps_of` wants them."""

    def __init__(self, genuine, impostors, size=11_000):
        self.parts = [torch.tensor(np.asarray(scores), dtype=torch.float32).split(size) for scores in (genuine, impostors)]
        self.count = len(genuine) + len(impostors)

    def blocks(self):
        for genuine in self.parts[0]:
            yield genuine, torch.empty(0)
        for impostors in self.parts[1]:
            yield torch.empty(0), impostors


def draw(seed=0, genuine=500, impostors=20_000, decimals=7):
    """Overlapping scores of both signs, float32, with ties by rounding, with 0 and -0."""
    random = np.random.default_rng(seed)
    scores = random.normal(0.3, 0.2, genuine), random.normal(0, 0.1, impostors)
    scores = [np.append(part.round(decimals), [0.0, -0.0, 0.25]).astype(np.float32) for part in scores]
    return scores


def embeddings(identities=30, images=4, size=16, spread=1.0, seed=0):
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(identities) * 7, images)
    rows = random.normal(size=(identities, size))[labels // 7] + spread * random.normal(size=(len(labels), size))
    order = random.permutation(len(labels))
    return rows[order].astype(np.float32), labels[order]


@pytest.mark.parametrize("decimals", [7, 2])  # few ties, and nothing but ties
@pytest.mark.parametrize("counted", [False, True])
def test_rates_are_those_of_scikit_learn(monkeypatch, counted, decimals):
    genuine, impostors = draw(decimals=decimals)
    if counted:
        monkeypatch.setattr(verification, "SORTED_AT_MOST", 0)
    steps = verification.steps_of(Blocks(genuine, impostors))
    is_genuine, scores = np.repeat([1, 0], [len(genuine), len(impostors)]), np.concatenate([genuine, impostors])
    far, tar, thresholds = metrics.roc_curve(is_genuine, scores, drop_intermediate=False)
    for exponent in (1, 2, 3, 4):
        rate = verification.tar_at_far(steps, exponent)
        best = np.flatnonzero(far <= 10.0**-exponent)[-1]
        assert rate.tar == tar[best] and rate.far == far[best]
        # The infimum of a TAR of 0 is any score above the highest.
        assert rate.threshold == thresholds[best] or tar[best] == far[best] == 0
    assert verification.tar_at_far(steps, 5) is None
    area, error = verification.area_under_roc(steps)
    exact = metrics.roc_auc_score(is_genuine, scores)
    assert abs(area - exact) <= error + 1e-12 and error < 0.01 and (error > 0) == counted
    det_far, det_frr, _ = metrics.det_curve(is_genuine, scores)
    equal, threshold = verification.equal_error_rate(steps)
    ends = [(max(a, b), min(a, b)) for a, b in zip(det_far, det_frr, strict=True)]
    assert max(low for _, low in ends) <= equal + 1e-12 and equal <= min(high for high, _ in ends) + 1e-12
    assert np.interp(equal, far, tar) == pytest.approx(1 - equal, abs=1e-12) and threshold in thresholds


@pytest.mark.parametrize("shift", [0, -0.2, -0.9])  # thresholds above 0, of both signs, and below 0
def test_counting_is_sorting(shift):
    """Every single score that a threshold can lie at, to the bit."""
    genuine, impostors = (scores + np.float32(shift) for scores in draw(seed=1))
    exact = Steps.of(genuine, impostors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "SORTED_AT_MOST", 0)
        counted = verification.steps_of(Blocks(genuine, impostors))
    assert counted.genuine.sum() == len(genuine) and counted.impostors.sum() == len(impostors)
    assert all(verification.tar_at_far(counted, e) == verification.tar_at_far(exact, e) for e in verification.FAR_EXPONENTS)
    assert verification.equal_error_rate(counted) == pytest.approx(verification.equal_error_rate(exact), abs=1e-15)


def test_worked_case():
    """Ten impostors 0.0 .. 0.9, genuine 0.95, 0.9, 0.45: at FAR 0.1 the threshold is 0.9, which accepts the tie on both sides."""
    steps = Steps.of([0.95, 0.9, 0.45], np.arange(10) / 10)
    assert verification.tar_at_far(steps, 1) == (0.9, 2 / 3, 0.1)
    assert verification.tar_at_far(steps, 2) is None
    # (10 + 9.5 + 5) of 30 pairs of pairs are in order.
    assert verification.area_under_roc(steps)[0] == pytest.approx(24.5 / 30)
    # TAR is 2/3 from FAR 0.1 to 0.5, so the two errors meet at 1/3, before the impostor 0.6 is accepted.
    assert verification.equal_error_rate(steps) == pytest.approx((1 / 3, 0.6))
    # Both of the two highest impostors tie at 0.9, and one may pass: no score that occurs but 0.95.
    tied = Steps.of([0.95, 0.9], [*np.arange(9) / 10, 0.9, 0.9])
    assert verification.tar_at_far(tied, 1) == (0.95, 0.5, 0)
    # Only impostors at the top: nothing is accepted.
    above = verification.tar_at_far(Steps.of([0.5], [0.9] * 10), 1)
    assert above.tar == above.far == 0 and above.threshold > 0.9


def test_one_impostor():
    steps = Steps.of([0.5, 0.7], [0.6])
    assert all(verification.tar_at_far(steps, exponent) is None for exponent in verification.FAR_EXPONENTS)
    assert verification.area_under_roc(steps) == (0.5, 0)
    assert verification.equal_error_rate(steps)[0] == pytest.approx(0.5)
    record = evaluate.verification_of(steps)
    assert record["tar"]["1e-1"] is None and record["unresolved"]["1e-1"] == "needs 10 impostor pairs, there are 1"


@pytest.mark.parametrize("distractors", [None, 37])
def test_all_pairs_are_all_pairs(monkeypatch, distractors):
    """Blocks of 16 rows, so that identities lie across several; an identity of one image, and one of 40."""
    rows, labels = embeddings()
    labels[labels < 70] = 0
    labels[np.flatnonzero(labels == 203)[1:]] = 196
    others = None if distractors is None else np.random.default_rng(5).normal(size=(distractors, 16))
    monkeypatch.setattr(all_pairs, "BLOCK", 16)
    pairs = all_pairs.AllPairs(rows, labels, others)
    genuine, impostors = (torch.cat(part).double() for part in zip(*pairs.blocks(), strict=True))
    unit = torch.nn.functional.normalize(torch.tensor(rows).double())
    upper, same = np.triu_indices(len(rows), 1), labels[:, None] == labels
    scores = (unit @ unit.T)[upper]
    expected = scores[~same[upper]]
    if others is not None:
        expected = torch.cat([expected, (unit @ torch.nn.functional.normalize(torch.tensor(others)).T).flatten()])
    assert len(genuine) + len(impostors) == pairs.count
    torch.testing.assert_close(genuine.sort().values, scores[same[upper]].sort().values, rtol=0, atol=1e-6)
    torch.testing.assert_close(impostors.sort().values, expected.sort().values, rtol=0, atol=1e-6)
    accepted, counts = pairs.accepted_of_identities([0.3, 0.8])
    assert counts.sum() == len(genuine) and (counts[0], len(counts)) == (40 * 39 // 2, 20)
    assert accepted.sum(0).tolist() == [(genuine >= limit).sum() for limit in (0.3, 0.8)]


@pytest.mark.parametrize("distractors", [None, 300])
def test_identification_is_what_a_matrix_gives(monkeypatch, distractors):
    rows, labels = embeddings(spread=0.9)
    random = np.random.default_rng(5)
    others = None if distractors is None else np.concatenate([random.normal(size=(distractors, 16)), rows[:2]])
    monkeypatch.setattr(identification, "PROBES", 7)
    found = identification.search(rows, labels, others)
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    first = {label: np.flatnonzero(labels == label)[0] for label in labels}
    mates, ranks, best = [], [], []
    for probe in range(len(rows)):
        enrolled = [first[labels[probe]]] if others is None else np.flatnonzero(labels == labels[probe])
        gallery = unit[[place for label, place in first.items() if label != labels[probe]]] if others is None else others
        scores = gallery @ unit[probe] / np.linalg.norm(gallery, axis=1)
        for mate in enrolled if others is not None or probe != enrolled[0] else []:
            if mate != probe:
                mates.append(unit[probe] @ unit[mate])
                ranks.append(min(1 + int((scores >= mates[-1] - 1e-7).sum()), identification.CMC_RANKS + 1))
        if others is not None or probe != enrolled[0]:
            best.append(scores.max())
    assert sorted(found.ranks) == sorted(ranks) and len(set(ranks)) > 5
    np.testing.assert_allclose(np.sort(found.mates), np.sort(mates), atol=1e-6)
    np.testing.assert_allclose(np.sort(found.best), np.sort(best), atol=1e-6)
    curve = identification.cmc(found)
    assert curve[0] == pytest.approx(np.mean(np.array(ranks) == 1)) and curve[9] == pytest.approx(np.mean(np.array(ranks) <= 10))
    tpir, threshold = identification.tpir_at_fpir(found, 1)
    assert (found.best >= threshold).mean() <= 0.1 and tpir == ((found.ranks == 1) & (found.mates >= threshold)).mean()
    lower = max(score for score in [*found.best, *found.mates[found.ranks == 1]] if score < threshold)
    assert (found.best >= lower).mean() > 0.1


def test_equal_images_count_against_the_mate():
    """A distractor that is the mate's own image: rank 2, never 1."""
    rows, labels = embeddings(identities=5, images=2)
    found = identification.search(rows, labels, rows)
    assert (found.ranks >= 3).all()  # the probe's own image too


def test_intervals():
    # Wilson's interval of 8 in 10, as in his paper's formula: (0.8 + 0.19207 ± 0.29136) / 1.38415.
    assert verification.wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert verification.wilson(0, 5)[0] == 0 and verification.wilson(5, 5)[1] == 1
    accepted, pairs = np.array([[6], [3], [0], [1]]), np.array([6, 3, 3, 1])
    ((low,), (high,)) = verification.bootstrap(accepted, pairs)
    assert verification.bootstrap(accepted, pairs).tolist() == [[low], [high]] and 0 <= low < 10 / 13 < high <= 1
    assert verification.bootstrap(pairs[:, None], pairs).tolist() == [[1.0], [1.0]]


def test_an_interval_of_all_pairs_has_a_width(tmp_path, capsys):
    """Every draw of identities gives 100% where every pair is right."""
    np.save(tmp_path / "e.npy", np.eye(5).repeat(2, 0)), np.save(tmp_path / "y.npy", np.arange(10) // 2)
    assert run(tmp_path) == 0 and "TAR at FAR 1e-1         100.00% (56.55% to 100.00%, Wilson)" in capsys.readouterr().out
    intervals = json.loads((tmp_path / "o.json").read_text())["verification"]["tar_interval"]
    assert intervals["identities"]["1e-1"] == [1, 1]


def test_folds():
    """Each threshold is from the other nine: one fold whose scores lie elsewhere is judged at theirs, and not its own."""
    same = np.tile([True, False], 50)
    scores = np.where(same, 0.8, 0.2) + np.linspace(-0.05, 0.05, 100)
    result = verification.folds(scores, same)
    assert result.accuracies == [1.0] * 10 and all(0.25 < threshold < 0.75 for threshold in result.thresholds)
    scores[:10] += 1  # all of the first fold above any threshold of the others
    assert verification.folds(scores, same).accuracies == [0.5] + [1.0] * 9
    assert verification.best_threshold(np.array([0.1, 0.5]), np.array([True, True])) == 0.1
    assert verification.best_threshold(np.array([0.1, 0.5]), np.array([False, False])) > 0.5
    with pytest.raises(ValueError, match="10 folds need at least 10 pairs, got 9"):
        verification.folds(scores[:9], same[:9])


MEMORY = """
import resource
import numpy as np
from cosface_kernels.training.all_pairs import AllPairs
from cosface_kernels.training import identification, verification

def peak(distractors):
    rows, labels, others = random.random((500, 8)) - 0.5, np.arange(500) // 4, random.random((distractors, 8)) - 0.5
    verification.steps_of(AllPairs(rows, labels, others)), identification.search(rows, labels, others)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

random, verification.SORTED_AT_MOST = np.random.default_rng(0), 0
print(peak(5_000), peak(205_000))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pairs():
    """Of 200,000 more distractors there are four arrays, of float64 and float32, and not half of their scores.

    The C library keeps up to a third of those of what is freed, from run to run.
    """
    few, many = map(int, fresh.run(MEMORY))
    arrays, scores = 200_000 * 8 * (8 + 8 + 4 + 4), 200_000 * 500 * 4
    assert many - few < arrays + scores / 2


@pytest.fixture
def files(tmp_path):
    rows, labels = embeddings()
    np.save(tmp_path / "e.npy", rows), np.save(tmp_path / "y.npy", labels)
    return tmp_path


def run(folder, *more, embeddings="e.npy", labels="y.npy"):
    command = ["eval", "--embeddings", folder / embeddings, "--labels", folder / labels, "--json", folder / "o.json", *more]
    return cli.main([str(part) for part in command])


def test_command(files, capsys):
    from safetensors.numpy import save_file

    assert run(files, "--html", files / "o.html") == 0
    page = (files / "o.html").read_text()
    assert page.count("<svg") == 2 and "false accept rate" in page and ">rank<" in page
    record, printed = json.loads((files / "o.json").read_text()), capsys.readouterr().out
    verified = record["verification"]
    assert verified["pairs"] == {"genuine": 180, "impostor": 6960} and record["identification"]["searches"] == 90
    low, high = verified["tar_interval"]["identities"]["1e-3"]
    assert low < verified["tar"]["1e-3"] < high and f"TAR at FAR 1e-3         {verified['tar']['1e-3']:.2%}" in printed
    assert verified["tar"]["1e-4"] is None and "needs 10,000 impostor pairs" in verified["unresolved"]["1e-4"]
    rows, labels = np.load(files / "e.npy"), np.load(files / "y.npy")
    save_file({"embeddings": rows, "labels": labels}, files / "both.safetensors")
    assert run(files, embeddings="both.safetensors", labels="both.safetensors") == 0
    assert json.loads((files / "o.json").read_text())["verification"] == verified
    np.save(files / "text.npy", labels.astype(str))
    assert run(files, "--distractors", files / "e.npy", labels="text.npy") == 0
    record = json.loads((files / "o.json").read_text())
    assert record["verification"]["pairs"]["impostor"] == 6960 + 120 * 120 and record["distractors"]["images"] == 120


def changed(place, value):
    rows = embeddings()[0]
    rows[place] = value
    return rows


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("e.npy", changed(7, np.nan), "row 7 is not finite; leave such rows out"),
        ("e.npy", changed(9, 0), "row 9 is all zeros"),
        ("e.npy", np.zeros((0, 4), np.float32), "holds no embeddings"),
        ("e.npy", np.ones((120, 4), int), "must hold floats of shape (N, D)"),
        ("e.npy", np.ones(120), "must hold floats of shape (N, D)"),
        ("e.npy", np.array([{}] * 3), "holds Python objects"),
        ("y.npy", np.arange(5), "has 5 labels for 120 embeddings"),
        ("y.npy", np.full(120, 0.5), "must hold one integer or text"),
        ("y.npy", np.full(120, np.inf), "must hold one integer or text"),
        ("y.npy", np.zeros((120, 1), int), "must hold one integer or text"),
        ("y.npy", np.arange(120), "there is no genuine pair"),
        ("y.npy", np.zeros(120, int), "there is no impostor pair"),
    ],
)
def test_bad_input(files, capsys, name, array, message):
    np.save(files / name, array, allow_pickle=True)
    assert run(files) == 1
    error = capsys.readouterr().err
    assert message in error and ("pair" in message or str(files / name) in error) and error.count("\n") == 1
    assert {path.name for path in files.iterdir()} == {"e.npy", "y.npy"}


def test_bad_files(files, capsys):
    (files / "bad.npy").write_bytes((files / "e.npy").read_bytes()[:300])
    (files / "bad.safetensors").write_bytes(b"\xff" * 40)
    (files / "e.txt").write_text("0 1")
    (files / "text.npy").write_text("0 1")
    np.save(files / "narrow.npy", np.ones((3, 8)))
    for name, message in (
        ("bad.npy", "damaged"),
        ("text.npy", "a damaged one (it does not begin as one)"),
        ("bad.safetensors", "damaged"),
        ("e.txt", "must be a .npy or a .safetensors file"),
        ("none.npy", "there is no such file"),
    ):
        assert run(files, embeddings=name) == 1
        error = capsys.readouterr().err
        assert str(files / name) in error and message in error
    assert run(files, "--distractors", files / "narrow.npy") == 1
    assert "narrow.npy: has D = 8" in capsys.readouterr().err
    assert run(files, "--json", files) == 1
    assert f"cannot write {files}: it is a folder" in capsys.readouterr().err
    assert run(files, "--json", files / "nowhere" / "o.json") == 1
    assert f"cannot write {files / 'nowhere' / 'o.json'}: there is no folder" in capsys.readouterr().err
    assert not list(files.glob("*o.json*")) and not list(files.glob(".*"))
