"""Compiles every launch configuration of the Triton kernels ahead of time, for chips that need not be here, and prints one JSON
line for each: kernel, chip, registers, bytes of stack (spills), bytes of shared memory, whether tensor cores are used.

A process of its own, because kernels decorated under TRITON_INTERPRET=1 cannot be compiled:  python tests/aot.py [90 100 ...]
"""

import itertools
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

from cosface_kernels.backends import triton_backend, triton_kernels, triton_rows

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TENSOR_CORE = {80: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*MMA"}
EMBEDDING_SIZES = (64, 512)


def configurations(chip):
    """(name, kernel, types of pointers other than float32, constexprs, launch options) of everything that a call can launch."""
    yield from exponentials(chip)
    for parts, (first, last) in itertools.product((1, triton_backend.PULL_PARTS_MAX), itertools.product((False, True), repeat=2)):
        # None for what is not read or written.
        unused = ["sum_ptr"] * (first and last) + ["total_ptr", "pull_ptr"] * (not last)
        constants = {"PARTS": parts, "FIRST": first, "LAST": last, **triton_backend.PULL_BLOCK, **dict.fromkeys(unused)}
        pointers = {"sum_ptr": "fp64", "total_ptr": "fp64"}
        name = f"add_pull {parts}" + " first" * first + " last" * last
        yield name, triton_kernels.add_pull, pointers, *split(constants)
    yield "order_targets", triton_rows.order_targets, INDICES, *split(triton_rows.ORDER_BLOCKS)
    for size, raw in itertools.product(EMBEDDING_SIZES, TYPES.values()):
        blocks = triton_kernels.row_blocks(size)
        pointers = {"rows_ptr": raw, "x_ptr": raw, "weight_ptr": raw, "out_ptr": raw, **INDICES}
        for normalize in (True, False):
            name = f"{raw} {size}" + " as they are" * (not normalize)
            for unit in ("bf16", "fp32"):
                config = {"NORMALIZE": normalize, **blocks}
                yield (
                    f"normalize_rows {unit} {name}",
                    triton_kernels.normalize_rows,
                    pointers | {"unit_ptr": unit},
                    *split(config),
                )
            searched = {"NORMALIZE": normalize, "SEARCH_STEPS": 10, **blocks}
            yield f"project_rows {name}", triton_kernels.project_rows, pointers, *split(searched)
        blocks = triton_kernels.row_blocks(size, triton_rows.ROW_BLOCK_ELEMENTS)
        yield f"enter_rows {raw} {size}", triton_rows.enter_rows, pointers, *split(blocks)
        yield f"x_gradient_rows {raw} {size}", triton_rows.x_gradient_rows, pointers, *split(blocks)
        yield f"sum_targets {raw} {size}", triton_rows.sum_targets, pointers, *split({"BLOCK_D": blocks["BLOCK_D"]})


INDICES = dict.fromkeys(("label_ptr", "target_ptr", "class_ptr", "order_ptr", "repeat_ptr", "target_row_ptr"), "i64")


def exponentials(chip):
    """The table of `triton_backend.tiles`, each entry of it once, for one row to a class and for several."""
    cases = itertools.product((torch.bfloat16, torch.float32), (1, 3), (False, True), ("ieee", "tf32"))
    for dtype, centers, ragged, precision in cases:
        if dtype == torch.bfloat16 and precision == "tf32":
            continue
        sizes = itertools.product((64, 4096), (64, 512))
        configs = {tuple(triton_backend.tiles(*size, dtype, divmod(chip, 10), centers).items()) for size in sizes}
        forms = ((False, False), (True, False), (False, True)) if centers == 1 else ((False, True), (True, True))
        for config, (store, maximum) in itertools.product(sorted(configs), forms):
            constants = {"STORE": store, "MAXIMUM": maximum, "CENTERS": centers, "RAGGED": ragged}
            constants |= {"PRECISION": precision, "UPCAST": False}
            stored = TYPES[dtype]
            pointers = {"x_ptr": stored, "unit_ptr": stored, "e_ptr": "fp32" if maximum else stored}
            pointers |= {"target_ptr": "i64", "partial_ptr": "fp64"}
            constants |= {} if store else {"e_ptr": None}
            constants |= {"shift_ptr": None} if maximum else {}
            shape = "x".join(str(value) for name, value in config if name.startswith("BLOCK"))
            flags = {"ragged": ragged, "store": store, "maximum": maximum, "centers": centers > 1}
            name = " ".join(["exponentials", stored, precision, shape, *(flag for flag, on in flags.items() if on)])
            yield name, triton_kernels.exponentials, pointers, *split(constants | dict(config))


def split(config):
    """A launch's keywords as (constexprs, options)."""
    options = {name: value for name, value in config.items() if name.startswith("num_")}
    return {name: value for name, value in config.items() if name not in options}, options


def compile_for(chip, kernel, pointers, constants, options):
    """The compiled kernel; arguments typed and aligned as the launcher passes them at the usual sizes."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + pointers.get(name, "fp32")
        elif name in ("log2_scale", "scale"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
        if name.endswith("_ptr") or name in (
            "D",
            "D_padded",
            "stride_row",
            "x_stride_row",
            "stride_e",
            "first_class",
            "first_row",
        ):
            attributes[(index,)] = [["tt.divisibility", 16]]
        if name in ("stride_column", "x_stride_column", "label_stride"):  # the launcher makes a stride of 1 a constant
            constants = {**constants, name: 1}
            signature[name] = "constexpr"
    attributes = {key: value for key, value in attributes.items() if signature[kernel.arg_names[key[0]]] != "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def resources(compiled, chip):
    """Registers and stack as ptxas reports them, and whether the machine code uses the chip's matrix instructions."""
    usage, code = disassemble(compiled)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "tensor_core": bool(re.search(rf"\b{TENSOR_CORE[chip]}", code)),
    }


def disassemble(compiled):
    """What cuobjdump says of a kernel's resources, and its machine code."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(compiled.asm["cubin"])
        runs = [subprocess.run([tool, how, path], capture_output=True, text=True, check=True) for how in ("-res-usage", "-sass")]
    return runs[0].stdout + runs[0].stderr, runs[1].stdout


def main():
    for chip in [int(argument) for argument in sys.argv[1:]] or sorted(TENSOR_CORE):
        for name, kernel, pointers, constants, options in configurations(chip):
            compiled = compile_for(chip, kernel, pointers, constants, options)
            print(json.dumps({"chip": chip, "name": name, **resources(compiled, chip)}), flush=True)


if __name__ == "__main__":
    main()
