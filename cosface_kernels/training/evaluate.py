"""`cosface eval`: numbers of verification and identification, of embeddings, pairs of images, templates, or held-out faces."""

from pathlib import Path

import numpy as np
import torch

from ..ops.normalize import unit_rows
from ..version import __version__
from . import faces, identification, verification
from . import pairs as lists
from .all_pairs import AllPairs
from .arrays import read_embeddings, read_labels, write_json
from .data import prepare
from .templates import TemplatePairs, Templates, sums

FARS = {f"1e-{exponent}": exponent for exponent in verification.FAR_EXPONENTS}
HELD_OUT_IMAGES, HELD_OUT_BATCH = 4, 128  # of an identity, of a backbone's input
FPIRS = {f"1e-{exponent}": exponent for exponent in (1, 2, 3)}


def of_embeddings(embeddings, labels, distractors=None):
    """The record of files: all pairs compared, each image searched.

    Args:
        embeddings: path of an array (N, D), .npy or .safetensors.
        labels: path of an array (N,), the identity of each.
        distractors: path of an array (M, D) of images of nobody in `labels`.

    Raises:
        ValueError: a file cannot be used; the message names it.
    """
    rows = read_embeddings(embeddings)
    identities = read_labels(labels, len(rows))
    others = None if distractors is None else read_embeddings(distractors)
    if others is not None and others.shape[1] != rows.shape[1]:
        raise ValueError(f"{distractors}: has D = {others.shape[1]}, and {embeddings} has D = {rows.shape[1]}")
    pairs = AllPairs(rows, identities, others)
    record = {
        "version": __version__,
        "embeddings": {"file": str(embeddings), "images": len(rows), "size": rows.shape[1], "identities": len(pairs.identities)},
        "distractors": None if others is None else {"file": str(distractors), "images": len(others)},
        "verification": verification_of(verification.steps_of(pairs), pairs.accepted_of_identities),
    }
    return record | {"identification": identification_of(identification.search(rows, identities, others))}


def of_pairs(path, checkpoint, flip, images=None):
    """The record of a list of pairs (pairs.py), by the backbone of a run: accuracy in ten folds, and rates of all pairs.

    Raises:
        ValueError: the list or an image cannot be used; the message names it.
        FileNotFoundError: there is no such run.
    """
    from .backbones import load_backbone
    from .embed import embed

    listed = lists.read(path, images)
    backbone, config = load_backbone(checkpoint)
    rows = embed(backbone, [image for template in listed.templates for image in template], config.image_size, flip)
    scores = scores_of(listed, rows)
    result = verification.folds(scores, listed.same)
    right = sum(np.array_split(scores, 10)[fold].size * accuracy for fold, accuracy in enumerate(result.accuracies))
    return {
        "version": __version__,
        "checkpoint": str(checkpoint),
        "flip": flip,
        "pairs": {"file": str(path), "templates": len(listed.templates), "images": len(rows)},
        "verification": {
            "accuracy": float(np.mean(result.accuracies)),
            "accuracy_std": float(np.std(result.accuracies)),
            "accuracy_interval": list(verification.wilson(round(right), len(scores))),
            "folds": result._asdict(),
            **verification_of(verification.Steps.of(scores[listed.same], scores[~listed.same])),
        },
    }


def of_templates(embeddings, templates, pairs=None, galleries=(), probes=None):
    """The record of templates (templates.py) of embeddings: of pairs, and of a search of `probes` in each of the galleries.

    Raises:
        ValueError: a file cannot be used; the message names it.
    """
    rows = read_embeddings(embeddings)
    listed = Templates(rows, templates)
    record = {
        "version": __version__,
        "embeddings": {"file": str(embeddings), "images": len(rows), "size": rows.shape[1], "templates": len(listed.unit)},
    }
    if pairs:
        record["verification"] = verification_of(verification.steps_of(TemplatePairs(listed, pairs)))
    if galleries:
        record["identification"] = _of_galleries({str(path): listed.search(path, probes) for path in galleries})
    return record


