"""Templates, as IJB-B and IJB-C compare them: a template is all images of one appearance of a person, from several media.

    template = unit row of the mean over its media of (the mean of the unit embeddings of a medium)

Source: IJB-C, Maze et al., ICB 2018. The files are those of the benchmark that InsightFace's evaluation reads too:

    ijbc_face_tid_mid.txt             line n is "image template medium" of row n
    ijbc_template_pair_label.txt      "template template 0-or-1"                         1:1
    ijbc_1N_gallery_G1.csv, ..._G2.csv, ijbc_1N_probe_mixed.csv    "template,subject,..." for each image, below a heading    1:N
"""

from pathlib import Path

import numpy as np
import torch

from ..ops.normalize import unit_rows
from . import identification
from .all_pairs import unit

PAIRS = 2**18  # compared at a time


class Templates:
    """The unit rows of all templates of a list."""

    def __init__(self, embeddings, path):
        """embeddings (N, D); path: line n is "image template medium" of row n."""
        owner, medium = _read_templates(path, len(embeddings))
        self.path, (self.numbers, owner) = path, np.unique(owner, return_inverse=True)
        media, of_row = np.unique(np.stack([owner, medium], 1), axis=0, return_inverse=True)
        means = _means(unit(embeddings).double(), of_row, len(media))
        self.unit = unit_rows(_means(means, media[:, 0], len(self.numbers)))[0].float()

    def places(self, wanted, path, lines):
        """The rows of these templates, any shape, which `path` names on these lines."""
        places = np.searchsorted(self.numbers, wanted).clip(max=len(self.numbers) - 1)
        missing = self.numbers[places] != wanted
        if missing.any():
            line, number = lines[missing][0], wanted[missing][0]
            raise ValueError(f"{path}: line {line} names template {number}, which {self.path} has not")
        return torch.from_numpy(places)

    def search(self, gallery, probes):
        """The identification.Searches of the templates of one .csv among those of another, each a path."""
        enrolled, whose = self._subjects(gallery)
        subjects, counts = np.unique(whose, return_counts=True)
        if counts.max() > 1:
            raise ValueError(f"{gallery}: subject {subjects[counts.argmax()]} has several templates; a gallery has one for each")
        return identification.search_gallery(enrolled, whose, *self._subjects(probes))

    def _subjects(self, path):
        """(unit rows, subjects) of the templates of a .csv, each once."""
        templates, subjects, lines = _read_subjects(path)
        return self.unit[self.places(templates, path, lines)], subjects


class TemplatePairs:
    """The listed pairs of templates, as verification.steps_of takes them."""

    def __init__(self, templates, path):
        """templates: Templates; path: lines of "template template 0-or-1"."""
        found = _read_pairs(path)
        lines = np.arange(1, 1 + len(found))[:, None].repeat(2, 1)
        self.unit, self.same = templates.unit, torch.from_numpy(found[:, 2] == 1)
        self.first, self.second = templates.places(found[:, :2], path, lines).T
        self.count = len(self.same)

    def blocks(self):
        """Yield (genuine, impostor) scores, 1-D float32; the same at each call."""
        for start in range(0, self.count, PAIRS):
            part = slice(start, start + PAIRS)
            scores = (self.unit[self.first[part]] * self.unit[self.second[part]]).sum(1)
            yield scores[self.same[part]], scores[~self.same[part]]


def sums(rows, owner, count):
    """(count, D): the sums of the rows of each owner."""
    return rows.new_zeros(count, rows.shape[1]).index_add_(0, torch.from_numpy(owner), rows)


def _means(rows, owner, count):
    return sums(rows, owner.ravel(), count) / torch.from_numpy(np.bincount(owner.ravel(), minlength=count))[:, None]


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


def _read_pairs(path):
    """int64 (P, 3): two templates, and whether they are of one identity."""
    try:
        found = np.loadtxt(path, dtype=np.int64, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: not lines of 'template template 0-or-1' ({error})") from error
    if found.shape[1:] != (3,) or not np.isin(found[:, 2], (0, 1)).all():
        raise ValueError(f"{path}: not lines of 'template template 0-or-1'")
    return found


def _read_subjects(path):
    """(templates, their subjects, their first lines), int64 (T,) each, of a .csv with a line for each image."""
    found = {}
    with open(path, errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                template, subject = map(int, line.split(",")[:2])
            except ValueError:
                if number == 1:  # the heading
                    continue
                raise ValueError(f"{path}: line {number} must be 'template,subject,...', got {line[:80]!r}") from None
            if found.setdefault(template, (subject, number))[0] != subject:
                raise ValueError(f"{path}: line {number} has template {template} of subject {subject}, an earlier one of another")
    if not found:
        raise ValueError(f"{path}: has no lines 'template,subject,...'")
    return np.array([(template, *of) for template, of in found.items()], dtype=np.int64).T
