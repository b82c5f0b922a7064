"""Does each feature go with each axis, and with each other feature, as the tables of docs/features.md say?

What "yes" and "no" mean: feature_table.py. The axis of shards is a check of sharded_losses.py, where ranks are.
"""

import itertools

import pytest
import torch
from feature_table import AXES, FEATURES, can_be_together, cells, outcome
from selection import slow_when

from cosface_kernels.ops import backends

HARD = ["CurricularFace", "MVSoftmax", "InterTopK", "InterclassFiltering"]


def said(axis):
    return {name: columns[axis] for name, columns in cells("feature").items()}


def excluded():
    """The pairs that do not go together, as sets of two."""
    found = set()
    for name, columns in cells("of these").items():
        others = columns["does not go with"].replace("hard negatives", ", ".join(HARD)).split(", ")
        found |= {frozenset((one, other)) for one in (HARD if name == "hard negatives" else [name]) for other in others}
    return found


def test_every_feature_is_tried():
    assert FEATURES.keys() == said("torch").keys()


@pytest.mark.parametrize("axis", [axis for axis in AXES if axis not in ("shards", "torch.compile")])
@slow_when(lambda axis: axis == "triton")
def test_axis(axis):
    why = backends.unusable(axis, torch.device("cpu")) if axis in backends.NAMES else None
    if why:
        pytest.skip(why)
    found = {name: outcome([name], axis) for name in FEATURES}
    assert {name: each.split(":")[0] for name, each in found.items()} == said(axis), found


@pytest.mark.slow
def test_torch_compile():
    """Several features in one graph, as each takes seconds; those that want a fused optimiser, which breaks it, by themselves."""
    groups, apart = [], excluded()
    for name in FEATURES:
        is_fused = FEATURES[name].optimizer is not None
        for group in groups:
            alike = (FEATURES[group[0]].optimizer is not None) == is_fused
            if alike and all(can_be_together(name, other) and {name, other} not in apart for other in group):
                group.append(name)
                break
        else:
            groups.append([name])
    outcomes = [outcome(group, "torch.compile") for group in groups]
    found = {name: each for group, each in zip(groups, outcomes, strict=True) for name in group}
    assert {name: each.split(":")[0] for name, each in found.items()} == said("torch.compile"), found


def test_what_excludes_each_other():
    pairs = [pair for pair in itertools.combinations(FEATURES, 2) if can_be_together(*pair)]
    found = {pair: outcome(pair, "torch") for pair in pairs}
    assert {frozenset(pair) for pair in pairs if found[pair] != "yes"} == excluded(), found
