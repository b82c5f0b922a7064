"""Does a call really hold no N x C matrix?"""

import subprocess
import sys
from pathlib import Path

import fresh
import pytest

MEASURE = """
import re
import torch
from cosface_kernels import cosface_loss

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def step(num_rows, num_classes, size, budget):
    features = torch.randn(num_rows, size, requires_grad=True)
    weight = torch.randn(num_classes, size, requires_grad=True)
    labels = torch.randint(num_classes, (num_rows,))
    weight.grad = torch.zeros_like(weight).add_(1)  # the gradient's own memory, touched before the peak is read
    features.grad = torch.ones_like(features)
    before = peak()
    weight.grad = features.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = cosface_loss(features, weight, labels, memory_budget=budget)
    loss.backward()
    return peak() - before

autocast, num_classes, size, budget = {}, {}, {}, {}
step(512, 1000, size, budget)
print(step(512, num_classes, size, budget))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM from /proc, which only Linux has")
@pytest.mark.parametrize(
    ("autocast", "num_classes", "size", "kept", "limit"),
    [pytest.param(False, 500_000, 128, 0, 0.04, marks=pytest.mark.slow), (True, 200_000, 64, 0.25, 0.05)],
)
def test_peak_is_few_percent_of_the_logits_beyond_what_is_kept(autocast, num_classes, size, kept, limit):
    """A few percent of one float32 matrix of logits: N = 512, forward and backward, in a fresh process warmed up at C = 1,000."""
    logits = 512 * num_classes * 4
    (taken,) = fresh.run(MEASURE.format(autocast, num_classes, size, int(kept * logits)))
    assert int(taken) < (kept + limit) * logits


TRAIN = """
import sys
import torch
from cosface_kernels import CosFaceLoss, FusedSGD
from cosface_kernels.tools.demo.million import peak_bytes

def step(head, optimizer, kept):
    head.memory_budget = kept
    for _ in range(int(sys.argv[1])):
        head(torch.randn(128, 64), torch.randint(len(head.weight), (128,))).backward()
    optimizer.step()

def new(identities):
    head = CosFaceLoss(64, identities, table_format=sys.argv[2])
    optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9, state_format=sys.argv[3])
    return head, optimizer

cpu = torch.device("cpu")
step(*new(5000), 0)
before = peak_bytes(cpu)
head, optimizer = new(500_000)
step(head, optimizer, 0)
step(head, optimizer, 0)
state = [buffer for buffer in optimizer.state[head.weight].values() if buffer.dim()]
print(peak_bytes(cpu) - before - sum(tensor.nbytes for tensor in (head.weight, *state)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM, which only Linux has")
@pytest.mark.parametrize(("batches", "formats"), [(1, ("float32", "float32")), (3, ("bfloat16", "int8"))])
def test_training_holds_no_gradient_of_the_table(batches, formats):
    """C=500k, D=64: a gradient would be 128 MB; slabs are of 16k rows in float32, 4 MB each of rows, gradient and state."""
    run = subprocess.run([sys.executable, "-c", TRAIN, str(batches), *formats], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) < 0.2 * 500_000 * 64 * 4
