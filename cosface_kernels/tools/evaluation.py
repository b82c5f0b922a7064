"""The commands that say what a network is worth: eval, embed, reproduce. cli.py adds them."""

from pathlib import Path

from .command import add, done, fail, refuse

RENDERED = "faces", "faces20000", "digits"


def _add_eval(commands):
    option = add(
        commands,
        _eval,
        "eval",
        help="verification and identification: TAR at FAR, folds, ranks, with intervals",
        usage="cosface eval --embeddings FILE --labels FILE [--distractors FILE] [--json FILE] [--html FILE]\n"
        "       cosface eval --embeddings FILE --templates FILE [--template-pairs FILE] [--gallery FILE ... --probes FILE]\n"
        "                    [--json FILE] [--html FILE]\n"
        "       cosface eval --pairs FILE --checkpoint DIR [--flip RULE] [--images DIR] [--json FILE] [--html FILE]",
        description="Compare all pairs of embeddings, and search each image among the others, in memory that does not grow with "
        "the number of pairs; or compare the pairs of a list, in ten folds. docs/evaluation.md has the definitions.",
    )
    arrays = "a .npy or .safetensors file"
    option("--embeddings", type=Path, metavar="FILE", help=f"(N, D), {arrays}")
    option("--labels", type=Path, metavar="FILE", help=f"(N,), the identity of each, {arrays}")
    option("--distractors", type=Path, metavar="FILE", help=f"(M, D), images of nobody in --labels, {arrays}")
    option("--templates", type=Path, metavar="FILE", help="IJB's list: image, template and medium of each embedding")
    option("--template-pairs", type=Path, metavar="FILE", help="IJB's list of pairs: template, template, 0 or 1")
    option("--gallery", type=Path, nargs="+", metavar="FILE", help="IJB's galleries of a search, .csv of templates and subjects")
    option("--probes", type=Path, metavar="FILE", help="IJB's probes, which are searched in each gallery")
    option("--pairs", type=Path, metavar="FILE", help="InsightFace's .bin file, or a .txt list of pairs")
    option("--images", type=Path, metavar="DIR", help="where the images of a .txt list are (default: beside it)")
    _add_network(option)
    option("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    option("--html", type=Path, metavar="FILE", help="write the numbers with their curves, ROC and CMC, to FILE")


def _add_network(option):
    option("--checkpoint", type=Path, metavar="DIR", help="a run's folder: the network")
    rule = "the image alone, beside its mirror image (as the paper; default), or their sum (as InsightFace)"
    option("--flip", choices=("none", "concat", "sum"), help=rule)


def _add_embed(commands):
    option = add(
        commands,
        _embed,
        "embed",
        help="embeddings of a folder of images, or the network as an ONNX file",
        usage="cosface embed DIR --checkpoint DIR --out FILE [--flip RULE]\n       cosface embed --checkpoint DIR --onnx FILE",
        description="Write the embeddings of all images below a folder, with their names and folders; or write the network, with "
        "what it does to pixels before and to features after, as an ONNX file.",
    )
    option("images", nargs="?", type=Path, metavar="DIR", help="a folder of images")
    option("--out", type=Path, metavar="FILE", help="a .npy or .safetensors file")
    option("--onnx", type=Path, metavar="FILE", help="the ONNX file")
    _add_network(option)


def _add_reproduce(commands):
    option = add(
        commands,
        _reproduce,
        "reproduce",
        help="the paper's experiments in small, with a report that says which of its claims held",
        description="Repeat an experiment of the paper in small, on identities that were never trained, from several seeds: "
        "toy (figure 4), margins (figure 5), losses (table 2), normalization (table 1), or nsl, LMCL with and without its "
        "margin. A run that was stopped goes on where it was.",
    )
    option("experiment", choices=("toy", "margins", "losses", "normalization", "nsl"))
    names = ", ".join(RENDERED)
    data = (
        f"{names} (1,000 or 20,000 rendered identities, handwritten digits; default: faces), or with --pairs what `train` takes"
    )
    option("--data", default="faces", metavar="DATA", help=data)
    pairs = "judge networks trained with the paper's settings on these lists, as eval --pairs takes them"
    option("--pairs", type=Path, nargs="+", default=[], metavar="FILE", help=pairs)
    option("--images", type=Path, metavar="DIR", help="where the images of a .txt list are (default: beside it)")
    option("--seeds", type=int, default=3, choices=range(1, 101), metavar="N", help="trainings of each loss (default: 3)")
    steps = "of each training (default: 500, with --pairs the paper's 30,000)"
    option("--steps", type=int, choices=range(1, 10**6), metavar="N", help=steps)
    where = "where results.jsonl and the report go (default: ./reproduction)"
    option("--out", type=Path, default=Path("reproduction"), metavar="DIR", help=where)


def _eval(arguments):
    embeddings, labels, pairs = arguments.embeddings, arguments.labels, arguments.pairs
    templates, galleries = arguments.templates, arguments.gallery or []
    refuse(
        arguments,
        (bool(embeddings) == bool(pairs), "give --embeddings, or --pairs"),
        (bool(embeddings) != bool(labels or templates), "--embeddings goes with --labels, or with --templates"),
        (labels and templates, "--embeddings goes with --labels, or with --templates"),
        (bool(galleries) != bool(arguments.probes), "--gallery and --probes go together"),
        (
            bool(templates) != bool(arguments.template_pairs or galleries),
            "--templates goes with --template-pairs, or with --gallery and --probes",
        ),
        (bool(pairs) != bool(arguments.checkpoint), "--pairs and --checkpoint go together"),
        (arguments.distractors and not labels, "--distractors goes with --labels"),
        ((arguments.flip or arguments.images) and embeddings, "--flip and --images go with --pairs"),
    )
    given = embeddings, labels, arguments.distractors, templates, arguments.template_pairs, *galleries, arguments.probes, pairs
    for path in filter(None, given):
        if not path.is_file():
            return fail(f"{path}: there is no such file")
    if homeless := _homeless(arguments.json, arguments.html):
        return fail(homeless)

    def evaluated():
        from ..training import arrays, evaluate

        if pairs:
            record = evaluate.of_pairs(pairs, arguments.checkpoint, arguments.flip or "concat", arguments.images)
        elif templates:
            record = evaluate.of_templates(embeddings, templates, arguments.template_pairs, galleries, arguments.probes)
        else:
            record = evaluate.of_embeddings(embeddings, labels, arguments.distractors)
        if arguments.json:
            arrays.write_json(arguments.json, record)
        if arguments.html:
            evaluate.page(record, arguments.html)
        numbers = evaluate.numbers(record)
        width = max(24, 2 + max(map(len, numbers)))
        return "\n".join(f"{what:<{width}}{text}" for what, text in numbers.items())

    return done(evaluated)


def _embed(arguments):
    refuse(
        arguments,
        (not arguments.checkpoint, "--checkpoint says whose network"),
        (bool(arguments.images) != bool(arguments.out), "DIR and --out go together"),
        (not (arguments.images or arguments.onnx), "give DIR and --out, or --onnx"),
    )
    if homeless := _homeless(arguments.out, arguments.onnx):
        return fail(homeless)

    def embedded():
        from ..training import embed

        lines = []
        if arguments.images:
            lines.append(embed.folder(arguments.images, arguments.checkpoint, arguments.out, arguments.flip or "concat"))
        if arguments.onnx:
            lines.append(embed.onnx(arguments.checkpoint, arguments.onnx))
        return "\n".join(lines)

    return done(embedded)


def _reproduce(arguments):
    name, data, pairs, out = arguments.experiment, arguments.data, arguments.pairs, arguments.out
    refuse(
        arguments,
        (
            not pairs and data not in RENDERED,
            f"--data is one of {', '.join(RENDERED)}; any other goes with --pairs, got {data!r}",
        ),
        (pairs and data in RENDERED, "--pairs goes with --data DATA, as `cosface train data=DATA` takes it"),
        (pairs and name == "toy", "toy takes no --pairs"),
        (arguments.images and not pairs, "--images goes with --pairs"),
    )

    def reproduced():
        from ..training import photographs, recipes, reproduce

        if name == "toy":
            import torch

            from .demo import toy

            out.mkdir(parents=True, exist_ok=True)
            return reproduce.write("toy", reproduce.toy(toy.run(out, torch.device("cpu"))), out)
        if pairs:
            steps = arguments.steps or photographs.STEPS
            results = reproduce.run_on_photographs(
                name, data, paths=pairs, images=arguments.images, seeds=arguments.seeds, steps=steps, out=out
            )
            lines = reproduce.report_of_photographs(name, results, pairs)
            return reproduce.write(f"{name}-{Path(data).stem}", lines, out)
        results = reproduce.run(name, data, arguments.seeds, arguments.steps or recipes.STEPS, out)
        return reproduce.write(f"{name}-{data}", reproduce.report(name, results), out)

    return done(reproduced, extras="reproduce")


def _homeless(*paths):
    """A message where a file to write has no folder, before the work is done."""
    for path in filter(None, paths):
        if path.is_dir():
            return f"cannot write {path}: it is a folder, and a file is wanted"
        if not path.parent.is_dir():
            return f"cannot write {path}: there is no folder {path.parent}"
    return None


COMMANDS = _add_eval, _add_embed, _add_reproduce
