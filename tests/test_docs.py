"""Do the examples of the documents run, and do they say what is true?"""

import functools
import inspect
import json
import math
import re
import statistics
from pathlib import Path

import feature_table
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cosface_kernels
from benchmarks import margins as benchmark
from benchmarks import tables
from cosface_kernels import CosFaceLoss, MarginSoftmaxLoss, cosface_loss, margins, reference, theory
from cosface_kernels.tools import cli

DOCS = Path(__file__).parents[1] / "docs"
# All python blocks of a document run one after another, with the names of those before.
DOCUMENTS = ["margins.md", "sampling.md"]
ALL = [*sorted(DOCS.rglob("*.md")), *(DOCS.parent / name for name in ("README.md", "CONTRIBUTING.md"))]
MARGINS = {
    name: kind
    for name, kind in inspect.getmembers(margins, inspect.isclass)
    if issubclass(kind, margins.Margin) and kind is not margins.Margin
}


def text(document):
    return (DOCS / document).read_text()


@functools.cache
def run(document):
    """[the names after each block]"""
    torch.manual_seed(0)
    names, after = {}, []
    for block in re.findall(r"```python\n(.*?)```", text(document), re.S):
        exec(block, names)
        after.append(dict(names))
    return after


def after(document, code):
    """The names after the first block with this code in it."""
    blocks = re.findall(r"```python\n(.*?)```", text(document), re.S)
    return run(document)[next(place for place, block in enumerate(blocks) if code in block)]


def rows(document, heading):
    """The cells of the table whose head starts so."""
    (table,) = re.findall(rf"^\| {heading} \|.*\n\| ---.*\n((?:\|.*\n)+)", text(document), re.M)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


def constructed(cell, names):
    """The value of the code in a cell."""
    return eval(cell.strip("`"), dict(names))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_examples_run(document):
    assert run(document)


