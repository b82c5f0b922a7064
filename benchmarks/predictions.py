"""Predicts the time of a step of the triton backend on an H100 or H200, by arithmetic:  python -m benchmarks.predictions

Nothing here was measured. `seconds(case)` is (fastest, slowest) or None. A case is one measurement of a stage of
`benchmarks.gpu_check`, which prints the two beside the time. Does not import torch.

    exponentials   waves of tiles x the clocks of one. A tile's clocks are those of its busiest unit where two programs share a
                   processor, else of its product and then its epilogue: `python tests/clocks.py 47` counts them.
    product        2 M N K at the rate that cuBLAS reaches for that K, times the waves' rounding
    rows           bytes over the memory's bandwidth: of w, ŵ, dŵ, dW, and what add_pull reads and writes of U
    step           the sum. Fastest: E is written and read under the products. Slowest: by itself, and with L2 at its slowest
"""

import math

PROCESSORS = 132
CLOCK = 1.75e9, 1.6e9  # under load, of 1.98: an H800 that multiplied without pause settled near 1.6
FLOPS_A_CLOCK = 4096  # of a processor, in bfloat16
L2_BYTES = 47.0, 36.0  # bytes that L2 delivers to a processor in a clock: DeepGEMM's model of Hopper, and a slow guess
BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}  # bytes a second, read and written, of a copy
MEMORY = {"H100": 85_027_979_264, "H200": 150_000_000_000}
CUBLAS = {512: 588e12, 1024: 588e12, 4096: 646e12}  # by K, at 8192 x 8192 on an H100: Triton's Gluon tutorial 07
ATTENTION = 640e12, 0.5 * FLOPS_A_CLOCK * PROCESSORS * CLOCK[1]  # of an attention-shaped kernel, flops a second: FlashMLA's, half
# Clocks of a tile beside its product and L2, as `python tests/clocks.py 47` counts them for (E stored, sums alone): what shared
# memory takes for each column of D and once, and the epilogue of a lone program.
TILES = {
    "128x128x64": {"shape": (128, 128), "programs": 2, "shared": (10, (768, 256)), "issue": 2.28, "once": (1486, 1230)},
    "128x256x64": {"shape": (128, 256), "programs": 1, "shared": (16, (1376, 352)), "issue": 2.63, "once": (2600, 2088)},
}
DEVICE = "H200"


def seconds(case, device=DEVICE):
    """(fastest, slowest) of one call of a case, or None where nothing is predicted."""
    device = next((name for name in BANDWIDTH if name in (device or "")), DEVICE)
    predict = {"exponentials": exponentials, "product": product, "step": step, "features": features, "attend": attend}
    function = predict.get(case.get("kind"))
    try:
        return tuple(function(case, device, best) for best in (0, 1)) if function else None
    except KeyError:  # a tile, say, that nobody has counted
        return None


def exponentials(case, device, end):
    n, b, d = case["rows"], case["classes"], case["size"]
    tile, stored = TILES[case["tile"]], case["store"]
    height, width = tile["shape"]
    tiles = math.ceil(n / height) * math.ceil(b / width)
    waves = math.ceil(tiles / (PROCESSORS * tile["programs"])) * tile["programs"]
    ceiling = 2 * n * b * d / _cublas(d) if end == 0 and d >= 512 else 0.0
    return max(waves * _tile_clocks(tile, d, stored, L2_BYTES[end]) / CLOCK[end], ceiling)


def _tile_clocks(tile, d, stored, l2_bytes):
    height, width = tile["shape"]
    each, once = tile["shared"][0], tile["shared"][1][0 if stored else 1]
    epilogue = tile["once"][0 if stored else 1]
    product = [2 * height * width * d / FLOPS_A_CLOCK, 2 * d * (height + width) / l2_bytes]
    if tile["programs"] > 1:
        return max(*product, each * d + once, tile["issue"] * d + epilogue)
    return max(*product, each * d) + epilogue


