"""Compiles every launch configuration of the Triton kernels ahead of time, for chips that need not be here, and prints one JSON
line for each: kernel, chip, registers, bytes of stack (spills), bytes of shared memory, whether tensor cores are used.

A process of its own, because kernels decorated under TRITON_INTERPRET=1 cannot be compiled:  python tests/aot.py [90 100 ...]
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cosface_kernels.backends import triton_backend, triton_kernels

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TENSOR_CORE = {80: r"\bHMMA", 90: r"\bHGMMA", 100: r"\bUTC\w*MMA"}
EMBEDDING_SIZES = (64, 512, 1024)


def configurations():
    """(name, kernel, signature, constexprs, launch options) of everything that a call can launch."""
    for dtype, stored in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        config = dict(triton_backend.tiles(dtype))
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        for store, maximum in ((False, False), (True, False), (False, True)):
            for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
                constants = {"STORE": store, "MAXIMUM": maximum, "PRECISION": precision, "UPCAST": False, **config}
                pointers = {"x_ptr": stored, "unit_ptr": stored, "e_ptr": stored, "target_ptr": "i64"}
                if not store:
                    constants["e_ptr"] = pointers.pop("e_ptr") and None
                name = f"exponentials {stored} {precision}" + " store" * store + " maximum" * maximum
                yield name, triton_kernels.exponentials, pointers, constants, options
    for size in EMBEDDING_SIZES:
        blocks = dict(triton_backend.row_blocks(size))
        options = {"num_warps": blocks.pop("num_warps")}
        for raw in TYPES.values():
            for unit in ("bf16", "fp32"):
                pointers = {"rows_ptr": raw, "unit_ptr": unit}
                yield f"normalize_rows {raw} {unit} {size}", triton_kernels.normalize_rows, pointers, blocks, options
            pointers = {"rows_ptr": raw, "out_ptr": raw, "slot_ptr": "i64", "target_class_ptr": "i64"}
            yield f"project_rows {raw} {size}", triton_kernels.project_rows, pointers, blocks, options


def compile_for(chip, kernel, pointers, constants, options):
    """The compiled kernel; arguments typed and aligned as the launcher passes them at the usual sizes."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + pointers.get(name, "fp32")
        elif name == "log2_scale":
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
        if name.endswith("_ptr") or name in ("D", "D_padded", "stride_row", "stride_e"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    if "stride_column" in kernel.arg_names:  # contiguous rows: the launcher makes a stride of 1 a constant
        constants = {**constants, "stride_column": 1}
        signature["stride_column"] = "constexpr"
    attributes = {key: value for key, value in attributes.items() if signature[kernel.arg_names[key[0]]] != "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def resources(compiled, chip):
    """Registers and stack as ptxas reports them, and whether the machine code uses the chip's matrix instructions."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(compiled.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
        code = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups())
    return {
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "tensor_core": bool(re.search(TENSOR_CORE[chip], code)),
    }


def main():
    for chip in [int(argument) for argument in sys.argv[1:]] or sorted(TENSOR_CORE):
        for name, kernel, pointers, constants, options in configurations():
            compiled = compile_for(chip, kernel, pointers, constants, options)
            print(json.dumps({"chip": chip, "name": name, **resources(compiled, chip)}), flush=True)


if __name__ == "__main__":
    main()
