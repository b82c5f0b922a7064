"""The timing loop of all benchmarks: cases take turns, each is checked first, and a failure is an error in its own row.

A row is a case's facts and {"seconds": [a call's, measured several times], "errors", "wrong", "peak_bytes", "error"}. On a GPU a
case's calls are captured as one CUDA graph, so that the host costs nothing, and timed by events over its replays; eager cases are
timed by the host's clock between two waits. Cases take turns, back and forth, so that drift of the clocks meets all of them.
"""

import contextlib
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from .ends import LostDevice

REPLAYS = 3  # of a graph in one turn


class Case(NamedTuple):
    facts: dict  # the facts that identify its row
    run: Callable  # run(i): the i-th call, with other inputs each time where they would stay in cache
    check: Callable | None = None  # check(): {"errors": [relative ones], "wrong": bool}, or other facts for its row
    calls: int = 1  # in one measurement
    graph: bool = True  # on a GPU
    seconds_most: float = 5.0  # no further turn for a case that has taken as long


def measure(cases, device, turns=3):
    """Yield each case's row whenever it has grown: a process that is killed loses one turn.

    Raises:
        LostDevice: a case took the GPU with it. Its row, with the error, comes before.
    """
    entries = [(case, {**case.facts, "seconds": [], "error": None}) for case in cases]
    for case, row in entries:
        yield from _guarded(row, device, lambda case=case, row=row: _first_call(case, row, device))
    for _, (case, row) in in_turns(entries, turns):
        if not row["error"] and sum(row["seconds"]) * case.calls < case.seconds_most:
            yield from _guarded(row, device, lambda case=case, row=row: row["seconds"].extend(_turn(case, device)))


def in_turns(cases, count):
    """(turn, case), back and forth, so that drift of the clocks meets all of them."""
    for turn in range(count):
        for case in reversed(cases) if turn % 2 else cases:
            yield turn, case


def _first_call(case, row, device):
    """Make a case's first call, untimed because it compiles, and check its result."""
    case.run(0)
    synchronize(device)
    if case.check:
        row.update(case.check())


def _turn(case, device):
    """Seconds of a call, a few times."""
    if not (case.graph and device.type == "cuda"):
        started = time.perf_counter()
        for index in range(case.calls):
            case.run(index)
        synchronize(device)
        return [(time.perf_counter() - started) / case.calls]

    def calls():
        for index in range(case.calls):
            case.run(index)

    graph = captured(calls)
    graph.replay()
    taken = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) * 1e-3 / case.calls)
    return taken


def captured(function):
    """function() captured as a CUDA graph, after one call on a side stream."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        function()
    return graph


def _guarded(row, device, function):
    with recorded(row):
        function()
    yield row
    if row["error"]:
        ensure(device, row["error"])


@contextlib.contextmanager
def recorded(row):
    """Context manager that writes a failure inside into the row's "error"."""
    try:
        yield
    except Exception as error:
        row["error"] = first_line(error)


def first_line(error):
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def ensure(device, message):
    """Check, after an error, that the device still takes work.

    Raises:
        LostDevice: it does not.
    """
    try:
        synchronize(device)
    except RuntimeError as error:
        raise LostDevice(message) from error


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def relative_error(got, exact):
    """‖got - exact‖ / ‖exact‖, by rows at a time: no second C x D matrix in float64."""
    if not got.dim():
        return float((got.double() - exact).abs() / exact.abs())
    pairs = zip(got.split(2**14), exact.split(2**14), strict=True)
    return float(sum((g.double() - e).square().sum() for g, e in pairs).sqrt() / exact.norm())
