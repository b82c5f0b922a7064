"""One peer of `cosface bench` in a process of its own: checked beside float64, then timed; in bfloat16 where nothing is said."""

import torch

from .. import bench, measure
from ..ends import Skip
from ..peers import peers
from . import gpu

REPEATS = 3
KEPT = ("flops", "seconds", "peak_bytes", "errors", "wrong", "another_loss")


def rival(cases, device=None):
    device = device or gpu.device()
    for case in cases:
        peer = next(peer for peer in peers(device, [case.get("precision", "bfloat16")]) if peer.name == case["peer"])
        if peer.missing:
            raise Skip(f"{peer.name}: {peer.missing}")
        if short := measure.shortage(peer.bytes_needed(*case["shape"]), device):
            yield {**case, "line": short}
            continue
        report = bench.blank(case["shape"], [peer])
        bench.run(report, [peer], device, REPEATS)
        (row,) = report["rows"]
        yield {**case, **{key: row[key] for key in KEPT}, "check_classes": report["check_classes"], "error": row["error"]}
        if device.type == "cuda":
            torch.cuda.empty_cache()
