"""The pictures of a report, from the numbers that a run and its evaluations left."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from chulengo.evaluate.report import svg
from chulengo.evaluate.report.inputs import Json
from chulengo.evaluate.report.verdict import Measured, Row
from chulengo.evaluate.report.wording import change, digits, number, percent, score, span, whole
from chulengo.train.plots import thinned, wants_log, without_lag

MAX_POINTS = 600  # a curve: the drawing area is 1,000 pixels wide at most
SMOOTH_FROM = 10  # points
MARKED_UP_TO = 60  # validation points that are drawn as dots
NUM_BINS = 18
ROOM = 0.12  # of an axis, between two labels such as 10,000 on a telephone


def loss_chart(rows: Sequence[Json]) -> Markup | None:
    """Returns training and validation loss over steps; None without a finite loss."""
    train, validation = _column(rows, "train", "loss"), _column(rows, "validation", "loss")
    finite = [value for _, value in [*train, *validation] if math.isfinite(value)]
    if not finite:
        return None
    log = wants_log(finite)
    y = _loss_axis(finite, log)
    x = svg.linear_axis(0, max(1.0, *(step for step, _ in [*train, *validation])), whole=True, snug=True)
    curves = []
    if train:
        steps, losses = [step for step, _ in train], [value for _, value in train]
        smooth = len(losses) >= SMOOTH_FROM
        raw = list(zip(*thinned(steps, losses, MAX_POINTS), strict=True))
        curves.append(svg.Curve(raw, "train faint" if smooth else "train", marks=len(losses) == 1))
        if smooth:
            mean = thinned(steps, without_lag(losses, geometric=log), MAX_POINTS)
            curves.append(svg.Curve(list(zip(*mean, strict=True)), "train strong"))
    if validation:
        best = min((point for point in validation if math.isfinite(point[1])), key=lambda p: p[1], default=None)
        curves.append(svg.Curve(validation, "validation dashed", marks=len(validation) <= MARKED_UP_TO, ring=best))
    says = (f"Loss over {whole(x.high)} steps: {_course('training', train)}; {_course('validation', validation)}."
            f"{' Logarithmic axis.' if log else ''}")
    return svg.plot(curves, x, y, says=says, x_label="optimiser step", height=300)


def single_chart(rows: Sequence[Json], key: str, name: str) -> Markup | None:
    """Returns one column of the training rows over steps; None where it was not recorded."""
    points = _column(rows, "train", key)
    finite = [value for _, value in points if math.isfinite(value)]
    if not finite:
        return None
    x = svg.linear_axis(0, max(1.0, *(step for step, _ in points)), most=5, whole=True, snug=True)
    y = svg.linear_axis(0, max(finite), most=4)
    shown = thinned([step for step, _ in points], [value for _, value in points], MAX_POINTS)
    curve = svg.Curve(list(zip(*shown, strict=True)), "train", marks=len(points) == 1)
    says = f"{name} over steps: between {digits(min(finite), 3)} and {digits(max(finite), 3)}."
    return svg.plot([curve], x, y, says=says, x_label="optimiser step", height=150)


def not_finite_from(rows: Sequence[Json]) -> int | None:
    """Returns the first step whose training loss is NaN or infinite."""
    return next((int(step) for step, loss in _column(rows, "train", "loss") if not math.isfinite(loss)), None)


def headline_chart(row: Row) -> tuple[list[tuple[str, Markup]], Markup] | None:
    """Returns each side's score with its interval as a line, and the axis under them; None for one side or none."""
    measured = {side: found for side, found in row.sides.items() if found.value is not None}
    if len(measured) < 2:
        return None
    ends = [end for found in measured.values() for end in (found.value, *(found.interval or ())) if end is not None]
    low, high = min(ends), max(ends)
    if row.unit == "share":
        axis = svg.linear_axis(0, 1, most=6, write=_percents)
    elif row.unit == "points" and low >= 0 and high <= 100:
        axis = svg.linear_axis(0, 100)
    elif low > 0 and high / low > 50:
        axis = svg.log_axis(low / 1.3, high * 1.3)
    else:
        axis = svg.linear_axis(min(0, low), high)
    return [(side, svg.whisker(axis, found.value, found.interval, style=_side_style(side),
                               says=_says(side, found, row.unit))) for side, found in measured.items()], svg.scale(axis)


