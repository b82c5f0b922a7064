"""Does anything depend on PyTorch's default dtype or device? Under each, the bits are those under float32 and CPU."""

import ast
import contextlib
from functools import partial
from pathlib import Path

import attending
import pytest
import torch
from margin_rows import ROWS, batch
from selection import interpreted, pairs, repeats_when, slow_when

import cosface_kernels
from cosface_kernels import CosFaceLoss, FusedAdamW, FusedSGD, MarginSoftmaxLoss, margin_softmax_loss
from cosface_kernels.margins import AdaFace
from cosface_kernels.ops import page_pool
from cosface_kernels.ops.backends import cpu_library
from cosface_kernels.optim import rules
from cosface_kernels.sampling import sample_classes

DEFAULTS = {
    "float64": lambda: _default_dtype(torch.float64),
    "float16": lambda: _default_dtype(torch.float16),
    "meta": lambda: torch.device("meta"),
}
# A margin of cosines, of raw features, of a raw table with a bias, and of several centres.
FORMS = ["CosFace", "CosFace raw", "Softmax bias", "ArcFace x3"]
every_default = pytest.mark.parametrize("default", DEFAULTS.values(), ids=DEFAULTS)

pytestmark = pytest.mark.usefixtures("small_slabs")


@contextlib.contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def assert_unmoved(default, run):
    """run() -> tensors, from inputs that it makes with a dtype and a device."""
    wanted = run()
    with default():
        got = run()
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)  # and their dtypes and devices


def tensors(state):
    return [value for value in state.values() if isinstance(value, torch.Tensor)]


@every_default
@slow_when(lambda backend, default: interpreted(backend) or default is DEFAULTS["float16"])
@repeats_when(lambda backend, default: interpreted(backend) and default is DEFAULTS["float64"])
def test_every_margin(default, backend, device, request):
    """Every margin; raw features, a bias and sub-centres also with exponentials kept and with row maxima."""
    attend = attending.asked(request.node)
    for name in ["CosFace"] if attend else FORMS if interpreted(backend) else ROWS:
        row = ROWS[name]
        for budget, scale in ((0, row.scale), ("auto", row.scale), (0, 300.0))[: 3 if name in FORMS and not attend else 1]:
            features, weight, labels, *bias = batch(row, device, num_rows=5, dtype=torch.float32)
            options = {"margin": row.margin, "centers_per_class": row.centers, "bias": bias[0] if bias else None}
            options |= {"scale": scale, "memory_budget": budget, "backend": backend}

            def run(inputs=(features, weight), labels=labels, options=options):
                inputs = [each.clone().requires_grad_() for each in inputs]
                loss = margin_softmax_loss(*inputs, labels, **options)
                return [loss.detach(), *torch.autograd.grad(loss, inputs)]

            try:
                assert_unmoved(default, run)
            except AssertionError as error:
                raise AssertionError(f"{name}, memory_budget = {budget}, scale = {scale}") from error


OPTIMIZERS = {"SGD": partial(FusedSGD, momentum=0.9), "AdamW": FusedAdamW}
TABLES = {"bfloat16": {"table_format": "bfloat16"}, "sampled": {"dtype": torch.float32, "sample_rate": 0.5}}
STEPS = pairs([*DEFAULTS], ["float32", "bfloat16", "int8"], ["native", "torch"], [*OPTIMIZERS], [*TABLES])
ATTENDED = STEPS[0]


@pytest.mark.parametrize("default, state_format, path, optimizer, table", STEPS)
@slow_when(lambda backend: interpreted(backend))
@repeats_when(
    lambda backend, default, state_format, path, optimizer, table: (
        backend == "attend" and (default, state_format, path, optimizer, table) != ATTENDED
    )
)
def test_fused_steps(default, state_format, path, optimizer, table, backend, device, monkeypatch):
    if path == "torch" or not cpu_library.available():
        monkeypatch.setattr(rules.Part, "is_native", lambda part: False)

    def run():
        torch.manual_seed(0)
        head = CosFaceLoss(20, 300, device=device, backend=backend, **TABLES[table])
        steps = OPTIMIZERS[optimizer](head.parameters(), lr=0.1, state_format=state_format)
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            features = torch.randn(9, 20, generator=generator, dtype=torch.float32, device="cpu").to(device)
            labels = torch.randint(300, (9,), generator=generator, dtype=torch.int64, device="cpu").to(device)
            head(features, labels).backward()
            steps.step()
        return [head.weight.detach(), *tensors(steps.state[head.weight])]

    assert_unmoved(DEFAULTS[default], run)


@every_default
def test_heads(default, device):
    """Running statistics, nearest classes, new and removed identities, and which classes are sampled."""

    def run():
        torch.manual_seed(0)
        head = MarginSoftmaxLoss(8, 30, margin=AdaFace(), device=device, dtype=torch.float32)
        head.grow(3), head.remove([2, 31])
        features = torch.randn(6, 8, dtype=torch.float32, device="cpu").to(device)
        labels = torch.randint(30, (6,), dtype=torch.int64, device="cpu").to(device)
        loss = head(features, labels)
        sampled = sample_classes(labels, 30, 0.4, seed=3)
        return [loss.detach(), *head.state_dict().values(), *head.topk(features, 3), sampled]

    assert_unmoved(default, run)


@every_default
def test_lent_memory(default, monkeypatch):
    monkeypatch.setattr(page_pool, "LARGE", 1)
    page_pool.release()
    with default():
        lent = page_pool.empty((3, 5), torch.float32, torch.device("cpu"))
    assert lent.dtype == torch.float32 and lent.device.type == "cpu" and lent.shape == (3, 5)


CONSTRUCTORS = (
    "arange as_tensor asarray empty empty_strided eye full linspace ones rand randint randn randperm scalar_tensor tensor zeros"
)
PACKAGE = Path(cosface_kernels.__file__).parent


def _sources():
    return {path: path.read_text() for path in PACKAGE.rglob("*.py") if "demo" not in path.parts}


def test_every_allocation_names_its_dtype_and_device():
    """A demo is a user's script. as_tensor has the dtype of what it is given."""
    found = []
    for path, source in _sources().items():
        for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
            if ast.unparse(call.func).removeprefix("torch.") in CONSTRUCTORS.split() and ast.unparse(call.func).startswith(
                "torch."
            ):
                named = {keyword.arg for keyword in call.keywords}
                missing = {"dtype", "device"} - named - ({"dtype"} if call.func.attr == "as_tensor" else set())
                found += (
                    [f"{path.relative_to(PACKAGE)}:{call.lineno} names no {' and no '.join(sorted(missing))}"] if missing else []
                )
    assert not found, "\n".join(found)


def test_tensors_reach_native_code_through_one_function():
    """cpu_library.pointer checks them; page_pool.py makes tensors of memory, and not the other way round; checkpoint/files.py has
    names of files alone.
    """
    foreign = {path.name for path, source in _sources().items() if "import ctypes" in source}
    assert foreign == {"cpu_library.py", "page_pool.py", "files.py"}
    assert Path(cpu_library.__file__).read_text().count("data_ptr()") == 1
