"""The `cosface` command. Exit status: 0 done, 1 it cannot be done here (one line says why), 2 wrong usage.

Nothing that imports torch is imported before the arguments are known to be right.
"""

import argparse
import importlib.util
import math
import os
import re
import sys
import tempfile
from pathlib import Path

from ..version import __version__
from . import evaluation
from .command import Parser, add, done, fail, refuse, without_extras

COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
SIZES = {prefix + unit: 1000**power for power, prefix in enumerate("KMGTP", 1) for unit in ("", "B")} | {"B": 1}
SIZES |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGTP", 1)}
DEMO_EXTRAS = "matplotlib", "sklearn", "tqdm"
DEVICE = {"choices": ("cpu", "cuda"), "help": "default: cuda where there is a GPU"}
# The names that plan.py knows.
OPTIMIZERS = "sgd", "adamw", "plain-sgd", "torch-sgd", "torch-adamw"
TABLES, STATES = ("float32", "bfloat16", "float8"), ("float32", "bfloat16", "int8")


def command():
    """The process of `cosface`. It ends a rank that has done its work without taking the interpreter down: DTensor's caches keep
    the process group, and a thread of Gloo's that lets go of its last tensor after that aborts (pytorch/pytorch#179291)."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has what it wanted, and the rest must not be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    if status == 0 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    sys.exit(status)


def main(argv=None):
    parser = Parser(
        prog="cosface", description="Large Margin Cosine Loss (CosFace) over millions of identities, without an N x C matrix."
    )
    parser.add_argument("--version", action="version", version=f"cosface_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    for each in (_add_demo, _add_train, _add_compare, *evaluation.COMMANDS, _add_bench, _add_convert, _add_plan, _add_info):
        each(commands)
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 2
    return arguments.run(arguments)


def _add_demo(commands):
    option = add(
        commands,
        _demo,
        "demo",
        help="the paper's toy experiment, then real training steps over one million identities",
        description="Two experiments, with figures: the paper's toy experiment (what the margin does to the angles between "
        "identities, on handwritten digits), and real training steps over one million identities beside what plain PyTorch "
        "needs for them. Uses a GPU if there is one.",
    )
    where = "where toy_features.png, million_loss.png and summary.json go (default: ./demo-output)"
    option("--out", type=Path, default=Path("demo-output"), metavar="DIR", help=where)


def _add_train(commands):
    option = add(
        commands,
        _train,
        "train",
        help="a backbone with any margin, from a folder of faces, InsightFace's records or rendered faces, to a report",
        usage="cosface train [FILE.yaml] [KEY=VALUE ...] [--resume] [--print-config]",
        description="Train a backbone and a class table into a folder: config.yaml, metrics.jsonl, checkpoints, report.html. "
        "For example: cosface train data=faces:100 epochs=5 out=runs/first. Under torchrun: torchrun --nproc-per-node 8 "
        "--no-python cosface train ... A first Ctrl-C saves and stops.",
    )
    option("settings", nargs="...", metavar="KEY=VALUE", help="a setting, or a YAML file of them; --print-config shows all")
    option("--resume", action="store_true", help="go on with the run in out=DIR, with its own settings")
    option("--print-config", action="store_true", help="print all settings as YAML, and do nothing")


def _add_compare(commands):
    option = add(
        commands,
        _compare,
        "compare",
        help="runs of train side by side: curves, numbers, and the settings in which they differ",
        description="Write one page of several runs of train, and print their numbers. Of one run: write its report.html anew, "
        "with what cosface eval --json has left in its folder since.",
    )
    option("runs", nargs="+", metavar="RUN", help="the folder of a run")
    option("--out", default="compare.html", metavar="FILE", help="the page of several runs (default: compare.html)")


def _add_bench(commands):
    option = add(
        commands,
        _bench,
        "bench",
        help="time, memory and error of one forward and backward, beside the alternatives (four to eight minutes on two cores)",
        description="Time, memory and error of one forward and backward of LMCL: each backend of this package, plain PyTorch, "
        "and whatever else of its kind is installed. Prints a Markdown table. Needs a source checkout.",
    )
    add_problem(option, rows=512, classes=100_000, size=512, repeats=5)
    option("--device", **DEVICE)
    option("--peers", default="", metavar="TEXT", help="only those whose name contains TEXT")
    plot = "measure at C = 10^4 .. 10^7 instead, which may take an hour; time.png and memory.png go into DIR"
    option("--plot", type=Path, metavar="DIR", help=plot)


def add_problem(option, *, rows=None, classes=None, size=None, repeats=None):
    """Add the sizes of a problem, for those that have a default. option: a parser's add_argument."""
    for flag, default, what in (
        ("--rows", rows, "N, rows of a batch"),
        ("--classes", classes, "C, classes"),
        ("--size", size, "D, embedding size"),
        ("--repeats", repeats, "turns that each case gets, fewer for a slow one"),
    ):
        if default:
            option(flag, type=count, default=default, metavar="N", help=f"{what} (default: {default})")
    if repeats:
        option("--dtype", choices=("float32", "bfloat16", "both"), default="both", help="products; bfloat16 is autocast")
    option("--json", type=Path, metavar="FILE", help="write all that was measured to FILE, as it comes")


