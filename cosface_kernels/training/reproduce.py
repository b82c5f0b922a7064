"""`cosface reproduce`: the paper's experiments in small, on identities that were never trained, each from several seeds.

Each training is one line of results.jsonl, so a run that was stopped goes on where it was. An experiment is its losses, and the
claims of the paper that its results are asked about.
"""

import hashlib
import json
import os
import shlex
import statistics
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

from . import photographs, recipes
from .arrays import whole_lines, write_text

MARGINS = (0.0, 0.1, 0.2, 0.3, 0.35, 0.45)
OURS = f"LMCL, m = {recipes.MARGIN}"
WITHOUT = "LMCL without feature normalisation"
EXPERIMENTS = {
    "margins": {f"LMCL, m = {margin:g}": partial(recipes.lmcl, margin) for margin in MARGINS},
    "losses": recipes.LOSSES,
    "normalization": {name: recipes.LOSSES[name] for name in (WITHOUT, OURS)},
    "nsl": {f"LMCL, m = {margin:g}": partial(recipes.lmcl, margin) for margin in (0.0, recipes.MARGIN)},
}


def run(experiment, data, seeds, steps, out, done=print):
    """[{"data", "loss", "seed", "settings", and the scores}]: what results.jsonl in `out` has not yet is trained now."""
    datasets = {}  # of one seed, for all its losses

    def trained(line, make_loss):
        if "accuracy" in line:
            return line
        seed = line["seed"]
        if seed not in datasets:
            datasets.clear()
            datasets[seed] = recipes.DATA[data](seed)
        start = time.process_time()
        scores = recipes.train(make_loss, datasets[seed], seed, steps)._asdict()
        return line | scores | {"minutes": round((time.process_time() - start) / 60, 2)}

    return _results(experiment, data, seeds, recipes.settings(steps, data), Path(out), trained=trained, done=done)


def run_on_photographs(experiment, data, paths, images, seeds, steps, out, done=print):
    """[the same, with "pairs": {name of a list: scores} in place of the scores]; networks stay in `out`, for other lists."""
    out, listed = Path(out), photographs.read(paths, images)

    def trained(line, make_loss):
        scores = line.get("pairs", {})
        if missing := listed.keys() - scores.keys():
            place = out / "networks" / hashlib.sha256(_key(line).encode()).hexdigest()[:16]
            network = photographs.train(make_loss, data, line["seed"], steps, place)
            scores = scores | {each: photographs.score(network, listed[each]) for each in sorted(missing)}
        return line | {"pairs": scores}

    results = _results(experiment, data, seeds, photographs.settings(steps), out, trained=trained, done=done)
    return [line | {"pairs": {each: line["pairs"][each] for each in listed}} for line in results]


def _results(experiment, data, seeds, settings, out, trained, done):
    """The line of each training. trained(line, make_loss): the line, or what results.jsonl has of it, with all that is asked."""
    out.mkdir(parents=True, exist_ok=True)
    path, results = out / "results.jsonl", []
    known = {_key(line): line for line in read(path)}  # of several lines of one training the last has all lists
    for seed in range(seeds):
        for name, make_loss in EXPERIMENTS[experiment].items():
            line = {"data": data, "loss": name, "seed": seed, "settings": settings}
            before = known.get(_key(line))
            results.append(trained(before or line, make_loss))
            if results[-1] != before:
                _append(path, results[-1])
                done(f"{data}, seed {seed}: {name}")
    return results


def _key(line):
    return json.dumps([line[name] for name in ("data", "loss", "seed", "settings")], sort_keys=True)


def read(path):
    """The results of the whole lines of results.jsonl."""
    results = []
    for number, line in enumerate(whole_lines(path), 1):
        try:
            results.append(json.loads(line))
            _key(results[-1])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is no result of a training ({error}); remove it") from error
    return results


def _append(path, line):
    with open(path, "ab") as file:
        whole = path.read_bytes().rpartition(b"\n")
        file.truncate(len(whole[0]) + len(whole[1]))
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


