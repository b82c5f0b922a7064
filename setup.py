"""Metadata is in pyproject.toml. This file builds csrc/cpu into one shared library, where a compiler is; without one the package
works with its other backends, and `cosface info` says so.
"""

import glob
import os
import platform
import shutil
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = ["csrc/cpu/kernels.cpp", "csrc/cpu/batch.cpp", "csrc/cpu/update.cpp"]
FLAGS = [
    "-std=c++17",
    "-fno-exceptions",
    "-O3",
    "-fopenmp",
    "-ffp-contract=fast",
    "-falign-loops=64",  # a product's loop in as few lines of the instruction cache as it fits, wherever the linker puts it
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
]
MACHINE = os.environ.get("COSFACE_MACHINE") or platform.machine()  # another one for a cross compiler: make test-aarch64
# One binary for every processor: the source is compiled once for each set, and cpu_library.py picks one when it is loaded.
INSTRUCTION_SETS = {"portable": []}
if MACHINE in ("x86_64", "AMD64"):
    # An MMX instruction, which the compiler may pick for 64-bit vectors, leaves the x87 unit that fmod uses in PyTorch unusable.
    FLAGS.append("-mno-mmx")
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
    INSTRUCTION_SETS["avx512bf16"] = [*INSTRUCTION_SETS["avx512"], "-mavx512bf16"]
    INSTRUCTION_SETS["amx"] = [*INSTRUCTION_SETS["avx512bf16"], "-mamx-tile", "-mamx-bf16"]
elif MACHINE == "aarch64":
    INSTRUCTION_SETS["neon"] = ["-DCOSFACE_NEON"]
    INSTRUCTION_SETS["neonbf16"] = ["-march=armv8.2-a+bf16", "-DCOSFACE_NEON"]
# Sets whose instructions are plain functions, to test on any x86-64 what is compiled for them: make test-stand-in.
if os.environ.get("COSFACE_STAND_IN"):
    LEVELS = {"avx512": 1, "avx512bf16": 2, "amx": 3}
    INSTRUCTION_SETS = {"portable": []}
    for name in os.environ["COSFACE_STAND_IN"].split():
        INSTRUCTION_SETS[name] = ["-include", "tests/stand_in/avx512.h", f"-DSTAND_IN={LEVELS[name]}", "-O1"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"] if os.environ.get("COSFACE_SANITIZE") else []


class BuildNative(build_ext):
    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"  # loaded with ctypes: no Python module, no ABI tag

    def build_extension(self, extension):
        path = self.get_ext_fullpath(extension.name)
        Path(path).unlink(missing_ok=True)  # where compiling fails, no older library is taken
        objects = []
        for name, flags in INSTRUCTION_SETS.items():
            if not self.takes(flags):
                print(f"without {name}: {self.compiler.compiler_cxx[0]} is too old for {' '.join(flags)}")
                continue
            objects += self.compiler.compile(
                extension.sources,
                output_dir=os.path.join(self.build_temp, name),
                macros=[("INSTRUCTION_SET", name)],
                extra_preargs=[*FLAGS, *flags, *SANITIZERS],
                depends=extension.depends,
            )
        self.compiler.link_shared_object(objects, path, extra_postargs=["-fopenmp", *SANITIZERS])

    def takes(self, flags):
        """True if the compiler knows these flags: AMX since GCC 11, AVX-512's bfloat16 since GCC 10."""
        if not flags:
            return True
        with tempfile.TemporaryDirectory() as folder:
            empty = Path(folder, "empty.cpp")
            empty.touch()
            try:
                self.compiler.compile([str(empty)], output_dir=folder, extra_preargs=flags)
            except CompileError:
                return False
        return True


class OneWheel(bdist_wheel):
    """A wheel for every Python, and without the library for every platform too."""

    def run(self):
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)  # may hold files that are gone
        super().run()

    def get_tag(self):
        self.root_is_pure = not any(Path(self.bdist_dir).rglob("libcosface_cpu.so"))
        return "py3", "none", super().get_tag()[2]


# optional: where it cannot be compiled, setuptools says so in a line and goes on.
setup(
    ext_modules=[
        Extension(
            "cosface_kernels.ops.backends.libcosface_cpu",
            SOURCES,
            depends=sorted(glob.glob("csrc/cpu/*.h")),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": OneWheel},
)
