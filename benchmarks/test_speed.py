"""pytest-benchmark suite of one forward and backward:  python -m pytest benchmarks --benchmark-group-by=param:shape"""

import pytest
import torch

from .measure import synchronize
from .peers import inputs, peers, step

SHAPES = [(128, 10_000, 512), (512, 100_000, 128)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("peer", peers(DEVICE), ids=lambda peer: peer.key)
def test_step(benchmark, peer, shape):
    if peer.missing:
        pytest.skip(peer.missing)
    tensors = inputs(*shape, DEVICE)

    def run():
        results = step(peer.function, *tensors)
        synchronize(DEVICE)
        return results

    loss, *gradients = benchmark(run)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
