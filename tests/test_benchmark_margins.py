"""Does benchmarks/margins.py time every margin beside CosFace, name the wrong and the slow ones, and lose nothing on the way?"""

import json

import pytest
import torch

from benchmarks import margins as benchmark
from benchmarks import measure, steps
from cosface_kernels import FusedSGD, margins
from cosface_kernels.heads import plain

SIZES = ["--rows=8", "--classes=100", "--size=32", "--repeats=2"]
NORMALISED = ["CosFace", "NormSoftmax", "ArcFace", "SphereFace", "Combined", "AdaFace", "MagFace"]


def rows_of(table):
    """{(name, products): the other cells}"""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {(cells[0], cells[1]): cells[2:] for cells in lines if not cells[0].startswith(("---", "products"))}


def wrong_ones(printed):
    return {name for (name, _), cells in rows_of(printed).items() if "WRONG" in cells[2]}


def test_table_and_json(capsys, tmp_path):
    path = tmp_path / "new" / "margins.json"
    assert benchmark.main([*SIZES, f"--json={path}"]) == 0
    printed = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert printed == benchmark.table(report) + "\n"
    assert report["complete"] and report["shape"] == [8, 100, 32]
    assert {"device", "torch", "date", "commit"} <= set(report["environment"])
    rows = rows_of(printed)
    assert list(rows) == [(row["name"], row["precision"]) for row in report["rows"]]
    for row in report["rows"]:
        assert len(row["seconds"]) == len(row["cosface_seconds"]) == 2 and not row["wrong"]
        assert max(row["errors"]) < {"float32": 1e-4, "bfloat16": 0.1}[row["precision"]]
        milliseconds, ratio, *_ = rows[row["name"], row["precision"]]
        assert float(milliseconds) > 0 and " to " in ratio
    assert "5% of cosface_loss" in printed and "cosface_loss itself: " in printed


def test_options(capsys, monkeypatch):
    """All are right; and wrong ones are marked."""
    monkeypatch.setattr(benchmark, "CHECK_SHAPE", (8, 300))  # fewer labels and hard classes than a sample has
    monkeypatch.setattr(measure, "processor_seconds", lambda run: [run(), 1.5][1])
    assert benchmark.main([*SIZES, "--options", "--dtype=float32", "--repeats=1", "--processor-time"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("One forward and backward, processor time, ") and "cosface_loss itself: 1500 ms" in printed
    names = [case.name for case in benchmark.OPTIONS + benchmark.STEPS]
    assert [name for name, _ in rows_of(printed)] == names and not wrong_ones(printed)
    assert f"times one without the option: {'; '.join(step.name for step in benchmark.STEPS)}." in printed
    right = margins.MVSoftmax.polynomial
    monkeypatch.setattr(margins.MVSoftmax, "polynomial", lambda self, *given: (*right(self, *given)[:3], 0.01))
    monkeypatch.setattr(plain, "correction", lambda classes, certain, num_classes: torch.zeros(len(classes)))
    monkeypatch.setattr(steps, "FusedSGD", lambda weights, *, max_row_norm=None, **options: FusedSGD(weights, **options))
    assert benchmark.main([*SIZES, "--options", "--dtype=float32", "--repeats=1"]) == 0
    assert wrong_ones(capsys.readouterr().out) == {"MVSoftmax", "hard classes", "max_row_norm"}


def test_cases_are_distinct():
    assert [case.name for case in benchmark.CASES if case.normalised] == NORMALISED
    assert len({case.name for case in benchmark.CASES}) == len(benchmark.CASES)


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in (margins.CosFace, margins.ArcFace)), margins.MagFace]
)
def test_a_wrong_margin_is_marked(capsys, monkeypatch, kind):
    right = kind.target_logit

    def wrong(self, product, length, *terms):
        return right(self, product, length, *terms) - 0.001 * (1 if length is None else length)

    monkeypatch.setattr(kind, "target_logit", wrong)
    assert benchmark.main([*SIZES, "--dtype=float32"]) == 0
    assert wrong_ones(capsys.readouterr().out) == {case.name for case in benchmark.CASES if isinstance(case.margin, kind)}


def test_a_wrong_penalty_or_gradient_is_marked(capsys, monkeypatch):
    monkeypatch.setattr(margins.MagFace, "penalty", lambda self, norm: None)
    psi = margins.SphereFace.psi  # LSoftmax's too
    monkeypatch.setattr(margins.SphereFace, "psi", lambda self, cosine: psi(self, cosine.detach()))
    assert benchmark.main([*SIZES, "--dtype=float32"]) == 0
    assert wrong_ones(capsys.readouterr().out) == {"MagFace", "SphereFace", "LSoftmax"}


