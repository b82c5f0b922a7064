"""report.html of a run, and of several side by side: one file, without scripts, readable in light and dark."""

import json
import statistics
from html import escape
from pathlib import Path

import torch
import torch.nn.functional as F

from . import config as settings
from . import data, svg
from .arrays import read_json, whole_lines, write_text

CURVES = {"loss": "loss", "target_cosine": "cosine with the own class", "negative_cosine": "hardest negative cosine"}
LIGHT = "--page: #fcfcfb; --text: #1c1d1f; --soft: #5f6368; --rule: #dcdcd8; "
DARK = "--page: #16181b; --text: #e6e6e3; --soft: #a2a6ac; --rule: #383b40; "
LIGHT_SERIES = ["#2a6fdb", "#d1495b", "#2e8b57", "#b7791f", "#7b4fc9", "#0f8a9d", "#a0522d", "#64748b"]
DARK_SERIES = ["#6ea8fe", "#f2828f", "#63c58c", "#e0b050", "#b095f0", "#56c4d4", "#d69a70", "#a3b1c2"]
STYLE = """
body { background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; border-bottom: 1px solid var(--rule); padding-bottom: .2rem; }
p { color: var(--soft); margin: .2rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top; }
th { font-weight: 500; color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(380px, 100%), 1fr)); gap: 1.2rem; }
figure { margin: 0; }
figcaption { font-weight: 500; margin-bottom: .2rem; }
.legend { font-size: 13px; margin: 0; }
.legend span { margin-right: 1.2rem; }
.legend i { display: inline-block; width: .65rem; height: .65rem; margin-right: .35rem; background: var(--c); }
svg { width: 100%; height: auto; }
.sphere { max-width: 320px; }
svg text { fill: var(--soft); font-size: 11px; }
.grid { stroke: var(--rule); }
.axis { stroke: var(--soft); fill: none; }
.line { fill: none; stroke-width: 1.6; stroke: var(--c); }
.fill { fill: var(--c); }
pre { overflow-x: auto; font-size: 13px; }
"""


def _style():
    light, dark = (
        base + " ".join(f"--s{number}: {colour};" for number, colour in enumerate(colours))
        for base, colours in ((LIGHT, LIGHT_SERIES), (DARK, DARK_SERIES))
    )
    series = "\n".join(f".s{number} {{ --c: var(--s{number}); }}" for number in range(len(LIGHT_SERIES)))
    colours = f":root {{ color-scheme: light dark; {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    return colours + STYLE + series


