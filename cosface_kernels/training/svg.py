"""Charts as inline SVG, text only: lines, densities over time, points on a sphere. Colours are those of the page's CSS."""

import math
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 240, 52, 12, 12, 38


def lines(series, x_title, y_title, log_x=False, from_zero=False):
    """A chart of {name: [(x, y), ...]}, at most eight series. from_zero: the axis of y begins at 0."""
    series = {name: [each for each in points if _drawable(each, log_x)] for name, points in series.items()}
    points = [each for found in series.values() for each in found]
    if not points:
        return '<p class="empty">nothing to draw</p>'
    x, y = _Axis([each[0] for each in points], log_x), _Axis([0] * from_zero + [each[1] for each in points], False)
    body = []
    for number, found in enumerate(series.values()):
        path = " ".join(f"{x.at(a, LEFT, WIDTH - RIGHT):.1f},{y.at(b, HEIGHT - BOTTOM, TOP):.1f}" for a, b in thinned(found))
        body.append(f'<polyline class="line s{number % 8}" points="{path}"/>')
    return _legend(series) + _chart(x, y, x_title, y_title, body)


def roc(curves):
    """A chart of {name: {"far": [...], "tar": [...]}}."""
    series = {name: list(zip(each["far"], each["tar"], strict=True)) for name, each in curves.items()}
    return lines(series, "false accept rate", "true accept rate", log_x=True)


def _legend(names):
    """A line of text above the chart, where no curve runs through it; a name alone says nothing."""
    entries = (f'<span><i class="s{number % 8}"></i>{escape(name)}</span>' for number, name in enumerate(names))
    return f'<p class="legend">{"".join(entries)}</p>' if len(names) > 1 else ""


def density(columns, x_title, y_title):
    """Histograms over time, each column darker where more numbers are: [(x, [count of each bin from -1 to 1])]."""
    columns = _merged(columns, 60)
    x, y = _Axis([0, columns[-1][0]], False), _Axis([-1, 1], False)
    body, before = [], 0
    for at, counts in columns:
        left, right = x.at(before, LEFT, WIDTH - RIGHT), x.at(at, LEFT, WIDTH - RIGHT)
        before, most = at, max(counts) or 1
        for number, count in enumerate(counts):
            if count:
                top, bottom = (y.at(2 * edge / len(counts) - 1, HEIGHT - BOTTOM, TOP) for edge in (number + 1, number))
                shape = f'x="{left:.1f}" y="{top:.1f}" width="{right - left + 0.3:.1f}" height="{bottom - top + 0.3:.1f}"'
                body.append(f'<rect class="fill s0" fill-opacity="{0.08 + 0.92 * count / most:.2f}" {shape}/>')
    return _chart(x, y, x_title, y_title, body)


def sphere(points, labels):
    """Points (x, y, z) inside the unit sphere, seen along z; those behind are pale."""
    radius, centre = 125, 140
    body = [f'<circle class="axis" cx="{centre}" cy="{centre}" r="{radius}"/>']
    for (x, y, z), label in sorted(zip(points, labels, strict=True), key=lambda each: each[0][2]):
        place = f'cx="{centre + radius * x:.1f}" cy="{centre - radius * y:.1f}"'
        body.append(f'<circle class="fill s{label % 8}" {place} r="{3.2 + 1.3 * z:.1f}" fill-opacity="{0.65 + 0.3 * z:.2f}"/>')
    return f'<svg viewBox="0 0 280 280" class="sphere" role="img">{"".join(body)}</svg>'


def thinned(points, most=300):
    """At most `most` points: each is the mean of a run of neighbours."""
    size = -(-len(points) // most)
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [tuple(sum(side) / len(group) for side in zip(*group, strict=True)) for group in groups]


def number(value):
    """A number as text, of four digits."""
    if isinstance(value, int) and abs(value) < 10**6:
        return f"{value:,}"
    return f"{value:.4g}"


def _merged(columns, most):
    size = -(-len(columns) // most)
    groups = [columns[start : start + size] for start in range(0, len(columns), size)]
    return [(group[-1][0], [sum(bin) for bin in zip(*(counts for _, counts in group), strict=True)]) for group in groups]


def _drawable(point, log_x):
    return all(value is not None and math.isfinite(value) for value in point) and (point[0] > 0 or not log_x)


class _Axis:
    """The places of numbers along an axis, and the axis's ticks."""

    def __init__(self, values, log):
        self.log = log
        low, high = (math.log10(each) if log else each for each in (min(values), max(values)))
        if log:
            low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
            self.ticks = [10.0**power for power in range(low, high + 1)]
        else:
            if low == high:
                low, high = low - abs(low or 1) * 0.1, high + abs(high or 1) * 0.1
            step = 10 ** math.floor(math.log10((high - low) / 4))
            step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
            self.ticks = [
                round(each * step, 12) for each in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
            ]
        self.low, self.high = low, high

    def at(self, value, start, stop):
        value = math.log10(value) if self.log else value
        return start + (stop - start) * (value - self.low) / (self.high - self.low)


def _chart(x, y, x_title, y_title, body):
    floor, wall = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for tick in y.ticks:
        place = y.at(tick, floor, TOP)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{wall}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for tick in x.ticks:
        place = x.at(tick, LEFT, wall)
        parts.append(f'<text x="{place:.1f}" y="{floor + 15}" text-anchor="middle">{_short(tick)}</text>')
    parts += body
    parts.append(f'<polyline class="axis" points="{LEFT},{TOP} {LEFT},{floor} {wall},{floor}"/>')
    parts.append(f'<text x="{(LEFT + wall) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_title)}</text>')
    middle = (TOP + floor) / 2
    parts.append(f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text></svg>')
    return "".join(parts)


def _short(tick):
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(tick) >= size:
            return f"{tick / (1000 if unit == 'k' else size):g}{unit}"
    return f"{tick:g}".replace("e-0", "e-")
