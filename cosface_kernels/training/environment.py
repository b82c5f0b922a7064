"""environment.json: what a run ran on, for whoever reads its numbers later."""

import platform
import sys
import time
from pathlib import Path

import torch

from ..version import __version__


def describe(run):
    cuda = run.device.type == "cuda"
    return {
        "cosface_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else cpu_model(),
        "threads": torch.get_num_threads(),
        "processes": run.ranks.size,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": sys.argv[1:],
        "images": len(run.source),
        "identities": run.source.num_classes,
        "steps": run.total,
        "backbone_parameters": sum(each.numel() for each in run.model.backbone.parameters()),
        "table": list(run.model.head.weight.shape),
    }


def cpu_model():
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "unknown"
