"""Charts as SVG inside a page: drawn from numbers by a few lines, so that a page that is written often costs little.

Colours are CSS variables of the page, which has others in the dark.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 24  # margins
_TICKS = 3  # of an axis, at least, and eight at most
_MOST_DECADES = 1e12  # between the ends of a logarithmic axis: what lies above is not shown
_BEGINNING = 0.02  # of the horizontal axis, which need not be seen
DASHES = {"-": "none", "--": "7 3", ":": "2 3", "-.": "7 3 2 3"}
"""The lengths of strokes and gaps by matplotlib's sign for them."""


@dataclass(frozen=True)
class Line:
    """Describes a line through ``points`` (x, y) in a ``colour`` of CSS, with ``strokes`` of `DASHES`.

    ``band`` (x, low, high) is filled around it. Without strokes (None), the points alone are drawn. ``marks`` are at
    the last point, or dots or rings at all.
    """

    points: Sequence[tuple[float, float]]
    colour: str
    strokes: str | None = "-"
    band: Sequence[tuple[float, float, float]] = ()
    marks: Literal["last", "dots", "rings"] = "last"


@dataclass(frozen=True)
class Level:
    """Describes a broken line at a height ``y`` from left to right."""

    y: float
    colour: str


@dataclass(frozen=True)
class Range:
    """Says what an axis shows: from ``low`` to ``high``, on a logarithmic scale if ``log``."""

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Return where a value lies: 0 at the beginning of the axis, 1 at its end."""
        if self.log:
            value = max(value, self.low / 1e3)  # which lies outside, and has a logarithm
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return the round values on the axis that get a number."""
        if self.log and self.high > 4 * self.low:
            return _logarithmic_ticks(self.low, self.high)
        step = _round_step((self.high - self.low) / _TICKS)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def _round_step(most: float) -> float:
    """Return the greatest of 1, 2 and 5 times a power of ten that is not above ``most``."""
    power = 10.0 ** math.floor(math.log10(most))
    steps = [times * power for times in (0.5, 1, 2, 5)]
    return max(step for step in steps if step <= most * (1 + 1e-9))


def _logarithmic_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 3, 5 and 7 times the powers of ten between; fewer multiples of more powers."""
    multiples: Sequence[int] = (1,)
    if high < 10 * low:
        multiples = (1, 2, 3, 5, 7)
    elif high < 100 * low:
        multiples = (1, 2, 5)
    ticks = []
    for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        ticks += [times * 10.0**exponent for times in multiples]
    return [tick for tick in ticks if low <= tick <= high]


def draw(
    title: str, lines: Sequence[Line], levels: Sequence[Level] = (), *, log: bool = False, from_zero: bool = False
) -> str:
    """Return a figure of HTML: the title, and the lines against the number of the update.

    The vertical axis is logarithmic if ``log`` (all y > 0), and begins at 0 if ``from_zero``. At least one line has a
    point.
    """
    end = max(point[0] for line in lines for point in line.points)
    x_range = Range(0.0, max(end, 1.0) * 1.02)  # with room for the last mark
    y_range = _y_range(lines, levels, _BEGINNING * end, log=log, from_zero=from_zero)
    parts = _grid(x_range, y_range)
    parts.append(f'<svg x="{_LEFT}" y="{_TOP}" width="{_inner_width()}" height="{_inner_height()}">')  # which clips
    for line in lines:
        parts += _drawn(line, x_range, y_range)
    for level in levels:
        y = _down(level.y, y_range)
        parts.append(
            f'<path d="M0 {y:.1f}H{_inner_width()}" fill="none" stroke="{level.colour}" stroke-dasharray="3 3"/>'
        )
    parts.append("</svg>")
    label = html.escape(title)
    return (
        f'<figure><figcaption>{label}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


# A loss falls most in its first updates, and an axis that holds these leaves no height for all others. They are left
# out where there is something behind them.
def _y_range(lines: Sequence[Line], levels: Sequence[Level], beginning: float, *, log: bool, from_zero: bool) -> Range:
    """Return the vertical range of all points behind the ``beginning``, and of the levels."""
    values = [y for line in lines for x, y in line.points if x >= beginning]
    values += [level.y for level in levels]
    low, high = min(values), max(values)
    if log:
        high = min(high, low * _MOST_DECADES)
        room = max((high / low) ** 0.05, 1.01)
        return Range(low / room, high * room, log=True)
    if from_zero:
        return Range(0.0, high * 1.05 or 1.0)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return Range(low - room, high + room)


def _inner_width() -> int:
    """Return the width of what is inside the axes."""
    return _WIDTH - _LEFT - _RIGHT


def _inner_height() -> int:
    """Return the height of what is inside the axes."""
    return _HEIGHT - _TOP - _BOTTOM


def _across(x: float, x_range: Range) -> float:
    """Return the distance of x from the left axis."""
    return x_range.share(x) * _inner_width()


def _down(y: float, y_range: Range) -> float:
    """Return the distance of y from the upper edge: ten heights at most, where y is far outside."""
    share = min(max(y_range.share(y), -10.0), 10.0)
    return (1 - share) * _inner_height()


def _grid(x_range: Range, y_range: Range) -> list[str]:
    """Return the ticks of both axes, with a thin line from each of the vertical one, and the horizontal axis' name."""
    bottom = _HEIGHT - _BOTTOM
    parts = []
    for tick in y_range.ticks():
        y = _TOP + _down(tick, y_range)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x_range.ticks():
        x = _LEFT + _across(tick, x_range)
        anchor = "end" if x > _WIDTH - 20 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="{anchor}">{short(tick)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{_WIDTH - _RIGHT}"/>')
    return parts


def _drawn(line: Line, x_range: Range, y_range: Range) -> list[str]:
    """Return a line, the band around it and its marks."""
    parts = []
    if line.band:
        upper = [(x, high) for x, _, high in line.band]
        lower = [(x, low) for x, low, _ in reversed(line.band)]
        outline = _path([*upper, *lower], x_range, y_range)
        parts.append(f'<path d="{outline}Z" fill="{line.colour}" fill-opacity=".18"/>')
    if line.strokes is not None:
        parts.append(
            f'<path d="{_path(line.points, x_range, y_range)}" fill="none" stroke="{line.colour}" stroke-width="1.6" '
            f'stroke-linejoin="round" stroke-dasharray="{DASHES[line.strokes]}"/>'
        )
    fill = line.colour
    if line.marks == "rings":
        fill = "none"
    marked = line.points
    if line.marks == "last":
        marked = line.points[-1:]
    for x, y in marked:
        cx, cy = _across(x, x_range), _down(y, y_range)
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="1.8" fill="{fill}" stroke="{line.colour}"/>')
    return parts


def _path(points: Sequence[tuple[float, float]], x_range: Range, y_range: Range) -> str:
    """Return a path of SVG through the points."""
    places = [f"{_across(x, x_range):.1f} {_down(y, y_range):.1f}" for x, y in points]
    return f"M{'L'.join(places)}"


def short(value: float) -> str:
    """Return a number in as few letters as an axis has room for: 12k, 3M, 5e-05."""
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power * (10 if letter == "k" else 1):
            return f"{value / power:.4g}{letter}"
    return f"{value:.4g}"
