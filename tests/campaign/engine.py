"""Draws cases, runs each in a process that may die, and makes those that fail smaller."""

import json
import multiprocessing
import random
import time
import traceback
import warnings
from collections import Counter, defaultdict
from importlib import import_module

# How many cases of each kind in a round: by how many there are to think of, and how long one takes.
ROUND = {"losses": 8, "options": 6, "optimisers": 2, "identities": 3, "shards": 2, "saves": 2, "files": 3, "hostile": 6}
SECONDS = 600  # after which a case, on a machine that others use too, counts as hung
TRIALS = 30  # of making a failure smaller

_fork = multiprocessing.get_context("fork")  # this process runs nothing of torch's, so that its threads cannot be missed


def module_of(kind):
    return import_module(f"{__package__}.{kind}")


def draw(kind, seed, number):
    """The number-th case of a kind: {name: value}."""
    generator = random.Random(f"{seed}/{kind}/{number}")
    case = {name: generator.choice(values) for name, values in module_of(kind).SPACE.items()}
    if "turn" in case:  # all of them in some order, so that none is left out
        turns = module_of(kind).SPACE["turn"]
        case["turn"] = random.Random(f"{seed}/{kind}").sample(turns, len(turns))[number % len(turns)]
    return module_of(kind).settle(case)


class Runner:
    """Runs cases one after the other in a process, and in another one once that has died."""

    def __init__(self):
        self.process = None

    def __call__(self, kind, case):
        """None, or what went wrong in words."""
        if self.process is None:
            self.pipe, other = _fork.Pipe()
            self.process = _fork.Process(target=_serve, args=(other,))
            self.process.start()
            other.close()
        self.pipe.send((kind, case))
        try:
            if self.pipe.poll(SECONDS):
                return self.pipe.recv()
            failure = f"hung: no answer in {SECONDS} seconds"
        except EOFError:
            self.process.join()
            failure = f"died: exit code {self.process.exitcode}"
        self.close()
        return failure

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None


def _serve(pipe):
    warnings.simplefilter("ignore")
    while True:
        try:
            kind, case = pipe.recv()
        except EOFError:
            return
        try:
            module_of(kind).check(case)
            pipe.send(None)
        except Exception:
            pipe.send("wrong: " + traceback.format_exc())


def smaller(kind, case, failure, run):
    """A case as simple as can be that fails in the same way, and how."""
    module, trials, going = module_of(kind), 0, True
    while going:
        going = False
        for name, values in module.SPACE.items():
            for value in dict.fromkeys(values):
                if value == case[name] or trials == TRIALS:
                    break
                candidate = module.settle({**case, name: value})
                if candidate == case:
                    continue
                trials += 1
                found = run(kind, candidate)
                if found is not None and found[:4] == failure[:4]:
                    case, failure, going = candidate, found, True
                    break
    return case, failure


def script(kind, case, failure):
    """The script that repeats the case, from the root of the checkout."""
    reason = failure.strip().splitlines()[-1]
    return f"# {reason}\nfrom tests.campaign import {kind}\n\n{kind}.check({case!r})\n"


def campaign(seed, *, seconds=None, cases=None, kinds=tuple(ROUND), report=print):
    """Runs rounds until the time is over or as many cases were run; {what was tried, what failed}."""
    started, run = time.monotonic(), Runner()
    tried, values, failures = Counter(), defaultdict(Counter), []

    def is_over():
        return sum(tried.values()) >= cases if seconds is None else time.monotonic() - started > seconds

    try:
        for kind in _rounds(kinds):
            if is_over():
                break
            case = draw(kind, seed, tried[kind])
            tried[kind] += 1
            for name, value in case.items():
                if name != "seed":
                    values[f"{kind}.{name}"][str(value)] += 1
            failure = run(kind, case)
            if failure is not None:
                case, failure = smaller(kind, case, failure, run)
                failures.append({"kind": kind, "case": case, "failure": failure, "script": script(kind, case, failure)})
                report(failures[-1]["script"], flush=True)
    finally:
        run.close()
    took = time.monotonic() - started
    return {"seed": seed, "seconds": round(took, 1), "cases": dict(tried), "failures": failures, "values": values}


def _rounds(kinds):
    while True:
        for kind in kinds:
            yield from [kind] * ROUND[kind]


def write(result, path):
    path.write_text(json.dumps(result, indent=1, default=dict) + "\n")
