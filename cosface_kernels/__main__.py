"""python -m cosface_kernels: the same as the `cosface` command."""

from .tools.cli import command

command()
