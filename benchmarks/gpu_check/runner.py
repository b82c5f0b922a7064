"""Runs a plan of stages: a process group and a limit for each, the record written after each. Torch is never imported here.

The record, gpu_check.json: {"kind": "gpu_check", "stages": {name: entry}, "complete"}. An entry: {"status", "line", "rows",
"seconds", "commit", "conditions", "output"}; status is "done", "skipped" (this machine lacks something: the line says what),
"failed", "stopped" (at its limit) or "not run". A stage appends its rows to rows.jsonl as it makes them, so that a stage that is
killed keeps those it had; of rows of the same case the last counts.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time

from .. import predictions
from ..ends import LostDevice, Skip
from ..record import say, write_json
from ..source import ROOT, commit, search_path
from . import forms, report, stages, watch

GRACE = 3.0  # seconds between an interrupt and a kill
REAP = 5.0  # for a killed process to go; one that is stuck in the driver is left behind
LEAST = 5.0  # seconds without which a stage is not begun
PAUSE = 3.0  # seconds before a GPU that did not answer is asked again
# Exit statuses of a stage: the machine lacks something for it, and a case took the process's GPU with it.
SKIPPED, LOST = 3, 4
MEASURED = {"seconds", "predicted", "errors", "wrong", "error", "peak_bytes", "line"}


def check(plan, out, *, seconds, resume=None, dry_run=False, patience=1.0):
    """Run the stages of a plan. Returns the exit status: 0 if all of them succeeded or were skipped."""
    deadline = time.monotonic() + seconds
    earlier = json.loads((resume / "gpu_check.json").read_text())["stages"] if resume else {}
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.jsonl").write_text("")
    record = {"kind": "gpu_check", "dry_run": dry_run, "stages": {}, "complete": False}
    lost = None
    for stage in plan:
        if earlier.get(stage.name, {}).get("status") == "done":
            entry = earlier[stage.name]
        elif lost:
            entry = {"status": "not run", "line": lost, "rows": []}
        elif (left := deadline - time.monotonic()) < LEAST:
            entry = {"status": "not run", "line": "no time was left for it", "rows": []}
        else:
            limit = min(stage.limit * patience, left)
            say(f"{stage.name}, at most {limit:.0f} s")
            entry = run(stage, out, limit, dry_run)
            if entry["status"] in ("failed", "stopped") and not stage.vital and not _answers(out, dry_run, patience, deadline):
                lost = f"the GPU no longer answered after {stage.name}"
        say(f"{stage.name}: {entry['status']}{': ' * bool(entry['line'])}{entry['line']}")
        record["stages"][stage.name] = entry
        write_json(out / "gpu_check.json", record)
        if stage.vital and entry["status"] != "done":
            print(f"gpu_check: {entry['line']}", file=sys.stderr)
            return 1
    record["complete"] = True
    write_json(out / "gpu_check.json", record)
    write_json(out / "forms.json", forms.table(record))
    print("\n".join(report.decisions(record)))
    print(f"gpu_check: {out / 'gpu_check.json'}")
    return int(any(entry["status"] not in ("done", "skipped") for entry in record["stages"].values()))


def _answers(out, dry_run, patience, deadline):
    """True if the GPU still answers a new process, or a second one: the first may be slow for reasons of the machine's, and who
    is not heard loses all that follows. True as well where no time is left to ask.
    """
    for pause in (0.0, PAUSE):
        time.sleep(pause)
        if (left := deadline - time.monotonic()) < LEAST:
            return True
        if run(stages.PROBE, out, min(stages.PROBE.limit * patience, left), dry_run)["status"] == "done":
            return True
    return False


def run(stage, out, limit, dry_run=False):
    """Run one stage and return its entry. After a case that lost the process's GPU, the others go on in a new process."""
    rows, log = out / "rows.jsonl", out / "log.txt"
    first_row, first_character = rows.stat().st_size, log.stat().st_size if log.exists() else 0
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--stage", stage.name, "--out", str(out)]
    command += ["--since", str(first_row)] + ["--dry-run"] * dry_run
    with watch.Watch(dry_run) as watched, log.open("a") as output:
        while (status := _process(command, stage, output, started + limit - time.monotonic())) == LOST:
            pass  # each time a row more, so it ends
    entry = {
        "status": {None: "stopped", 0: "done", SKIPPED: "skipped"}.get(status, "failed"),
        "line": f"stopped after {limit:.0f} s" if status is None else f"exit status {status}" * (status not in (0, SKIPPED)),
        "rows": _rows(rows, first_row),
        "seconds": round(time.monotonic() - started, 1),
        "commit": commit(),
        "conditions": watched.summary(),
    }
    if entry["status"] == "done" and any(row.get("wrong") or row.get("error") for row in entry["rows"]):
        entry.update(status="failed", line="a row is wrong or has an error")
    for row in [row for row in entry["rows"] if set(row) == {"line"}]:
        entry["line"] = "; ".join(filter(None, (entry["line"], row["line"])))
        entry["rows"].remove(row)
    if entry["status"] in ("failed", "stopped"):
        with log.open("rb") as file:
            file.seek(first_character)
            entry["output"] = file.read().decode(errors="replace")[-4000:]
    return entry


def _process(command, stage, output, limit):
    """The exit status of a process group, or None past the limit."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **stage.environment, "PYTHONPATH": search_path()},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return _wait(process, limit)


def _wait(process, limit):
    """The exit status, or None past the limit. No wait is without end, and no process of the group stays."""
    status = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(limit)
        if status is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(REAP)
    return status


def _rows(path, start):
    """The rows written from byte `start` on, the last of each case. A killed stage's last line may be half a line."""
    found = {}
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                found[json.dumps({key: value for key, value in row.items() if key not in MEASURED or set(row) == {"line"}})] = row
    return list(found.values())


def work(name, out, since=0, dry_run=False):
    """Run one stage in this process: write rows for the cases without one from byte `since` on. Returns the exit status."""
    stage = next(stage for stage in (stages.PROBE, *stages.PLAN) if stage.name == name)
    function = _pretend if dry_run else getattr(importlib.import_module(f".{stage.module}", __package__), stage.function)
    device = None if dry_run else _device()
    had = [row for row in _rows(out / "rows.jsonl", since) if row.get("error") or row.get("seconds") != []]
    cases = [case for case in stage.cases() if not case or not any(case.items() <= row.items() for row in had)]
    with (out / "rows.jsonl").open("a", buffering=1) as file:
        try:
            for row in function(cases, *([out] if stage.files and not dry_run else [])):
                predicted = predictions.seconds(row, device)
                file.write(json.dumps({**row, "predicted": predicted} if predicted else row) + "\n")
        except Skip as reason:
            file.write(json.dumps({"line": str(reason)}) + "\n")
            return SKIPPED
        except LostDevice as error:
            print(error, flush=True)
            return LOST
    return 0


def _device():
    """The GPU's name, or None."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _pretend(cases):
    """Rows as the stage's work would write them, with the predicted times."""
    for case in cases:
        predicted = predictions.seconds(case)
        yield {**case, "seconds": [sum(predicted) / 2] * 3 if predicted else []}
