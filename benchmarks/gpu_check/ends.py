"""How a stage may end before its time."""


class Skip(Exception):
    """The machine lacks something that a stage needs; the message says what."""


class LostDevice(RuntimeError):
    """After an illegal access nothing else of this process runs on its GPU."""
