"""Does the package's wheel serve every Python, with the library that is in it, and every platform where no compiler is?"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import setuptools

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
LOSS = """
import warnings
warnings.simplefilter("always")
import torch
from cosface_kernels import CosFaceLoss
from cosface_kernels.ops.backends import cpu_library
head = CosFaceLoss(16, 50)
for _ in range(2):
    head(torch.randn(4, 16), torch.arange(4)).backward()
print(head.weight.grad.isfinite().all().item(), cpu_library.LIBRARY, *cpu_library.available())
"""


def run(*command, cwd, **variables):
    """(stdout, stderr) of a command that imports nothing of this checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COSFACE_CPU_LIBRARY")}
    process = subprocess.run(command, cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout, process.stderr


def sources(folder):
    """A clone, without what was built in it."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "cosface_kernels", folder / "cosface_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def wheel(clone, compiler):
    """(the wheel that setup.py makes, its output). setup.py finds setuptools there and nothing else, no PyTorch."""
    alone = clone / "setuptools-alone"
    alone.mkdir()
    site = Path(setuptools.__file__).parents[1]
    for path in (site / "setuptools", site / "_distutils_hack", *site.glob("setuptools-*.dist-info")):
        (alone / path.name).symlink_to(path)
    command = sys.executable, "-S", "setup.py", "bdist_wheel"
    output = run(*command, cwd=clone, PYTHONPATH=str(alone), CC=str(compiler), CXX=str(compiler))
    (found,) = (clone / "dist").iterdir()
    return found, "".join(output)


def install(found, folder):
    """The Python of a fresh environment with the wheel, and what this environment has beside the package."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    command = sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", found
    run(*command, cwd=folder.parent, PIP_DISABLE_PIP_VERSION_CHECK="1")
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    return python, site / "cosface_kernels"


def test_one_wheel_for_every_python(tmp_path):
    """And a script in the clone's folder, where Python takes the clone instead, is warned."""
    clone = sources(tmp_path / "clone")
    compiler = tmp_path / "compiler"  # in a third of the time: no kernel is timed here
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    found, _ = wheel(clone, compiler)
    interpreter, abi, platform = found.stem.split("-")[2:]
    assert (interpreter, abi) == ("py3", "none") and platform.startswith("linux_")
    python, package = install(found, tmp_path / "fresh")
    output, warnings = run(python, "-c", LOSS, cwd=tmp_path)
    finite, library, best, *_ = output.split()
    assert finite == "True" and Path(library) == package / "ops" / "backends" / "libcosface_cpu.so"
    assert best in ("avx512bf16", "avx512", "avx2", "neon", "portable") and "native CPU kernels" not in warnings

    (clone / "train.py").write_text(LOSS)
    output, warnings = run(python, "train.py", cwd=clone)
    finite, library = output.split()
    assert finite == "True" and Path(library).is_relative_to(clone)
    assert warnings.count("the native CPU kernels are missing") == 1 and "in a source tree with -e" in warnings


def test_a_machine_without_a_compiler(tmp_path):
    """Building says so in a line, the wheel is one for all platforms, and its first loss warns once."""
    clone = sources(tmp_path / "clone")
    built = clone / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    left = built / "cosface_kernels" / "gone.py"  # of an earlier version
    left.parent.mkdir(parents=True)
    left.touch()
    found, output = wheel(clone, "no-such-compiler")
    assert found.name.endswith("-py3-none-any.whl")
    (line,) = [line for line in output.splitlines() if "libcosface_cpu" in line and "failed" in line]
    assert "no-such-compiler" in line
    python, package = install(found, tmp_path / "fresh")
    output, warnings = run(python, "-c", LOSS, cwd=tmp_path)
    finite, library = output.split()
    assert finite == "True" and Path(library).is_relative_to(package) and not Path(library).exists()
    assert not (package / "gone.py").exists()
    assert warnings.count("the native CPU kernels are missing") == 1
    text, _ = run(python, "-m", "cosface_kernels", "info", cwd=tmp_path)
    assert "native kernels   it was not built" in text and "C++ compiler" in text
    assert "its native library cannot be used" in text
