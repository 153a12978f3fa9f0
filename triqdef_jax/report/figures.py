"""Figures as inline SVG: curves with intervals, and estimates with intervals beside one another.

Sizes are in px of a figure 360 px wide, which the page scales to the width at hand. Series are told apart by colour, dash and marker,
so that they survive print and colour blindness; colours are the page's variables `--series-0` to `--series-7`.
"""

import html
import math
from typing import NamedTuple

WIDTH = 360
PLOT_HEIGHT = 170
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 44, 12, 8, 34
NUM_SERIES = 8
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "10 4", "4 2", "12 3 3 3")
MARKER_PX = 3.2


class Point(NamedTuple):
    """A point of a curve with the ends of its interval, all in the units of the axes; no ends, no whisker."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


class Estimate(NamedTuple):
    """An estimate with its interval; `chance` is drawn as a bar beside it; `series` picks colour and marker."""

    value: float
    low: float | None
    high: float | None
    series: int = 0
    chance: float | None = None


class Axis(NamedTuple):
    """An axis: values `low` to `high` on px `start` to `end`, linearly or, for positive values, by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return the px of a value; one outside the axis lands on its end."""
        low, high, inside = self.low, self.high, min(max(value, self.low), self.high)
        if self.is_log:
            low, high, inside = math.log(low), math.log(high), math.log(inside)
        return self.start + (inside - low) / (high - low) * (self.end - self.start)


def line_chart(
    series: dict[str, list[Point]],
    *,
    title: str,
    x: str,
    y: str,
    y_range: tuple[float, float] | None = None,
    is_log_x: bool = False,
) -> str:
    """Return curves with their intervals and a legend; empty where no series has a point.

    Args:
      series: name -> points in order of x. title: says what is drawn, for screen readers. x, y: labels of the axes.
      y_range: ends of the y axis, or None for those of the data. is_log_x: whether x, all positive, is drawn by its logarithm.
    """
    points = [point for curve in series.values() for point in curve]
    if not points:
        return ""
    across = Axis(*_range([p.x for p in points]), MARGIN_LEFT, WIDTH - MARGIN_RIGHT, is_log_x)
    low, high = y_range or _range([p.y for p in points])
    up = Axis(low, high, MARGIN_TOP + PLOT_HEIGHT, MARGIN_TOP)
    drawn = [_curve(curve, index, across, up) for index, curve in enumerate(series.values())]
    height = MARGIN_TOP + PLOT_HEIGHT + MARGIN_BOTTOM
    return _svg(title, height, _frame(across, up, x, y) + "".join(drawn)) + legend(list(series))


def interval_plot(rows: dict[str, list[Estimate]], *, title: str, x: str, x_range: tuple, names: list[str]) -> str:
    """Return estimates as dots with whiskers, a row each, chance levels as bars; with a legend of `names` where there are several."""
    row_px, left = 13, 118
    across = Axis(*x_range, left, WIDTH - MARGIN_RIGHT)
    parts, top = [], MARGIN_TOP
    for label, estimates in rows.items():
        height = row_px * max(1, len(estimates))
        parts.append(_words(left - 6, top + height / 2 + 3.5, label, "end"))
        parts += [_estimate(e, across, top + row_px * (i + 0.5)) for i, e in enumerate(estimates)]
        top += height + 3
    frame = "".join(
        _line(px, MARGIN_TOP - 4, px, top, "grid") + _words(px, top + 12, text, "middle") for px, text in _ticks(across)
    )
    axis_name = _words((left + WIDTH - MARGIN_RIGHT) / 2, top + 26, x, "middle")
    return _svg(title, top + 32, frame + axis_name + "".join(parts)) + (legend(names) if len(names) > 1 else "")


def legend(names: list[str]) -> str:
    """Return a list of series with their colour, dash and marker."""
    items = []
    for index, name in enumerate(names):
        sample = _line(1, 6, 27, 6, "curve", DASHES[index % NUM_SERIES]) + _marker(14, 6, index)
        swatch = f'<svg class="s{index % NUM_SERIES}" viewBox="0 0 28 12" aria-hidden="true">{sample}</svg>'
        items.append(f"<li>{swatch}{html.escape(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def round_steps(low: float, high: float, *, number: int = 5) -> list[float]:
    """Return about `number` round values between two ends, both inclusive where they are round: 1, 2 or 5 times a power of ten."""
    raw = (high - low) / number
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _range(values):
    """Return the ends of the values, a little apart where all are one."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(axis):
    """Yield (px, text) of round values; of a logarithmic axis doublings from its lower end, at most eight."""
    values = round_steps(axis.low, axis.high)
    if axis.is_log:
        doublings = math.log2(axis.high / axis.low)
        step = math.ceil(doublings / 8)
        values = [axis.low * 2**i for i in range(0, int(doublings + 1e-9) + 1, step)]
    for value in values:
        yield axis.place(value), f"{value:g}" if abs(value) > 1e-9 else "0"


