"""Is the report of a run one file that says what was measured, and nothing of anybody else's?"""

import json
import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("PIL")
pytest.importorskip("yaml")
pytest.importorskip("tqdm")

from cosface_kernels.tools import cli
from cosface_kernels.training import config, report, svg


def make_run(folder, *, lr=0.02, loss=5.0):
    folder.mkdir()
    (folder / "config.yaml").write_text(config.text(config.Config(data="faces:<9>", out=str(folder), lr=lr)))
    (folder / "environment.json").write_text(json.dumps({"steps": 100, "images": 2000}))
    lines = [{"step": step, "lr": lr, "loss": loss + 50 / step, "target_cosine": step / 200} for step in range(1, 101)]
    lines[-1] |= {"images_per_second": 321.0, "memory": 10**9, "target_histogram": [0, 3, 1, 0]}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 101, "lr')
    record = {"accuracy": 0.625, "tar": {"1e-3": 0.875, "1e-4": None}, "roc": {"far": [0, 1e-3, 1], "tar": [0.5, 0.875, 1]}}
    (folder / "pairs.json").write_text(json.dumps({"verification": record, "identification": {"rank1": 0.375}}))
    points = {"points": [[0.5, -0.5, 0.1], [0, 0, 1.0]], "labels": [0, 1], "share": 0.9}
    (folder / "sphere.json").write_text(json.dumps(points))
    return folder


class Page(HTMLParser):
    """Tags with their attributes, and what is not closed."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report_is_one_file_with_the_numbers_as_text(tmp_path):
    page = Page(report.write(make_run(tmp_path / "first & run")))
    assert page.open == [] and not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert "http" not in (tmp_path / "first & run/report.html").read_text()
    assert all(text in page.text for text in ("first & run", "100 of 100", "faces:<9>", "321", "1.00 GB", "87.50%"))
    captions = ("loss", "learning rate", "cosines", "cosine with the own class, all images", "ROC", "embeddings of 2 identities")
    assert all(caption in page.text for caption in captions) and "hardest negative" not in page.text
    assert sum(tag == "circle" for tag, _ in page.tags) == 3


def test_compare_names_what_differs(tmp_path, capsys):
    runs = [str(make_run(tmp_path / name, lr=lr)) for name, lr in (("a", 0.02), ("b", 0.5))]
    assert cli.main(["compare", *runs, "--out", str(tmp_path / "c.html")]) == 0
    page, printed = Page(tmp_path / "c.html"), capsys.readouterr().out
    assert "Settings that differ" in page.text and "0.5" in page.text and "momentum" not in page.text
    for what, rate in (("accuracy in ten folds", 62.5), ("TAR at FAR 1e-3", 87.5), ("rank 1", 37.5)):
        assert re.search(rf"pairs: {what} +{rate:.2f}% +{rate:.2f}%", printed)
    assert cli.main(["compare", str(tmp_path)]) == 1 and "is no run" in capsys.readouterr().err
    (tmp_path / "a/report.html").unlink(missing_ok=True)
    assert cli.main(["compare", runs[0]]) == 0 and (tmp_path / "a/report.html").exists()


def test_lines_go_through_their_points():
    """A line from the lower left corner of the axes to the upper right, and back."""
    drawn = svg.lines({"up": [(0, 0), (10, 5)], "down": [(0, 5), (10, 0)]}, "x", "y")
    legend, drawn = drawn.split("<svg")
    assert re.sub("<[^>]*>", " ", legend).split() == ["up", "down"]  # above the curves
    up, down = re.findall(r'class="line s\d" points="([^"]*)"', drawn)
    left, right = svg.LEFT, svg.WIDTH - svg.RIGHT
    low, high = svg.HEIGHT - svg.BOTTOM, svg.TOP
    assert up == f"{left:.1f},{low:.1f} {right:.1f},{high:.1f}" and down == f"{left:.1f},{high:.1f} {right:.1f},{low:.1f}"
    assert svg.lines({"none": [(1, float("nan"))]}, "x", "y").startswith("<p")
    assert svg.thinned([(step, 2 * step) for step in range(1000)], 10)[0] == (49.5, 99.0)


def test_density_counts_every_histogram():
    """More columns than are drawn are added up, none is left out."""
    drawn = svg.density([(step, [step % 2, 1]) for step in range(1, 121)], "step", "cosine")
    assert drawn.count("<rect") == 120
    assert set(re.findall(r'fill-opacity="([^"]*)"', drawn)) == {"1.00", "0.54"}
