"""Compiles the kernels that a visit to a GPU launches, on a machine without one:  python -m benchmarks.gpu_cache DIR [--chip 90]

Triton finds a kernel by its source, its options, the chip and Triton's own files and ptxas; by no path and no driver. So run this
with the Triton of the GPU's machine, take DIR along, and set TRITON_CACHE_DIR to it there. prepared.json in it names that Triton;
the stage `probe` of benchmarks.gpu_check compares. Compiled are the launches of tests/aot.py and those of the stages `smoke`,
`exponentials`, `steps`, `forms` and `gluon`; of each kernel only what runs is kept, and nothing that these do not launch.
"""

import argparse
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

from .source import ROOT

STEPS = {"steps", "forms", "gluon"}
# In place of the stages': a first slab, one between and a last one of cut blocks, all divisible by 16; and a form's check,
# divisible by 8. No program has a single block of a slab, which Triton would compile for.
CLASSES_AND_SLABS = [(2 * 3072 + 1040, 3072), (3080, 3200)]
DROPPED = {".ttir", ".ttgir", ".llir", ".source", ".ptx"}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument(
        "--chip", type=int, default=90, help="compute capability without the point (default: 90, an H100 or H200)"
    )
    arguments = parser.parse_args(argv)
    # Triton reads these once, when it is imported.
    folder = arguments.folder.resolve()
    os.environ.update(TRITON_CACHE_DIR=str(folder), TRITON_INTERPRET="0")
    folder.mkdir(parents=True, exist_ok=True)
    fill(folder, arguments.chip)
    return 0


def fill(folder, chip):
    sys.path.insert(0, str(ROOT / "tests"))
    import aot
    from triton.runtime.cache import get_cache_manager, triton_key

    kept = set()
    for launch in aot.launches(chip, itertools.chain(aot.calls(chip), [smoke, tiles, *whole_steps()])):
        kept.add(Path(get_cache_manager(launch.compiled.hash).cache_dir))
        print(f"{len(kept):>4} {launch.kernel}", end="\r", file=sys.stderr, flush=True)
    for group in folder.glob("*/__grp__*.json"):
        if group.parent not in kept:
            shutil.rmtree(group.parent)
    for path in itertools.chain(*(place.iterdir() for place in kept)):
        if path.suffix in DROPPED:
            path.unlink()
    key = hashlib.sha256(triton_key().encode()).hexdigest()
    facts = {"triton": importlib.metadata.version("triton"), "triton_key": key, "chip": chip, "kernels": len(kept)}
    (folder / "prepared.json").write_text(json.dumps(facts, indent=1) + "\n")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {len(kept)} kernels for sm_{chip}, {size / 1e6:.1f} MB, triton {facts['triton']}, key {key[:8]}")


def smoke():
    """Launch what the stage of that name does: where a case names no slab, one of all classes, as a GPU has."""
    import torch

    from cosface_kernels.ops import slabs

    from .gpu_check import smoke, stages

    whole = {"SLAB_CLASSES_MIN": 2**20, "SLAB_CLASSES_MAX": 2**20}
    with mock.patch.multiple(slabs, **whole):
        for row in smoke.smoke(stages.SMOKE, torch.device("cpu")):
            if "error" in row:
                raise RuntimeError(row)


def tiles():
    """Launch `exponentials` as the stage of that name does, at a size for which Triton compiles the same kernel."""
    import torch

    from .gpu_check import kernels, stages

    small = {"rows": 256, "classes": 512, "size": 64}
    cases = {json.dumps({**case, **small}): {**case, **small} for case in stages.exponentials()}
    for _ in kernels.exponentials(cases.values(), torch.device("cpu")):
        pass


def whole_steps():
    """Functions that launch what the stages of whole steps do, and their checks of forms, over few classes."""
    from .gpu_check import stages

    cases = [case for stage in stages.PLAN if stage.name in STEPS for case in stage.cases()]
    kinds = {json.dumps([case["rows"], case["size"], case["budget"] == "none", case.get("forms", {})]): case for case in cases}
    return [functools.partial(_step, case, *sizes) for case in kinds.values() for sizes in CLASSES_AND_SLABS]


def _step(case, classes, slab):
    import torch

    from . import peers
    from .gpu_check import gpu, steps

    with gpu.forms(case.get("forms")), gpu.slabs(slab):
        peers.step(steps.loss(case), *peers.inputs(case["rows"], classes, case["size"], torch.device("cpu")))


if __name__ == "__main__":
    raise SystemExit(main())
