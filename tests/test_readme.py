"""Do the README's examples run, and do they say what is true?"""

import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import tables
from cosface_kernels import cosface_loss, reference

README = (Path(__file__).parents[1] / "README.md").read_text()
REPLACED, _, USAGE, MARGIN, LARGE = re.findall(r"```python\n(.*?)```", README, re.S)


def problem():
    torch.manual_seed(0)
    features, weight = torch.randn(8, 16, dtype=torch.float64), torch.randn(50, 16, dtype=torch.float64)
    return features.requires_grad_(), weight.requires_grad_(), torch.randint(50, (8,))


def test_expression_that_it_replaces():
    x, w, y = problem()
    theirs = eval(REPLACED.split("#")[0], {"F": F, "x": x, "w": w, "y": y, "s": 64.0, "m": 0.35, "C": len(w)})
    torch.testing.assert_close(cosface_loss(x, w, y), theirs)


def test_usage_example():
    names = {}
    torch.manual_seed(0)
    exec(USAGE, names)
    assert names["loss"].isfinite() and names["head"].weight.grad.any()
    assert names["nearest"].shape == (32, 5)


def test_large_tables():
    names = {}
    torch.manual_seed(0)
    exec(USAGE, names)
    exec(LARGE.split("head = ShardedCosFaceLoss")[0], names)
    head = names["head"]
    assert head.weight.grad is None and head.weight.dtype == torch.bfloat16 and head.sample_rate == 0.1
    assert names["table_optimizer"].state[head.weight]["momentum_buffer"].dtype == torch.int8
    exec(LARGE, names)
    assert names["head"](names["backbone"](names["images"]), names["identities"]).isfinite()


def test_another_margin():
    torch.manual_seed(0)
    features, labels = torch.randn(8, 128, dtype=torch.float64), torch.randint(100_000, (8,))
    names = {"backbone": lambda images: features, "images": None, "identities": labels}
    exec(MARGIN, names)
    torch.testing.assert_close(names["head"](features, labels), names["loss"])
    logits = reference.logits(features, names["head"].weight.detach().double(), scale=1.0)
    angle = logits.gather(1, labels[:, None]).acos()
    expected = F.cross_entropy(64.0 * logits.scatter(1, labels[:, None], (angle + 0.5).cos()), labels)
    torch.testing.assert_close(names["loss"], expected)


def test_table_is_what_was_measured():
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu_epyc_zen5.json"
    (report,) = tables.reports_in(json.loads(path.read_text()))
    assert tables.markdown(report) in README, f"python -m benchmarks.tables {path.name} prints another table"
