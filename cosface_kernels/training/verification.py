"""Rates at which scores tell genuine pairs (one identity) from impostor pairs (two), exact.

    a pair is accepted if score >= t      FAR(t) = accepted impostors / impostors      TAR(t) = accepted genuine / genuine

TAR at FAR f is TAR(t) at the smallest score t that occurs with FAR(t) <= f, so pairs of equal score are accepted together or not
at all. Everything is read from `Steps`: how many pairs of each kind have each score. Few scores are sorted; many are counted in
two passes, by the upper 20 bits of a float32, then by the lower 12 where a threshold lies, so no list of scores exists.
"""

from typing import NamedTuple

import numpy as np
import torch

# FAR 10^-1 .. 10^-6: an integer number of impostors, not a rounded float, may pass.
FAR_EXPONENTS = range(1, 7)
# Scores that are sorted; more are counted.
SORTED_AT_MOST = 2**24
LOW_BITS = 12
BINS, FINE = 2 ** (32 - LOW_BITS), 2**LOW_BITS
RESAMPLES = 1000


class Steps(NamedTuple):
    """The numbers of pairs with each score, ascending."""

    scores: np.ndarray  # (S,), float64
    genuine: np.ndarray  # (S,), int64
    impostors: np.ndarray  # (S,), int64
    undecided: float = 0.0  # (genuine, impostor) pairs of pairs in one step whose scores may differ

    @classmethod
    def of(cls, genuine, impostors):
        """Steps of the scores in two arrays."""
        genuine, impostors = (np.asarray(scores, dtype=np.float64).ravel() for scores in (genuine, impostors))
        scores, places = np.unique(np.concatenate([genuine, impostors]), return_inverse=True)
        counts = [np.bincount(part, minlength=len(scores)) for part in np.split(places.ravel(), [len(genuine)])]
        return cls(scores, *counts).checked()

    def checked(self):
        for kind, counts in (("genuine", self.genuine), ("impostor", self.impostors)):
            if not counts.sum():
                what = "two images of one identity" if kind == "genuine" else "images of two identities"
                raise ValueError(f"there is no {kind} pair, so there are no rates: give {what}")
        return self

    def accepted(self):
        """(genuine, impostors): how many of each are accepted where the threshold is a step's score."""
        return self.genuine[::-1].cumsum()[::-1], self.impostors[::-1].cumsum()[::-1]


class Rate(NamedTuple):
    """The acceptance of pairs at one threshold."""

    threshold: float
    tar: float
    far: float


def steps_of(pairs):
    """The Steps of `pairs`: pairs.count, and pairs.blocks(), which yields (genuine, impostor) scores, 1-D float32 tensors.

    Of more than SORTED_AT_MOST pairs blocks() is called twice, and a step without a threshold may stand for several scores: the
    first 12 bits of their fraction are those of the step's.
    """
    if pairs.count <= SORTED_AT_MOST:
        return Steps.of(*scores_of(pairs))
    coarse = _coarse_counts(pairs)
    filled = np.flatnonzero(coarse.any(0))
    rough = Steps(_scores_of_keys(filled << LOW_BITS), *coarse[:, filled]).checked()
    refined = filled[_bins_of_thresholds(rough)]
    return _merge(rough, filled, refined, _fine_counts(pairs, refined))


def scores_of(pairs):
    """(genuine, impostor) scores of all pairs, arrays."""
    return tuple(torch.cat(part).numpy() for part in zip(*pairs.blocks(), strict=True))


