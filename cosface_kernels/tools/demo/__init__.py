"""`cosface demo`: the paper's toy experiment, then training steps over one million identities. Needs the extras [demo]."""

import json
import os
import sys

import torch

from . import million, toy


def run(out):
    """Run both parts, write their figures and summary.json into the directory `out`, print one summary table.

    Raises:
        MemoryError: too little is free for the class table, said before any work.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    million.require_memory(device)
    toy_results = toy.run(out, device)
    million_result = million.run(out, device)
    _write_json(out / "summary.json", {"toy": [result._asdict() for result in toy_results], "million": million_result._asdict()})
    sys.stderr.flush()  # the progress bars come before the table
    print(_table(toy_results, million_result, out))


def _table(toy_results, million_result, out):
    return "\n".join(["", *toy.table(toy_results), "", *million.table(million_result), "", f"Figures and summary.json: {out}"])


def _write_json(path, content):
    """Write a file beside its place, then rename it, so that a failure leaves no half a file."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