def headings(document):
    """The anchors of a Markdown file, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", ALL, ids=[str(path.relative_to(DOCS.parent)) for path in ALL])
def test_links_lead_somewhere(document):
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", document.read_text()):
        target = document.parent / path if path else document
        assert target.exists(), path
        assert not anchor or anchor in headings(target), f"{path}#{anchor}"


def test_index_names_every_document():
    linked = set(re.findall(r"\]\(([^)#]+)\)", text("README.md")))
    assert {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} - {"README.md"} <= linked


def test_contributing_names_every_test_file():
    table = (DOCS.parent / "CONTRIBUTING.md").read_text().split("| to change |")[1].split("\n\n")[0]
    files = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.strip("| ").split(" | ")[1])}
    assert files == named


def test_requirements_have_every_extra():
    """So that no test is skipped for want of a package."""
    project = (DOCS.parent / "pyproject.toml").read_text()
    (extras,) = re.findall(r"\[project.optional-dependencies\]\n(.*?)\n\n", project, re.S)
    wanted = set(re.findall(r'"([a-z-]+)>=', extras))
    pinned = set(re.findall(r"^([\w-]+)==", (DOCS.parent / "requirements.txt").read_text().lower(), re.M))
    assert "onnxruntime" in wanted <= pinned


def test_index_names_every_public_name():
    table = text("README.md").split("## API")[1].split("## Words")[0]
    assert {*cosface_kernels.__all__} - {"__version__"} <= set(re.findall(r"`(\w+)`", table))


def test_margins_first_example():
    names = run("margins.md")[0]
    features, labels, head = names["features"].detach().double(), names["labels"], names["head"]
    assert isinstance(head.margin, margins.ArcFace) and head.scale == 64
    logits = reference.logits(features, head.weight.detach().double(), scale=1.0)
    angle = logits.gather(1, labels[:, None]).acos()
    expected = F.cross_entropy(64 * logits.scatter(1, labels[:, None], (angle + 0.5).cos()), labels)
    for loss in (names["loss"], names["same"]):
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["cpu_epyc_zen5_margins", "cpu_epyc_zen3_options"])
def test_cost_is_what_was_measured(name):
    report = json.loads((DOCS.parent / "benchmarks" / "results" / f"{name}.json").read_text())
    assert benchmark.table(report) in text("margins.md")


# In the table of features: which rows of benchmarks.margins without --options, in this order; those with have features' names.
MEASURED = {
    "margins of ‖x‖": ["AdaFace"],
    "sub-centres": ["CosFace, 3 sub-centres"],
    "features as they are": ["CosFace, normalize_features=False"],
    "a bias": ["Softmax with bias"],
    "several classes to a row": ["2 classes to a row", "8 classes to a row"],
}


def test_costs_of_features():
    ratios = {}
    for name in ("cpu_epyc_zen5_margins", "cpu_epyc_zen3_options"):
        report = json.loads((DOCS.parent / "benchmarks" / "results" / f"{name}.json").read_text())
        for row in report["rows"]:
            if row["precision"] == "float32":
                ratios[row["name"]] = f"{benchmark._quartiles(row)[1]:.2f}" + "*" * row.get("whole_step", False)
    for name, columns in feature_table.cells("feature").items():
        found = re.findall(r"\d\.\d\d\*?", columns["times cosface_loss"])
        assert found == [ratios[each] for each in MEASURED.get(name, [name])], name


def test_margins_table_has_every_margin_with_its_defaults():
    found = {}
    for cell, _, normalised, _, _, cost in rows("margins.md", "margin"):
        margin = constructed(cell, MARGINS)
        found[type(margin).__name__] = margin
        assert margin == type(margin)(), f"{cell} does not show the defaults"
        assert normalised.split(";")[0] == ("features, table" if margin.normalize_features else "nothing")
        assert margin.normalize_features == margin.normalize_weight
        # Logits that are no cosines have no constant shift.
        assert cost == ("none" if margin.normalize_features else "one more pass over the table")
    assert found.keys() == MARGINS.keys()


def test_margins_running_statistics():
    names = after("margins.md", "moved = ")
    norms = names["features"].detach().norm(dim=1)
    assert names["moved"] == pytest.approx(0.01 * (norms.mean().item() - 20), rel=1e-3)
    assert names["head"].batch_mean.item() == pytest.approx(names["before"] + names["moved"])
    assert {"batch_mean", "batch_std"} <= names["head"].state_dict().keys()
    assert after("margins.md", "mixed = ")["mixed"].batch_mean.item() == pytest.approx(names["head"].batch_mean.item())
    assert all(
        "step" in MarginSoftmaxLoss(4, 9, margin=margin(annealing=True)).state_dict()
        for margin in (margins.SphereFace, margins.LSoftmax)
    )


def test_margins_one_of_ones_own():
    names = after("margins.md", "class ElasticCosFace")
    head = MarginSoftmaxLoss(128, 1000, margin=names["ElasticCosFace"](m=0.2, sigma=0.0))
    expected = CosFaceLoss(128, 1000, margin=0.2)
    expected.weight = head.weight
    torch.testing.assert_close(head(names["features"], names["labels"]), expected(names["features"], names["labels"]))
    (gradient,) = torch.autograd.grad(names["loss"], names["features"])
    assert gradient.any() and gradient.isfinite().all()


def test_margins_of_classes():
    by_class, moving, synthetic, names = (
        after("margins.md", code) for code in ("by_class = ", "moving = ", "class Synthetic", "weights = ")
    )
    assert by_class["loss"].isfinite() and torch.equal(by_class["values"], 0.5 / by_class["images"].float() ** 0.1)
    assert {*moving["moving"].state_dict()} == {"weight", "margin_m"} and moving["loss"].isfinite()
    assert type(synthetic["Synthetic"]().for_labels(torch.tensor([3, 600]))) is synthetic["Synthetic"]
    torch.testing.assert_close(names["loss"], cosface_loss(names["features"], names["head"].weight, names["labels"]))


def test_margins_beside_the_margin():
    names = after("margins.md", "smooth = ")
    for name in ("smooth", "weighted"):
        torch.testing.assert_close(names[name], names[f"same_{name}"])
    rows = F.cross_entropy(names["logits"], names["labels"], reduction="none")
    torch.testing.assert_close(names["weighted_rows"], (names["row_weights"] * rows).sum() / names["row_weights"].sum())


def test_margins_learnt_scale():
    names = after("margins.md", "present = ")
    head, present = names["head"], names["present"]
    assert present == pytest.approx(head.scale.item()) and abs(present - 64) > 1e-3


def test_margins_adacos():
    """The scale after three steps by plain float64 PyTorch, as its paper has it. The table does not move."""
    names = after("margins.md", "scale = math.sqrt(2)")
    x, w, y = names["features"].detach().double(), names["head"].weight.detach().double(), names["labels"]
    cosines, scale = F.normalize(x) @ F.normalize(w).T, math.sqrt(2) * math.log(999)
    for _ in range(3):
        negatives = (scale * cosines).exp().scatter(1, y[:, None], 0.0).sum(1).mean()
        angle = cosines.gather(1, y[:, None]).acos().median().clamp(max=math.pi / 4)
        scale = (negatives.log() / angle.cos()).item()
    assert names["scale"] == pytest.approx(scale, rel=1e-4)


def test_margins_what_the_paper_compares():
    names = {**run("margins.md")[-1], **MARGINS}
    found = dict(rows("margins.md", "in the paper"))
    assert len(found) == 9
    heads = {method: constructed(cell, names) for method, cell in found.items() if cell.startswith("`")}
    features = torch.randn(4, 512)
    for method, head in heads.items():
        assert head.weight.shape == (10_575, 512) and head(features, torch.arange(4)).isfinite(), method
    as_they_are = {"Softmax", "L-Softmax", "A-Softmax", "LMCL without feature normalisation"}
    assert {method for method, head in heads.items() if not head.normalize_features} == as_they_are
    assert {method for method, head in heads.items() if not head.normalize_weight} == {"Softmax", "L-Softmax"}
    assert all(head.scale == (1 if method in as_they_are else 64) for method, head in heads.items())
    for method in found.keys() - heads.keys():
        assert "migrate.md#center-contrastive-and-triplet-losses-beside-this-head" in found[method]


def test_sampling():
    first, hard, *_, second = run("sampling.md")
    assert (hard["head"].hard_classes[hard["labels"]] >= 0).all() and hard["statistics"].negative_class.shape == (64,)
    assert len(first["touched"]) == 1000 and torch.isin(first["labels"], first["touched"]).all()
    assert len(second["classes"]) == 1000 and second["loss"].isfinite()


def test_margins_theory():
    names = run("margins.md")[-1]
    assert f"# {names['smallest_scale']:.2f}: eq. 6" in text("margins.md")
    assert f"# {names['largest_margin']:.4f}: eq. 7" in text("margins.md")
    assert f"# {names['scale']:g}, {names['margin']:.4f} and a sentence" in text("margins.md")
    assert names["reason"].endswith(".")
    with pytest.warns(UserWarning, match=r"eq\. 7"):
        CosFaceLoss(2, 8, margin=0.5)
    assert theory.suggest(1_000_000, 512)[:2] == (64, 0.35)


@pytest.mark.parametrize(
    "name, document",
    [
        *((f"cpu_epyc_{name}", "performance.md") for name in ("zen5", "zen5_training", "zen3")),
        *((f"cpu_epyc_zen3_{name}", "performance.md") for name in ("break_even", "processor_time", "fused_formats")),
        ("formats", "training.md"),
    ],
)
def test_tables_are_what_was_measured(name, document):
    """As `python -m benchmarks.tables` prints them."""
    printed = tables.text(json.loads((DOCS.parent / "benchmarks" / "results" / f"{name}.json").read_text()))
    assert printed.strip() in text(document), f"python -m benchmarks.tables {name}.json prints another table"


def test_performance_is_what_was_measured():
    results, document = DOCS.parent / "benchmarks" / "results", text("performance.md")
    found = {name: json.loads((results / f"cpu_epyc_zen5{name}.json").read_text()) for name in ("", "_identities", "_memory")}
    assert tables.text(found["_identities"]) in document
    median = {(row["name"], row["precision"]): statistics.median(row["seconds"]) for row in found[""]["rows"]}
    ours = {precision: median["cosface_loss, cpu", precision] for precision in ("float32", "bfloat16")}
    plain, compiled, learning = "plain PyTorch", "torch.compile of plain PyTorch", "pytorch-metric-learning"
    assert f"| float32 against {plain} | {median[plain, 'float32'] / ours['float32']:.1f} |" in document
    for name, told in ((plain, plain), (compiled, "torch.compile of it"), (learning, learning)):
        times = " / ".join(f"{median[name, precision] / ours['bfloat16']:.1f}" for precision in ("float32", "bfloat16"))
        assert re.search(rf"\| bfloat16 against {told} in float32 / under the same autocast \| {times} \|", document), (
            name,
            times,
        )
    megabytes = {(row["name"], row["precision"]): f"{row['peak_bytes'] / 1e6:.0f}" for row in found["_memory"]["rows"]}
    cpu, plain = (
        [megabytes[f"cosface_loss, {backend}, memory_budget=0", precision] for precision in ("bfloat16", "float32")]
        for backend in ("cpu", "torch")
    )
    told = f"{cpu[0]} MB in bfloat16 and {cpu[1]} MB in float32, and {plain[0]} and {plain[1]} MB with the torch backend"
    assert told in " ".join(document.split())


def test_example_of_training():
    """With fewer classes: each one's nearest other takes C² D products, a minute."""
    torch.manual_seed(0)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "training.md").read_text(), re.S):
        exec(block.replace("100_000", "1_000"), names)
    assert names["head"].num_classes == len(names["all_identities"].unique()) == names["all_identities"].max() + 1
    assert names["centers"].shape == (1000, 128) and names["clean"].shape == (32,)
    assert names["head"].weight.grad is None and names["table_optimizer"].skipped_steps == 0
    assert names["table_optimizer"].state[names["head"].weight]["momentum_buffer"].any()


