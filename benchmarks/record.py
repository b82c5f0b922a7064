"""The record of a benchmark: JSON of one shape, written whenever it has grown, and a table of it.

    {"kind": the benchmark, "environment": measure.environment(), "rows": cases, "complete": bool, and facts of the benchmark}

Imports nothing that takes time.
"""

import argparse
import errno
import json
import os
import sys
import time
from pathlib import Path


def parser(description, **problem):
    """A parser with the sizes of a problem that have a default here, and --json."""
    from cosface_kernels.tools.cli import add_problem  # the package imports torch

    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_problem(found.add_argument, **problem)
    return found


def keep(record, path, work, table):
    """Run work(save), which fills the record and calls save() whenever it has grown; print table(record).

    Returns the exit status: 0, 1 where `path` cannot be written, 130 after Ctrl-C, with all that was measured so far.
    """

    def save():
        if path:
            write_json(path, record)

    try:
        save()
    except OSError as error:
        return fail(record["kind"], f"cannot write to {error.filename}: {error.strerror}")
    status = 0
    try:
        work(save)
        record["complete"] = True
    except KeyboardInterrupt:
        say("interrupted; what was measured so far:")
        status = 130
    print(table(record))
    save()
    return status


def write_json(path, content):
    """Write a file beside its place, then rename it, so that a failure leaves no half a file."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


_started = time.monotonic()


def say(message):
    print(f"[{time.monotonic() - _started:4.0f} s] {message}", file=sys.stderr, flush=True)


def fail(kind, message):
    print(f"{kind}: {message}", file=sys.stderr)
    return 1
