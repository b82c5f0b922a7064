"""Builds the libraries of a GPU that is not there, for the PyTorch that runs this:  python tests/fake_gpu/build.py DIR HEADERS

HEADERS: a folder with those of CUDA 13.

runtime.cpp and driver.cpp answer what is asked of libcudart and libcuda. Everything else that PyTorch's own libraries leave
undefined is a function that does nothing and returns 0, in a library of the name that they look for.
"""

import collections
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# Prefixes of the functions of each library; those of libcudart are known by their version.
LIBRARIES = {
    "libcublas.so.13": "cublas(?!Lt)",
    "libcublasLt.so.13": "cublasLt",
    "libcudnn.so.9": "cudnn",
    "libcufft.so.12": "cufft",
    "libcufile.so.0": "cuFile",
    "libcupti.so.13": "cupti",
    "libcurand.so.10": "curand",
    "libcusolver.so.12": "cusolver",
    "libcusparse.so.12": "cusparse(?!Lt)",
    "libcusparseLt.so.0": "cusparseLt",
    "libnccl.so.2": "p?nccl",
    "libnvrtc.so.13": "nvrtc",
    "libnvshmem_host.so.3": "nvshmem",
}
RUNTIME = "libcudart.so.13"
# Functions with something to answer beside 0: {pattern: arguments and body}.
ANSWERS = {
    "cublas(Lt)?Create(_v2)?": "void** handle) { *handle = (void*)1; return 0; }",
    "cublasGetVersion_v2": "void* handle, int* version) { *version = 130100; return 0; }",
    "cublasLtGetVersion": "void) { return 130100; }",
    "cublasLtMatmulAlgoGetHeuristic": "void* a, void* b, void* c, void* d, void* e, void* f, void* g, int wanted, char* found, "
    "int* number) { __builtin_memset(found, 0, 96); *number = 1; return 0; }",
    "cublas.*([gG]emm|LtMatmul$|[gG]emv|[dD]ot).*": 'void) { count("product"); return 0; }',
    "nvrtcVersion": "int* major, int* minor) { *major = 13; *minor = 0; return 0; }",
    "nvrtcGet(PTX|CUBIN|ProgramLog)Size": "void* program, unsigned long* size) { *size = 16; return 0; }",
    "nvrtcGet(PTX|CUBIN|ProgramLog)": "void* program, char* text) { *text = 0; return 0; }",
    "nvrtcCreateProgram": 'void** program) { count("compilation"); *program = (void*)1; return 0; }',
    "nvrtcGetLoweredName": 'void* program, char* name, char** lowered) { *lowered = "kernel"; return 0; }',
}
COUNT = """#include <dlfcn.h>
static void count(const char* what) {
  void* runtime = dlopen("libcudart.so.13", RTLD_NOW | RTLD_GLOBAL);
  ((void (*)(const char*))dlsym(runtime, "fake_count"))(what);
}
"""


def main(out, headers):
    out.mkdir(parents=True, exist_ok=True)
    libraries = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    undefined = undefined_in(libraries, LIBRARIES, RUNTIME)
    compiler = ["g++", "-std=c++17", "-w", "-O1", "-shared", "-fPIC", f"-I{headers}"]
    runtime = out / "runtime.o"
    subprocess.run(
        ["g++", "-std=c++17", "-w", "-O1", "-c", "-fPIC", f"-I{headers}", HERE / "runtime.cpp", "-o", runtime], check=True
    )
    answered = set(re.findall(r" [TW] (\w+)", output("nm", "-g", runtime)))
    rest = out / "rest.c"
    rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(undefined[RUNTIME].keys() - answered)))
    subprocess.run(["gcc", "-w", "-c", "-fPIC", rest, "-o", rest.with_suffix(".o")], check=True)
    link([runtime, rest.with_suffix(".o")], out / RUNTIME, {RUNTIME: ["*"]}, "g++")
    subprocess.run([*compiler, HERE / "driver.cpp", "-o", out / "libcuda.so.1", "-Wl,-soname,libcuda.so.1", "-ldl"], check=True)
    (out / "libcuda.so").unlink(missing_ok=True)
    (out / "libcuda.so").symlink_to("libcuda.so.1")
    for library in LIBRARIES:
        source = out / "library.c"
        source.write_text(COUNT + "".join(f"long {name}({_answer(name)}\n" for name in sorted(undefined[library])))
        link([source], out / library, by_version(undefined[library]), "gcc")


def undefined_in(folder, libraries, runtime):
    """{library: {function: its version or None}} of what PyTorch's own, in a folder, leave to others.

    libraries: {name: prefix of its functions}; runtime: CUDA's, whose functions have its name for a version.
    """
    found = collections.defaultdict(dict)
    for library in sorted(folder.glob("*.so*")):
        for symbol in re.findall(r" UND (\S+)", output("readelf", "-W", "--dyn-syms", library)):
            name, version = ([*symbol.replace("@@", "@").split("@"), None])[:2]
            if version == runtime:
                found[runtime][name] = version
            elif not re.match("GLIBC|GCC|CXX|GOMP|OMP", version or ""):
                for other, pattern in libraries.items():
                    if re.match(pattern, name):
                        found[other][name] = version
    return found


def _answer(name):
    return next((body for pattern, body in ANSWERS.items() if re.fullmatch(pattern, name)), "void) { return 0; }")


def by_version(functions):
    """{version: [name, ...]} of {name: version or None}."""
    versions = collections.defaultdict(list)
    for name, version in functions.items():
        versions[version].append(name)
    versions.pop(None, None)
    return versions


def link(sources, library, versions, compiler):
    script = library.with_suffix(".map")
    script.write_text("".join(f"{version} {{ global: {'; '.join(names)}; }};\n" for version, names in versions.items()))
    options = [f"-Wl,--version-script={script}"] if versions else []
    command = [compiler, "-w", "-shared", "-fPIC", *sources, "-o", library, f"-Wl,-soname,{library.name}", *options, "-ldl"]
    subprocess.run(command, check=True)


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
