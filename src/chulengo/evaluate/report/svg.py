"""Charts as inline SVG: lines, bars and intervals on axes with round ticks.

Why not matplotlib's SVG: its text is either outlines (50 kB a chart, unreadable to a screen reader) or set in a font
of fixed width, its colours are baked in, and it scales like a picture, so that labels of 11 px on a desktop are 6 px on
a phone. Here every coordinate is a percentage of the drawing area, which is as wide as the page lets it be, while
text and line widths stay in pixels; colours are classes, so that the style sheet decides light, dark and print.

Percentages do not exist inside a path. Curves therefore lie in a nested <svg> with a viewBox of 1000 x 1000 that is
stretched to the area, and `vector-effect: non-scaling-stroke` (in the style sheet) keeps their width. Points are
strokes of no length with round ends, which stay round however the area is stretched.

The drawing area overflows on purpose: tick labels stand outside it, in the padding of the box around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from chulengo.evaluate.report.wording import digits

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: what it spans, where its ticks are, how a value is written on it.

    Attributes:
        low, high: the ends.
        ticks: values with a label, within the ends.
        log: logarithmic; both ends are then positive.
        write: a tick's label.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False
    write: Callable[[float], str] = digits

    def place(self, value: float) -> float:
        """Returns where a value lies, 0 at the low end and 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True)
class Curve:
    """Points that belong together.

    Attributes:
        points: (x, y) in order; a y that is not finite is a gap.
        style: class names: which colour, which line (`train`, `validation dashed`, …).
        marks: draw the points themselves.
        line: join them.
        bars: (x, low, high) intervals.
        ring: a point to draw a ring around.
    """

    points: Points
    style: str
    marks: bool = False
    line: bool = True
    bars: Sequence[tuple[float, float, float]] = field(default_factory=tuple)
    ring: tuple[float, float] | None = None


def linear_axis(
    low: float, high: float, *, most: int = 6, whole: bool = False, snug: bool = False,
    write: Callable[[float], str] = digits,
) -> Axis:
    """Returns an axis with at most `most` round ticks.

    Args:
        low, high: what it must show; an empty span is widened.
        most: ticks at most.
        whole: ticks are whole numbers.
        snug: the axis ends at `low` and `high`, not at the ticks around them.
        write: a tick's label.
    """
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    step = _round_step((high - low) / max(1, most - 1))
    step = max(1.0, math.ceil(step)) if whole else step
    if not snug:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    first = math.ceil(low / step - 1e-9)
    ticks = [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]
    return Axis(low, high, tuple(ticks), write=write)


