"""environment.json: what a run ran on, for whoever reads its numbers later."""

import platform
import sys
import time

import torch

from ..tools.info import cpu_model
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