# The paper's tables 1 and 2 (arXiv 1801.09414): LFW, YTF, MegaFace rank 1, MegaFace TAR at FAR 1e-6, %, trained on CASIA-WebFace.
PAPER = {
    "Softmax": (97.88, 93.1, 54.85, 65.92),
    "Softmax + Contrastive": (98.78, 93.5, 65.21, 78.86),
    "Triplet": (98.70, 93.4, 64.79, 78.32),
    "L-Softmax": (99.10, 94.0, 67.12, 80.42),
    "Softmax + Center": (99.05, 94.4, 65.49, 80.14),
    "A-Softmax": (99.42, 95.0, 72.72, 85.56),
    "A-Softmax-NormFea": (99.32, 95.4, 75.42, 88.82),
    WITHOUT: (99.10, 93.1, 75.10, 88.65),
    OURS: (99.33, 96.1, 77.11, 89.88),
}
TITLES = {
    "margins": "The paper's figure 5: the margin m from 0 to 0.45",
    "losses": "The paper's table 2: nine losses",
    "normalization": "The paper's table 1: feature normalisation",
    "nsl": "LMCL against NSL, which is LMCL with m = 0",
}
TRAINED = {
    "faces": "1,000 rendered identities of 10 images; tested on 100 others of 10 images, among 1,000 distractors",
    "faces20000": "20,000 rendered identities of 10 images; tested on 1,000 others of 5 images, among 10,000 distractors",
    "digits": "seven of scikit-learn's ten digits; tested on the other three",
}
SCORES = {"accuracy": "pair accuracy", "rank1": "rank 1", "tar_1e3": "TAR at FAR 1e-3", "tar_1e4": "TAR at FAR 1e-4"}
VERDICTS = "held", "did not hold", "did not separate"


def claims(experiment):
    """[(the paper's claim, the loss that shall score higher, the other)]"""
    if experiment == "normalization":
        return [("normalised features are better", OURS, WITHOUT)]
    if experiment == "nsl":
        return [("LMCL is better than NSL", OURS, "LMCL, m = 0")]
    if experiment == "losses":
        return [(f"LMCL is better than {other}", OURS, other) for other in recipes.LOSSES if other != OURS]
    name = "LMCL, m = {:g}".format
    worst = [(f"m = {margin:g} is better than m = 0", name(margin), name(0)) for margin in MARGINS[1:]]
    pairs = pairwise(MARGINS[1:-1])
    rising = [(f"m = {high:g} is better than m = {low:g}", name(high), name(low)) for low, high in pairs]
    return [*worst, *rising, ("m = 0.35 is better than m = 0.45", name(0.35), name(0.45))]


def verdict(results, score, better, worse):
    """(one of VERDICTS, the differences of all seeds): the claim held if all are positive, did not hold if all are negative."""
    of = {(line["loss"], line["seed"]): line[score] for line in results}
    differences = [of[better, seed] - of[worse, seed] for seed in sorted({seed for _, seed in of})]
    return VERDICTS[0 if min(differences) > 0 else 1 if max(differences) < 0 else 2], differences


def report(experiment, results):
    """Markdown of an experiment's results, line by line."""
    data, seeds, setting = results[0]["data"], len({line["seed"] for line in results}), results[0]["settings"]
    command = f"    cosface reproduce {experiment} --data {data} --seeds {seeds} --steps {setting['steps']} --out DIR"
    yield from (f"# {TITLES[experiment]}, in small", "", command, "")
    yield (
        f"Trained on `{data}`: {TRAINED[data]}. {setting['steps']} steps of {setting['batch']} images of "
        f"{setting['image_size']} pixels, D = {setting['embedding_size']}, s = {setting['scale']:g} for cosines, SGD with lr "
        f"{setting['lr']:g}, one cycle (s and lr chosen for LMCL and softmax on another seed, after 500 steps). Mean ± standard "
        f"deviation of {seeds} seeds, in %, each with its own images and weights." + _minutes(results)
    )
    yield from ("", *_scores(experiment, results), "", *_claims(experiment, results))


