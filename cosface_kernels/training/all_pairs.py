"""Scores of all pairs of embeddings, a block of 2048 x 2048 at a time: the matrix of all scores never exists.

score(i, j) = x̂_i·x̂_j, i < j        genuine if both are of one identity; a distractor is of none, and meets embeddings alone
"""

import numpy as np
import torch

from ..ops.normalize import unit_rows

BLOCK = 2048


class AllPairs:
    """The pairs of embeddings (N, D) with labels (N,), and of embeddings with distractors (M, D)."""

    def __init__(self, embeddings, labels, distractors=None):
        self.identities, number = np.unique(np.asarray(labels), return_inverse=True)
        order = number.ravel().argsort(kind="stable")  # images of one identity side by side: other blocks have no genuine pair
        self.numbers = torch.from_numpy(number.ravel()[order])
        self.unit = unit(embeddings, order)
        self.distractors = None if distractors is None else unit(distractors)
        count = len(self.unit)
        self.count = count * (count - 1) // 2 + count * (0 if distractors is None else len(self.distractors))

    def blocks(self):
        """Yield (genuine, impostor) scores of each block, 1-D float32; the same at each call."""
        for start, rows in self._rows():
            for other in range(start, len(self.unit), BLOCK):
                scores = rows @ self.unit[other : other + BLOCK].T
                if not self._has_genuine(start, other):
                    yield scores.new_empty(0), scores.flatten()
                    continue
                same = self._same(start, other)
                yield tuple(scores[each.triu(1) if start == other else each] for each in (same, ~same))
            for other in range(0, 0 if self.distractors is None else len(self.distractors), BLOCK):
                yield rows.new_empty(0), (rows @ self.distractors[other : other + BLOCK].T).flatten()

    def accepted_of_identities(self, thresholds):
        """(accepted (I, T), pairs (I,)): each identity's genuine pairs, if any; those that score at least a threshold."""
        size = len(self.identities)
        accepted, pairs = np.zeros((size, len(thresholds)), dtype=np.int64), np.zeros(size, dtype=np.int64)
        for start, rows in self._rows():
            for other in range(start, len(self.unit), BLOCK):
                if not self._has_genuine(start, other):
                    break
                scores = rows @ self.unit[other : other + BLOCK].T
                same = self._same(start, other)
                row, column = (same.triu(1) if start == other else same).nonzero(as_tuple=True)
                owner, scores = self.numbers[start : start + BLOCK][row], scores[row, column]
                pairs += torch.bincount(owner, minlength=size).numpy()
                for place, threshold in enumerate(thresholds):
                    accepted[:, place] += torch.bincount(owner[scores.double() >= threshold], minlength=size).numpy()
        return accepted[pairs > 0], pairs[pairs > 0]

    def _rows(self):
        for start in range(0, len(self.unit), BLOCK):
            yield start, self.unit[start : start + BLOCK]

    def _same(self, start, other):
        return self.numbers[start : start + BLOCK, None] == self.numbers[None, other : other + BLOCK]

    def _has_genuine(self, start, other):
        """True if an identity has images in both blocks, the second of which is not before the first."""
        return bool(self.numbers[min(start + BLOCK, len(self.unit)) - 1] >= self.numbers[other])


def unit(embeddings, order=None):
    """Unit rows, float32 (N, D), of an array that may lie on the disk; in another order where one is given."""
    rows = torch.empty(embeddings.shape, dtype=torch.float32, device="cpu")
    for start in range(0, len(rows), BLOCK):
        place = slice(start, start + BLOCK)
        part = torch.from_numpy(np.array(embeddings[place if order is None else order[place]]))
        rows[place] = unit_rows(part.double())[0]  # rounded once: equal rows are equal, of whatever dtype
    return rows
