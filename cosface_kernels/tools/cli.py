"""The `cosface` command. Exit status: 0 done, 1 it cannot be done here (one line says why), 2 wrong usage."""

import argparse
import math
import re
import sys
import tempfile
from pathlib import Path

from ..version import __version__
from . import plan

COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
SIZES = {prefix + unit: 1000**power for power, prefix in enumerate("KMGTP", 1) for unit in ("", "B")} | {"B": 1}
SIZES |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGTP", 1)}
DEMO_EXTRAS = {"matplotlib", "sklearn", "tqdm"}


def main(argv=None):
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 2
    return {"demo": _demo, "bench": _bench, "convert": _convert, "info": _info, "plan": _plan}[arguments.command](arguments)


def _parser():
    parser = argparse.ArgumentParser(
        prog="cosface", description="Large Margin Cosine Loss (CosFace) over millions of identities, without an N x C matrix."
    )
    parser.add_argument("--version", action="version", version=f"cosface_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="the paper's toy experiment, then real training steps over one million identities (under three minutes)",
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
    bench = commands.add_parser(
        "bench",
        help="time, memory and error of one forward and backward, beside the alternatives (four to eight minutes on two cores)",
        description="Time, memory and error of one forward and backward of LMCL: each backend of this package, plain PyTorch, "
        "and whatever else of its kind is installed. Prints a Markdown table. Needs a source checkout.",
    )
    for flag, default, what in (
        ("--rows", 512, "N, rows of a batch"),
        ("--classes", 100_000, "C, classes"),
        ("--size", 512, "D, embedding size"),
        ("--repeats", 5, "turns that each peer gets, fewer for a slow one"),
    ):
        kind = positive if flag == "--repeats" else count
        bench.add_argument(flag, type=kind, default=default, metavar="N", help=f"{what} (default: {default})")
    bench.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both", help="products; bfloat16 is autocast")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    bench.add_argument("--peers", default="", metavar="TEXT", help="only those whose name contains TEXT")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured to FILE, as it comes")
    bench.add_argument(
        "--plot",
        type=Path,
        metavar="DIR",
        help="measure at C = 10^4 .. 10^7 instead, which may take an hour; time.png and memory.png go into DIR",
    )
    bench.add_argument("--without", action="append", default=[], help=argparse.SUPPRESS)
    _add_convert(commands)
    _add_plan(commands)
    commands.add_parser(
        "info",
        help="versions, devices, and which backends can be used here",
        description="Print versions, devices, and which backends can be used here: what a bug report should contain.",
    )
    return parser


def _add_convert(commands):
    convert = commands.add_parser(
        "convert",
        help="a class table trained in another system to a state dict of CosFaceLoss, or back",
        usage="cosface convert IN... OUT (--from SYSTEM | --key NAME [--transpose]) [--to SYSTEM [--ranks W]] [--force]\n"
        "       cosface convert IN OUT --to SYSTEM [--ranks W] [--force]",
        description="Take the class table out of another system's files and write the state dict of CosFaceLoss, or, with --to, "
        "the other way round, every bit the same. Systems: insightface is PartialFC_V2, one file for each rank; pml is "
        "pytorch-metric-learning; docs/migrate.md has the keys of others. For example: "
        "cosface convert rank_*.pt head.pt --from insightface; "
        "cosface convert adaface.pt head.pt --key kernel --transpose; "
        "cosface convert head.pt 'rank_{rank}.pt' --to insightface --ranks 8.",
    )
    convert.add_argument(
        "inputs", nargs="+", metavar="IN", help="files written by torch.save, all shards of one table; ordered by rank"
    )
    convert.add_argument("out", metavar="OUT", help="the file to write; with --ranks its text {rank} becomes 0, 1, ...")
    origin = convert.add_mutually_exclusive_group()
    origin.add_argument("--from", dest="system", choices=("insightface", "pml"), help="the system that wrote IN")
    origin.add_argument("--key", metavar="NAME", help="for any other system, the table's key in IN: state_dict.head.kernel")
    convert.add_argument("--transpose", action="store_true", help="the table at --key is (D, C), not (C, D)")
    convert.add_argument("--to", choices=("insightface", "pml"), help="the system to write for (default: CosFaceLoss)")
    convert.add_argument("--ranks", type=positive, metavar="W", help="with --to insightface, write a shard for each of W ranks")
    convert.add_argument("--force", action="store_true", help="replace OUT if it exists")
    convert.set_defaults(wrong_usage=convert.error)


