"""Do the native kernels for AMX pass the native tests where plain functions stand in for the instructions of AVX-512 and AMX?"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs a compiler for x86-64")
def test_amx(tmp_path):
    """`make test-stand-in` does the same for AVX-512 too, and compiles with -O3 what is not a stand-in."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)

    def run(*command, **variables):
        command = [sys.executable, *command]
        result = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
        return result.stdout

    folders = "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)
    run("setup.py", "-q", "build_ext", *folders, COSFACE_STAND_IN="amx", CC=str(compiler), CXX=str(compiler))
    library = tmp_path / "cosface_kernels/ops/backends/libcosface_cpu.so"
    tests = "-p", "no:cacheprovider", "tests/test_native.py", "-k", "amx and (accuracy or threads or checked)"
    assert " passed" in run("-m", "pytest", *tests, COSFACE_CPU_LIBRARY=str(library))