def log_axis(low: float, high: float, write: Callable[[float], str] = digits) -> Axis:
    """Returns a logarithmic axis with ticks at 1, or 1 and 3, or 1, 2 and 5 of each power of ten, as room allows."""
    if not high > low:
        low, high = low / 2, high * 2
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    found: list[float] = []
    for mantissas in ((1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**power for power in range(first, last + 1) for m in mantissas]
        found = [tick for tick in found if low <= tick * (1 + 1e-9) and tick <= high * (1 + 1e-9)]
        if len(found) <= 7:
            break
    while len(found) > 7:
        found = found[::2]
    return Axis(low, high, tuple(found or (low, high)), log=True, write=write)


def plot(curves: Sequence[Curve], x: Axis, y: Axis, *, says: str, x_label: str = "", height: int = 260) -> Markup:
    """Returns a chart of curves.

    Args:
        curves: drawn in this order, later ones on top.
        x, y: the axes.
        says: what the picture shows, in words, for who cannot see it.
        x_label: beneath the horizontal axis.
        height: of the drawing area, in pixels; its width is that of the page.
    """
    drawn = [_grid(x, y, x_label)]
    drawn += [_curve(curve, x, y) for curve in curves]
    return _framed(Markup("").join(drawn), says, height)


def bars(
    heights: Sequence[float], edges: Sequence[float], x: Axis, y: Axis, *, style: str, says: str, x_label: str,
    height: int = 150, mark: float | None = None,
) -> Markup:
    """Returns a histogram: `heights[i]` between `edges[i]` and `edges[i + 1]`, with a line at `mark`."""
    drawn = [_grid(x, y, x_label)]
    for count, left, right in zip(heights, edges, edges[1:], strict=False):
        if count > 0:
            start, end, top = x.place(left), x.place(right), y.place(count)
            drawn.append(Markup('<rect class="bar {}" x="{}" y="{}" width="{}" height="{}"/>').format(
                style, _percent(start), _percent(1 - top), _percent((end - start) * 0.94), _percent(top)))
    if mark is not None and x.low <= mark <= x.high:
        at = _percent(x.place(mark))
        drawn.append(Markup('<line class="median" x1="{}" x2="{}" y1="0" y2="100%"/>').format(at, at))
    return _framed(Markup("").join(drawn), says, height)


def whisker(
    axis: Axis, value: float | None, bounds: tuple[float, float] | None, *, style: str, says: str,
    zero: float | None = None,
) -> Markup:
    """Returns one line of a forest plot: the interval as a bar, the value as a dot, a rule at `zero`."""
    parts = []
    if zero is not None and axis.low <= zero <= axis.high:
        at = _percent(axis.place(zero))
        parts.append(Markup('<line class="zero" x1="{}" x2="{}" y1="-15%" y2="115%"/>').format(at, at))
    if bounds is not None:
        low, high = (min(1.0, max(0.0, axis.place(bound))) for bound in bounds)
        parts.append(Markup('<line class="whisker {}" x1="{}" x2="{}" y1="50%" y2="50%"/>').format(
            style, _percent(low), _percent(high)))
    if value is not None:
        parts.append(Markup('<circle class="dot {}" cx="{}" cy="50%" r="5"/>').format(
            style, _percent(min(1.0, max(0.0, axis.place(value))))))
    return Markup('<svg class="forest" role="img" aria-label="{}">{}</svg>').format(says, Markup("").join(parts))


def scale(axis: Axis) -> Markup:
    """Returns an axis alone, to stand under a column of `whisker`s."""
    labels = [
        Markup('<text x="{}" y="12" class="{}">{}</text>').format(
            _percent(axis.place(tick)), _anchor(axis.place(tick)), axis.write(tick)) for tick in axis.ticks
    ]
    return Markup('<svg class="scale" aria-hidden="true">{}</svg>').format(Markup("").join(labels))


def quantiles(axis: Axis, marks: dict[str, float], *, says: str) -> Markup:
    """Returns a strip: a bar from p5 to p95, a tick at p50, a dot at max."""
    p5, p50, p95, top = (axis.place(marks[name]) for name in ("p5", "p50", "p95", "max"))
    parts = Markup(
        '<line class="thin" x1="{}" x2="{}" y1="50%" y2="50%"/><line class="thick" x1="{}" x2="{}" y1="50%" y2="50%"/>'
        '<line class="mid" x1="{}" x2="{}" y1="0" y2="100%"/><circle class="end" cx="{}" cy="50%" r="4"/>'
    ).format(*map(_percent, (p95, top, p5, p95, p50, p50, top)))
    return Markup('<svg class="strip" role="img" aria-label="{}">{}</svg>').format(says, parts)


def _framed(drawing: Markup, says: str, height: int) -> Markup:
    return Markup('<div class="plot"><svg role="img" aria-label="{}" width="100%" height="{}">{}</svg></div>').format(
        says, height, drawing)


def _grid(x: Axis, y: Axis, x_label: str) -> Markup:
    parts = []
    for tick in y.ticks:
        at = _percent(1 - y.place(tick))
        parts.append(Markup('<line class="grid" x1="0" x2="100%" y1="{0}" y2="{0}"/>'
                            '<text class="y" x="-8" y="{0}" dy="0.35em">{1}</text>').format(at, y.write(tick)))
    for tick in x.ticks:
        parts.append(Markup('<text class="{}" x="{}" y="100%" dy="1.5em">{}</text>').format(
            _anchor(x.place(tick), inner=True), _percent(x.place(tick)), x.write(tick)))
    parts.append(Markup('<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"/>'))
    if x_label:
        parts.append(Markup('<text class="label" x="50%" y="100%" dy="2.9em">{}</text>').format(x_label))
    return Markup("").join(parts)


def _curve(curve: Curve, x: Axis, y: Axis) -> Markup:
    def at(px: float, py: float) -> str:
        return f"{1000 * x.place(px):.1f} {1000 * (1 - y.place(py)):.1f}"

    def shown(py: float) -> bool:
        return math.isfinite(py) and (py > 0 or not y.log)

    parts = []
    for low_x, low, high in curve.bars:
        parts.append(Markup('<path class="interval" d="M{}L{}"/>').format(at(low_x, low), at(low_x, high)))
    if curve.line:
        pieces, begun = [], False
        for px, py in curve.points:
            if shown(py):
                pieces.append(f"{'L' if begun else 'M'}{at(px, py)}")
            begun = shown(py)
        parts.append(Markup('<path class="line" d="{}"/>').format("".join(pieces)))
    if curve.marks:
        dots = "".join(f"M{at(px, py)}h0" for px, py in curve.points if shown(py))
        parts.append(Markup('<path class="marks" d="{}"/>').format(dots))
    if curve.ring is not None:
        spot = at(*curve.ring)
        parts.append(Markup('<path class="ring" d="M{0}h0"/><path class="hole" d="M{0}h0"/>'
                            '<path class="marks" d="M{0}h0"/>').format(spot))
    return Markup(
        '<svg class="{}" viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">{}</svg>'
    ).format(f"curve {curve.style}", Markup("").join(parts))


def _anchor(place: float, *, inner: bool = False) -> str:
    """Returns the class that keeps a label at an end of the axis from standing out."""
    if place > 0.97:
        return "x last"
    return "x first" if place < 0.03 and not inner else "x"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))
