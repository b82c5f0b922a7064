"""Does a type checker see real signatures, accept right calls and report wrong ones? (The package ships py.typed.)"""

import inspect
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import cosface_kernels
from cosface_kernels import margins, reference, theory
from cosface_kernels.compat import insightface

USER = Path(__file__).with_name("typed_user.py")
PUBLIC = [getattr(cosface_kernels, name) for name in cosface_kernels.__all__]
PUBLIC += [getattr(insightface, name) for name in insightface.__all__]
PUBLIC += [
    each
    for module in (reference, theory)
    for name, each in vars(module).items()
    if inspect.isfunction(each) and each.__module__ == module.__name__ and not name.startswith("_")
]
PUBLIC += [each for each in vars(margins).values() if inspect.isclass(each) and issubclass(each, margins.Margin)]


def functions(public):
    """A function, or a class's own constructor and public methods, in the package."""
    if inspect.isfunction(public):
        yield public
    elif inspect.isclass(public):
        for name in dir(public):
            each = inspect.getattr_static(public, name)
            each = getattr(each, "__func__", each)
            is_ours = inspect.isfunction(each) and each.__module__.startswith("cosface_kernels")
            if (
                is_ours and (name == "__init__" or not name.startswith("_")) and each.__qualname__ != "Margin.psi"
            ):  # a checker sees a callable of any terms
                yield each


def test_everything_public_is_annotated():
    assert resources.files(cosface_kernels).joinpath("py.typed").is_file()
    found = {each.__qualname__: inspect.signature(each) for public in PUBLIC for each in functions(public)}
    assert {"cosface_loss", "MarginSoftmaxLoss.forward", "Fused.step", "translate", "MagFace.psi"} <= found.keys()
    for name, signature in found.items():
        parameters = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
        missing = [each.name for each in parameters if each.annotation is each.empty]
        assert not missing, (name, missing)


@pytest.mark.slow
def test_a_users_file(tmp_path):
    """mypy, over all of PyTorch: 20 s."""
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--no-error-summary", f"--cache-dir={tmp_path}", USER]
    output = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=USER.parents[1]).stdout
    lines = USER.read_text().splitlines()
    reported = {int(number) for number in re.findall(r"^\S+:(\d+): error:", output, re.M)}
    assert reported == {number for number, line in enumerate(lines, 1) if line.endswith("  # error")}, output
    revealed = re.findall(r'^\S+:(\d+): note: Revealed type is "(.*)"$', output, re.M)
    assert len(revealed) == sum(line.startswith("reveal_type(") for line in lines)
    for number, found in revealed:
        assert re.sub(r"(?:\w+\.)+(?=\w)", "", found) == lines[int(number) - 1].rpartition("  # ")[2]
