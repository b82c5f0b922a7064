"""`cosface demo`: the paper's toy experiment, then training steps over one million identities. Needs the extras [demo]."""

import json
import sys

import torch

from ...training.arrays import write_text
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
    summary = {"toy": [result._asdict() for result in toy_results], "million": million_result._asdict()}
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    sys.stderr.flush()  # the progress bars come before the table
    print(_table(toy_results, million_result, out))


def _table(toy_results, million_result, out):
    return "\n".join(["", *toy.table(toy_results), "", *million.table(million_result), "", f"Figures and summary.json: {out}"])
