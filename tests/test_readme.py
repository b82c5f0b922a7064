"""Do the README's examples run, and do they say what is true?"""

import json
import re
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

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
    before, step = USAGE.split("loss.backward()")
    exec(before, names)
    start = [parameter.detach().clone() for parameter in (names["head"].weight, names["backbone"].weight)]
    exec("loss.backward()" + step, names)
    assert names["loss"].isfinite() and names["head"].weight.grad is None
    assert not any(map(torch.equal, start, (names["head"].weight, names["backbone"].weight)))
    assert names["nearest"].shape == (32, 5)


def test_large_tables():
    names = {}
    torch.manual_seed(0)
    exec(USAGE, names)
    before = names["backbone"].weight.detach().clone()
    exec(LARGE.split("head = ShardedCosFaceLoss")[0], names)
    head = names["head"]
    assert head.weight.grad is None and head.weight.dtype == torch.bfloat16 and head.sample_rate == 0.1
    assert not torch.equal(names["backbone"].weight, before)
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


def results(name):
    return json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / f"{name}.json").read_text())


def test_figures_are_what_was_measured():
    sentences = " ".join(README.split())
    rows = {(row["name"], row["precision"]): row for row in results("cpu_epyc_zen5")["rows"]}
    ours = {budget: rows[f"cosface_loss, cpu{budget}", "bfloat16"] for budget in ("", ", memory_budget=0")}

    def faster(name, precision, budget=""):
        return statistics.median(rows[name, precision]["seconds"]) / statistics.median(ours[budget]["seconds"])

    plain, compiled = "plain PyTorch", "torch.compile of plain PyTorch"
    assert f"{faster(plain, 'float32'):.1f} times as fast as plain PyTorch in float32" in sentences
    assert f"{faster(plain, 'bfloat16'):.1f} times as fast as plain PyTorch under the same autocast" in sentences
    assert f"{faster(compiled, 'bfloat16'):.1f} times as fast as `torch.compile` of it" in sentences
    peak, recomputing, theirs = (f"{row['peak_bytes'] / 1e6:.0f}" for row in (*ours.values(), rows["plain PyTorch", "bfloat16"]))
    assert f"takes {peak} MB, where plain PyTorch under autocast takes {theirs}" in sentences
    slower = faster(plain, "float32", ", memory_budget=0")
    assert f"it takes {recomputing} MB, and is {slower:.1f} times as fast instead" in sentences
    seconds = {row["name"]: statistics.median(row["seconds"]) for row in results("cpu_epyc_zen3")["rows"]}
    times = [f"{seconds[name] / seconds['cosface_loss, cpu']:.1f} times as fast as" for name in (plain, compiled)]
    assert f"in float32 is {times[0]} plain PyTorch and {times[1]} `torch.compile` of it" in sentences
    (table,) = [
        table
        for table in results("cpu_epyc_zen5_training")["rows"]
        if table["part"] == "tables"
        and (table["identities"], table["size"], table["table_format"], table.get("sample_rate", 1))
        == (10**7, 256, "bfloat16", 1)
    ]
    assert f"Ten million identities, D = 256, train in {table['peak_bytes'] / 1e9:.1f} GB" in sentences
