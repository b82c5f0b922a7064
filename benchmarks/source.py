"""The place and the commit of the source tree. Imports nothing that takes time."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def commit():
    """The commit of the source tree; without a repository, the one that COSFACE_COMMIT names, or None."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return first_line(*command) or os.environ.get("COSFACE_COMMIT")


def first_line(*command):
    """The first line that a command prints; None if it prints nothing or cannot be run."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return lines[0] if lines else None


def search_path():
    """The source tree and PYTHONPATH's folders, as PYTHONPATH."""
    return os.pathsep.join([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
