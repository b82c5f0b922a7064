"""Builds empty libraries in place of CUDA's, with which a PyTorch for GPUs runs on a CPU:  python tests/fake_gpu/no_gpu.py DIR

For the PyTorch that runs this, of any CUDA. Asked for GPUs, they answer that there is none.
"""

import importlib.util
import re
import sys
from pathlib import Path

import build

FUNCTIONS = {**{library.partition(".so")[0]: functions for library, functions in build.LIBRARIES.items()}, "libcuda": "cu[A-Z]"}
NO_DEVICE = 100  # of the runtime and of the driver


def main(out):
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    wanted = build.output("readelf", "-d", *folder.glob("*.so*"))
    names = {name: name.partition(".so")[0] for name in re.findall(r"NEEDED.*\[(.*)\]", wanted)}
    runtime = next(name for name in names if names[name] == "libcudart")
    libraries = {name: FUNCTIONS[names[name]] for name in names if names[name] in FUNCTIONS}
    undefined = build.undefined_in(folder, libraries, runtime)
    for library in (runtime, *libraries):
        answer = NO_DEVICE if names[library] in ("libcudart", "libcuda") else 0
        functions = {name: f"long {name}(void) {{ return {answer}; }}\n" for name in sorted(undefined[library])}
        if library == runtime:  # what PyTorch's libraries call while they are loaded
            functions["__cudaRegisterFatBinary"] = "void* __cudaRegisterFatBinary(void) { static int it; return &it; }\n"
        source = out / "library.c"
        source.write_text("".join(functions.values()))
        build.link([source], out / library, build.by_version(undefined[library]), "gcc")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