def product(case, device, end):
    """E ŵ in parts, (N x B)(B x D), or with parts=0 Eᵀ x̂, (B x N)(N x D)."""
    n, b, d, parts = case["rows"], case["classes"], case["size"], case["parts"]
    out, summed = (n, b // parts) if parts else (b, n)
    tiles = math.ceil(out / 128) * math.ceil(d / 256) * max(parts, 1)
    waves = tiles / PROCESSORS
    return 2 * n * b * d / _cublas(summed) * math.ceil(waves) / waves * CLOCK[0] / CLOCK[end]


def _cublas(summed):
    """cuBLAS's flops a second for sums of that length, interpolated between published ones."""
    (low, slow), (high, fast) = (512, CUBLAS[512]), (4096, CUBLAS[4096])
    if summed <= 1024:
        return slow * min(1.0, summed / low)
    return slow + (fast - slow) * min(1.0, (math.log(summed) - math.log(1024)) / (math.log(high) - math.log(1024)))


def pull_parts(n, d):
    return max(1, min(16, 128 // (math.ceil(n / 128) * math.ceil(d / 256))))


def slab_rows(n, d, device):
    """Rows of a slab, by the package's own rule: cosface_kernels/ops/slabs.py."""
    wave = 64 * PROCESSORS
    busy = math.ceil(2**31 * PROCESSORS / (d * (4 * n + 1024)))
    fits = MEMORY[device] // 128 // (2 * (n + d) + 4 * d)
    return min(math.ceil(busy / wave), fits // wave) * wave


def kept_share(case, device):
    """The share of E that is kept with a budget: "all", "none", or "auto", the gradient's bytes or an eighth of the memory."""
    if case["budget"] != "auto":
        return 1.0 if case["budget"] == "all" else 0.0
    gradient = 4 * case["classes"] * case["size"]
    return min(1.0, min(gradient, MEMORY[device] / 8) / (2 * case["rows"] * case["classes"]))


def step_parts(case, device, end):
    """{part: seconds} of a forward and backward in bfloat16 with a float32 table."""
    n, c, d = case["rows"], case["classes"], case["size"]
    slab, again, parts = min(case["slab"] or slab_rows(n, d, device), c), 1 - kept_share(case, device), pull_parts(n, d)
    slabs, bandwidth = c / slab, BANDWIDTH[device]
    one = {"rows": n, "classes": slab, "size": d, "store": True}
    tile = min((exponentials({**one, "tile": tile}, device, end) for tile in TILES), default=0.0)
    moved = {"normalize_rows": (4 + 2 + 2) * c * d * (1 + again), "project_rows": (4 + 4 + 4 + 4) * c * d}
    moved["add_pull"] = slabs * n * d * (4 * parts + 16)
    return {
        "exponentials": slabs * tile * (1 + again),
        "U = E ŵ": slabs * product({**one, "parts": parts}, device, end),
        "dŵ = Eᵀ x̂": slabs * product({**one, "parts": 0}, device, end),
        **{name: moved_bytes / bandwidth for name, moved_bytes in moved.items()},
        "E by itself": 2 * n * c * (3 + again) / bandwidth if end else 0.0,
    }


def step(case, device, end):
    return sum(step_parts(case, device, end).values())


def features(case, device, end):
    """Forward and the features' gradient over a frozen bfloat16 table: no dŵ, nothing kept."""
    found = step_parts({**case, "budget": "all"}, device, end)
    n, c, d = case["rows"], case["classes"], case["size"]
    e = 4 * n * c / BANDWIDTH[device] if end else 0.0
    return found["exponentials"] + found["U = E ŵ"] + found["add_pull"] + 6 * c * d / BANDWIDTH[device] + e


def attend(case, device, end):
    """A step that stores no E: 8 N C D in two attention-shaped kernels, the row kernels folded into them."""
    return 8 * case["rows"] * case["classes"] * case["size"] / ATTENTION[end]


TARGET = {"kind": "step", "rows": 4096, "classes": 1_000_000, "size": 512, "slab": 0}


def main():
    print("\n".join(tables()))


def tables():
    """The lines of Markdown of the tables in docs/gpu.md."""
    yield "| `exponentials`, E stored, one slab | tile | predicted, us | % of the peak at 1.75 GHz | stage |"
    yield "| --- | --- | --- | --- | --- |"
    for (n, b), d in ((shape, d) for shape in ((4096, 8448), (1024, 16896)) for d in (512, 256, 128)):
        for tile in TILES:
            case = {"kind": "exponentials", "rows": n, "classes": b, "size": d, "tile": tile, "store": True}
            low, high = seconds(case)
            share = [2 * n * b * d / (FLOPS_A_CLOCK * PROCESSORS * CLOCK[0]) / end for end in (high, low)]
            yield (
                f"| N = {n:,}, B = {b:,}, D = {d} | {tile} | {_span(low * 1e6, high * 1e6)} "
                f"| {_span(share[0] * 100, share[1] * 100)} | exponentials |"
            )
    yield ""
    yield "| a step on an H200, ms: N = 4,096, C = 1,000,000, D = 512 | recomputing E | keeping all of E | stage |"
    yield "| --- | --- | --- | --- |"
    rows = [[step_parts({**TARGET, "budget": budget}, "H200", end) for end in (0, 1)] for budget in ("none", "all")]
    stages = {"exponentials": "exponentials", "U = E ŵ": "parts", "dŵ = Eᵀ x̂": "parts"}
    for name in rows[0][0]:
        spans = (_span(low[name] * 1e3, high[name] * 1e3) for low, high in rows)
        yield f"| {name} | {' | '.join(spans)} | {stages.get(name, 'profile')} |"
    spans = (_span(sum(low.values()) * 1e3, sum(high.values()) * 1e3) for low, high in rows)
    yield f"| **step** | {' | '.join(f'**{span}**' for span in spans)} | steps |"
    span = _span(*(1e3 * end for end in seconds({**TARGET, "kind": "attend"})))
    yield f"| in one attention-shaped kernel each way | {span} | | forms |"
    yield ""
    yield "| a step, ms | | recomputing E | keeping all of E | stage |"
    yield "| --- | --- | --- | --- | --- |"
    for n, c in ((512, 100_000), (1024, 1_000_000), (4096, 1_000_000), (1024, 10_000_000)):
        for device in BANDWIDTH:
            case = {**TARGET, "rows": n, "classes": c}
            spans = (_span(*(1e3 * end for end in seconds({**case, "budget": budget}, device))) for budget in ("none", "all"))
            yield f"| N = {n:,}, C = {c:,} | {device} | {' | '.join(spans)} | steps, peers |"


def _span(low, high):
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


if __name__ == "__main__":
    main()
