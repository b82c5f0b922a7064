"""The `cosface` command. Exit status: 0 done, 1 it cannot be done here (one line says why), 2 wrong usage."""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from ..ops.formats import STATE_FORMATS, TABLE_FORMATS
from ..ops.memory import available_bytes
from ..version import __version__
from . import memory_model, memory_report

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
        kind = positive if flag == "--repeats" else memory_report.count
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
    plan = commands.add_parser(
        "plan",
        help="memory and time of a training step by format, optimiser, sample rate and number of devices, and which to take",
        description="What a training step over a class table takes, before any of it is allocated: bytes of each part, whether "
        "they fit, flops, bytes moved and sent, and predicted seconds. Options that are not given are varied. For example: "
        "cosface plan --identities 10e6 --dim 512 --batch 1024 --memory 24GiB.",
    )
    for flag, what in (("--identities", "C: 10e6, 10M, 10_000_000"), ("--dim", "D"), ("--batch", "N, of all devices together")):
        plan.add_argument(flag, type=memory_report.count, required=True, metavar="N", help=what)
    for flag, choices in (
        ("--optimizer", tuple(memory_model.STATES)),
        ("--table-format", TABLE_FORMATS),
        ("--state-format", STATE_FORMATS),
    ):
        plan.add_argument(flag, nargs="+", choices=tuple(choices), metavar="NAME", help=f"of {', '.join(choices)}")
    plan.add_argument(
        "--sample-rate", nargs="+", type=memory_report.rate, metavar="RATE", help="classes in a step (varied: 1, 0.1)"
    )
    plan.add_argument(
        "--devices",
        nargs="+",
        type=memory_report.count,
        metavar="N",
        help="that share the table (varied: this machine's, or with --memory 1, 2, 4, 8)",
    )
    plan.add_argument(
        "--memory", type=memory_report.size, metavar="SIZE", help="of each device: 141GB, 24GiB (default: this machine's)"
    )
    plan.add_argument(
        "--precision", choices=memory_model.PRECISIONS, default="bfloat16", help="of the products (default: bfloat16)"
    )
    plan.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    plan.add_argument("--tflops", type=memory_report.speed, metavar="X", help="10^12 flops a second that the device reaches")
    plan.add_argument("--gbps", type=memory_report.speed, metavar="Y", help="10^9 bytes a second that it reads and writes")
    plan.set_defaults(wrong_usage=plan.error)


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
    if (arguments.tflops is None) != (arguments.gbps is None):
        arguments.wrong_usage("--tflops and --gbps go together")
    has_gpu = torch.cuda.is_available()
    device = torch.device(arguments.device or ("cuda" if has_gpu else "cpu"))
    if device.type == "cuda" and not has_gpu and not (arguments.memory and arguments.tflops):
        arguments.wrong_usage("there is no GPU here to measure: --device cuda needs --memory, --tflops and --gbps")
    here = max(torch.cuda.device_count(), 1) if device.type == "cuda" else 1
    found = memory_report.trainings(
        optimizers=arguments.optimizer or ("sgd", "adamw", "torch-sgd"),
        table_formats=arguments.table_format or tuple(TABLE_FORMATS),
        state_formats=arguments.state_format or tuple(STATE_FORMATS),
        sample_rates=arguments.sample_rate or (1.0, 0.1),
        devices=arguments.devices or [n for n in (1, 2, 4, 8) if n <= (arguments.identities if arguments.memory else here)],
        identities=arguments.identities,
        dim=arguments.dim,
        batch=arguments.batch,
        precision=arguments.precision,
        device_type=device.type,
    )
    if not found:
        arguments.wrong_usage("torch.optim's optimizers go with float32 for table and state and a sample rate of 1")
    if (
        arguments.identities * arguments.dim > memory_model.MOST_NUMBERS
        or arguments.batch * arguments.dim > memory_model.MOST_NUMBERS
    ):
        arguments.wrong_usage(f"a table or a batch of more than {memory_model.MOST_NUMBERS:,} numbers is beyond any plan")
    if max(training.devices for training in found) > arguments.identities:
        arguments.wrong_usage(f"{arguments.identities} identities cannot be shared by more devices than that")
    process = memory_model.measure_process(device.type)
    if arguments.tflops:
        ceilings, origin = memory_model.Ceilings(arguments.tflops * 1e12, arguments.gbps * 1e9), "as given"
    else:
        ceilings, origin = memory_model.measure_ceilings(found[0]), "measured here now"
    memory = arguments.memory or available_bytes(device) + process
    print("\n".join(memory_report.report(found, memory=memory, process=process, ceilings=ceilings, origin=origin)))
    return 0


def _info(_):
    from .info import report

    print(report())
    return 0


def _fail(message):
    print(f"cosface: {message}", file=sys.stderr)
    return 1
