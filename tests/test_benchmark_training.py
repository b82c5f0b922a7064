"""Does benchmarks/training.py train what it says, and report what it measured?"""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

import torch

from benchmarks import measure, training


def printed(**parts):
    rows = [{"part": part, **row} for part, rows in parts.items() for row in rows]
    return training.table({"environment": measure.environment(torch.device("cpu")), "rows": rows})


@pytest.mark.slow
def test_a_table_trains_in_a_process_of_its_own():
    row = {"identities": 4000, "size": 32, "table_format": "bfloat16", "state_format": "int8", "sample_rate": 0.5}
    found = training.alone("table_run", **row)
    assert len(found["losses"]) == len(found["seconds"]) == training.STEPS
    assert found["losses"][-1] < found["losses"][0] and 1e8 < found["peak_bytes"] < 4e9
    text = printed(tables=[{**row, **found}])
    assert "| 4,000 x 32, bfloat16 table, int8 momentum, 50% sampled |" in text
    assert f"{found['losses'][0]:.1f} -> {found['losses'][-1]:.1f}" in text


@pytest.mark.parametrize(
    "row, gigabytes",
    [
        ({"size": 512, "table_format": "bfloat16", "momentum": 0.0}, 102.4),  # fits an H200
        ({"size": 256, "table_format": "bfloat16", "state_format": "bfloat16"}, 102.4),
        ({"size": 256, "table_format": "float32", "state_format": "int8", "sample_rate": 0.1}, 128.0),
    ],
)
def test_bytes_of_a_table(row, gigabytes):
    assert training.table_bytes(100_000_000, **row) == pytest.approx(1.05e9 * gigabytes)


@pytest.mark.slow
def test_a_process_that_fails_is_a_row():
    found = training.alone("table_run", identities=4000, size=32, table_format="float7")
    assert found == {"error": "exit status 1"}
    row = {"identities": 4000, "size": 32, "table_format": "float7", "state_format": "int8", **found}
    assert "| exit status 1 |" in printed(tables=[row])


def test_steps_are_compared_in_turns(monkeypatch):
    shapes = [{"identities": 3000, "size": 16}, {"identities": 4000, "size": 8, "rows": 5}]
    monkeypatch.setattr(training, "STEP", {training.DEVICE.type: shapes})
    monkeypatch.setattr(training, "STEP_TURNS", 3)
    calls = []

    def run(what, optimizer, **shape):
        assert what == "step_run" and shape in shapes
        calls.append(optimizer)
        return {"seconds": [1.0, 9.0, 2.0], "peak_bytes": 3 * 10**9 + (optimizer != "FusedSGD") * 10**9}

    monkeypatch.setattr(training, "alone", run)
    rows = list(training.steps())
    fused, other = "FusedSGD", "torch.optim.SGD(fused=True)"
    assert calls[:6] == [fused, other, other, fused, fused, other] and len(calls) == 4 * 6
    assert all(taken == [2.0] * 3 for row in rows for taken in row["seconds"].values())
    names = ["torch.optim.SGD(fused=True)", "torch.optim.SGD"]
    assert [row["optimizer"] for row in rows] == 2 * names
    assert [{key: row[key] for key in shape} for row, shape in zip(rows[1:3], shapes, strict=True)] == shapes
    for row in rows:
        assert set(row["seconds"]) == {"FusedSGD", row["optimizer"]}
        row["seconds"] = {"FusedSGD": [1.0, 2.0, 3.0], row["optimizer"]: [2.0, 2.0, 9.0]}
    rows[3]["seconds"] = {name: [second / 100 for second in taken] for name, taken in rows[3]["seconds"].items()}
    text = printed(step=rows)
    first, second = text.split("\n| N = 5, 4,000 x 8 | step, s |")
    assert "\n| 3,000 x 16 | step, s |" in first and "| torch.optim.SGD | 2.00 | 2.00 | 2.00 x | 4.0 | 3.0 | 75% |" in first
    assert "| torch.optim.SGD | 0.0200 | 0.0200 | 2.00 x | 4.0 | 3.0 | 75% |" in second


@pytest.mark.slow
def test_a_turn_of_steps():
    found = training.alone("step_run", optimizer="torch.optim.SGD", identities=3000, size=16, rows=5)
    assert len(found["seconds"]) == training.TURN_STEPS and min(found["seconds"]) > 0 and 1e8 < found["peak_bytes"] < 4e9


def test_steps_that_fail_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(training, "alone", lambda *given, **options: {"error": "exit status 9"})
    assert not [*training.steps()]
    assert "torch.optim.SGD, 1,000,000 x 512: exit status 9" in capsys.readouterr().err


@pytest.mark.slow
def test_growth(monkeypatch):
    monkeypatch.setattr(training, "GROWTH", (3000, 5000))
    monkeypatch.setattr(training, "TURNS", 1)
    found = {"identities": list(training.growth())}
    assert [row["identities"] for row in found["identities"]] == [3000, 5000]
    assert all(min(row["seconds"]) > 0 for row in found["identities"])
    found["ranks"] = [{"ranks": 1, "seconds": [2.0]}, {"ranks": 2, "seconds": [1.0]}, {"ranks": 4, "error": "exit 1"}]
    text = printed(**found)
    assert "| 3,000 |" in text and "| 2 | 1.00 | 0.50 |" in text and "| 4 | exit 1 | |" in text


def test_wrong_part(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training", "everything"])
    with pytest.raises(SystemExit) as raised:
        training.main()
    assert raised.value.code == 2 and "no such part: everything" in capsys.readouterr().err
