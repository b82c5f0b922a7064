"""Verification of templates, as IJB-B and IJB-C ask: a template is all images of one appearance of a person, from several media.

    template = unit row of the mean over its media of (the mean of the unit embeddings of a medium)

Source: IJB-C, Maze et al., ICB 2018; the files are those that InsightFace's evaluation reads, ijbc_face_tid_mid.txt and
ijbc_template_pair_label.txt (lines "template template 0-or-1").
"""

from pathlib import Path

import numpy as np
import torch

from ..ops.normalize import unit_rows
from .all_pairs import unit

PAIRS = 2**18  # compared at a time


class TemplatePairs:
    """The listed pairs of templates, as verification.steps_of takes them."""

    def __init__(self, embeddings, templates, pairs):
        """embeddings (N, D); templates: a path, line n is "image template medium" of row n; pairs: a path, as above."""
        owner, medium = _read_templates(templates, len(embeddings))
        numbers, owner = np.unique(owner, return_inverse=True)
        media, of_row = np.unique(np.stack([owner, medium], 1), axis=0, return_inverse=True)
        self.unit = unit_rows(_means(_means(unit(embeddings).double(), of_row, len(media)), media[:, 0], len(numbers)))[0].float()
        self.first, self.second, self.same = _read_pairs(pairs, numbers, templates)
        self.count = len(self.same)

    def blocks(self):
        """Yield (genuine, impostor) scores, 1-D float32; the same at each call."""
        for start in range(0, self.count, PAIRS):
            part = slice(start, start + PAIRS)
            scores = (self.unit[self.first[part]] * self.unit[self.second[part]]).sum(1)
            yield scores[self.same[part]], scores[~self.same[part]]


def _means(rows, owner, count):
    """(count, D): the means of the rows of each owner."""
    owner = torch.from_numpy(owner.ravel())
    sums = rows.new_zeros(count, rows.shape[1]).index_add_(0, owner, rows)
    return sums / torch.bincount(owner, minlength=count)[:, None]


def _read_templates(path, count):
    """(template, medium) of each row."""
    lines = Path(path).read_text().splitlines()
    if len(lines) != count:
        raise ValueError(f"{path}: has {len(lines):,} lines for {count:,} embeddings; one is needed for each")
    found = np.empty((count, 2), dtype=np.int64)
    for number, line in enumerate(lines):
        try:
            _, template, medium = line.split()
            found[number] = int(template), int(medium)
        except ValueError:
            raise ValueError(f"{path}: line {number + 1} must be 'image template medium', got {line[:80]!r}") from None
    return found[:, 0], found[:, 1]


def _read_pairs(path, numbers, templates):
    """(places of the first templates, of the second, whether they are of one identity)."""
    try:
        found = np.loadtxt(path, dtype=np.int64, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: not lines of 'template template 0-or-1' ({error})") from error
    if found.shape[1:] != (3,) or not np.isin(found[:, 2], (0, 1)).all():
        raise ValueError(f"{path}: not lines of 'template template 0-or-1'")
    places = np.searchsorted(numbers, found[:, :2]).clip(max=len(numbers) - 1)
    missing = numbers[places] != found[:, :2]
    if missing.any():
        row = int(missing.any(1).argmax())
        raise ValueError(f"{path}: line {row + 1} names template {found[:, :2][missing][0]}, which {templates} has not")
    return *(torch.from_numpy(column) for column in places.T), torch.from_numpy(found[:, 2] == 1)