def _frame(across, up, x, y):
    """Return grid, tick labels and names of both axes."""
    rows = "".join(
        _line(across.start, px, across.end, px, "grid") + _words(across.start - 5, px + 3.5, text, "end")
        for px, text in _ticks(up)
    )
    columns = "".join(
        _line(px, up.start, px, up.start + 3, "grid") + _words(px, up.start + 14, text, "middle")
        for px, text in _ticks(across)
    )
    middle = (up.start + up.end) / 2
    name_y = (
        f'<text x="10" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 10 {middle:.1f})">{_text(y)}</text>'
    )
    return rows + columns + _words((across.start + across.end) / 2, up.start + 28, x, "middle") + name_y


def _curve(points, index, across, up):
    places = [(across.place(p.x), up.place(p.y), p) for p in points]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in places)
    whiskers = "".join(
        _line(px, up.place(p.low), px, up.place(p.high), "whisker")
        for px, _, p in places
        if None not in (p.low, p.high)
    )
    markers = "".join(_marker(px, py, index) for px, py, _ in places) if len(places) <= 40 else ""
    line = f'<polyline class="curve" points="{path}" stroke-dasharray="{DASHES[index % NUM_SERIES]}"/>'
    return f'<g class="s{index % NUM_SERIES}">{line}{whiskers}{markers}</g>'


def _estimate(estimate, across, y):
    whisker = ""
    if None not in (estimate.low, estimate.high):
        whisker = _line(across.place(estimate.low), y, across.place(estimate.high), y, "whisker")
    chance = across.place(estimate.chance) if estimate.chance is not None else None
    bar = "" if chance is None else _line(chance, y - 5, chance, y + 5, "chance")
    dot = _marker(across.place(estimate.value), y, estimate.series)
    return f'<g class="s{estimate.series % NUM_SERIES}">{bar}{whisker}{dot}</g>'


def _marker(x, y, index):
    """Return one of four shapes: circle, square, triangle, diamond."""
    r = MARKER_PX
    shapes = (
        [(x + r * math.cos(a), y + r * math.sin(a)) for a in (k * math.pi / 5 for k in range(10))],
        [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)],
        [(x, y - 1.2 * r), (x + 1.2 * r, y + r), (x - 1.2 * r, y + r)],
        [(x, y - 1.4 * r), (x + 1.4 * r, y), (x, y + 1.4 * r), (x - 1.4 * r, y)],
    )
    corners = " ".join(f"{px:.1f},{py:.1f}" for px, py in shapes[index % 4])
    return f'<polygon class="marker" points="{corners}"/>'


def _line(x1, y1, x2, y2, css_class, dash=""):
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line class="{css_class}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{dashes}/>'


def _words(x, y, text, anchor):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(text)}</text>'


def _text(words):
    return html.escape(words, quote=False)


def _svg(title, height, body):
    label = html.escape(title, quote=True)
    return f'<svg class="chart" role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {height:.0f}">{body}</svg>'
