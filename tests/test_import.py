"""Does importing the package touch nothing that the caller did not ask for, and export what it says?"""

import subprocess
import sys
from importlib import metadata

import pytest
from fresh import run

import cosface_kernels


def test_import_brings_no_triton_and_no_compiler():
    assert run("""
import sys, torch
before = set(sys.modules)
from cosface_kernels import CosFaceLoss, FusedSGD, cosface_loss, margins, reference, sample_classes, theory
new = {name.partition(".")[0] for name in set(sys.modules) - before}
new |= {name for name in set(sys.modules) - before if name.startswith(("torch._dynamo", "torch._inductor"))}
print(*sorted(name for name in new - set(sys.stdlib_module_names) if name != "torch"))
""") == ["cosface_kernels"]


def test_import_brings_no_checkpoints():
    """Half a second on top of torch's own."""
    assert not run("""
import sys, torch
from cosface_kernels import CosFaceLoss, FusedSGD
print(*(name for name in sys.modules if name.startswith("torch.distributed.checkpoint")))
""")


ANSWERED_WITHOUT_TORCH = {
    (): (2, "usage: cosface"),
    ("--help",): (0, "usage: cosface"),
    ("foo",): (2, "invalid choice: 'foo'"),
    ("train", "epoch=1"): (2, "usage: cosface train"),
    ("plan", "--help"): (0, "--identities"),
    ("bench", "--rows", "0"): (2, "'0' is not a whole number from 1 on"),
    ("demo", "--out", "/dev/null/out"): (1, "cannot write to --out /dev/null/out: Not a directory"),
    ("convert", "in.pt"): (2, "required: OUT"),
    ("convert", "/nowhere.pt", "out.pt", "--from", "pml"): (1, "cannot read /nowhere.pt: No such file"),
}


@pytest.mark.parametrize("arguments", ANSWERED_WITHOUT_TORCH)
def test_the_command_answers_without_torch(arguments):
    pytest.importorskip("matplotlib")  # the extras that demo asks for first
    status, text = ANSWERED_WITHOUT_TORCH[arguments]
    command = [sys.executable, "-X", "importtime", "-m", "cosface_kernels", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert process.returncode == status and text in process.stdout + process.stderr
    assert "| cosface_kernels\n" in process.stderr and "torch\n" not in process.stderr


def test_import_registers_the_operators():
    """For torch.export.load, in a script that names nothing of the package."""
    assert run("import cosface_kernels, torch; print(torch.ops.cosface_kernels.negative_lse.default.name())") == [
        "cosface_kernels::negative_lse"
    ]


def test_import_touches_no_gpu():
    # Recorded, because a machine without a GPU would hide a question about it.
    assert run("""
import torch
def record(name):
    function = getattr(torch.cuda, name)
    def asked(*arguments):
        print(name)
        return function(*arguments)
    setattr(torch.cuda, name, asked)
for name in ("_lazy_init", "is_available", "device_count", "current_device", "get_device_properties"):
    record(name)
import cosface_kernels
from cosface_kernels import CosFaceLoss, FusedSGD, cosface_loss, margins, reference, sample_classes, theory
print(torch.cuda.is_initialized())
""") == ["False"]


@pytest.mark.slow
def test_a_machine_without_triton():
    """As on macOS: everything but the triton backend works."""
    assert run("""
import sys
sys.modules["triton"] = None
import torch
from cosface_kernels import CosFaceLoss
head = CosFaceLoss(3, 5)
head(torch.ones(2, 3), torch.tensor([0, 1])).backward()
print(head.weight.grad.isfinite().all().item())
""") == ["True"]


def test_a_missing_library_is_said_once():
    """And not where its backend was not wanted."""
    assert run("""
import os, torch, warnings
os.environ["COSFACE_CPU_LIBRARY"] = "/nowhere/libcosface_cpu.so"
from cosface_kernels import cosface_loss
inputs = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for backend in ("torch", "auto", "auto"):
        cosface_loss(*inputs, backend=backend)
        print(sum("native CPU kernels are missing" in str(each.message) for each in caught))
""") == ["0", "1", "1"]


def test_exports():
    functions = {"cosface_loss", "cosine_lse", "margin_softmax_loss", "sample_classes"}
    heads = {"CosFaceLoss", "MarginSoftmaxLoss", "ShardedCosFaceLoss", "ShardedMarginSoftmaxLoss"}
    checkpoints = {"save_checkpoint", "load_checkpoint", "latest_checkpoint", "CorruptCheckpointError"}
    others = {"Statistics", "FusedSGD", "FusedAdamW", "margins", "reference", "theory", "__version__"}
    assert set(cosface_kernels.__all__) == functions | heads | checkpoints | others
    assert all(hasattr(cosface_kernels, name) for name in cosface_kernels.__all__)


def test_version():
    assert isinstance(cosface_kernels.__version__, str)
    assert cosface_kernels.__version__ == metadata.version("cosface-kernels")


def test_the_command_is_where_the_metadata_says():
    (command,) = metadata.entry_points(group="console_scripts", name="cosface")
    assert callable(command.load())
