"""pytest-benchmark suite of one forward and backward:  python -m pytest benchmarks --benchmark-group-by=param:shape"""

import pytest
import torch

from .peers import PEERS, inputs, step

SHAPES = [(128, 10_000, 512), (512, 100_000, 128)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("peer", PEERS)
def test_step(benchmark, peer, shape):
    tensors = inputs(*shape, DEVICE)

    def run():
        results = step(PEERS[peer], *tensors)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return results

    loss, *gradients = benchmark(run)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
