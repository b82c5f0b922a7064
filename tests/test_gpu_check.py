"""A visit to a GPU, rehearsed where there is none: processes, limits and the record; then the stages' work at tiny sizes."""

import contextlib
import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import harness, measure, peers, predictions, source, tables
from benchmarks.ends import LostDevice, Skip
from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import commands, forms, report, runner, stages, watch
from cosface_kernels import margins
from cosface_kernels.ops import slabs

CPU = torch.device("cpu")
NAMES = [stage.name for stage in stages.PLAN]


@pytest.fixture
def log(tmp_path):
    with (tmp_path / "log.txt").open("w") as file:
        yield file


def entry(status, **facts):
    return {"status": status, "line": "", "rows": [], "commit": "c", **facts}


def record(out):
    return json.loads((out / "gpu_check.json").read_text())


def test_the_runner_imports_no_torch():
    """It goes on where torch hangs on a lost GPU, and starts a process for each stage."""
    code = "import sys, benchmarks.gpu_check.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=source.ROOT, check=True)


def test_dry_run(capsys, tmp_path):
    """Every stage's process, with nothing of its work; predictions beside what would be measured."""
    assert command.main(["--dry-run", "--out", str(tmp_path)]) == 0
    found = record(tmp_path)
    assert found["complete"] and list(found["stages"]) == NAMES
    for stage in stages.PLAN:
        kept = found["stages"][stage.name]
        assert kept["status"] == "done" and len(kept["rows"]) == len(list(stage.cases()))
        assert kept["conditions"]["sm_mhz"] == [1700, 1720, 1740] and kept["conditions"]["throttled"] == ["power"]
    for row in found["stages"]["exponentials"]["rows"]:
        fastest, slowest = row["predicted"]
        assert fastest <= row["seconds"][0] <= slowest
    assert tables.main([str(tmp_path / "gpu_check.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| fastest |") == 2 and printed.count("| slab | 4096 | 512 | C 1000000, budget none, slab ") == 2
    assert "| WRONG |" not in printed and printed.count("| as predicted |") > 100
    assert json.loads((tmp_path / "forms.json").read_text())["compared"]
    assert len(list(tmp_path.iterdir())) <= 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_too_old_or_too_small_is_a_line(monkeypatch):
    from benchmarks.gpu_check import gpu, large, rivals, steps

    case = {"kind": "step", "rows": 4, "classes": 100, "size": 8, "budget": "all"}
    monkeypatch.setattr(gpu, "shortage", lambda needed, device: "does not fit" if needed > 100 * 8 * 4 else None)
    assert list(steps.steps([case], CPU)) == [{**case, "line": "does not fit"}]
    monkeypatch.setattr(measure, "shortage", lambda needed, device: "does not fit")
    peer = {"kind": "peer", "peer": "plain PyTorch", "shape": [4, 100, 8]}
    assert list(rivals.rival([peer], CPU)) == [{**peer, "line": "does not fit"}]
    fitting = large._fitting({"classes": 400}, "classes", lambda case: case["classes"] * 30, CPU)
    assert fitting == {"classes": 100, "line": "400 classes: does not fit"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "why_unusable", lambda *_: "it needs a GPU of compute capability 8.0 or later, this has 7.5")
    with pytest.raises(Skip, match="cannot run here: it needs a GPU of compute capability 8"):
        next(steps.steps([case]))


def test_every_stage_has_its_work():
    for stage in (stages.PROBE, *stages.PLAN):
        assert callable(getattr(importlib.import_module(f"benchmarks.gpu_check.{stage.module}"), stage.function)), stage.name
    assert len(set(NAMES)) == len(NAMES)


def test_slow_kernels_take_no_time_from_the_suite_and_our_own_figures():
    ends = dict(zip(NAMES, itertools.accumulate(stage.limit for stage in stages.PLAN), strict=True))
    ours = [name for name in NAMES if name.startswith("peer cosface_loss")][:2]
    assert max(ends[name] for name in ("gluon", "suite", "memcheck", *ours)) <= stages.SECONDS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.slow
def test_without_a_gpu(capfd, tmp_path):
    assert command.main(["--out", str(tmp_path), "--patience", "10"]) == 1
    assert "gpu_check: there is no GPU that this torch can use" in capfd.readouterr().err
    assert record(tmp_path)["stages"]["probe"]["status"] == "skipped" and not record(tmp_path)["complete"]


@pytest.mark.slow
def test_a_hang_ends_with_all_of_its_processes(monkeypatch, tmp_path, log):
    """Also one that ignores an interrupt, and its child that holds the log open."""
    monkeypatch.setattr(runner, "GRACE", 0.2)
    deaf = "import os, signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    child = deaf + "print(os.getpid(), flush=True); time.sleep(60)"
    parent = deaf + f"subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    assert runner._process([sys.executable, "-c", parent], stages.PROBE, log, 6.0) is None
    assert time.monotonic() - started < 50
    pid = int((tmp_path / "log.txt").read_text())
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or " Z " in state.read_text():
            return
        time.sleep(0.1)
    pytest.fail("the child still runs")


def test_a_lost_gpu_ends_the_kernels_but_not_the_record(monkeypatch, tmp_path):
    ran = []

    def run(stage, out, limit, dry_run=False):
        ran.append(stage.name)
        return entry("stopped" if stage.name in ("steps", stages.PROBE.name) else "done")

    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(runner, "PAUSE", 0.0)
    assert runner.check(stages.PLAN, tmp_path, seconds=540) == 1
    found = record(tmp_path)
    reached = NAMES[: NAMES.index("steps") + 1]
    assert ran == [*reached, stages.PROBE.name, stages.PROBE.name] and found["complete"] and (tmp_path / "forms.json").exists()
    left = {name: kept for name, kept in found["stages"].items() if name not in reached}
    assert len(left) == len(NAMES) - len(reached)
    assert all(kept["status"] == "not run" and "after steps" in kept["line"] for kept in left.values())


def test_a_failure_that_the_gpu_survives_ends_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "run", lambda stage, *_: entry("failed" if stage.name == "smoke" else "done"))
    assert runner.check(stages.PLAN, tmp_path, seconds=540) == 1
    assert [kept["status"] for kept in record(tmp_path)["stages"].values()].count("done") == len(NAMES) - 1


def test_a_slow_first_answer_ends_nothing(monkeypatch, tmp_path):
    """Nor does a failure that leaves no time to ask."""
    answers, pauses = iter(("stopped", "done")), []

    def run(stage, out, limit, dry_run=False):
        if stage is stages.PROBE:
            return entry(next(answers))
        return entry("failed" if stage.name == "smoke" else "done")

    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(runner.time, "sleep", pauses.append)
    assert runner.check(stages.PLAN, tmp_path, seconds=540) == 1
    assert [kept["status"] for kept in record(tmp_path)["stages"].values()].count("done") == len(NAMES) - 1
    assert pauses == [0.0, runner.PAUSE] and not [*answers]
    monkeypatch.setattr(runner, "LEAST", 1000.0)
    assert runner._answers(tmp_path, False, 1.0, time.monotonic() + 540)


def test_no_time_left(monkeypatch, tmp_path):
    limits = {}

    def run(stage, out, limit, dry_run=False):
        limits[stage.name] = limit
        return entry("done")

    monkeypatch.setattr(runner, "run", run)
    assert runner.check(stages.PLAN[:3], tmp_path, seconds=30) == 0
    assert limits["probe"] == 25 and limits["exponentials"] <= 30
    assert runner.check(stages.PLAN[:3], tmp_path, seconds=1) == 1
    assert record(tmp_path)["stages"]["probe"]["line"] == "no time was left for it"


def test_resume_does_again_what_was_not_finished(monkeypatch, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setattr(runner, "run", lambda stage, *_: entry("failed" if stage.name == "suite" else "done", commit="old"))
    runner.check(stages.PLAN, first, seconds=540)
    monkeypatch.setattr(runner, "run", lambda stage, *_: entry("done", commit="new"))
    assert runner.check(stages.PLAN, second, seconds=540, resume=first) == 0
    commits = {name: kept["commit"] for name, kept in record(second)["stages"].items()}
    assert commits.pop("suite") == "new" and set(commits.values()) == {"old"}


def test_cases_go_on_without_the_one_that_lost_the_gpu(monkeypatch, tmp_path):
    """In a new process, with what was measured kept."""
    (tmp_path / "rows.jsonl").write_text('{"kind": "smoke", "from": "an earlier stage"}\n')
    stage = next(stage for stage in stages.PLAN if stage.name == "smoke")
    calls = []

    def process(command, *_):
        calls.append(command)
        with monkeypatch.context() as patched:
            patched.setattr(importlib, "import_module", lambda *_: importlib)
            patched.setattr(importlib, stage.function, lambda cases: work(cases), raising=False)
            return runner.work(stage.name, tmp_path, int(command[command.index("--since") + 1]))

    def work(cases):
        for case in cases:
            if len(calls) == 1 and case is stages.SMOKE[2]:
                yield {**case, "error": "an illegal memory access"}
                raise LostDevice("an illegal memory access")
            yield {**case, "wrong": False}

    monkeypatch.setattr(runner, "_process", process)
    found = runner.run(stage, tmp_path, 60)
    assert len(calls) == 2 and len(found["rows"]) == len(stages.SMOKE)
    assert found["status"] == "failed" and [row for row in found["rows"] if "error" in row] == [found["rows"][2]]


def test_what_the_machine_lacks_is_a_line(monkeypatch, tmp_path):
    (tmp_path / "rows.jsonl").write_text("")

    def work(cases):
        yield {"line": "one is left out"}
        raise Skip("no ncu")

    monkeypatch.setattr(commands, "sanitizer", work)
    assert runner.work("memcheck", tmp_path) == runner.SKIPPED
    monkeypatch.setattr(runner, "_process", lambda *_: runner.work("memcheck", tmp_path))
    found = runner.run(next(stage for stage in stages.PLAN if stage.name == "memcheck"), tmp_path, 60)
    assert found["status"] == "skipped" and found["line"] == "one is left out; no ncu" and not found["rows"]


@pytest.mark.slow
def test_a_suite_that_is_stopped_leaves_what_it_found(monkeypatch, tmp_path):
    tests = tmp_path / "tests"
    tests.mkdir()
    mark = "import time, pytest\npytestmark = pytest.mark.gpu\n"
    (tests / "test_it.py").write_text(
        mark + "def test_wrong(): assert 0\ndef test_right(): pass\ndef test_long(): time.sleep(60)\n"
    )
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    monkeypatch.setattr(commands, "SUITE_SECONDS", 15)
    monkeypatch.setattr(commands.gpu, "device", lambda: CPU)
    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: name == "pytest" or None)  # no workers
    (row,) = commands.suite([{}], tmp_path)
    assert row["failure"] == 1 and row["passed"] and row["error"] == "pytest ended with 2, asked to after 15 s"
    assert [name for name, _ in row["failures"]] == ["tests.test_it::test_wrong"]


def test_races_are_looked_for_in_calls_that_are_there(monkeypatch, tmp_path):
    """The sanitizer is a script that writes down what it was asked for; the calls are those of the script that it is given."""
    tool, asked = tmp_path / "tool", []
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho "========= RACECHECK SUMMARY: 1 hazard"\nexit 9\n')
    tool.chmod(0o755)
    monkeypatch.setattr(commands, "_tool", lambda name: str(tool))
    monkeypatch.setattr(commands.gpu, "device", lambda: CPU)
    (row,) = commands.sanitizer(next(stage for stage in stages.PLAN if stage.name == "racecheck").cases())
    assert row["error"] == "exit status 9" and row["lines"] == ["========= RACECHECK SUMMARY: 1 hazard"]
    options, calls = (tmp_path / "asked").read_text().split("benchmarks.gpu_check.smoke")
    assert "--tool racecheck" in options and "--kernel-name kns=exponential --kernel-name kns=attend" in options
    smoke = importlib.import_module("benchmarks.gpu_check.smoke")
    monkeypatch.setattr(smoke, "smoke", lambda cases: asked.extend(cases) or [{"wrong": False}])
    assert smoke.main(calls.split()) == 0
    assert {case["size"] for case in asked} == {512} and any("forms" in case for case in asked) and len(asked) == 4


def test_rows_of_a_killed_stage(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1, "seconds": []}\n{"a": 2, "seconds": []}\n{"a": 1, "seconds": [3.0]}\n{"a": 3, "sec')
    assert runner._rows(path, 0) == [{"a": 1, "seconds": [3.0]}, {"a": 2, "seconds": []}]


def test_conditions():
    lines = [["1980", "2619", "[N/A]", "700.0", "45", "0x1"], ["1600", "2619", "[N/A]", "700.0", "70", "0x24"]]
    found = watch.summary(lines)
    assert found["sm_mhz"] == [1600, 1790, 1980] and found["power_w"] is None and found["throttled"] == ["power", "heat"]


def test_forms_are_those_that_were_right_and_faster():
    def row(n, form, seconds, **facts):
        return {"kind": "step", "rows": n, "size": 512, "forms": form, "seconds": [seconds], **facts}

    rows = [
        *(row(n, {}, 1.0) for n in (512, 2048)),
        row(512, {"attend_table": {}}, 0.99),  # within the noise
        row(2048, {"attend_table": {}}, 0.9),
        row(2048, {"attend_table": {"DESCRIPTORS": True}}, 0.8),
        row(2048, {"attend_table": {"DESCRIPTORS": False}}, 0.1, wrong=True),
        row(2048, {"attend_features": {}}, 0.1, error="boom"),
    ]
    tiles = {"kind": "exponentials", "rows": 512, "size": 128, "store": True, "warps": 8}
    rows.append({**tiles, "tile": "128x128x64", "stages": 3, "seconds": [2.0], "own": True})
    rows.append({**tiles, "tile": "128x256x64", "stages": 4, "seconds": [1.0]})
    stage = {"probe": entry("done", rows=[{"capability": [9, 0]}]), "forms": entry("done", rows=rows)}
    found = forms.table({"stages": stage, "dry_run": False})["rows"]
    facts = {"chip": [9, 0], "dtype": "bfloat16"}
    blocks = {"BLOCK_N": 128, "BLOCK_C": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
    attend = {"kernel": "attend_table", "num_rows": [1025, None], "size": [257, 512], "options": {"DESCRIPTORS": True}}
    exponentials = {"kernel": "exponentials", "num_rows": [1, None], "size": [65, 128], "options": blocks}
    assert found == [{**exponentials, **facts}, {**attend, **facts}]


def test_slabs_are_compared_for_each_shape_and_budget():
    def row(slab, seconds, **facts):
        case = {"kind": "step", "rows": 512, "classes": 9, "size": 64, "budget": "all", "slab": slab, "graph": True}
        return {**case, "seconds": [seconds], **facts}

    rows = [row(0, 2.0), row(8448, 1.0), row(16896, 0.1, wrong=True), row(33792, 0.1, graph=False), row(8448, 0.1, budget="none")]
    found = {"stages": {"steps": entry("done", rows=rows), "forms": entry("done", rows=[row(0, 0.1, forms={})])}}
    (slab,) = forms.slabs(found)
    assert slab["options"] == {"C": 9, "budget": "all", "slab": 8448} and slab["faster_by"] == 0.5
    printed = "\n".join(report.decisions({**found, "dry_run": True}))
    assert "| slab | 512 | 64 | C 9, budget all, slab 8448 | 1e+03 | 2e+03 | 50.0 |" in printed


def test_results_of_the_suite(tmp_path):
    (tmp_path / "suite.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="b"/>'
        '<testcase classname="a" name="c"><failure message="no"/></testcase>'
        '<testcase classname="a" name="d"><skipped/></testcase></testsuite></testsuites>'
    )
    assert commands.results(tmp_path / "suite.xml") == {"passed": 1, "failure": 1, "skipped": 1, "failures": [["a::c", "no"]]}


def test_cases_take_turns():
    order = []

    def case(name, **options):
        return harness.Case({"name": name}, lambda index: order.append((name, index)), **options)

    def broken(index):
        raise RuntimeError("out of registers\nand more")

    cases = [case("a", calls=2), harness.Case({"name": "b"}, broken), case("c", seconds_most=-1.0)]
    rows = {row["name"]: dict(row) for row in harness.measure(cases, CPU, turns=2)}
    assert order == [("a", 0), ("c", 0), ("a", 0), ("a", 1), ("a", 0), ("a", 1)]
    assert len(rows["a"]["seconds"]) == 2 and not rows["c"]["seconds"]
    assert rows["b"]["error"] == "RuntimeError: out of registers"


def test_a_lost_device_ends_the_cases_after_its_row(monkeypatch):
    def lose(index):
        monkeypatch.setattr(harness, "synchronize", lambda device: torch.zeros(2) + torch.zeros(3))  # a RuntimeError
        raise RuntimeError("an illegal memory access")

    rows = harness.measure([harness.Case({"name": "a"}, lose), harness.Case({"name": "b"}, print)], CPU)
    assert next(rows) == {"name": "a", "seconds": [], "error": "RuntimeError: an illegal memory access"}
    with pytest.raises(LostDevice, match="an illegal memory access"):
        next(rows)


def test_a_wrong_case_says_so():
    (row,) = harness.measure([harness.Case({}, print, lambda: {"errors": [1.0], "wrong": True})], CPU, turns=0)
    assert row["wrong"] and row["errors"] == [1.0]


def test_the_documents_have_the_predictions():
    assert "\n".join(predictions.tables()) in Path(source.ROOT, "docs", "gpu.md").read_text()


def test_predictions_by_hand():
    """One wave of lone tiles: product bound by L2, then the epilogue. E ŵ at N = 4096 in two parts, each K = 4224."""
    clocks = 2 * 512 * (128 + 256) / 36 + 2600
    tile = {"kind": "exponentials", "rows": 128, "classes": 256 * 132, "size": 512, "tile": "128x256x64", "store": True}
    assert predictions.seconds(tile)[1] == pytest.approx(clocks / 1.6e9)
    product = {"kind": "product", "rows": 4096, "classes": 8448, "size": 512, "parts": 2}
    assert predictions.seconds(product)[0] == pytest.approx(2 * 4096 * 8448 * 512 / 646e12 * 132 / 128)
    assert predictions.seconds({"kind": "smoke"}) is None and predictions.seconds({**tile, "tile": "64x64x64"}) is None
    step = {"kind": "step", "rows": 4096, "classes": 1_000_000, "size": 512, "slab": 0}
    none, auto, every = (predictions.seconds({**step, "budget": budget}) for budget in ("none", "auto", "all"))
    assert all(less < between < most for less, between, most in zip(every, auto, none, strict=True))


def test_predictions_know_the_slabs_and_parts_of_the_package():
    triton_backend = pytest.importorskip("cosface_kernels.ops.backends.triton_backend")
    for (device, memory), n, d in itertools.product(predictions.MEMORY.items(), (512, 1024, 4096), (128, 256, 512)):
        rows = slabs._rows_on_gpu(n, d, 1, torch.bfloat16, slabs.Chip(predictions.PROCESSORS, memory))
        assert predictions.slab_rows(n, d, device) == rows
    for n in (1, 512, 1024, 4096, 16384):
        assert predictions.pull_parts(n, 512) == triton_backend.pull_parts(n, 512, 2**14)


TILE = {"kind": "exponentials", "rows": 40, "classes": 128, "size": 64, "tile": "64x64x64", "warps": 4, "stages": 3}


class TestWork:
    """The stages' own work, where Triton's interpreter stands in for a GPU."""

    @pytest.fixture(autouse=True)
    def triton(self):
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("these kernels are compiled here")

    @pytest.mark.parametrize(
        "store, options", [(True, {}), (False, {}), (True, {"DESCRIPTORS": True, "HALVES": True}), (False, {"DESCRIPTORS": True})]
    )
    def test_exponentials(self, monkeypatch, store, options):
        from benchmarks.gpu_check import kernels

        case = {**TILE, "store": store, "options": options}
        *_, row = kernels.exponentials([case], CPU)
        assert not row["error"] and not row["wrong"] and len(row["seconds"]) == 2 and len(row["errors"]) == 1 + store
        assert {key: row[key] for key in case} == case
        launch = kernels._launch
        monkeypatch.setattr(kernels, "_launch", lambda problem, unit, e, options: launch(problem, -unit, e, options))
        *_, row = kernels.exponentials([case], CPU)
        assert row["wrong"]

    def test_an_option_that_no_kernel_has(self):
        from benchmarks.gpu_check import kernels

        (row,) = kernels.exponentials([{**TILE, "store": True, "options": {"NONE_HAS_IT": True}}], CPU)
        assert "1 cases left out" in row["line"]

    @pytest.mark.parametrize("parts", [0, 4])
    def test_parts(self, parts):
        from benchmarks.gpu_check import kernels

        case = {"kind": "product", "rows": 32, "classes": 64, "size": 64, "parts": parts}
        *_, row = kernels.parts([case, {"kind": "ceiling", "what": "product", "shape": [8, 8, 8]}], CPU)
        *_, row = kernels.parts([case], CPU)
        assert not row["error"] and not row["wrong"] and len(row["seconds"]) == 2

    def test_steps(self):
        from benchmarks.gpu_check import steps

        case = {"kind": "step", "rows": 3, "classes": 130, "size": 16, "budget": "all", "slab": 128, "graph": False}
        *_, row = steps.steps([case], CPU)
        assert not row["error"] and len(row["seconds"]) == 2

    @pytest.mark.parametrize("factor", [1.0, 1.01])
    def test_a_form_is_checked(self, monkeypatch, factor):
        from benchmarks.gpu_check import gpu, steps

        monkeypatch.setattr(gpu, "forms", lambda asked: contextlib.nullcontext())
        monkeypatch.setattr(steps, "cosface_loss", lambda *tensors, **_: factor * peers.plain(*tensors))
        case = {"kind": "step", "rows": 16, "classes": 100, "size": 16, "budget": "none", "forms": {"attend_table": {}}}
        *_, row = steps.steps([case], CPU)
        assert row["wrong"] == (factor > 1) and len(row["errors"]) == 3

    @pytest.mark.slow
    def test_smoke(self, monkeypatch):
        from benchmarks.gpu_check import smoke
        from cosface_kernels.ops.backends import triton_attend

        attended, attend = [], triton_attend.backward
        monkeypatch.setattr(triton_attend, "backward", lambda *given, **named: attended.append(attend(*given, **named)))
        cases = [
            {"rows": 9, "classes": 130, "size": 24, "precision": "bfloat16"},
            {"rows": 8, "classes": 128, "size": 16, "update": "int8"},
            {"rows": 8, "classes": 128, "size": 16, "update": "float8"},
            {"rows": 9, "classes": 130, "size": 24, "budget": "none", "slab": 128, "forms": stages.ATTEND},
        ]
        rows = list(smoke.smoke(cases, CPU))
        assert not any(row.get("error") or row["wrong"] for row in rows) and len(attended) == 1
        other = margins.CosFace(0.3)
        monkeypatch.setattr(smoke.margins, "CosFace", lambda margin: other)
        (row,) = smoke.smoke(cases[:1], CPU)
        assert row["wrong"]


@pytest.mark.slow
def test_a_prepared_cache(tmp_path):
    """Holds what runs and is launched, and names the Triton that made it."""
    pytest.importorskip("triton")
    (tmp_path / "of_another_source").mkdir()
    (tmp_path / "of_another_source" / "__grp__normalize_rows.json").write_text("{}")
    (tmp_path / "not_tritons").mkdir()
    few = "import itertools, sys; sys.path.insert(0, 'tests'); import aot; calls = aot.calls; from benchmarks import gpu_cache"
    few += "; from benchmarks.gpu_check import stages; stages.TILES = stages.TILES[:1]; stages.OPTIONS = []"
    few += "; stages.SMOKE = stages.SMOKE[:1]"
    few += "; aot.calls = lambda chip: itertools.islice(calls(chip), 1); steps = gpu_cache.whole_steps"
    few += "; gpu_cache.whole_steps = lambda: steps()[:2]; raise SystemExit(gpu_cache.main(sys.argv[1:]))"
    variables = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": source.search_path()}
    run = subprocess.run(
        [sys.executable, "-c", few, str(tmp_path)], cwd=source.ROOT, env=variables, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    facts = json.loads((tmp_path / "prepared.json").read_text())
    assert facts["kernels"] == len(list(tmp_path.rglob("*.cubin"))) > 5 and len(facts["triton_key"]) == 64
    assert not [path for path in tmp_path.rglob("*") if path.suffix in {".ttir", ".ptx", ".llir"}]
    assert (tmp_path / "not_tritons").exists() and not (tmp_path / "of_another_source").exists()
    assert f"{facts['kernels']} kernels for sm_90" in run.stdout
