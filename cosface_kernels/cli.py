"""The `cosface` command. Exit status: 0 done, 1 it cannot be done here (one line says why), 2 wrong usage."""

import argparse
import sys
import tempfile
from pathlib import Path

from .version import __version__

DEMO_EXTRAS = {"matplotlib", "sklearn", "tqdm"}


def main(argv=None):
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 2
    return _demo(arguments.out) if arguments.command == "demo" else _info()


def _parser():
    parser = argparse.ArgumentParser(
        prog="cosface", description="Large Margin Cosine Loss (CosFace) over millions of identities, without an N x C matrix."
    )
    parser.add_argument("--version", action="version", version=f"cosface_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="the paper's toy experiment, then real training steps over one million identities (about two minutes on two cores)",
        description="Two experiments, with figures: the paper's toy experiment (what the margin does to the angles between "
        "identities, on handwritten digits), and real training steps over one million identities beside what plain PyTorch "
        "needs for them. Uses a GPU if there is one.",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="where toy_features.png, million_loss.png and summary.json go (default: ./demo-output)",
    )
    commands.add_parser(
        "info",
        help="versions, devices, and which backends can be used here",
        description="Print versions, devices, and which backends can be used here: what a bug report should contain.",
    )
    return parser


def _demo(out):
    try:
        from . import demo
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in DEMO_EXTRAS:
            raise
        return _fail(f'the demo needs {error.name}, which is not installed: pip install "cosface-kernels[demo]"')
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # an existing directory may still refuse files
            pass
    except OSError as error:
        return _fail(f"cannot write to --out {out}: {error.strerror}")
    try:
        demo.run(out)
    except MemoryError as error:
        return _fail(str(error))
    return 0


def _info():
    from .info import report

    print(report())
    return 0


def _fail(message):
    print(f"cosface: {message}", file=sys.stderr)
    return 1
