"""Do a few random cases of every kind, other ones for each commit, hold; and does the campaign notice what is wrong?"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from campaign import engine, identities, losses, optimisers, options, shards, surface

from cosface_kernels.heads import grow
from cosface_kernels.optim import rules

ROOT = Path(__file__).parents[1]


def run(*arguments, folder):
    command = [sys.executable, "-m", "tests.campaign", *arguments, "--json", str(folder / "tried.json")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    return process, json.loads((folder / "tried.json").read_text())


@pytest.mark.slow
def test_two_rounds_of_this_commits_cases(tmp_path):
    """In a process of its own, which may crash."""
    process, tried = run("--cases", str(2 * sum(engine.ROUND.values())), folder=tmp_path)
    assert process.returncode == 0 and not tried["failures"], process.stdout + process.stderr
    assert set(tried["cases"]) == set(engine.ROUND)


def test_same_seed_same_cases():
    for kind in engine.ROUND:
        first, again, other = ([engine.draw(kind, seed, number) for number in range(20)] for seed in ("a", "a", "b"))
        assert first == again != other


def simplest(**changes):
    return losses.settle({name: values[0] for name, values in losses.SPACE.items()} | changes)


def test_rounding_of_a_gradient_that_cancels_is_no_error():
    """Rows of one number have none, and the exact one, the rounding of float64, is no measure of float32's."""
    losses.check(simplest(backend="cpu", classes=1000, size=1, weight="bfloat16", ignored=1, scale=100.0, seed=62))


def test_what_cancels_to_nothing_is_no_error():
    """Label smoothing where one class alone is in the sample."""
    case = {name: values[0] for name, values in options.SPACE.items()} | {"margin": "CosFace raw", "label_smoothing": 1.0}
    options.check(
        options.settle(case | {"backend": "torch", "autocast": True, "sampled": "sampled", "reduction": "none", "seed": 1})
    )
    assert (
        shards.settle({name: values[0] for name, values in shards.SPACE.items()} | {"beside": "smoothing", "sample_rate": 0.4})[
            "classes"
        ]
        * 0.4
        > 2
    )


def test_sparse_momentum_is_known():
    case = {name: values[0] for name, values in identities.SPACE.items()} | {"optimizer": "SGD", "sample_rate": 0.4, "classes": 7}
    steps = {f"step_{number}": what for number, what in enumerate(("step", "checkpoint", "grow", "remove", "step"))}
    identities.check(identities.settle(case | steps))


@pytest.mark.parametrize(
    "changes, wrong",
    [
        ({"table": "float64"}, {"lr": 1.0001}),
        ({"table": "float64", "beside": "smoothing", "max_row_norm": 0.5}, {"lr": 1.0001}),
        ({"table": "float32", "momentum": 0.9, "state": "int8"}, {"momentum": 0.95}),
        ({"table": "float8", "lr": 0.5}, {"lr": 2.0}),
    ],
)
def test_wrong_steps_are_noticed(changes, wrong, monkeypatch):
    """A rule whose numbers are multiplied by these: a step off by 10^-4, and momentum by more than its codes can explain."""
    apply = rules.SGD.apply
    case = {name: values[0] for name, values in optimisers.SPACE.items()} | {"step_0": "step", "step_1": "step"} | changes
    case = optimisers.settle(case)
    monkeypatch.setattr(rules.Part, "is_native", lambda part: False)
    optimisers.check(case)

    def apply_changed(rule, *arguments):
        return apply(rule._replace(**{name: getattr(rule, name) * factor for name, factor in wrong.items()}), *arguments)

    monkeypatch.setattr(rules.SGD, "apply", apply_changed)
    with pytest.raises(AssertionError, match="times what is allowed"):
        optimisers.check(case)