class Found:
    """All that a run's folder says of it."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.settings = settings.read(settings.of_run(folder))
        self.name = self.folder.resolve().name
        self.environment = read_json(self.folder / "environment.json") or {}
        self.metrics = [json.loads(line) for line in whole_lines(self.folder / "metrics.jsonl")]
        self.points = read_json(self.folder / "sphere.json")
        found = {path.stem: read_json(path) for path in sorted(self.folder.glob("*.json"))}
        kinds = "verification", "identification"
        self.evaluations = {name: each for name, each in found.items() if isinstance(each, dict) and any(map(each.get, kinds))}

    def series(self, key):
        return [(line["step"], line[key]) for line in self.metrics if line.get(key) is not None]

    def roc(self):
        """{name of an evaluation: its record's "roc"}"""
        found = {name: each.get("verification", {}).get("roc") for name, each in self.evaluations.items()}
        return {name: each for name, each in found.items() if each}

    def numbers(self):
        """{what: text} of how the run ended."""
        found = {"steps": f"{self.metrics[-1]['step'] if self.metrics else 0:,} of {self.environment.get('steps', 0):,}"}
        for key, what in {**CURVES, "top1": "own class the nearest, before the margin"}.items():
            if last := [value for _, value in self.series(key)[-50:]]:
                what += f", mean of the last {len(last)} steps" * (what == "loss")
                found[what] = svg.number(sum(last) / len(last))
        if speeds := [value for _, value in self.series("images_per_second")]:
            found["images a second, median"] = svg.number(statistics.median_high(speeds))
            found["memory, at most"] = f"{max(value for _, value in self.series('memory')) / 1e9:.2f} GB"
        counts = {"images": "images", "identities": "identities", "backbone_parameters": "parameters of the backbone"}
        found |= {what: f"{self.environment[key]:,}" for key, what in counts.items() if key in self.environment}
        facts = "device", "processes", "started", "torch", "cosface_kernels"
        found |= {key.replace("_", " "): str(self.environment[key]) for key in facts if key in self.environment}
        for name, each in self.evaluations.items():
            verified, searched = each.get("verification", {}), each.get("identification", {})
            rates = {"accuracy in ten folds": verified.get("accuracy")}
            rates |= {f"TAR at FAR {far}": tar for far, tar in verified.get("tar", {}).items()}
            rates["rank 1"] = searched.get("rank1")
            rates |= {f"TPIR at FPIR {fpir}": tpir for fpir, tpir in searched.get("tpir", {}).items()}
            found |= {f"{name}: {what}": f"{rate:.2%}" for what, rate in rates.items() if rate is not None}
        return found


def write(run):
    """Write run/report.html, and return its path."""
    found = Found(run)
    cosines = {"own class": found.series("target_cosine"), "hardest negative": found.series("negative_cosine")}
    charts = [
        ("loss", svg.lines({"loss": found.series("loss")}, "step", "loss")),
        ("learning rate", svg.lines({"lr": found.series("lr")}, "step", "lr")),
        ("cosines, mean of a step", svg.lines({name: each for name, each in cosines.items() if each}, "step", "cosine")),
    ]
    for kind in "target", "negative":
        if columns := found.series(f"{kind}_histogram"):
            charts.append((f"{CURVES[f'{kind}_cosine']}, all images", svg.density(columns, "step", "cosine")))
    charts += [
        ("share of images whose own class is the nearest", svg.lines({"": found.series("top1")}, "step", "top-1")),
        ("images a second", svg.lines({"": found.series("images_per_second")}, "step", "images/s", from_zero=True)),
    ]
    if roc := found.roc():
        charts.append(("ROC", svg.roc(roc)))
    if found.points:
        count = len(set(found.points["labels"]))
        caption = f"embeddings of {count} identities, on the three directions with {found.points['share']:.0%} of their squares"
        charts.append((caption, svg.sphere(found.points["points"], found.points["labels"])))
    settings_text = escape((found.folder / "config.yaml").read_text())
    rows = {what: [text] for what, text in found.numbers().items()}
    after = f"<h2>Settings</h2><pre>{settings_text}</pre>"
    return page(found.folder / "report.html", found.name, found.settings["data"], rows, charts, after=after)


def compare(runs, out):
    """Write one page of several runs: curves together, numbers side by side, and the settings in which they differ."""
    found = [Found(run) for run in runs]
    names = [each.name if [other.name for other in found].count(each.name) == 1 else str(each.folder) for each in found]
    named = dict(zip(names, found, strict=True))
    charts = []
    for key, what in CURVES.items():
        if series := {name: each.series(key) for name, each in named.items() if each.series(key)}:
            charts.append((what, svg.lines(series, "step", what)))
    if roc := {f"{name}, {which}": curve for name, each in named.items() for which, curve in each.roc().items()}:
        charts.append(("ROC", svg.roc(roc)))
    numbers = [each.numbers() for each in found]
    rows = {key: [each.get(key, "") for each in numbers] for key in dict.fromkeys(key for each in numbers for key in each)}
    values = {key: [each.settings.get(key) for each in found] for key in settings.FIELDS if key != "out"}
    differing = {key: [json.dumps(each) for each in row] for key, row in values.items() if any(each != row[0] for each in row)}
    after = f"<h2>Settings that differ</h2>{_table(differing, names) if differing else '<p>none</p>'}"
    return page(Path(out), "Comparison", ", ".join(names), rows, charts, names=names, after=after), rows, names


@torch.no_grad()
def keep_sphere(run, backbone, source, device):
    """Write run/sphere.json: embeddings of the first images, on their three main directions. backbone: in eval mode."""
    images, labels, _ = source.batch(range(min(len(source), 200)))
    chosen = torch.isin(labels, labels.unique()[:8])
    rows = F.normalize(backbone(data.prepare(images[chosen].to(device))).float()).cpu().double()
    if not rows.isfinite().all():
        return
    values, directions = torch.linalg.eigh(rows.T @ rows)
    points = rows @ directions[:, -3:].flip(1)
    points = torch.nn.functional.pad(points, (0, 3 - points.shape[1]))
    record = {"points": points.round(decimals=3).tolist(), "labels": labels[chosen].unique(return_inverse=True)[1].tolist()}
    write_text(Path(run) / "sphere.json", json.dumps(record | {"share": (values[-3:].sum() / values.sum()).item()}))


def _table(rows, names=()):
    head = f"<tr><th></th>{''.join(f'<th>{escape(name)}</th>' for name in names)}</tr>" if names else ""
    body = (
        f"<tr><th>{escape(key)}</th>{''.join(f'<td>{escape(value)}</td>' for value in row)}</tr>" for key, row in rows.items()
    )
    return f"<table>{head}{''.join(body)}</table>"


def page(path, title, subtitle, rows, charts, names=(), after=""):
    """Write a page of {what: texts of the runs `names`} and [(caption, SVG)], and return its path."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    numbers = f"<h1>{escape(title)}</h1><p>{escape(subtitle)}</p><h2>Numbers</h2>{_table(rows, names)}"
    figures = "".join(f"<figure><figcaption>{escape(caption)}</figcaption>{chart}</figure>" for caption, chart in charts)
    body = f'{numbers}<h2>Curves</h2><div class="charts">{figures}</div>{after}'
    write_text(path, f'<!doctype html><html lang="en"><head>{head}<style>{_style()}</style></head><body>{body}</body></html>\n')
    return path