def test_not_a_number_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(margins.AdaFace, "psi", lambda self, cosine, quality: cosine * torch.nan)
    assert benchmark.main([*SIZES, "--dtype=float32"]) == 0
    assert wrong_ones(capsys.readouterr().out) == {"AdaFace"}


def test_drift_cancels(monkeypatch):
    """A machine that slows down by a tenth with every step, on which all steps cost the same."""
    clock = iter(range(10**6))

    def seconds(function, device):
        return 1.1 ** (next(clock) % 1000)

    monkeypatch.setattr(measure, "seconds", seconds)
    report = {"shape": [8, 100, 4], "rows": [benchmark._row(case, "float32") for case in benchmark.CASES]}
    benchmark.time_pairs(report, torch.device("cpu"), repeats=4)
    for row in report["rows"]:
        assert benchmark._quartiles(row) == pytest.approx([1 / 1.1, (1.1 + 1 / 1.1) / 2, 1.1])


def test_the_slow_ones_are_named():
    """By hand: ratios of 1.00, 1.04, 1.06 for one margin, 1.01, 1.07, 1.09 for the other; a relative may be slower."""
    report = {"shape": [8, 100, 4], "complete": True, "environment": {"device": "none", "torch": "0", "date": "today"}}
    slow, fast, relative = (benchmark._row(case, "float32") for case in (*benchmark.CASES[2:4], benchmark.CASES[-1]))
    for row, seconds in ((fast, [2.08, 2.0, 2.12]), (slow, [2.18, 2.02, 2.14]), (relative, [9.0, 9.0, 9.0])):
        row.update(seconds=seconds, cosface_seconds=[2.0, 2.0, 2.0])
    table = benchmark.table({**report, "rows": [slow, fast, relative]})
    assert "Normalised margins beyond 5% of cosface_loss: ArcFace in float32 (1.070)." in table
    assert rows_of(table)["ArcFace", "float32"][:2] == ["2140", "1.070 (1.040 to 1.080)"]
    assert "cosface_loss itself: 2000 ms in float32, the medians" in table
    assert "No normalised margin is beyond 5%" in benchmark.table({**report, "rows": [fast, relative]})


def test_what_does_not_fit_is_said_before_allocating(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "inputs", lambda *arguments: pytest.fail("allocated"))
    assert benchmark.main([*SIZES, "--classes=1000000000000"]) == 1
    error = capsys.readouterr().err
    assert "C = 1,000,000,000,000 does not fit: needs about " in error and error.count("\n") == 1


def test_interrupt_prints_what_was_measured(capsys, monkeypatch, tmp_path):
    step, calls = benchmark.step, []

    def impatient(function, *tensors):
        calls.append(function)
        if len(calls) == 2 * len(benchmark.CASES) + 6:  # in the third pair after the warm-up
            raise KeyboardInterrupt
        return step(function, *tensors)

    monkeypatch.setattr(benchmark, "step", impatient)
    assert benchmark.main([*SIZES, "--dtype=float32", f"--json={tmp_path / 'r.json'}"]) == 130
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    times = [rows[case.name, "float32"][0] for case in benchmark.CASES]
    assert all(float(time) > 0 for time in times[-2:]) and set(times[:-2]) == {"not measured"} and "; interrupted." in printed
    report = json.loads((tmp_path / "r.json").read_text())
    assert not report["complete"] and [len(row["seconds"]) for row in report["rows"][-3:]] == [0, 1, 1]


def test_interrupt_before_anything_was_measured(capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "check", interrupt)
    assert benchmark.main([*SIZES]) == 130
    assert set(cells[0] for cells in rows_of(capsys.readouterr().out).values()) == {"not measured"}


def test_what_cannot_be_written_is_one_line(capsys):
    assert benchmark.main([*SIZES, "--json=/proc/nowhere/r.json"]) == 1
    error = capsys.readouterr().err
    assert "cannot write to /proc/nowhere" in error and error.count("\n") == 1


@pytest.mark.parametrize("option", ["--rows=0", "--classes=2", "--size=x", "--dtype=float8"])
def test_wrong_usage(capsys, option):
    with pytest.raises(SystemExit) as stop:
        benchmark.main([option])
    assert stop.value.code == 2 and option.split("=")[0] in capsys.readouterr().err
