"""Checks of callers' arguments. Every message names the argument, what it got and what it takes. docs/errors.md lists them."""

# ruff: noqa: F403 (callers take a check from here, whatever file it is in)

from .batch import *
from .calls import *
from .options import *
from .tensors import *
from .values import *
