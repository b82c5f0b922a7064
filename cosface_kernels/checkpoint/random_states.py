"""The states of the random number generators that a training draws from: PyTorch's, Python's, CUDA's and NumPy's if in use."""

import random
import sys

import torch


def states():
    """The states of this process's generators, as plain data."""
    found = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        found["numpy"] = (name, keys.tolist(), *rest)
    return found


def restore(states, *, tries=False):
    """Set this process's generators to these states; with tries new ones instead, which raise for a state that is none."""
    of_torch, of_python = (torch.Generator(), random.Random()) if tries else (torch.default_generator, random)
    of_torch.set_state(states["torch"])
    of_python.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        set_cuda = torch.Generator("cuda").set_state if tries else torch.cuda.set_rng_state
        set_cuda(states["cuda"])
    if "numpy" in states:
        import numpy

        of_numpy = numpy.random.RandomState() if tries else numpy.random
        of_numpy.set_state(states["numpy"])
