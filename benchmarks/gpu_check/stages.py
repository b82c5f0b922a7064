"""The plan of a visit, most valuable first: every stage, its limit in seconds, and its cases. Data: nothing here imports torch.

A case is what one row is measured for; its "kind" is what benchmarks.predictions knows it by.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

ATTEND = {"attend_table": {}, "attend_features": {}}
SMOKE = [
    # Ragged and whole tiles, one row, D without and with padding, two slabs and one, every dtype of table and features.
    {"rows": 67, "classes": 700, "size": 70},
    {"rows": 67, "classes": 700, "size": 70, "precision": "bfloat16"},
    {"rows": 128, "classes": 1024, "size": 512, "precision": "bfloat16"},
    {"rows": 128, "classes": 1024, "size": 512, "precision": "bfloat16", "budget": "none"},
    {"rows": 300, "classes": 1111, "size": 256, "precision": "bfloat16", "slab": 512},
    {"rows": 128, "classes": 1024, "size": 512, "precision": "bfloat16", "slab": 512, "budget": "none"},
    {"rows": 1, "classes": 513, "size": 64, "precision": "bfloat16"},
    {"rows": 64, "classes": 700, "size": 128, "precision": "bfloat16", "table": "bfloat16"},
    {"rows": 131, "classes": 700, "size": 512},
    {"rows": 67, "classes": 700, "size": 70, "scale": 1000.0, "precision": "bfloat16"},
    {"rows": 67, "classes": 700, "size": 70, "scale": 1000.0, "budget": "none"},
    {"rows": 67, "classes": 256, "size": 64, "centers": 3, "precision": "bfloat16"},
    {"rows": 128, "classes": 1024, "size": 64, "update": "float32"},
    {"rows": 128, "classes": 1024, "size": 64, "update": "bfloat16", "precision": "bfloat16"},
    {"rows": 128, "classes": 1024, "size": 64, "update": "int8", "precision": "bfloat16"},
    {"rows": 128, "classes": 1024, "size": 64, "update": "float8", "precision": "bfloat16"},
    {"rows": 128, "classes": 1024, "size": 512, "precision": "bfloat16", "graph": True},
    {"rows": 67, "classes": 700, "size": 70, "budget": "none", "forms": ATTEND},
    {"rows": 300, "classes": 1111, "size": 256, "precision": "bfloat16", "slab": 512, "budget": "none", "forms": ATTEND},
    {"rows": 128, "classes": 1024, "size": 512, "precision": "bfloat16", "budget": "none", "forms": ATTEND},
]
# Calls whose blocks share memory between their threads, at the widest tiles. All launches of a call would take minutes.
RACES = {
    "tool": "racecheck",
    "kernels": ["exponential", "attend"],
    "calls": [i for i, case in enumerate(SMOKE) if case["size"] == 512 and "precision" in case and "graph" not in case],
}
OPTIONS = [{"DESCRIPTORS": True}, {"HALVES": True}, {"DESCRIPTORS": True, "HALVES": True}]  # of the first two tiles
TILES = [("128x128x64", 8, 3), ("128x256x64", 8, 4), ("128x128x64", 8, 4), ("128x128x64", 4, 3), ("128x256x64", 8, 3)]
WAVE = 8448  # classes: 64 for each of 132 processors, so that tiles of any N that is a multiple of 256 fill whole waves
SHAPES = [(4096, 1_000_000, 512), (1024, 1_000_000, 512), (512, 100_000, 512), (1024, 10_000_000, 512)]
SMALL = 512, 10_000, 512  # N, C, D of a call whose time is the host's
PEERS = [
    "cosface_loss, triton, memory_budget=0",
    "cosface_loss, triton, all of E kept",
    "cosface_loss, triton",
    "plain PyTorch",
    "cut-cross-entropy",
    "Liger-Kernel",
    "torch.compile of plain PyTorch",
]


def exponentials():
    launches = [*((tile, {}) for tile in TILES), *itertools.product(TILES[:2], OPTIONS)]
    shapes = (4096, WAVE), (1024, 2 * WAVE), (512, 2 * WAVE)
    for (n, b), d, (launch, options), store in itertools.product(shapes, (512, 256, 128), launches, (True, False)):
        if "HALVES" in options and not store:  # halves are of E, which is not stored here
            continue
        tile, warps, stages = launch
        shape = {"kind": "exponentials", "rows": n, "classes": b, "size": d, "store": store}
        yield {**shape, "tile": tile, "warps": warps, "stages": stages, **({"options": options} if options else {})}


def _parts():
    yield {"kind": "ceiling", "what": "product", "shape": [8192, 8192, 8192]}
    yield {"kind": "ceiling", "what": "product", "shape": [8192, 8192, 512]}
    yield {"kind": "ceiling", "what": "copy", "bytes": 2**31}
    for n, b in ((4096, 6656), (4096, WAVE), (4096, 2 * WAVE), (1024, 2 * WAVE), (512, 2 * WAVE)):
        for parts in (0, 1, 2, 4, 8, 16):  # 0: dŵ
            yield {"kind": "product", "rows": n, "classes": b, "size": 512, "parts": parts}
        for parts in (2, 8):
            yield {"kind": "product", "rows": n, "classes": b, "size": 512, "parts": parts, "accumulate": True}


def _profile():
    for shape, budget in itertools.product(SHAPES[:3], ("none", "all")):
        yield {"kind": "profile", "shape": list(shape), "budget": budget}


def _steps():
    # The largest first: its slabs and budgets decide. 0: the package's own slab.
    for (n, c, d), budget, slab, graph in itertools.product(
        [*SHAPES, SMALL], ("none", "all", "auto"), (0, WAVE, 2 * WAVE, 4 * WAVE, 8 * WAVE), (True, False)
    ):
        if (slab and (budget == "auto" or not graph or c == SMALL[1])) or (c == 10_000_000 and (slab or graph)):
            continue
        yield {"kind": "step", "rows": n, "classes": c, "size": d, "budget": budget, "slab": slab, "graph": graph}


# Beside the slab loop as it is, {kernel: options}, as the package's table of forms names them; left out where it knows none.
FORMS = [
    {},
    {"attend_table": {}},
    {"attend_features": {}},
    ATTEND,
    {"attend_table": {"DESCRIPTORS": True}},
    {"attend_features": {"DESCRIPTORS": True}},
]
GLUON = [{}, {"attend_table": {"GLUON": True}}, {"attend_features": {"GLUON": True}}]


def _forms(forms, sizes=(512, 256, 128)):
    for (n, c), d, form in itertools.product(((4096, 1_000_000), (1024, 1_000_000), (512, 100_000)), sizes, forms):
        shape = {"kind": "step", "rows": n, "classes": c, "size": d, "budget": "none", "slab": 0, "graph": True}
        yield {**shape, "kind": "attend" if len(form) == 2 else "step", "forms": form}


def _peer(name):
    return lambda: [{"kind": "peer", "peer": name, "shape": list(shape)} for shape in SHAPES[1::-1] + SHAPES[2:3]]


def _float32():
    for name in ("cosface_loss, triton", "plain PyTorch"):
        yield {"kind": "peer", "peer": name, "precision": "float32", "shape": [1024, 100_000, 512]}


def _training():
    yield {"kind": "features", "rows": 1024, "classes": 100_000_000, "size": 512, "slab": 0}
    yield {"kind": "training", "identities": 1_000_000, "size": 512, "rows": 1024, "steps": 100, "table_format": "float32"}
    for table, state in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "int8"), ("float8", "int8")):
        yield {
            **{"kind": "training", "identities": 1_000_000, "size": 512, "rows": 1024, "steps": 2},
            **{"table_format": table, "state_format": state},
        }
    yield {
        **{"kind": "training", "identities": 100_000_000, "size": 512, "rows": 1024, "steps": 3},
        **{"table_format": "bfloat16", "momentum": 0.0},
    }


class Stage(NamedTuple):
    name: str
    limit: float  # seconds, at most
    module: str  # the one whose function makes the rows
    function: str
    cases: Callable = lambda: [{}]
    environment: dict = {}  # noqa: RUF012  never changed
    files: bool = False  # the function takes the folder of the record too, where it leaves files
    vital: bool = False  # without it nothing else is tried


# Long enough for a busy machine to import PyTorch, which can take ten seconds: who is late here loses all that follows.
PROBE = Stage("does it answer", 20, "smoke", "answers")
# Limits are for a slow machine: the GPU's own work is predicted to take ten seconds of a stage of the kernels at most. Where each
# stage takes all of its limit, the suite, memcheck and our own two budgets still have their time, and what follows has none.
SECONDS = 540.0
PLAN = [
    Stage("probe", 25, "smoke", "probe", vital=True),
    Stage("smoke", 45, "smoke", "smoke", lambda: SMOKE),
    Stage("exponentials", 60, "kernels", "exponentials", exponentials),
    Stage("parts", 30, "kernels", "parts", _parts),
    Stage("steps", 60, "steps", "steps", _steps),
    Stage("forms", 45, "steps", "candidates", lambda: _forms(FORMS)),
    Stage("gluon", 25, "steps", "candidates", lambda: _forms(GLUON, sizes=(512,))),
    Stage("suite", 150, "commands", "suite", environment={"TORCHINDUCTOR_COMPILE_THREADS": "1"}, files=True),
    Stage("memcheck", 50, "commands", "sanitizer", lambda: [{"tool": "memcheck"}]),
    *(Stage(f"peer {name}", 25, "rivals", "rival", _peer(name)) for name in PEERS),
    Stage("float32", 25, "rivals", "rival", _float32),
    Stage("initcheck", 40, "commands", "sanitizer", lambda: [{"tool": "initcheck"}]),
    Stage("racecheck", 30, "commands", "sanitizer", lambda: [RACES]),
    Stage("profile", 30, "steps", "profile", _profile),
    Stage("ncu", 40, "commands", "ncu", files=True),
    Stage("training", 60, "large", "train", _training),
]
