"""Do the benchmarks measure what they say: every peer or its reason, a wrong one named, nothing lost on the way?

Sizes are tiny and the peers' processes of their own are left out, but for one; the peers themselves are the real ones.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import fresh
import pytest

pytest.importorskip("matplotlib")

import torch

from benchmarks import bench, fused_formats, harness, measure, overhead, peers, plot, source, tables
from cosface_kernels import CosFaceLoss
from cosface_kernels.ops import backends
from cosface_kernels.tools import cli

SIZES = ["--rows=64", "--classes=400", "--size=32", "--repeats=2", "--device=cpu"]
TINY_PRODUCT = {"cpu": (16, 16, 16)}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(measure, "PRODUCT", TINY_PRODUCT)
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 4096})
    monkeypatch.setattr(measure, "cpu_peak_bytes", lambda peer, shape: 3_000_000)
    monkeypatch.setattr(peers, "compiled_plain", peers.plain)  # compiling takes longer than all else here


@pytest.fixture
def others(monkeypatch):
    """A function that adds peers named and computed as its keywords say."""

    def add(**functions):
        real = peers.peers
        extra = [peers.Peer(name, "float32", function, 0, 0) for name, function in functions.items()]
        monkeypatch.setattr(bench, "peers", lambda *arguments: [*real(*arguments), *extra])

    return add


def rows_of(table):
    """{(name, products): the other cells}"""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {(cells[0], cells[1]): cells[2:] for cells in lines if not cells[0].startswith(("---", "products"))}


def test_every_peer_has_a_row_or_a_reason(capsys):
    assert cli.main(["bench", *SIZES]) == 0
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    for peer in peers.peers("cpu"):
        if peer.missing:
            assert (peer.name, peer.precision) not in rows
            assert peer.name in printed and peer.missing in printed
        else:
            milliseconds, *_, memory, loss, dx, dw = rows.pop((peer.name, peer.precision))
            assert " to " in milliseconds and memory == "3"
            assert loss == "another loss" or max(map(float, (loss, dx, dw))) < {"float32": 1e-4, "bfloat16": 0.1}[peer.precision]
    assert not rows


def test_the_op_is_there_with_every_backend_and_plan():
    found = {(peer.name, peer.precision, peer.flops) for peer in peers.peers("cpu")}
    for name in backends.NAMES:
        for precision in peers.PRECISIONS:
            assert {
                (f"cosface_loss, {name}", precision, 6.0),
                (f"cosface_loss, {name}, memory_budget=0", precision, 8.0),
            } <= found
    assert all(peer.missing for peer in peers.peers("cpu") if "triton" in peer.name)  # never its interpreter


def test_the_op_keeps_what_its_name_says():
    """E of all classes, in the precision of the products, or nothing."""
    features, weight, labels = peers.inputs(64, 400, 32)
    for peer in peers.peers("cpu"):
        if peer.name.startswith("cosface_loss, torch"):
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor, saved=saved: saved.append(tensor), lambda tensor: tensor
            ):
                peer.function(features, weight, labels)
            kept = [tensor.dtype for tensor in saved if tensor.numel() == 64 * 400]
            assert kept == ([] if "memory_budget=0" in peer.name else [getattr(torch, peer.precision)]), peer.key


def test_ours_come_first_and_what_compiles_last():
    found = peers.peers("cuda")
    assert found[0].key == "cosface_loss, torch, bfloat16" and "all of E kept" in found[1].name
    assert [peer.compiled for peer in found] == sorted(peer.compiled for peer in found)
    assert all(peer.precision == "bfloat16" for peer in found[: len(found) // 2 - 1])


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, y: peers.plain(x, w, y) * 1.001,
        lambda x, w, y: peers.plain(x, w, (y + 1) % len(w)),
        lambda x, w, y: peers.plain(x, w.detach(), y) + 0 * w.sum(),  # no gradient of the table
        lambda x, w, y: peers.plain(x, w, y) * torch.nan,
    ],
)
def test_a_wrong_peer_is_printed_as_such(capsys, others, function):
    others(bad=function, good=peers.plain)
    assert cli.main(["bench", *SIZES, "--peers=d", "--dtype=float32"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["bad", "float32"][-3].startswith("WRONG")
    assert not any("WRONG" in cell for (name, _), cells in rows.items() if name != "bad" for cell in cells)


def test_a_wrong_op_of_ours_is_printed_as_such(capsys, monkeypatch):
    monkeypatch.setattr(peers, "cosface_loss", lambda x, w, y, **_: 1.001 * peers.plain(x, w, y))
    assert cli.main(["bench", *SIZES, "--peers=cosface", "--dtype=float32"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows and all(cells[-3].startswith("WRONG") for cells in rows.values())


def test_a_crash_is_a_row_with_its_error(capsys, others):
    def crash(features, weight, labels):
        raise RuntimeError("out of registers\nand much more")

    others(crashing=crash)
    assert cli.main(["bench", *SIZES, "--peers=a", "--dtype=float32"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["crashing", "float32"][0] == "RuntimeError: out of registers"
    assert " to " in rows[peers.PLAIN, "float32"][0]


def test_a_lost_gpu_is_not_everybodys_error(capsys, monkeypatch, others):
    """After an illegal access nothing runs in that process: the others say so."""

    def lose(features, weight, labels):
        monkeypatch.setattr(harness, "synchronize", lambda device: torch.zeros(2) + torch.zeros(3))  # a RuntimeError
        raise RuntimeError("an illegal memory access was encountered")

    others(culprit=lose, victim=peers.plain)
    assert cli.main(["bench", *SIZES, "--dtype=float32", "--peers=i"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["culprit", "float32"][0] == "RuntimeError: an illegal memory access was encountered"
    assert rows["victim", "float32"][0] == "not run: the GPU was lost to culprit, float32"
    assert rows[peers.PLAIN, "float32"][0].endswith("(one step)")


def test_a_crash_in_a_process_of_its_own_spares_this_one(capsys, monkeypatch, others):
    def killed(peer, shape):
        if peer.name == "hungry":
            raise RuntimeError("its process was killed by signal 9")
        return 1

    others(hungry=lambda *tensors: pytest.fail("run after its process was killed"))
    monkeypatch.setattr(measure, "cpu_peak_bytes", killed)
    assert cli.main(["bench", *SIZES, "--peers=hungry"]) == 0
    assert "killed by signal 9" in rows_of(capsys.readouterr().out)["hungry", "float32"][0]


@pytest.mark.parametrize("shape", [["--classes=1000000000000"], ["--rows=1000000000000", "--classes=2"]])
def test_what_does_not_fit_is_said_before_allocating(capsys, monkeypatch, shape):
    monkeypatch.setattr(bench, "inputs", lambda *arguments: pytest.fail("allocated"))
    monkeypatch.setattr(measure, "cpu_peak_bytes", lambda *arguments: pytest.fail("allocated in a process of its own"))
    assert cli.main(["bench", *SIZES, *shape, "--dtype=float32"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows and all(cells[0].startswith("does not fit: needs about ") for cells in rows.values())


def test_what_fits_goes_on(capsys, monkeypatch):
    """Memory between what plain PyTorch needs and what the op does."""
    by_name = {peer.name: peer.bytes_needed(64, 400, 32) for peer in peers.peers("cpu", ["float32"])}
    ours, plain = by_name["cosface_loss, torch, memory_budget=0"], by_name[peers.PLAIN]
    monkeypatch.setattr(measure, "free_bytes", lambda device: (ours + plain) // 2)
    assert cli.main(["bench", *SIZES, "--dtype=float32"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows[peers.PLAIN, "float32"][0].startswith("does not fit")
    assert " to " in rows["cosface_loss, torch, memory_budget=0", "float32"][0]


def test_errors_at_fewer_classes_say_so(capsys, monkeypatch):
    monkeypatch.setattr(measure, "CHECK_LOGITS", 64 * 50)
    assert cli.main(["bench", *SIZES, "--peers=plain PyTorch", "--dtype=float32"]) == 0
    assert "in float64, at C = 50;" in capsys.readouterr().out


def test_a_size_whose_inputs_fail_is_recorded(monkeypatch):
    def fail(*arguments):
        raise MemoryError("the table")

    (peer,) = (peer for peer in peers.peers("cpu", ["float32"]) if peer.name == peers.PLAIN)
    report = bench.blank((64, 400, 32), [peer])
    monkeypatch.setattr(bench, "inputs", fail)
    bench.run(report, [peer], torch.device("cpu"), 1)
    assert report["complete"] and report["rows"][0]["error"] == "not measured: MemoryError: the table"


def test_a_slow_peer_has_one_turn(monkeypatch):
    calls = []

    def slow(features, weight, labels):
        calls.append(labels)
        return peers.plain(features, weight, labels)

    peer = peers.Peer("slow", "float32", slow, 0, 0)
    report = bench.blank((64, 400, 32), [peer])
    monkeypatch.setattr(bench, "SECONDS_PER_PEER", 0.0)
    bench.run(report, [peer], torch.device("cpu"), 5)
    assert len(calls) == len(report["rows"][0]["seconds"]) == 1  # that of the check
    report.update(environment={"device": "none", "torch": "0", "date": "today"}, ceilings={"float32": 1.0, "copy": 1.0})
    assert rows_of(tables.markdown(report))["slow", "float32"][0].endswith(" (one step)")


def test_peers_that_take_minutes_are_not_run(capsys, monkeypatch):
    """Plain PyTorch in bfloat16 takes 200 s here; results in bfloat16 are then judged with fewer classes."""
    probed = {"plain PyTorch, bfloat16": 200.0, "pytorch-metric-learning, bfloat16": 61.0}
    monkeypatch.setattr(bench, "PROBE_CLASSES", 90)
    monkeypatch.setattr(bench, "_probed", lambda name, *arguments: probed.get(name, 1.0))
    assert cli.main(["bench", *SIZES, "--peers=p"]) == 0
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    left_out = {key: cells[0] for key, cells in rows.items() if "not run" in cells[0]}
    assert left_out == {
        (peers.PLAIN, "bfloat16"): "not run: a step would take about 200 s",
        ("pytorch-metric-learning", "bfloat16"): "not run: a step would take about 61 s",
        (
            "torch.compile of plain PyTorch",
            "bfloat16",
        ): "not run: a step of plain PyTorch, which has the same products, would take about 200 s",
    }
    assert "at C = 20;" in printed and len(rows) > 6


def test_a_probe_is_of_the_whole_step(monkeypatch):
    """And its first call, which loads code, is not taken where it was slow."""
    took = iter([7.0, 0.5])
    monkeypatch.setattr(measure, "seconds", lambda *arguments: next(took))
    assert bench._probed("slow at first", None, peers.inputs(2, 8, 4), 100.0) == 50


def test_a_ceiling_is_the_best_of_the_run(monkeypatch):
    """The first turn's was taken on a busy machine. A processor without bfloat16 products makes them in float32."""
    measured = [{"float32": 3.0, "bfloat16": 1.0}, {"float32": 8.0, "bfloat16": 1.0}, {"float32": 5.0, "bfloat16": 1.0}]
    monkeypatch.setattr(measure, "product_rate", lambda device, name: measured[0][name])
    monkeypatch.setattr(measure, "copy_rate", lambda device: 2.0)
    known = bench.ceilings(torch.device("cpu"), ["bfloat16"])
    assert known == {"bfloat16": 3.0, "copy": 2.0}
    while measured:
        bench.raise_ceilings(known, torch.device("cpu"))
        measured.pop(0)
    assert known == {"bfloat16": 8.0, "copy": 2.0}