def _of_galleries(searches):
    """The mean over galleries, as IJB reports it, and the record of each."""
    found = {path: identification_of(each) for path, each in searches.items()}
    rates = [each["tpir"] for each in found.values()]
    return {
        "rank1": float(np.mean([each["rank1"] for each in found.values()])),
        "cmc": np.mean([each["cmc"] for each in found.values()], 0).tolist(),
        "tpir": {name: None if None in (each := [rate[name] for rate in rates]) else float(np.mean(each)) for name in FPIRS},
        "galleries": found,
    }


def scores_of(listed, rows):
    """(P,) cosines of Pairs; rows: the embeddings of all images of all templates, in order. A template is its mean unit row."""
    sizes = [len(template) for template in listed.templates]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    unit = unit_rows(sums(unit_rows(rows.double())[0], owner, len(sizes)))[0]
    return (unit[listed.first] * unit[listed.second]).sum(1).numpy()


@torch.no_grad()
def write_held_out(path, backbone, config, first, device):
    """Write the rates of all pairs of `config.held_out` rendered identities that nobody trained on, numbered from `first` on.

    backbone: in eval mode.
    """
    labels = np.repeat(np.arange(first, first + config.held_out), HELD_OUT_IMAGES)
    images, rows = np.tile(np.arange(HELD_OUT_IMAGES), config.held_out), []
    for start in range(0, len(labels), HELD_OUT_BATCH):
        some = slice(start, start + HELD_OUT_BATCH)
        drawn = torch.from_numpy(faces.render(labels[some], images[some], config.image_size, config.seed))
        rows.append(backbone(prepare(drawn.to(device))).float().cpu())
    rows = torch.cat(rows).numpy()
    if np.isfinite(rows).all() and rows.any(1).all():
        pairs = AllPairs(rows, labels)
        found = verification_of(verification.steps_of(pairs), pairs.accepted_of_identities)
        write_json(path, {"identities": config.held_out, "images": len(labels), "verification": found})


def verification_of(steps, accepted_of_identities=None):
    """The record of Steps. accepted_of_identities(thresholds): see AllPairs; without it there is no bootstrap over identities."""
    genuine, impostors = (int(counts.sum()) for counts in (steps.genuine, steps.impostors))
    rates = {name: verification.tar_at_far(steps, exponent) for name, exponent in FARS.items()}
    found = {name: rate for name, rate in rates.items() if rate}
    error, threshold = verification.equal_error_rate(steps)
    area, area_error = verification.area_under_roc(steps)
    return {
        "pairs": {"genuine": genuine, "impostor": impostors},
        "tar": {name: rate and rate.tar for name, rate in rates.items()},
        "far": {name: rate and rate.far for name, rate in rates.items()},
        "threshold": {name: rate and rate.threshold for name, rate in rates.items()},
        "tar_interval": _intervals(found, genuine, accepted_of_identities),
        "unresolved": _unresolved(rates, FARS, "impostor pairs", impostors),
        "eer": error,
        "eer_threshold": threshold,
        "auc": area,
        "auc_error": area_error,
        "roc": dict(zip(("far", "tar", "threshold"), verification.roc_points(steps), strict=True)),
    }


def _unresolved(rates, exponents, what, count):
    return {name: f"needs {10 ** exponents[name]:,} {what}, there are {count:,}" for name, rate in rates.items() if not rate}


def _intervals(rates, genuine, accepted_of_identities):
    """{"wilson": {FAR: [low, high]}, "identities": the same by the bootstrap}, of TAR at thresholds held as they are."""
    wilson = {name: list(verification.wilson(round(rate.tar * genuine), genuine)) for name, rate in rates.items()}
    if not (accepted_of_identities and rates):
        return {"wilson": wilson}
    bounds = verification.bootstrap(*accepted_of_identities([rate.threshold for rate in rates.values()]))
    return {"wilson": wilson, "identities": dict(zip(rates, bounds.T.tolist(), strict=True))}