def difference_bars(rows: Sequence[Row]) -> tuple[dict[str, Markup], Markup | None]:
    """Returns a forest-plot line for each row's difference, by name, and the axis that shares and points share.

    Shares and points lie on one axis, in points. Every other score has a scale of its own, since a difference in
    words and one in perplexity cannot lie on one: only its side of zero can be read off.
    """
    in_points = [row for row in rows if row.unit != "number" and row.difference is not None]
    drawn: dict[str, Markup] = {}
    axis = None
    if in_points:
        axis = _difference_axis([end for row in in_points for end in _ends(row)])
    for row in rows:
        if row.difference is None:
            continue
        if row.unit == "number":
            ends = _ends(row)
            reach = 1.15 * max(map(abs, ends)) or 1.0
            own = svg.Axis(-reach, reach, ())
        else:
            own = axis or svg.Axis(-1, 1, ())
        factor = 100 if row.unit == "share" else 1
        bounds = None if row.interval is None else (factor * row.interval[0], factor * row.interval[1])
        says = f"difference {change(row.difference, row.unit)}"
        if row.interval is not None:
            says += f", interval {span(row.interval, row.unit, signed=True)}"
        drawn[row.name] = svg.whisker(own, factor * row.difference, bounds, style=row.verdict, says=says, zero=0.0)
    return drawn, None if axis is None else svg.scale(axis)