def test_json_round_trip(capsys, tmp_path):
    path = tmp_path / "new" / "results.json"
    assert cli.main(["bench", *SIZES, "--peers=plain", f"--json={path}"]) == 0
    printed = capsys.readouterr().out
    assert tables.main([str(path)]) == 0
    assert capsys.readouterr().out == printed
    report = json.loads(path.read_text())
    assert report["complete"] and report["shape"] == [64, 400, 32]
    assert all(len(row["seconds"]) == 2 for row in report["rows"])


@pytest.mark.parametrize("path", sorted((source.ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_kept_results_have_the_one_shape(path):
    record = json.loads(path.read_text())
    assert {"kind", "environment", "rows", "complete"} <= record.keys() and record["complete"]
    if record["kind"] == "formats":
        pytest.importorskip("sklearn")
    table = tables.text(record)
    assert record["environment"]["device"] in table and table.count("\n|") > len(record["rows"]) / 3


def test_interrupt_prints_what_was_measured(capsys, others, tmp_path):
    def interrupt(features, weight, labels):
        raise KeyboardInterrupt

    others(impatient=interrupt)
    assert cli.main(["bench", *SIZES, "--dtype=float32", f"--json={tmp_path / 'r.json'}"]) == 130
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert rows[peers.PLAIN, "float32"][0].endswith("(one step)") and rows["impatient", "float32"][0] == "not measured"
    assert "; interrupted" in printed
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["seconds"]


@pytest.mark.parametrize("stage", ["ceilings", "Check"])
def test_early_interrupt(capsys, monkeypatch, stage):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench if stage == "ceilings" else measure, stage, interrupt)
    assert cli.main(["bench", *SIZES]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_flops_and_bytes():
    """By hand: N = 1000, C = 10^6, D = 100, two seconds, plain PyTorch nine; the ceiling is 1 TFLOP/s."""
    chosen = peers.peers("cpu", ["float32"])
    peer, plain = next(peer for peer in chosen if peer.flops == 8.0), next(peer for peer in chosen if peer.name == peers.PLAIN)
    report = bench.blank((1000, 10**6, 100), [peer, plain])
    report["ceilings"] = {"float32": 1e12, "copy": 1e10}
    report["environment"] = {"device": "none", "torch": "0", "date": "today"}
    report["rows"][0].update(seconds=[4.0, 1.0, 2.0], name="x", missing=None)
    report["rows"][1]["seconds"] = [9.0]
    cells, plain_cells = rows_of(tables.markdown(report)).values()
    assert cells[:5] == ["2000 (1000 to 4000)", "4.50", "0.4", "40%", "0.4"]
    assert plain_cells[1] == "1.00"


@pytest.mark.parametrize("size", [96, 121])  # a last chunk that is full, and one that ends within a group of four
def test_inputs_have_three_hard_negatives(monkeypatch, size):
    monkeypatch.setattr(peers, "CHUNK", 32)
    features, weight, labels = (tensor.detach() for tensor in peers.inputs(64, size, 2000))
    cosines = features @ weight.T
    same_group = torch.arange(size) // 4 == labels[:, None] // 4
    assert (cosines[same_group] - 0.8).abs().max() < 0.1 and cosines[~same_group].abs().max() < 0.2
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(size), atol=0.05, rtol=0)


def test_margin_from_a_cross_entropy():
    """Assembled in float32 from ce alone, for rows from hopeless to converged."""
    ce = torch.tensor([80.0, 20.0, 1.4, 1e-2, 1e-6, 1e-12])
    exact = torch.log1p(torch.expm1(ce.double()) * torch.tensor(64 * 0.35).double().exp())
    for row, loss in zip(ce, exact, strict=True):
        torch.testing.assert_close(peers.with_margin(row[None]).double(), loss, rtol=1e-5, atol=0)


def test_peak_memory_waits_for_what_autograd_still_holds(monkeypatch):
    """Else the peak beyond it would come out too small, or below zero."""
    readings = iter([900, 300, 300, 300])
    monkeypatch.setattr(measure, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(readings))
    assert measure.settled_bytes(torch.device("cuda")) == 300 and next(readings) == 300


@pytest.mark.parametrize("variable, wanted", [("abc123", "abc123"), (None, None)])
def test_commit_where_the_repository_did_not_travel(monkeypatch, tmp_path, variable, wanted):
    monkeypatch.setattr(source, "ROOT", tmp_path)
    monkeypatch.delenv("COSFACE_COMMIT", raising=False)
    if variable:
        monkeypatch.setenv("COSFACE_COMMIT", variable)
    assert source.commit() == wanted


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the high water mark is reset in /proc, which only Linux has"
)
def test_peak_memory_in_a_process_of_its_own(monkeypatch):
    monkeypatch.undo()
    (peer,) = (peer for peer in peers.peers("cpu", ["float32"]) if peer.name == peers.PLAIN)
    peak = measure.cpu_peak_bytes(peer, (256, 20_000, 8))
    logits = 256 * 20_000 * 4
    assert 2 * logits < peak < 8 * logits
    with pytest.raises(RuntimeError, match="process of its own"):
        measure.cpu_peak_bytes(peer._replace(name="nobody"), (4, 4, 4))


def test_plot_over_classes(capsys, monkeypatch, tmp_path):
    """A line ends where its peer no longer fits, or would take too long."""
    sizes, every = (100, 200, 400), peers._peers
    monkeypatch.setattr(peers, "_peers", lambda *arguments: (peer for peer in every(*arguments) if peer.name == peers.PLAIN))
    (plain,) = peers.peers("cpu", ["float32"])
    monkeypatch.setattr(bench, "SWEEP", sizes)
    monkeypatch.setattr(measure, "free_bytes", lambda device: plain.bytes_needed(64, 300, 32))
    command = ["bench", *SIZES, "--dtype=float32", f"--plot={tmp_path / 'plots'}", f"--json={tmp_path / 'sweep.json'}"]
    assert cli.main(command) == 0
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"time.png", "memory.png"}
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    reports = sweep["rows"]
    assert sweep["kind"] == "sweep" and sweep["complete"] and {report["kind"] for report in reports} == {"bench"}
    assert [report["shape"][1] for report in reports] == list(sizes)
    assert ["does not fit" in (report["rows"][0]["error"] or "") for report in reports] == [False, False, True]
    assert capsys.readouterr().out.count("One forward and backward") == 3
    (line, cross, *_) = plot._figure(reports, "seconds", lambda row: row["seconds"] and min(row["seconds"])).axes[0].lines
    assert list(line.get_xdata()) == [100, 200] and list(cross.get_xdata()) == [200]