def _add_convert(commands):
    option = add(
        commands,
        _convert,
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
    systems = {"choices": ("insightface", "pml")}
    option("inputs", nargs="+", metavar="IN", help="files written by torch.save, all shards of a table, numbered in their names")
    option("out", metavar="OUT", help="the file to write; with --ranks its text {rank} becomes 0, 1, ...")
    option("--from", dest="system", **systems, help="the system that wrote IN")
    option("--key", metavar="NAME", help="for any other system, the table's key in IN: state_dict.head.kernel")
    option("--transpose", action="store_true", help="the table at --key is (D, C), not (C, D)")
    option("--to", **systems, help="the system to write for (default: CosFaceLoss)")
    option("--ranks", type=count, metavar="W", help="with --to insightface, write a shard for each of W ranks")
    option("--force", action="store_true", help="replace OUT if it exists")


def _add_plan(commands):
    option = add(
        commands,
        _plan,
        "plan",
        help="memory of a training step by format, optimiser, sample rate and number of devices, and which to take",
        description="What a training step over a class table takes, before any of it is allocated: bytes of each part, whether "
        "they fit, and which way to train to take. Options that are not given are varied. For example: "
        "cosface plan --identities 10e6 --dim 512 --batch 1024 --memory 24GiB.",
    )
    for flag, what in (
        ("--identities", "C, such as 10e6, 10M or 10_000_000"),
        ("--dim", "D, embedding size"),
        ("--batch", "N, rows of a step on all devices"),
    ):
        option(flag, type=count, required=True, metavar="N", help=what)
    for flag, choices in (("--optimizer", OPTIMIZERS), ("--table-format", TABLES), ("--state-format", STATES)):
        option(flag, nargs="+", choices=choices, metavar="NAME", help=f"of {', '.join(choices)}")
    option("--sample-rate", nargs="+", type=rate, metavar="RATE", help="classes in a step (varied: 1, 0.1)")
    hard = "of each class, in its sample (default: none), where classes are sampled"
    option("--hard-classes", type=count, default=0, metavar="N", help=hard)
    devices = "that share the table (varied: this machine's, or with --memory 1, 2, 4, 8)"
    option("--devices", nargs="+", type=count, metavar="N", help=devices)
    option("--memory", type=size, metavar="SIZE", help="of each device: 141GB, 24GiB (default: this machine's)")
    option("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of the products (default: bfloat16)")
    option("--device", **DEVICE)


def _add_info(commands):
    text = "versions, devices, and which backends can be used here"
    add(commands, _info, "info", help=text, description=f"Print {text}: what a bug report should contain.")


def count(text):
    """A number of things: 10e6, 10M, 10_000_000 or 10,000,000."""
    plain = text.replace(",", "") if re.fullmatch(r"\d{1,3}(,\d{3})+", text.strip()) else text
    value = _number(plain, COUNTS)
    return int(
        _right(text, value >= 1 and value == value // 1 and value, "a whole number from 1 on, such as 10e6, 10M or 10,000,000")
    )


def size(text):
    """Bytes: 141GB, 24GiB, 3G."""
    value = _number(text, SIZES)
    return int(_right(text, value >= 1 and value, "a size with its unit, such as 141GB, 24GiB or 3G"))


def rate(text):
    value = _number(text, {"": 1})
    return _right(text, 0 < value <= 1 and value, "a rate above 0 and up to 1")


def _number(text, units):
    """The number that text names, times its unit; NaN where it names none, or one that does not fit 62 bits."""
    found = re.fullmatch(r"\s*((?:\d(?:_?\d)*)?\.?\d*(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)\s*", text)
    try:
        value = float(found[1]) * units[found[2].upper()]
    except (TypeError, ValueError, KeyError):
        return math.nan
    return value if value < 2**62 else math.nan


def _right(text, value, what):
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def _demo(arguments):
    out = arguments.out
    for name in DEMO_EXTRAS:
        if importlib.util.find_spec(name) is None:
            return fail(f'the demo needs {name}, which is not installed: pip install "cosface-kernels[demo]"')
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # an existing directory may still refuse files
            pass
    except OSError as error:
        return fail(f"cannot write to --out {out}: {error.strerror}")
    from . import demo

    return done(lambda: demo.run(out), MemoryError)


def _train(arguments):
    given = [each for each in arguments.settings if not each.startswith("-")]
    for flag in set(arguments.settings) - set(given):  # argparse takes no options between settings
        if flag not in ("--resume", "--print-config"):
            arguments.wrong_usage(f"{flag} is no option; settings are KEY=VALUE")
        setattr(arguments, flag[2:].replace("-", "_"), True)
    try:
        from ..training import config as settings

        config = settings.of_command(given, arguments.resume, arguments.print_config)
        if arguments.print_config:
            print(settings.text(config), end="")
            return 0
        from ..training.loop import train

        return train(config, arguments.resume)
    except ModuleNotFoundError as error:
        return without_extras(error)
    except settings.ConfigError as error:
        arguments.wrong_usage(str(error))
    except (OSError, RuntimeError, ArithmeticError) as error:
        return fail(error)


def _compare(arguments):
    def compared():
        from ..training import report

        if len(arguments.runs) == 1:
            return report.write(arguments.runs[0])
        page, rows, names = report.compare(arguments.runs, arguments.out)
        width = max(map(len, rows))
        lines = (f"{what:<{width}}  {'  '.join(f'{each:>20}' for each in row)}" for what, row in [("", names), *rows.items()])
        return "\n".join([*map(str.rstrip, lines), str(page)])

    return done(compared, (OSError, ValueError))


def _bench(arguments):
    checkout = Path(__file__).parents[2]
    if (checkout / "benchmarks" / "bench.py").exists():
        sys.path.insert(0, str(checkout))  # a console script does not search the current directory
    try:
        from benchmarks import bench
    except ImportError as error:  # also for another package of that name
        if (error.name or "").partition(".")[0] != "benchmarks":
            raise
        return fail("bench needs a source checkout, it is not installed with the package; `python -m benchmarks` runs it there")
    return bench.main(arguments)


def _convert(arguments):
    system, key, to, ranks = arguments.system, arguments.key, arguments.to, arguments.ranks
    refuse(
        arguments,
        (system and key is not None, "--from and --key exclude each other"),
        (not (system or key or to), "--from or --key says what IN is, or --to what OUT shall be"),
        (arguments.transpose and not key, "--transpose needs --key"),
        ((ranks is not None) != ("{rank}" in arguments.out), "--ranks goes with {rank} in OUT and --to insightface"),
        (ranks and to != "insightface", "--ranks goes with {rank} in OUT and --to insightface"),
        (len(arguments.inputs) > 1 and not (key or system == "insightface"), "several IN need --from insightface or --key"),
    )
    for path in arguments.inputs:
        try:
            os.stat(path)  # opening a pipe would wait
        except OSError as error:
            return fail(f"cannot read {path}: {error.strerror}")
    from .convert import convert

    names = "inputs", "out", "system", "key", "transpose", "to", "force"
    return done(lambda: convert(**{name: getattr(arguments, name) for name in names}, ranks=ranks or 1), (OSError, ValueError))


def _plan(arguments):
    from .plan import report

    try:
        print(report(arguments))
    except ValueError as error:
        arguments.wrong_usage(str(error))
    return 0


def _info(_):
    from .info import report

    return done(report)
