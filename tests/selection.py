"""The mark `slow`: `make test` leaves these tests out. Three ways to set it:

    @pytest.mark.slow                                        # the whole test
    [1, pytest.param(2, marks=pytest.mark.slow)]             # a parameter
    @slow_when(lambda backend, shape: interpreted(backend) and shape != SHAPES[0])     # where that holds of its parameters

Slow is what takes seconds and whose answer seldom changes: compiling ahead of time, Triton's interpreter beyond one shape and
kind for each form, torch.compile beyond three margins, tables of a million classes, long trainings, kills, full disks, more than
two ranks, benchmarks in processes of their own. All arithmetic of every backend, and every public behaviour, has a test that is
not slow.
"""

import itertools

import pytest
import torch

HAS_GPU = torch.cuda.is_available()


def slow_when(condition):
    return pytest.mark.slow_when.with_args(condition)


def pairs(*parameters, first=()):
    """Few cases of the parameters' product, `first` among them, in which any two values of two parameters meet.

    For grids whose parameters change code of their own: an error needs a value or two to show, seldom three.
    """

    def met(case):
        return set(itertools.combinations(enumerate(case), 2))

    cases, product = list(first), list(itertools.product(*(range(len(values)) for values in parameters)))
    places = [tuple(values.index(value) for values, value in zip(parameters, case, strict=True)) for case in cases]
    left = set().union(*map(met, product)).difference(*map(met, places))
    while left:
        best = max(product, key=lambda case: len(left & met(case)))
        left -= met(best)
        cases.append(tuple(values[place] for values, place in zip(parameters, best, strict=True)))
    return cases


def slab_loop_when(condition):
    """Marks a test that the attention-shaped kernels do not serve where condition(parameters...) holds: it has no case "attend".

    conftest.py fails a case "attend" in which nothing attends, and one of "triton" so marked whose calls the kernels would serve.
    """
    return pytest.mark.slab_loop.with_args(condition)


slab_loop = slab_loop_when(lambda: True)


def repeats_when(condition):
    """Marks a grid without the cases where condition(parameters...) holds: they would repeat others."""
    return pytest.mark.repeats.with_args(condition)


def interpreted(backend):
    """Triton's interpreter takes some 100 times as long as a compiled kernel."""
    return backend in ("triton", "attend") and not HAS_GPU