def test_a_step_that_would_take_too_long_is_not_run(monkeypatch):
    (peer,) = (peer for peer in peers.peers("cpu", ["float32"]) if peer.name == peers.PLAIN)
    first, second = bench.blank((16, 100, 8), [peer]), bench.blank((16, 400, 8), [peer])
    first["rows"][0]["seconds"] = [20.0, 25.0]
    bench.run(second, [peer], torch.device("cpu"), 1, expected=bench._seconds_at([first, second], second["shape"]))
    assert second["rows"][0]["error"] == "not run: a step would take about 80 s"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--peers=nobody"], 'no peer\'s name contains "nobody"'),
        (["--json=/proc/nowhere/r.json"], "cannot write to /proc/nowhere"),
        *([] if torch.cuda.is_available() else [(["--device=cuda"], "there is no GPU that this torch can use")]),
    ],
)
def test_what_cannot_be_done_is_one_line(capsys, options, message):
    assert cli.main(["bench", *SIZES, *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("option", ["--rows=0", "--classes=-5", "--size=x", "--dtype=float8"])
def test_wrong_usage(capsys, option):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", option])
    assert stop.value.code == 2 and option.split("=")[0] in capsys.readouterr().err


def test_without_a_source_checkout(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "benchmarks", None)
    assert cli.main(["bench"]) == 1
    error = capsys.readouterr().err
    assert "needs a source checkout" in error and error.count("\n") == 1


@pytest.mark.slow
def test_fused_formats(monkeypatch):
    """Every case makes a step, and keeps of E what it says."""
    kept = {}

    def budget_of(*sizes, memory_budget, **options):
        kept[case] = memory_budget
        return CosFaceLoss(*sizes, memory_budget=memory_budget, **options)

    monkeypatch.setattr(fused_formats, "CosFaceLoss", budget_of)
    for case in fused_formats.CASES:
        fused_formats.step_of(case, 4, 50, 8)()
    assert kept.pop("all-of-E") >= 4 * 50 * 4 and set(kept.values()) == {"auto"}
    rows = [{"case": "float32", "seconds": [1.0, 3.0]}, {"case": "float8", "seconds": [2.0, 3.0]}]
    record = {"environment": {"device": "d", "torch": "t", "date": "day"}, "shape": (4, 50, 8), "rows": rows}
    assert fused_formats.table(record).endswith("| float32 | 2.00 | 1.000 |\n| float8 | 2.50 | 1.500 |")


OVERHEAD = """
import sys
from benchmarks import overhead
overhead.CALLS, sys.argv[1:] = 5, ["--json", {path!r}]
overhead.main()
"""


@pytest.mark.slow
def test_overhead(tmp_path):
    pytest.importorskip("triton")
    printed = " ".join(fresh.run(OVERHEAD.format(path=str(tmp_path / "r.json"))))
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["name"] for row in rows] == list(overhead.PEERS)
    assert all(list(row["microseconds"]) == ["forward", "forward and backward"] for row in rows)
    assert all(f"| {row['name']} | {row['microseconds']['forward']:.1f} | " in printed for row in rows)


@pytest.mark.slow
def test_gpu_tests_need_only_torch_and_pytest():
    """They are all found where the optional packages are missing, but for the files that are about those."""
    hide = "import sys, pytest; sys.modules.update(dict.fromkeys(sys.argv[1].split())); sys.exit(pytest.main(sys.argv[2:]))"
    optional = "matplotlib pytorch_metric_learning sklearn tqdm"
    command = [sys.executable, "-c", hide, optional, "--collect-only", "-rs", "-p", "no:cacheprovider", "tests"]
    run = subprocess.run(command, cwd=source.ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-2000:]
    skipped = set(re.findall(r"SKIPPED.* tests/(\w+)\.py.*could not import", run.stdout))
    beside = {"test_benchmarks", "test_benchmark_training", "test_cli", "test_formats"}
    training = {"test_training", "test_training_processes", "test_training_report", "test_reproduce", "test_evaluation"}
    assert skipped == beside | training | {"test_templates", "test_compat_docs", "test_compat_pml", "test_digits"}
