"""One step at N = 4096, D = 512 over a table of two slabs, for a profiler to look at."""

import functools

import torch

from cosface_kernels import cosface_loss

from ..peers import autocast, inputs, step
from . import gpu, stages

if __name__ == "__main__":
    tensors = inputs(4096, 2 * stages.WAVE, 512, gpu.device())
    with gpu.slabs(stages.WAVE):
        step(autocast(functools.partial(cosface_loss, backend="triton", memory_budget=0)), *tensors)
    torch.cuda.synchronize()
