"""Line charts and histograms as inline SVG, without a library.

Colours come from the page's style sheet (classes ``s0``, ``s1``, ...), so that a chart follows the
reader's light or dark setting.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH = 360
HEIGHT = 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 22
COLOURS = 8  # classes s0 to s7
MOST_POINTS = 400
FEW_POINTS = 30  # a line with no more points shows them
MOST_BINS = 24

Curve = Sequence[tuple[float, float]]


def line_chart(title: str, curves: Mapping[str, Curve], *, x_label: str) -> str:
    """Return a figure with one line for each curve.

    Args:
        title: shown above the chart.
        curves: points by name, each in the order of x. Curves without points are left out.
        x_label: the unit of x.
    """
    drawn = {name: _thinned(points) for name, points in curves.items() if points}
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    x_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_axis = _padded_axis(ys)
    parts = [_grid(x_axis, y_axis)]
    for number, (name, points) in enumerate(drawn.items()):
        parts.append(_line(name, points, number, x_axis, y_axis))
    return _figure(title, "".join(parts), list(drawn), x_label=x_label)


def histogram(title: str, samples: Mapping[str, Sequence[float]], *, x_label: str) -> str:
    """Return a figure with the histogram of each list of numbers, as shares of its length.

    Args:
        title: shown above the chart.
        samples: numbers by name. Empty lists are left out.
        x_label: the unit of the numbers.
    """
    drawn = {name: values for name, values in samples.items() if values}
    every = [value for values in drawn.values() for value in values]
    low, high = min(every), max(every)
    if low == high:
        low, high = low - 0.5, high + 0.5
    bins = min(MOST_BINS, max(4, math.isqrt(min(map(len, drawn.values())))))
    shares = {name: _shares(values, low, high, bins) for name, values in drawn.items()}
    x_axis = _Axis(low, high, LEFT, WIDTH - RIGHT)
    y_axis = _Axis(0.0, max(max(found) for found in shares.values()), HEIGHT - BOTTOM, TOP)
    parts = [_grid(x_axis, y_axis, percent=True)]
    width = (high - low) / bins
    for number, (name, found) in enumerate(shares.items()):
        for index, share in enumerate(found):
            left = x_axis.place(low + index * width)
            right = x_axis.place(low + (index + 1) * width)
            top = y_axis.place(share)
            parts.append(
                f'<rect class="bar s{number % COLOURS}" x="{left:.1f}" y="{top:.1f}" '
                f'width="{right - left:.1f}" height="{HEIGHT - BOTTOM - top:.1f}">'
                f"<title>{escape(name)}: {100 * share:.1f}%</title></rect>"
            )
    return _figure(title, "".join(parts), list(drawn), x_label=x_label)


def number_text(value: float) -> str:
    """Format a number with four significant digits, without an exponent if it is short."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


class _Axis:
    """A linear map from values to coordinates."""

    def __init__(self, low: float, high: float, start: float, end: float):
        if low == high:
            low, high = low - 0.5, high + 0.5
        self.low = low
        self.high = high
        self._start = start
        self._scale = (end - start) / (high - low)

    def place(self, value: float) -> float:
        """Return the coordinate of a value."""
        return self._start + (value - self.low) * self._scale

    def ticks(self, wanted: int) -> list[float]:
        """Return about `wanted` round values in the range of the axis."""
        raw = (self.high - self.low) / wanted
        size = 10 ** math.floor(math.log10(raw))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def _padded_axis(values: list[float]) -> _Axis:
    """Return a vertical axis with a margin above and below the values."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 0.5
    return _Axis(low - margin, high + margin, HEIGHT - BOTTOM, TOP)


def _thinned(points: Curve) -> Curve:
    """Return at most MOST_POINTS points, each the mean of its neighbours."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size == 1:
        return points
    found = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        found.append((part[-1][0], sum(y for _, y in part) / len(part)))
    return found


def _shares(values: Sequence[float], low: float, high: float, bins: int) -> list[float]:
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / (high - low) * bins), bins - 1)] += 1
    return [count / len(values) for count in counts]


def _line(name: str, points: Curve, number: int, x_axis: _Axis, y_axis: _Axis) -> str:
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    colour = f"s{number % COLOURS}"
    last = f"{escape(name)}: {number_text(points[0][1])} to {number_text(points[-1][1])}"
    parts = [f'<polyline class="line {colour}" points="{path}"><title>{last}</title></polyline>']
    if len(points) <= FEW_POINTS:
        for (x, y), (step, value) in zip(places, points, strict=True):
            parts.append(
                f'<circle class="point {colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5">'
                f"<title>{escape(name)} at {step:g}: {number_text(value)}</title></circle>"
            )
    return "".join(parts)


def _grid(x_axis: _Axis, y_axis: _Axis, *, percent: bool = False) -> str:
    parts = []
    for value in y_axis.ticks(4):
        y = y_axis.place(value)
        text = f"{100 * value:.3g}%" if percent else number_text(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{text}</text>'
        )
    for value in x_axis.ticks(4):
        parts.append(
            f'<text class="tick" x="{x_axis.place(value):.1f}" y="{HEIGHT - 8}" '
            f'text-anchor="middle">{number_text(value)}</text>'
        )
    return "".join(parts)


def _figure(title: str, content: str, names: list[str], *, x_label: str) -> str:
    keys = ""
    if len(names) > 1:
        keys = " ".join(
            f'<span class="key"><i class="swatch s{number % COLOURS}"></i>{escape(name)}</span>'
            for number, name in enumerate(names)
        )
        keys = f'<div class="keys">{keys}</div>'
    return (
        f'<figure><figcaption>{escape(title)} <span class="soft">by {escape(x_label)}</span>'
        f"</figcaption>{keys}"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{content}</svg></figure>"
    )
