"""Exceptions that end a stage before its time."""


class Skip(Exception):
    """Raised if the machine lacks something that a stage needs; the message names it."""


class LostDevice(RuntimeError):
    """Raised after an illegal access: nothing else of this process runs on its GPU."""