def histograms(columns: Mapping[str, Sequence[float]], unit: str) -> list[tuple[str, Markup, str]]:
    """Returns (name, histogram, summary) for each column of lengths, all on the same axes.

    Args:
        columns: name -> lengths; an empty one is left out.
        unit: what is counted, such as "words".
    """
    filled = {name: sorted(values) for name, values in columns.items() if values}
    if not filled:
        return []
    together = sorted(value for values in filled.values() for value in values)
    # the last bin takes the longest hundredth: one runaway answer would flatten all others
    cap = max(1.0, together[min(len(together) - 1, math.floor(0.99 * len(together)))])
    width = max(1.0, float(math.ceil((cap + 1) / NUM_BINS)))
    num_bins = math.floor(cap / width) + 1
    edges = [number * width for number in range(num_bins + 1)]
    counts = {name: [0.0] * num_bins for name in filled}
    for name, values in filled.items():
        for value in values:
            counts[name][min(num_bins - 1, int(value // width))] += 1 / len(values)
    x = svg.linear_axis(0, edges[-1], most=5, whole=True, snug=True)
    y = svg.linear_axis(0, max(share for shares in counts.values() for share in shares), most=3,
                        write=_percents)
    drawn = []
    for name, values in filled.items():
        median, longest = values[len(values) // 2], values[-1]
        summary = f"median {whole(median)}, longest {whole(longest)} {unit}, {whole(len(values))} texts"
        summary += "; the last bar holds all longer ones" if longest >= edges[-1] else ""
        drawn.append((name, svg.bars(counts[name], edges, x, y, style=_side_style(name), says=f"{name}: {summary}.",
                                     x_label=unit, mark=median + 0.5), summary))
    return drawn


def length_strips(ledgers: Mapping[str, Json]) -> tuple[list[tuple[str, Markup, str]], Markup | None]:
    """Returns (name, strip, summary) of each ledger's row lengths in tokens, and their common axis."""
    marks = {}
    for name, ledger in ledgers.items():
        lengths = ledger.get("lengths")
        if isinstance(lengths, dict):
            values = {key: number(lengths.get(key)) for key in ("p5", "p50", "p95", "max")}
            found = {key: value for key, value in values.items() if value is not None}
            if len(found) == 4 and found["max"] > 0:
                marks[name] = found
    if not marks:
        return [], None
    axis = svg.linear_axis(0, max(found["max"] for found in marks.values()))
    strips = []
    for name, found in marks.items():
        summary = (f"nine of ten rows have {whole(found['p5'])} to {whole(found['p95'])} tokens, the median "
                   f"{whole(found['p50'])}, the longest {whole(found['max'])}")
        strips.append((name, svg.quantiles(axis, found, says=f"{name}: {summary}"), summary))
    return strips, svg.scale(axis)


def study_chart(trials: Sequence[tuple[float, float]], *, lower_is_better: bool, metric: str) -> Markup:
    """Returns every finished trial's value in the order they were run, with the best so far as a line."""
    values = [value for _, value in trials]
    log = wants_log(values)
    x = svg.linear_axis(0, max(number for number, _ in trials) or 1, whole=True)
    y = _loss_axis(values, log)
    better = min if lower_is_better else max
    best: list[tuple[float, float]] = []
    for place, value in trials:
        # a step, not a slope: between two trials nothing got better
        best += [(place, best[-1][1])] if best else []
        best.append((place, better(value, best[-1][1]) if best else value))
    curves = [svg.Curve(best, "train"), svg.Curve(trials, "validation", marks=True, line=False)]
    says = f"{len(trials)} finished trials; best {metric} {digits(better(values))}."
    return svg.plot(curves, x, y, says=says, x_label="trial", height=220)


def sample_size_chart(
    points: Sequence[tuple[float, float, tuple[float, float] | None]], metric: str, unit: str
) -> Markup:
    """Returns the score over the number of training rows, on a logarithmic axis, with the range of the repeats."""
    ends = [end for _, value, bounds in points for end in (value, *(bounds or ()))]
    rows = [count for count, _, _ in points]
    x = svg.log_axis(min(rows) / 1.2, max(rows) * 1.2, write=whole)
    sizes = sorted(set(rows))
    # the sizes themselves are what one looks up, as long as their labels have room
    if all(x.place(after) - x.place(before) >= ROOM for before, after in itertools.pairwise(sizes)):
        x = replace(x, ticks=tuple(sizes))
    low, high = min(ends), max(ends)
    if unit == "share":  # there is nothing below 0 % or above 100 %
        pad = 0.0 if high > low else max(0.1 * high, 0.05)
        low, high = max(0.0, low - pad), min(1.0, high + pad)
    y = svg.linear_axis(low, high, write=_percents if unit == "share" else digits)
    bars = [(count, *bounds) for count, _, bounds in points if bounds is not None]
    curve = svg.Curve([(count, value) for count, value, _ in points], "train", marks=True, bars=bars)
    says = "; ".join(f"{whole(count)} rows: {score(value, unit)}" for count, value, _ in points)
    return svg.plot([curve], x, y, says=f"{metric} by training rows. {says}.", x_label="training rows", height=220)


def _column(rows: Sequence[Json], kind: str, key: str) -> list[tuple[float, float]]:
    found = []
    for row in rows:
        step, value = number(row.get("step")), row.get(key)
        if row.get("kind") == kind and step is not None and isinstance(value, int | float):
            finite = number(value)
            found.append((step, math.inf if finite is None else finite))  # NaN or infinite: a gap
    return found


def _loss_axis(values: Sequence[float], log: bool) -> svg.Axis:
    low, high = min(values), max(values)
    if log:
        return svg.log_axis(low / 1.1, high * 1.1)
    # a zero line when it costs at most half the height: it shows how much of the loss is gone
    return svg.linear_axis(0 if 0 <= low < high / 2 else low, high)


def _course(name: str, points: Sequence[tuple[float, float]]) -> str:
    finite = [value for _, value in points if math.isfinite(value)]
    if not finite:
        return f"{name} not recorded"
    return f"{name} from {digits(finite[0], 3)} to {digits(finite[-1], 3)}, lowest {digits(min(finite), 3)}"


def _ends(row: Row) -> list[float]:
    factor = 100 if row.unit == "share" else 1
    ends: list[Any] = [row.difference, *(row.interval or ())]
    return [factor * end for end in ends if end is not None]


def _difference_axis(ends: Sequence[float]) -> svg.Axis:
    low, high = min(0.0, *ends), max(0.0, *ends)
    pad = 0.05 * (high - low) or 1.0
    # zero is never at the very end: on which side of it an interval lies is what one looks for
    low, high = (low - pad, high + pad) if low > -100 and high < 100 else (min(low, -8.0), max(high, 8.0))
    return svg.linear_axis(low, high, most=6, snug=True,
                           write=lambda value: change(value, "points").removesuffix(" points").removesuffix(".0"))


def _says(side: str, found: Measured, unit: str) -> str:
    text = f"{side}: {score(found.value, unit)}"
    return text if found.interval is None else f"{text}, interval {span(found.interval, unit)}"


def _percents(value: float) -> str:
    return percent(value, 0)


def _side_style(side: str) -> str:
    return side if side in ("base", "tuned") else "other"
