"""docs/errors.md has every message of the package, and none that the package has not."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "errors.md").read_text().split("## Messages of PyTorch")[0]
# Rows of the tables whose first heading is "message".
ROWS = [row for table in re.findall(r"^\| message \|.*\n\| ---.*\n((?:\|.*\n)+)", DOCUMENT, re.M) for row in table.splitlines()]
DOCUMENTED = [message for row in ROWS for message in re.findall(r"`([^`]+)`", row.strip("| ").split(" | ")[0])]
# They end a program of ours or answer wrong usage of a command, which shows its own help.
OTHERS = {"SystemExit", "argparse.ArgumentTypeError"}


def template(node):
    """The text of an expression, … for what it inserts; None if it is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) or "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return (template(node.left) or "…") + (template(node.right) or "…")
    return None


def raised(tree):
    """Messages of raise, warnings.warn and a command's fail, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) not in OTHERS:
            call = node.exc
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "fail"):
            call = node
        else:
            continue
        if call.args and (text := template(call.args[0])) and len(re.findall(r"\w+", text)) > 1:
            yield node.lineno, text


@functools.cache
def trees():
    return {path: ast.parse(path.read_text()) for path in sorted((ROOT / "cosface_kernels").rglob("*.py"))}


@functools.cache
def texts():
    """Every text in the package's code but docstrings, each once."""
    nodes = [node for tree in trees().values() for node in ast.walk(tree)]
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    return {text for node in nodes if node not in docstrings and (text := template(node))}


def matches(message, text):
    """True if a text has the parts of a documented message, in their order."""
    place = 0
    for part in message.strip("… ").split("…"):
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


@pytest.mark.parametrize("message", DOCUMENTED)
def test_message_exists(message):
    assert any(matches(message, text) for text in texts()), "no such text in the package"


def test_every_message_is_there():
    missing = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path, tree in trees().items()
        for line, text in raised(tree)
        if not any(matches(message, text) for message in DOCUMENTED)
    ]
    assert not missing, "docs/errors.md lacks:\n" + "\n".join(missing)
