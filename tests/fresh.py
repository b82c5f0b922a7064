"""A fresh interpreter for a script that must not see the imports of tests, without the seconds that importing torch takes."""

import contextlib
import io
import multiprocessing
import os
import traceback

# A server that has imported torch, and nothing of ours, forks a process for each script.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch"])


def run(script):
    """The words that the script prints."""
    ours, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=_run, args=(script, theirs), daemon=True)
    process.start()
    theirs.close()
    failed, printed = ours.recv() if ours.poll(120) else (True, "it took more than two minutes")
    process.kill()
    process.join()
    assert not failed, printed
    return printed.split()


def _run(script, pipe):
    os.environ.pop("TRITON_INTERPRET", None)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            exec(script, {"__name__": "script"})
    except BaseException:
        pipe.send((True, traceback.format_exc()))
    else:
        pipe.send((False, output.getvalue()))
