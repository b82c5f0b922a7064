"""Predicts `exponentials` on sm_90 from its machine code, on a machine that has no GPU:  python tests/clocks.py [bytes of L2]

Clocks of one tile on one processor (SM), were each unit the only limit, and the share of the tensor cores' peak that follows:

    tensor    2 BLOCK_N BLOCK_C D / 4096          ex2      BLOCK_N BLOCK_C / 16
    issue     warp instructions / 4               shared   bytes that tiles write and tensor cores read, / 128
    l2        bytes of both operands / what L2 delivers to each processor in a clock, a guess

With two programs on a processor one's epilogue runs under the other's product: the tile takes as long as its busiest unit. A lone
program runs them one after the other. Not counted: waits, clock throttling, the last wave.
benchmarks/predictions.py makes a step of that.
"""

import re
import sys

from aot import BFLOAT16, EXPONENTIALS, SLAB, Call, asking, launches
from compiled_facts import cuobjdump, resources

L2_BYTES = float(sys.argv[1]) if len(sys.argv) > 1 else 47.0
PROCESSOR = {"registers": 65536, "shared": 227 * 1024, "shared_of_a_block": 1024}
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.M)
CLASSES = {"FP32": r"F(FMA|ADD|MUL|MNMX)", "select": r"F?SEL", "predicate": r"[FIU]+SETP|PLOP3", "convert": r"F2F"}


def instructions(code):
    """(of one pass of the product's loop, of all else) as lists of opcodes."""
    listing = [(int(address, 16), name, rest) for address, name, rest in INSTRUCTION.findall(code)]
    products = [address for address, name, _ in listing if name.startswith("HGMMA")]
    jumps = [
        (int(rest.split("0x")[-1], 16), address) for address, name, rest in listing if name.startswith("BRA") and "0x" in rest
    ]
    loops = [(start, end) for start, end in jumps if any(start <= address <= end for address in products)]
    start, end = min(loops, key=lambda loop: loop[1] - loop[0])
    inside = [name for address, name, _ in listing if start <= address <= end]
    return inside, [name for address, name, _ in listing if not start <= address <= end]


def clocks(size, launch):
    """One row of the table, as a dict."""
    n, c, k, warps = (launch.numbers[name] for name in ("BLOCK_N", "BLOCK_C", "BLOCK_K", "num_warps"))
    loop, once = instructions(cuobjdump("-sass", launch.compiled))
    registers, shared = resources(launch.compiled)["registers"], launch.compiled.metadata.shared
    programs = min(
        PROCESSOR["registers"] // (-(-registers // 8) * 8 * 32 * warps),
        PROCESSOR["shared"] // (shared + PROCESSOR["shared_of_a_block"]),
    )
    elements = n * c
    exchanged = sum(name.startswith(("STS", "LDS")) for name in once) * warps * 32 * 16
    read = 2 * size * (n + c * n // 64)  # each 64 rows of a product read all of the classes' tile
    product = {
        "tensor": 2 * elements * size / 4096,
        "shared": (2 * size * (n + c) + read) / 128,
        "l2": 2 * size * (n + c) / L2_BYTES,
        "issue": len(loop) * size / k * warps / 4,
    }
    epilogue = {"ex2": elements / 16, "issue": len(once) * warps / 4, "shared": exchanged / 128}
    if programs > 1:
        total = max(product.get(unit, 0) + epilogue.get(unit, 0) for unit in {**product, **epilogue})
    else:
        total = max(product.values()) + max(epilogue.values())
    each = elements / (warps * 32)  # elements of one thread
    counts = {name: sum(bool(re.match(pattern, opcode)) for opcode in once) / each for name, pattern in CLASSES.items()}
    return {
        **{"registers": registers, "shared KB": shared / 1024, "programs": programs},
        **{unit: product.get(unit, 0) + epilogue.get(unit, 0) for unit in ("tensor", "ex2", "issue", "shared", "l2")},
        **{"total": total, "% of peak": 100 * product["tensor"] / total},
        **{"once": len(once) / each, **counts},
    }


def main():
    calls = [
        Call(num_classes=num_classes, size=size, dtypes=(BFLOAT16, BFLOAT16), frozen=True)
        for size in (256, 512)
        for num_classes in (SLAB, SLAB + 80)
    ]
    calls += [asking(call, exponentials=options) for call in (calls[0], calls[2]) for options in EXPONENTIALS]
    header = None
    for launch in launches(90, calls):
        if not launch.kernel.startswith("exponential"):
            continue
        shape = "x".join(str(launch.numbers[f"BLOCK_{axis}"]) for axis in "NCK")
        name = shape + " ragged" * launch.numbers["RAGGED"] + " store" * (launch.kernel == "exponentials")
        name += "".join(f" {option.lower()}" for option in ("DESCRIPTORS", "HALVES") if launch.numbers.get(option))
        for size in (512, 256, 128):
            row = clocks(size, launch)
            if header is None:
                header = f"{'tile':>44} {'D':>4} " + " ".join(f"{unit:>9}" for unit in row)
                print(header)
            values = (f"{value:>9{'.0f' if value >= 100 else '.3g'}}" for value in row.values())
            print(f"{name:>44} {size:>4} " + " ".join(values), flush=True)


if __name__ == "__main__":
    main()