def report_of_photographs(experiment, results, paths):
    """Markdown of the results on photographs, line by line, with a section for each list of pairs."""
    data, seeds, setting = results[0]["data"], len({line["seed"] for line in results}), results[0]["settings"]
    command = f"    cosface reproduce {experiment} --data {shlex.quote(data)} --pairs {shlex.join(map(str, paths))}"
    yield from (f"# {TITLES[experiment]}", "", f"{command} --seeds {seeds} --steps {setting['steps']} --out DIR", "")
    yield (
        f"Trained on `{data}`, by the paper's settings: {setting['backbone']}, {setting['steps']:,} steps of "
        f"{setting['identities'] * setting['images']} images of {setting['image_size']} pixels, D = {setting['embedding_size']}, "
        f"s = {setting['scale']:g}, SGD with lr {setting['lr']:g}, divided by 10 three times. Mean ± standard deviation of "
        f"{seeds} seeds, in %."
    )
    for name in results[0]["pairs"]:
        flat = [line | line["pairs"][name] for line in results]
        yield from ("", f"## {name}", "", *_scores(experiment, flat), "", *_claims(experiment, flat))


def _minutes(results):
    """A sentence, where the lines have it."""
    found = [line["minutes"] for line in results if "minutes" in line]
    return f" A training took {min(found):g} to {max(found):g} minutes of processor time." if found else ""


def _known(results):
    """{score: title} of what was measured in all results."""
    return {score: title for score, title in SCORES.items() if all(line.get(score) is not None for line in results)}


def _scores(experiment, results):
    names, scores = list(EXPERIMENTS[experiment]), _known(results)
    printed = all(name in PAPER for name in names)  # figure 5 is a curve without numbers
    paper = ["the paper's LFW", "YTF", "MegaFace rank 1", "MegaFace TAR at FAR 1e-6"] if printed else []
    runs = {name: [line for line in results if line["loss"] == name] for name in names}
    cells = {name: [_percent([line[score] for line in runs[name]]) for score in (*scores, "eer")] for name in names}
    rows = [(name, *cells[name], *(PAPER[name] if printed else ())) for name in names]
    yield from _table(["loss", *scores.values(), "equal error rate", *paper], rows)
    if printed:
        yield ""
        yield "The paper's own numbers are for CASIA-WebFace and another network: compare their order, not their size."


def _table(head, rows):
    """Lines of Markdown."""
    yield from (f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def _percent(values):
    spread = statistics.stdev(values) if len(values) > 1 else 0
    return f"{100 * statistics.fmean(values):.2f} ± {100 * spread:.2f}"


def _claims(experiment, results):
    known = _known(results)
    judged = {claim: [verdict(results, score, better, worse) for score in known] for claim, better, worse in claims(experiment)}
    for place, title in enumerate(known.values()):
        words = [found[place][0] for found in judged.values()]
        told = ", ".join(f"{words.count(word)} {word}" for word in VERDICTS if word in words)
        yield f"- By {title}, of {len(judged)} claims of the paper {told}."
    yield ""
    yield "A claim held if it is true of every seed, did not hold if it is true of none, and else did not separate."
    yield "Beside it are the smallest and the largest difference, in points."
    yield ""
    cells = {
        claim: [f"{word} ({100 * min(each):+.2f} to {100 * max(each):+.2f})" for word, each in found]
        for claim, found in judged.items()
    }
    yield from _table(["claim of the paper", *known.values()], [(claim, *found) for claim, found in cells.items()])


def toy(results):
    """Figure 4, by the demo's experiment: its results as Markdown, line by line."""
    gaps = [result.smallest_gap for result in results[1:]]
    yield from ("# The paper's figure 4: eight identities in a plane", "", "    cosface reproduce toy --out DIR", "")
    rows = [(loss, f"{gap:.1f}", f"{angle:.2f}", f"{100 * accuracy:.1f}") for loss, gap, angle, accuracy in results]
    yield from _table(["loss", "smallest gap, °", "within an identity, °", "held-out accuracy, %"], rows)
    yield ""
    word = VERDICTS[0 if gaps == sorted(gaps) else 1]
    yield f"The paper's claim that a larger margin widens the gap {word}: {', '.join(f'{gap:.1f}°' for gap in gaps)}."


def write(name, lines, out):
    """Write a report's lines to NAME.md in `out`; its text."""
    text = "\n".join(lines) + "\n"
    write_text(Path(out) / f"{name}.md", text)
    return text