def _coarse_counts(pairs):
    """(2, BINS): the numbers of genuine and impostor pairs with each upper bits of a score's key."""
    counts = np.zeros((2, BINS), dtype=np.int64)
    for block in pairs.blocks():
        for kind, scores in enumerate(block):
            bins = _keys(scores).bitwise_right_shift_(LOW_BITS).add_(BINS // 2)
            counts[kind] += torch.bincount(bins, minlength=BINS).numpy()
    return counts


def _keys(scores):
    """int32 that order as float32 scores do: their bits, of negative scores the other way round. -0 + 0 = 0, one key."""
    bits = (scores + 0.0).view(torch.int32)
    return bits.bitwise_right_shift(31).bitwise_and_(2**31 - 1).bitwise_xor_(bits)


def _scores_of_keys(keys):
    """The scores, float64, of keys counted from the lowest on."""
    keys = (keys - 2**31).astype(np.int32)
    return (keys ^ (keys >> 31 & 2**31 - 1)).view(np.float32).astype(np.float64)


def _bins_of_thresholds(rough):
    """Places of the steps whose single scores any rate depends on."""
    impostors = rough.accepted()[1]
    places = {_crossing(rough)}
    for exponent in FAR_EXPONENTS:
        first = _first(impostors, impostors[0] // 10**exponent)
        places |= {first - 1, first}  # it lies in the step below, or is the lowest score of this one
    return sorted(place for place in places if 0 <= place < len(impostors))


def _fine_counts(pairs, refined):
    """(2, bins, FINE): the numbers of genuine and impostor pairs with each score of these bins."""
    slots = torch.full((BINS,), -1, dtype=torch.int32, device="cpu")
    slots[torch.from_numpy(refined)] = torch.arange(len(refined), dtype=torch.int32, device="cpu")
    fine = np.zeros((2, len(refined) * FINE), dtype=np.int64)
    for block in pairs.blocks():
        for kind, scores in enumerate(block):
            keys = _keys(scores)
            slot = slots.index_select(0, keys.bitwise_right_shift(LOW_BITS).add_(BINS // 2))
            inside = slot >= 0
            places = slot[inside] * FINE + (keys[inside] & FINE - 1)
            fine[kind] += torch.bincount(places, minlength=fine.shape[1]).numpy()
    return fine.reshape(2, len(refined), FINE)


def _merge(rough, filled, refined, fine):
    """The steps of the bins `filled`, with those of `refined` replaced by their single scores."""
    whole = ~np.isin(filled, refined)
    low = (refined[:, None] << LOW_BITS) + np.arange(FINE)
    seen = fine.any(0)
    keys = np.concatenate([filled[whole] << LOW_BITS, low[seen]])
    counts = [np.concatenate([old[whole], new[seen]]) for old, new in zip(rough[1:3], fine, strict=True)]
    order = keys.argsort()
    undecided = np.dot(rough.genuine[whole].astype(np.float64), rough.impostors[whole].astype(np.float64))
    return Steps(_scores_of_keys(keys[order]), *(part[order] for part in counts), undecided)


def _first(accepted, allowed):
    """The place of the smallest threshold at which at most `allowed` are accepted: accepted falls from step to step."""
    return int(np.searchsorted(-accepted, -allowed))


def tar_at_far(steps, exponent):
    """The Rate at the smallest threshold with FAR <= 10^-exponent; None if there are fewer than 10^exponent impostor pairs."""
    genuine, impostors = steps.accepted()
    allowed = int(impostors[0]) // 10**exponent
    if not allowed:
        return None
    place = _first(impostors, allowed)
    if place == len(steps.scores):  # the highest score is one of too many impostors
        return Rate(float(np.nextafter(steps.scores[-1], np.inf)), 0.0, 0.0)
    return Rate(float(steps.scores[place]), float(genuine[place] / genuine[0]), float(impostors[place] / impostors[0]))


def equal_error_rate(steps):
    """(rate, threshold): where the ROC, its points joined by lines, has FAR = 1 - TAR, and the score of the step it lies in."""
    place = _crossing(steps)
    (tar, far), (tar_above, far_above) = _rates(steps, place), _rates(steps, place + 1)
    share = (1 - tar_above - far_above) / (tar + far - tar_above - far_above)
    return float(far_above + share * (far - far_above)), float(steps.scores[place])


def _crossing(steps):
    """The place of the highest threshold with FAR + TAR >= 1."""
    genuine, impostors = steps.accepted()
    total = genuine / genuine[0] + impostors / impostors[0]
    return int(np.flatnonzero(total >= 1)[-1])


def _rates(steps, place):
    return [float(counts[place:].sum() / counts.sum()) for counts in (steps.genuine, steps.impostors)]


def area_under_roc(steps):
    """(P(a genuine score > an impostor's) + half of P(equal), its largest error): no error where scores were sorted."""
    genuine, impostors = steps.accepted()
    pairs = float(genuine[0]) * float(impostors[0])
    above = genuine - steps.genuine / 2
    return float(np.dot(above, steps.impostors.astype(np.float64)) / pairs), steps.undecided / 2 / pairs


def roc_points(steps, count=200):
    """(FAR, TAR, threshold) of some thresholds, as lists from the strictest: at FARs spread evenly over the decades, and at 1."""
    genuine, impostors = steps.accepted()
    allowed = np.geomspace(1, impostors[0], count).astype(np.int64)
    places = np.unique(np.searchsorted(-impostors, -np.concatenate([[0], allowed])))
    places = places[places < len(steps.scores)][::-1]
    far, tar = impostors[places] / impostors[0], genuine[places] / genuine[0]
    return far.tolist(), tar.tolist(), steps.scores[places].tolist()


def wilson(successes, trials, z=1.959963984540054):
    """(low, high): Wilson's 95% interval of a rate, as if the trials were independent."""
    rate, weight = successes / trials, z * z / trials
    middle = (rate + weight / 2) / (1 + weight)
    half = z / (1 + weight) * (rate * (1 - rate) / trials + weight / 4 / trials) ** 0.5
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def bootstrap(successes, trials, seed=0, resamples=RESAMPLES):
    """(low, high), each (T,): the middle 95% of the rates when identities are drawn anew, with replacement.

    successes: (identities, T). trials: (identities,), each at least one. Images of one identity stay together, since they
    resemble each other; thresholds are as they were.
    """
    random, count = np.random.default_rng(seed), len(trials)
    rates = []
    for _ in range(resamples):
        drawn = np.bincount(random.integers(count, size=count), minlength=count)
        rates.append(drawn @ successes / (drawn @ trials))
    return np.quantile(rates, [0.025, 0.975], axis=0)


class Folds(NamedTuple):
    """The result of a protocol of folds, as LFW's."""

    accuracies: list[float]  # of each fold
    thresholds: list[float]  # of each fold: chosen on the others


def folds(scores, same, count=10):
    """Folds of pairs in their given order: each fold judged at the threshold that is best on the others.

    The threshold lies midway between two neighbouring scores of the others, the highest of those that are equally good.
    """
    scores, same = np.asarray(scores, dtype=np.float64), np.asarray(same, dtype=bool)
    if len(scores) < count:
        raise ValueError(f"{count} folds need at least {count} pairs, got {len(scores)}")
    result = Folds([], [])
    for fold in np.array_split(np.arange(len(scores)), count):
        others = np.ones(len(scores), dtype=bool)
        others[fold] = False
        threshold = best_threshold(scores[others], same[others])
        result.thresholds.append(threshold)
        result.accuracies.append(float(((scores[fold] >= threshold) == same[fold]).mean()))
    return result


def best_threshold(scores, same):
    """The threshold of the highest accuracy, midway between two scores; the highest of those that are equally good."""
    found, places = np.unique(scores, return_inverse=True)
    # Accepting from the k-th distinct score on: what is gained is same pairs, what is lost other pairs.
    gain = np.bincount(places.ravel(), weights=np.where(same, 1.0, -1.0), minlength=len(found))
    right = np.append(gain[::-1].cumsum()[::-1], 0.0)
    best = len(right) - 1 - int(right[::-1].argmax())
    if best in (0, len(found)):
        return float(np.nextafter(found[-1], np.inf) if best else found[0])
    return float((found[best - 1] + found[best]) / 2)