def _add_plan(commands):
    plans = commands.add_parser(
        "plan",
        help="memory of a training step by format, optimiser, sample rate and number of devices, and which to take",
        description="What a training step over a class table takes, before any of it is allocated: bytes of each part, whether "
        "they fit, and which way to train to take. Options that are not given are varied. For example: "
        "cosface plan --identities 10e6 --dim 512 --batch 1024 --memory 24GiB.",
    )
    for flag, what in (("--identities", "C: 10e6, 10M, 10_000_000"), ("--dim", "D"), ("--batch", "N, of all devices together")):
        plans.add_argument(flag, type=count, required=True, metavar="N", help=what)
    for flag, choices in (("--optimizer", plan.OPTIMIZERS), ("--table-format", plan.TABLES), ("--state-format", plan.STATES)):
        plans.add_argument(flag, nargs="+", choices=tuple(choices), metavar="NAME", help=f"of {', '.join(choices)}")
    plans.add_argument("--sample-rate", nargs="+", type=rate, metavar="RATE", help="classes in a step (varied: 1, 0.1)")
    devices = "that share the table (varied: this machine's, or with --memory 1, 2, 4, 8)"
    plans.add_argument("--devices", nargs="+", type=count, metavar="N", help=devices)
    plans.add_argument("--memory", type=size, metavar="SIZE", help="of each device: 141GB, 24GiB (default: this machine's)")
    plans.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of the products")
    plans.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    plans.set_defaults(wrong_usage=plans.error)


def count(text):
    """A number of things: 10e6, 10M, 10_000_000 or 10,000,000."""
    if re.fullmatch(r"\d{1,3}(,\d{3})+", text.strip()):
        text = text.replace(",", "")
    return _whole(text, COUNTS, "a number such as 10e6, 10M or 10,000,000")


def size(text):
    """Bytes: 141GB, 24GiB, 3G."""
    return _whole(text, SIZES, "a size with its unit such as 141GB or 24GiB")


def _whole(text, units, what):
    found = re.fullmatch(r"\s*([\d_.]+(?:[eE]\+?\d+)?)\s*([A-Za-z]*)\s*", text)
    if found and found[2].upper() in units:
        value = _number(found[1], math.isfinite, what) * units[found[2].upper()]
        if value >= 1 and (value == int(value) or units is SIZES) and value < 2**62:
            return int(value)
    raise argparse.ArgumentTypeError(f"{text!r} is not {what}")


def rate(text):
    return _number(text, lambda value: 0 < value <= 1, "a rate above 0 and up to 1")


def _number(text, is_right, what):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not is_right(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _demo(arguments):
    out = arguments.out
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


def _bench(arguments):
    checkout = Path(__file__).parents[2]
    if (checkout / "benchmarks" / "bench.py").exists():
        sys.path.insert(0, str(checkout))  # a command does not search the directory it is run from
    try:
        from benchmarks import bench
    except ImportError as error:  # also another package of that name
        if (error.name or "").partition(".")[0] != "benchmarks":
            raise
        return _fail("bench needs a source checkout, it is not installed with the package; `python -m benchmarks` runs it there")
    return bench.main(arguments)


def _convert(arguments):
    system, key, to, ranks = arguments.system, arguments.key, arguments.to, arguments.ranks
    if not (system or key or to):
        arguments.wrong_usage("--from or --key says what IN is, or --to what OUT shall be")
    if arguments.transpose and not key:
        arguments.wrong_usage("--transpose needs --key")
    if (ranks is not None) != ("{rank}" in arguments.out) or (ranks and to != "insightface"):
        arguments.wrong_usage("--ranks goes with {rank} in OUT and --to insightface")
    if len(arguments.inputs) > 1 and not (key or system == "insightface"):
        arguments.wrong_usage("several IN need --from insightface or --key")
    from .convert import convert

    try:
        print(
            convert(
                arguments.inputs,
                arguments.out,
                system=system,
                key=key,
                transpose=arguments.transpose,
                to=to,
                ranks=ranks or 1,
                force=arguments.force,
            )
        )
    except (OSError, ValueError) as error:
        return _fail(str(error))
    return 0


def _plan(arguments):
    try:
        print(plan.report(arguments))
    except ValueError as error:
        arguments.wrong_usage(str(error))
    return 0


def _info(_):
    from .info import report

    print(report())
    return 0


def _fail(message):
    print(f"cosface: {message}", file=sys.stderr)
    return 1
