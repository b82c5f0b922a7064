"""Facts of a compiled kernel, kept for the next time, so that Triton compiles only what has changed.

In .cache/ahead_of_time, a file for each chip. Their key is Triton's own, of the kernel's source and all that it calls, its
arguments and options, the chip, Triton itself and its ptxas; and this file, which finds the facts.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler import make_backend
from triton.runtime.cache import get_cache_key

TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
FOLDER = Path(__file__).parents[1] / ".cache" / "ahead_of_time"


def resources(compiled, log=""):
    """Registers and stack as ptxas reports them, if there is one of the chip's matrix instructions, warnings in ptxas' log."""
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump("-res-usage", compiled)).groups())
    return {
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "tensor_core": TENSOR_CORE[compiled.metadata.target.arch] in compiled.asm["ptx"],
        "fma": compiled.asm["ptx"].count("fma.rn.f32"),
        "warnings": re.findall("Potential Performance Loss.*", log),
    }


def cuobjdump(option, compiled):
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


class Known:
    """In place of a compiled kernel, which has nothing to run on."""

    def __init__(self, facts):
        self.facts = facts


@contextlib.contextmanager
def remembered(name, forget=True):
    """Inside, kernels are Known, their facts those of `resources`.

    forget: at the end the file loses what was not asked for.
    """
    path, compile = FOLDER / f"{name}.json", triton.compiler.compile
    known = json.loads(path.read_text()) if path.exists() else {}
    asked = set()

    def compile_once(source, target, options, **rest):
        key = _key(source, target, options)
        asked.add(key)
        if key not in known:
            known[key] = _resources_of(lambda: compile(source, target=target, options=options, **rest))
            _write(path, known)
        return Known(known[key])

    with mock.patch.object(triton.compiler, "compile", compile_once):
        yield
    if forget:
        _write(path, {key: known[key] for key in asked})


def _key(source, target, options):
    backend = make_backend(target)
    options = backend.parse_options({**options, **source.parse_options()})
    kernel = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
    return hashlib.sha256(kernel.encode() + Path(__file__).read_bytes()).hexdigest()


def _resources_of(compile):
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(triton.knobs.cache, "dir", folder),
        mock.patch.object(triton.knobs.nvidia, "dump_ptxas_log", True),
        contextlib.redirect_stdout(io.StringIO()) as log,
    ):
        compiled = compile()
        return resources(compiled, log.getvalue())


def _write(path, facts):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(facts, file)
    os.replace(file.name, path)
