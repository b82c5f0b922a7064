"""The API's pages, from docstrings:  python docs/build_api.py DIR   (`make docs`). Fails where a public name would be missing."""

import importlib
import sys
import warnings
from pathlib import Path

import pdoc

# Without the first one's submodules that are no part of its __all__.
MODULES = ("cosface_kernels", "cosface_kernels.compat.insightface", "cosface_kernels.compat.pytorch_metric_learning")


def build(folder):
    modules = {name: importlib.import_module(name) for name in MODULES}
    for module in modules.values():
        for name in module.__all__:  # pdoc looks into __dict__, where a name that is loaded on first use is not yet
            setattr(module, name, getattr(module, name))
    version = modules["cosface_kernels"].__version__
    pdoc.render.configure(docformat="google", show_source=False, footer_text=f"cosface_kernels {version}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        pdoc.pdoc(*MODULES, output_directory=folder)
    for path, module in modules.items():
        page = (folder / f"{path.replace('.', '/')}.html").read_text()
        missing = [name for name in module.__all__ if f'id="{name}"' not in page and f"cosface_kernels/{name}.html" not in page]
        if missing:
            raise SystemExit(f"{folder} has no {', '.join(missing)} of {path}")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
