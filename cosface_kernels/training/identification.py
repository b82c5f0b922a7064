"""Finding a probe's identity among distractors, as MegaFace asks: rank, CMC, and TPIR at FPIR, in bounded memory.

A search has a probe, its mate (another image of its identity) and others. With distractors these are the others, and each image
is searched with each other image of its identity as the mate. Without, the first image of each identity is enrolled, each other
image is a probe, and the others of its search are the enrolled images of other identities. In a gallery with a row for each
subject, a probe whose subject is enrolled has a mate; FPIR is that of the probes whose subject is not (the open set of IJB).

    rank = 1 + others that score >= the mate               CMC(r) = searches of rank <= r / searches
    FPIR(t) = probes with another that scores >= t / probes     TPIR(t) = searches of rank 1 whose mate scores >= t / searches

Only the best CMC_RANKS others of each probe are kept; the slabs of the others find them (heads/logits.py).
"""

from typing import NamedTuple

import numpy as np
import torch

from ..heads import logits
from .all_pairs import unit

CMC_RANKS = 20
PROBES = 1024  # searched at a time


class Searches(NamedTuple):
    """One row for each search; best for each probe. Scores are float64 cosines."""

    mates: np.ndarray  # (S,), the mate's score
    ranks: np.ndarray  # (S,), CMC_RANKS + 1 for any beyond
    best: np.ndarray  # (P,), the highest score of a probe's others; in a gallery, of the probes that have no mate
    gallery: int  # others of one search


def search(embeddings, labels, distractors=None):
    """The Searches of embeddings (N, D), labels (N,), distractors (M, D) or None.

    Raises:
        ValueError: no identity has two images, or there is nobody to confuse them with.
    """
    rows, number = unit(embeddings), np.unique(np.asarray(labels), return_inverse=True)[1].ravel()
    order = number.argsort(kind="stable")
    first = np.flatnonzero(np.diff(number[order], prepend=-1))  # the place of each identity's first image
    sizes = np.diff(first, append=len(order))
    if sizes.max() < 2:
        raise ValueError("no identity has two images, so nobody can be found: give another image of some identities")
    if distractors is None:
        gallery = rows[order[first]]
        probes = np.setdiff1d(np.arange(len(order)), order[first])
        mates = [[order[first[number[probe]]]] for probe in probes]
        own = number[probes]
    else:
        gallery = unit(distractors)
        probes = order[np.repeat(sizes, sizes) > 1]
        members = np.split(order, first[1:])
        mates = [members[number[probe]][members[number[probe]] != probe] for probe in probes]
        own = np.full(len(probes), -1)
    if len(gallery) < 1 + (distractors is None):
        raise ValueError("there is one identity and no distractor, so nobody can be confused: give --distractors")
    found = [_search(rows, probes[at], mates[at], own[at], gallery) for at in _slices(len(probes))]
    return Searches(*map(np.concatenate, zip(*found, strict=True)), len(gallery) - (distractors is None))


def search_gallery(gallery, enrolled, probes, subjects):
    """The Searches of probes (P, D) in a gallery (G, D), unit rows, of the subjects (P,) and enrolled (G,), which all differ.

    Raises:
        ValueError: no probe's subject is enrolled.
    """
    place = {subject: row for row, subject in enumerate(enrolled.tolist())}
    own = np.array([place.get(subject, -1) for subject in subjects.tolist()], dtype=np.int64)
    known, unknown = np.flatnonzero(own >= 0), np.flatnonzero(own < 0)
    if not len(known):
        raise ValueError("no probe's subject is in the gallery, so nobody can be found: is it the gallery of these probes?")
    rows, mates = torch.cat([probes, gallery]), len(probes) + own[:, None]
    found = [_search(rows, some, mates[some], own[some], gallery)[:2] for some in (known[at] for at in _slices(len(known)))]
    best = [_others(probes[some], own[some], gallery)[:, 0].numpy() for some in (unknown[at] for at in _slices(len(unknown)))]
    return Searches(*map(np.concatenate, zip(*found, strict=True)), np.concatenate([np.empty(0), *best]), len(gallery) - 1)


def _slices(count):
    return [slice(start, start + PROBES) for start in range(0, count, PROBES)]


def _search(rows, probes, mates, own, gallery):
    """(mates' scores, ranks, best others) of some probes. own: the row of the gallery that is no other of each, or -1."""
    x = rows[probes]
    scores = _others(x, own, gallery)
    probe = torch.from_numpy(np.repeat(np.arange(len(x)), [len(some) for some in mates]))
    with_mate = _cosines(x[probe], rows[np.concatenate(mates)])
    ranks = 1 + (scores[probe] >= with_mate[:, None]).sum(1)
    return with_mate.numpy(), ranks.numpy(), scores[:, 0].numpy()


def _others(x, own, gallery):
    """float64 (P, CMC_RANKS): the highest scores of the others of probes, descending, -inf beyond their number."""
    indices = logits.largest(logits.Cosines(are_unit=True), (gallery, None), x, CMC_RANKS + 1)[1]
    # float32 finds the candidates. Their scores are summed as the mates' are, so that equal images have equal scores.
    scores = torch.stack([_cosines(x, gallery[column]) for column in indices.T], 1)
    scores[indices == torch.from_numpy(own)[:, None]] = -torch.inf
    return scores.sort(1, descending=True).values[:, :CMC_RANKS]


def _cosines(x, y):
    return (x.double() * y.double()).sum(1)


def cmc(searches):
    """[the share of searches of rank <= r, for r = 1 .. CMC_RANKS]; beyond the number of others it is 1."""
    counts = np.bincount(searches.ranks, minlength=CMC_RANKS + 2)[1 : CMC_RANKS + 1]
    return (counts.cumsum() / len(searches.ranks)).tolist()


def tpir_at_fpir(searches, exponent):
    """(TPIR, threshold) at the smallest threshold, of the scores that occur, with FPIR <= 10^-exponent.

    None if there are fewer than 10^exponent probes.
    """
    allowed = len(searches.best) // 10**exponent
    if not allowed:
        return None
    best = np.sort(searches.best)[::-1]
    right = searches.mates[searches.ranks == 1]
    above = best[allowed] if allowed < len(best) else -np.inf  # the threshold is the next score that occurs
    scores = np.concatenate([best, right])
    scores = scores[scores > above]
    threshold = scores.min() if len(scores) else np.nextafter(above, np.inf)
    return float((right >= threshold).sum() / len(searches.mates)), float(threshold)