def identification_of(searches):
    """The record of Searches."""
    curve, count = identification.cmc(searches), len(searches.ranks)
    found = {name: identification.tpir_at_fpir(searches, exponent) for name, exponent in FPIRS.items()}
    return {
        "searches": count,
        "probes": len(searches.best),
        "gallery": searches.gallery + 1,
        "rank1": curve[0],
        "rank1_interval": list(verification.wilson(round(curve[0] * count), count)),
        "cmc": curve,
        "tpir": {name: pair and pair[0] for name, pair in found.items()},
        "threshold": {name: pair and pair[1] for name, pair in found.items()},
        "unresolved": _unresolved(found, FPIRS, "probes", len(searches.best)),
    }


def numbers(record):
    """{what: text} of the record."""
    found = _verified(record["verification"]) if "verification" in record else {}
    return found | (_searched(record["identification"]) if "identification" in record else {})


def _verified(verified):
    pairs, intervals = verified["pairs"], verified["tar_interval"]
    found = {"pairs": f"{pairs['genuine']:,} genuine, {pairs['impostor']:,} impostor"}
    if "accuracy" in verified:
        spread = f"± {verified['accuracy_std']:.2%} between folds"
        found["accuracy in ten folds"] = f"{verified['accuracy']:.2%} {spread}, {_between(verified['accuracy_interval'])} of all"
    for name, tar in verified["tar"].items():
        if tar is None:
            found[f"TAR at FAR {name}"] = verified["unresolved"][name]
            continue
        where = f"from score {verified['threshold'][name]:.4f} on"
        found[f"TAR at FAR {name}"] = f"{tar:.2%} ({_quoted(intervals, name)}), {where}"
    return found | {"equal error rate": f"{verified['eer']:.4%}", "area under the ROC": f"{verified['auc']:.6f}"}


def _quoted(intervals, name):
    """The interval of the bootstrap, or Wilson's: without one, and at 0% and 100%, where all draws are alike."""
    low, high = intervals.get("identities", {}).get(name, (0, 0))
    if low < high:
        return f"{_between((low, high))}, bootstrap over identities"
    return f"{_between(intervals['wilson'][name])}, Wilson"


def _searched(searched):
    if "galleries" not in searched:
        probes = f"{searched['searches']:,} of {searched['probes']:,} probes among {searched['gallery']:,} images"
        return {"searches": probes} | _ranks(searched)
    found = {}
    for path, each in searched["galleries"].items():
        probes = f"{each['searches']:,} probes, and {each['probes']:,} of others, among {each['gallery']:,} templates"
        found |= {f"{Path(path).stem}: {what}": text for what, text in {"searches": probes, **_ranks(each)}.items()}
    return found | {f"mean: {what}": text for what, text in _ranks(searched).items()}


def _ranks(searched):
    interval = f" ({_between(searched['rank1_interval'])}, Wilson)" if "rank1_interval" in searched else ""
    found = {"rank 1": f"{searched['rank1']:.2%}{interval}", "rank 10": f"{searched['cmc'][9]:.2%}"}
    for name, tpir in searched["tpir"].items():
        if tpir is not None:
            found[f"TPIR at FPIR {name}"] = f"{tpir:.2%}"
        elif "unresolved" in searched:
            found[f"TPIR at FPIR {name}"] = searched["unresolved"][name]
    return found


def _between(interval):
    low, high = interval
    return f"{low:.2%} to {high:.2%}"


def page(record, path):
    """Write the record's numbers and curves as one HTML file."""
    from . import report, svg

    charts = []
    if "verification" in record:
        charts.append(("ROC", svg.roc({"": record["verification"]["roc"]})))
    if "identification" in record:
        curve = {"": list(enumerate(record["identification"]["cmc"], 1))}
        charts.append(("CMC", svg.lines(curve, "rank", "share of searches")))
    source = record.get("embeddings") or record["pairs"]
    rows = {what: [text] for what, text in numbers(record).items()}
    report.page(path, "Evaluation", source["file"], rows, charts)