def whole_training(folder, monkeypatch, change=lambda block: block):
    """The names that the blocks of whole_training.md leave, run in a folder."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text("whole_training.md"), re.S):
        exec(change(block), names)
    return names


@pytest.mark.slow
def test_whole_training(tmp_path, monkeypatch):
    """It learns, and a run that is stopped ends on the bits of one that is not."""
    monkeypatch.setattr("os.fsync", lambda file: None)  # waits for the disk, for what no crash threatens here
    names = whole_training(tmp_path / "at_once", monkeypatch)
    assert names["step"] == 60 and names["accuracy"] > 0.8 and names["best"] > 0.8
    saved = [
        sorted(path.name for path in (tmp_path / "at_once" / folder).iterdir()) for folder in ("checkpoints", "checkpoints_best")
    ]
    assert saved == [["step-40", "step-60"], ["best"]]
    backbones = [names[name].state_dict().values() for name in ("deployed", "backbone")]
    assert names["since"] or all(map(torch.equal, *backbones))
    assert names["embeddings"].shape == (500, 16) and torch.allclose(names["embeddings"].norm(dim=1), torch.ones(500))
    np.save("embeddings.npy", names["embeddings"].numpy()), np.save("labels.npy", names["validation"][1].numpy())
    (command,) = re.findall(r"^    cosface (.*)$", text("whole_training.md"), re.M)
    assert cli.main(command.split()) == 0
    stop = "    loss, accuracy = train(step)\n"
    with pytest.raises(KeyboardInterrupt):
        whole_training(
            tmp_path / "twice",
            monkeypatch,
            lambda block: block.replace(stop, stop + "    if step == 45: raise KeyboardInterrupt\n"),
        )
    again = whole_training(tmp_path / "twice", monkeypatch)
    for one, other in zip(names["model"].state_dict().values(), again["model"].state_dict().values(), strict=True):
        assert torch.equal(one, other)