OPTIONS = {
    "smoothing": {"label_smoothing": 0.1},
    "learnt scale": {"scale": "learnt"},
    "hard negatives": {"negatives": "MV", "call": "head"},
    "class weights": {"class_weight": "some", "reduction": "mean"},
    "several classes": {"positives": 2},
    "numbers by class": {"margin": "Combined by class"},
    "sampled": {"classes": 130, "sampled": "corrected", "hard_classes": 3},
    "float8": {"call": "head", "weight": "float8"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_wrong_options_are_noticed(option, monkeypatch):
    """The simplest case of each is right, and one whose option is a hundredth more is not."""
    case = {name: values[0] for name, values in options.SPACE.items()} | {"margin": "CosFace", "classes": 7, "rows": 5}
    case = options.settle(case | OPTIONS[option])
    options.check(case)
    ours = options._ours

    def off(case, given):
        changes = {}
        if given.class_weight is not None:
            changes["class_weight"] = given.class_weight**1.02
        if given.label_weights is not None:
            changes["label_weights"] = given.label_weights * 1.01
        if given.numbers:
            changes["numbers"] = {name: values * 1.01 for name, values in given.numbers.items()}
        if given.sample is not None:
            changes["sample"] = given.sample._replace(by_class=given.sample.by_class * 1.01)
        changed = given._replace(**changes or {"scale": given.scale * 1.01})
        return ours(case, changed)

    monkeypatch.setattr(options, "_ours", off)
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        options.check(case)


def test_wrong_rows_after_growing_are_noticed(monkeypatch):
    case = {name: values[0] for name, values in identities.SPACE.items()}
    case = identities.settle(case | {"optimizer": "FusedSGD", "step_0": "step", "step_1": "grow", "step_2": "looked up"})
    identities.check(case)
    follow = grow.follow
    monkeypatch.setattr(grow, "follow", lambda *given: [(s, key, 2 * changed) for s, key, changed in follow(*given)])
    with pytest.raises(AssertionError, match="state of weight: momentum_buffer changed"):
        identities.check(case)


def test_a_refusal_that_is_none_is_noticed(monkeypatch):
    case = {name: values[0] for name, values in options.SPACE.items()} | {"label_smoothing": 0.1, "class_weight": "some"}
    case = options.settle(case | {"clash": True})
    options.check(case)
    monkeypatch.setattr(options, "_ours", lambda case, given: None)
    with pytest.raises(AssertionError, match="no error about class_weight and label_smoothing"):
        options.check(case)


def test_every_public_argument_is_drawn_or_left_out_with_a_reason():
    """A new one must say which choice of which kind draws it, and one that is gone may not stay."""
    assert surface.ARGUMENTS.keys() == surface.names()
    for name, choices in surface.ARGUMENTS.items():
        assert choices.keys() == surface.parameters(name), name
        for argument, choice in choices.items():
            if choice.startswith("left out: "):
                assert len(choice.split()) > 3, f"{name}, {argument}: why?"
                continue
            kind, _, drawn = choice.partition(".")
            assert kind in engine.ROUND, f"{name}, {argument}"
            assert not drawn or len({*map(str, engine.module_of(kind).SPACE[drawn])}) > 1, f"{name}, {argument}: {choice}"


def test_every_margin_is_drawn():
    drawn = {type(row.margin) for row in options.MARGINS.values()} | {type(hard.negatives) for hard in options.HARD.values()}
    assert surface.public_margins() <= drawn


class Answers:
    """A run that fails where told, and counts."""

    def __init__(self, fails):
        self.fails, self.cases = fails, []

    def __call__(self, kind, case):
        self.cases.append(case)
        return "wrong: it fails" if self.fails(case) else None


def test_a_failure_is_made_smaller():
    """To the simplest value of all but what it needs."""

    def fails(case):
        return case["classes"] >= 64 and case["reduction"] == "sum"

    case = next(case for number in range(1000) if fails(case := engine.draw("losses", "a", number)))
    case = losses.settle({**case, "margin": "cosface_loss", "inputs": "uniform"})
    found, failure = engine.smaller("losses", case, "wrong: it fails", Answers(fails))
    expected = simplest(classes=64, reduction="sum")
    assert failure == "wrong: it fails" and sum(found[name] != value for name, value in expected.items()) <= 3, found
    assert compile(engine.script("losses", found, failure), "script", "exec")


@pytest.mark.slow
def test_wrong_results_and_crashes_are_noticed():
    """In a process as the campaign's own: a loss and a step of two ranks that are off by 10^-4, and a call that ends it."""
    script = """
import atexit
import os
from tests.campaign import engine, losses, shards
from cosface_kernels import cosface_loss
run = engine.Runner()
atexit.register(run.close)  # an assertion that fails must not wait for that process
simplest = losses.settle({name: values[0] for name, values in losses.SPACE.items()})
assert run("losses", simplest) is None, run("losses", simplest)
losses.cosface_loss = lambda *a, **k: cosface_loss(*a, **k) * 1.0001
run.close()
assert "wrong: " in run("losses", simplest) and "loss: error" in run("losses", simplest)
fused, *plain = shards.RULES["SGD"]
shards.RULES["SGD"] = lambda parameters, lr: fused(parameters, lr=1.0001 * lr), *plain
run.close()
step = {name: values[0] for name, values in shards.SPACE.items()} | {"ranks": 2, "rule": "SGD"}
assert "weight: error" in run("shards", step), run("shards", step)
losses.cosface_loss = lambda *a, **k: os._exit(7)
run.close()
assert run("losses", simplest) == "died: exit code 7"
run.close()
"""
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
