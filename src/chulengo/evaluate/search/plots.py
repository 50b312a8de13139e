"""The pictures of a search and of a sample-size curve, drawn as `train.plots` draws: same colours, same bytes.

A search: the values in the order of the trials with the best so far, the course of every trial through its evaluation
points, and the value against each setting. Pruned trials have no value; they are drawn at the loss at which they ended,
hollow, so that one sees where the search stopped looking. A curve: every repeat as a point, the mean as a line.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chulengo.evaluate.search.curve import BOUNDS, UNITS, Point, Verdict
from chulengo.evaluate.search.space import Dimension, short
from chulengo.evaluate.search.study import Trial, best_of
from chulengo.train.plots import BLUE, DOTS_PER_INCH, GREY, ORANGE, STYLE, wants_log
from chulengo.train.run_folder import write_bytes

COLUMNS = 3
PANEL_INCHES = (3.6, 2.5)


def plot_search(
    trials: Sequence[Trial], dimensions: Sequence[Dimension], png: Path, svg: Path, *, title: str = ""
) -> None:
    """Writes the picture of a search as PNG and SVG.

    Args:
        trials: as `study.trials_of` returns them.
        dimensions: the space, a panel each.
        png: where the PNG goes; its folder is made when missing.
        svg: where the SVG goes.
        title: what was searched, in a few words.
    """
    import matplotlib
    from matplotlib.figure import Figure

    shown = [trial for trial in trials if _height(trial) is not None]
    rows = 1 + math.ceil(len(dimensions) / COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PANEL_INCHES[0] * COLUMNS, PANEL_INCHES[1] * rows + 0.6), layout="constrained")
        grid = figure.add_gridspec(rows, COLUMNS)
        history = figure.add_subplot(grid[0, :2])
        _draw_history(history, shown)
        _draw_courses(figure.add_subplot(grid[0, 2]), trials)
        heights = [height for trial in shown if (height := _height(trial)) is not None]
        in_log, limits = wants_log(heights), _limits(heights)
        for place, dimension in enumerate(dimensions):
            axes = figure.add_subplot(grid[1 + place // COLUMNS, place % COLUMNS])
            _draw_setting(axes, shown, dimension)
            _loss_axis(axes, limits, in_log=in_log)
        _loss_axis(history, limits, in_log=in_log)
        figure.suptitle(f"Search: {title}" if title else "Search", x=0.01, ha="left", fontweight="bold", fontsize=12)
        _save(figure, png, svg)


def plot_curve(
    curves: Mapping[str, Sequence[Point]], verdicts: Mapping[str, Verdict], png: Path, svg: Path, *, title: str = ""
) -> None:
    """Writes the picture of a sample-size curve as PNG and SVG, a panel a metric.

    Args:
        curves: points by metric, ascending in rows.
        verdicts: what each says.
        png: where the PNG goes; its folder is made when missing.
        svg: where the SVG goes.
        title: what was trained, in a few words.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 4.4 * len(curves) + 0.3), layout="constrained")
        for place, (metric, points) in enumerate(curves.items(), 1):
            axes = figure.add_subplot(len(curves), 1, place)
            _draw_sizes(axes, metric, points)
            axes.set_title(_wrapped(verdicts[metric].text, 96), loc="left", fontsize=9.5, color=GREY)
        figure.suptitle(f"Sample size: {title}" if title else "Sample size", x=0.01, ha="left", fontweight="bold",
                        fontsize=12)
        _save(figure, png, svg)


def _draw_history(axes: Any, trials: Sequence[Trial]) -> None:
    for state, style in _styles(trials):
        some = [trial for trial in trials if trial.state == state]
        axes.plot([t.number for t in some], [_height(t) for t in some], label=state, **style)
    complete = [trial for trial in trials if trial.value is not None]
    best, numbers, values = math.inf, [], []
    for trial in complete:
        best = min(best, trial.value if trial.value is not None else best)
        numbers.append(trial.number)
        values.append(best)
    if complete:
        last = max(trial.number for trial in trials)
        axes.step([*numbers, last], [*values, best], where="post", color=ORANGE, linewidth=1.6, label="best so far")
        _ring(axes, trials, lambda trial: trial.number)
    if trials:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.0, ncols=5, fontsize=9,
                    handlelength=1.6, columnspacing=1.2, borderpad=0.2)
    else:
        axes.text(0.5, 0.5, "no trials yet", transform=axes.transAxes, ha="center", color=GREY)
    axes.set_xlabel("trial")
    axes.set_ylabel("validation loss")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_courses(axes: Any, trials: Sequence[Trial]) -> None:
    """Draws the loss of each trial by evaluation point."""
    best = best_of(trials)
    for trial in trials:
        points = sorted(trial.points.items())
        if not points:
            continue
        is_best = best is not None and trial.number == best.number
        axes.plot([p for p, _ in points], [v for _, v in points], marker="o", markersize=2.5 if not is_best else 4.0,
                  color=ORANGE if is_best else BLUE if trial.state == "complete" else GREY,
                  linewidth=1.8 if is_best else 0.8, alpha=1.0 if is_best else 0.5, zorder=3 if is_best else 2)
    axes.set_xlabel("evaluation point")
    last = max((point for trial in trials for point in trial.points), default=1)
    axes.set_xlim(0.8, last + 0.2)
    axes.set_xticks(range(1, last + 1))
    losses = [loss for trial in trials for loss in trial.points.values()]
    _loss_axis(axes, _limits(losses), in_log=wants_log(losses))


def _draw_setting(axes: Any, trials: Sequence[Trial], dimension: Dimension) -> None:
    key = dimension.key
    having = [trial for trial in trials if key in trial.params]

    def place(trial: Trial) -> float:
        if dimension.choices:
            return float(dimension.choices.index(trial.params[key]))
        return float(trial.params[key])

    for state, style in _styles(having):
        some = [trial for trial in having if trial.state == state]
        axes.plot([place(t) for t in some], [_height(t) for t in some], **style)
    _ring(axes, having, place)
    if dimension.choices:
        axes.set_xticks(range(len(dimension.choices)), [_tick(choice) for choice in dimension.choices])
        axes.set_xlim(-0.5, len(dimension.choices) - 0.5)
    else:
        _whole_range(axes, dimension)
    axes.set_title(short(key), loc="left", fontsize=10.0)
    axes.tick_params(labelsize=9)


def _whole_range(axes: Any, dimension: Dimension) -> None:
    """Shows the range that was searched, not only the part that was tried."""
    from matplotlib.ticker import LogLocator, NullFormatter

    assert dimension.low is not None
    assert dimension.high is not None
    margin = 0.05
    if not dimension.log:
        width = dimension.high - dimension.low
        axes.set_xlim(dimension.low - margin * width, dimension.high + margin * width)
        axes.locator_params(axis="x", nbins=6)
        return
    axes.set_xscale("log")
    ratio = dimension.high / dimension.low
    axes.set_xlim(dimension.low / ratio**margin, dimension.high * ratio**margin)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if ratio >= 100 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_sizes(axes: Any, metric: str, points: Sequence[Point]) -> None:
    rows = [point.rows for point in points]
    axes.set_xscale("log")
    for point in points:
        axes.plot([point.rows] * len(point.values), point.values, marker="o", markersize=5, linestyle="none",
                  color=BLUE, alpha=0.45)
    axes.plot(rows, [point.mean for point in points], color=BLUE, linewidth=1.8, marker="_", markersize=12,
              label="mean of the repeats")
    axes.set_xticks(rows, [f"{n:,}" for n in rows])
    axes.minorticks_off()
    axes.set_xlim(rows[0] / 1.3, rows[-1] * 1.3)
    axes.set_xlabel("training rows")
    axes.set_ylabel(f"{metric} ({UNITS[metric]})")
    if (bounds := BOUNDS[metric]) is not None:
        low, high = bounds
        top = min(high, axes.get_ylim()[1])
        axes.set_ylim(low, top if max(value for point in points for value in point.values) > low else high)


def _styles(trials: Sequence[Trial]) -> list[tuple[str, dict[str, Any]]]:
    """Returns how the trials of each state that occurs are drawn; never by colour alone."""
    known: dict[str, dict[str, Any]] = {
        "complete": {"marker": "o", "markersize": 5, "color": BLUE, "linestyle": "none"},
        "pruned": {"marker": "o", "markersize": 5, "color": GREY, "markerfacecolor": "none", "linestyle": "none"},
        "failed": {"marker": "x", "markersize": 5, "color": GREY, "linestyle": "none"},
    }
    return [(state, style) for state, style in known.items() if any(t.state == state for t in trials)]


def _ring(axes: Any, trials: Sequence[Trial], place: Any) -> None:
    best = best_of(trials)
    if best is not None:
        axes.plot(place(best), best.value, marker="o", markersize=11, markerfacecolor="none", color=ORANGE,
                  markeredgewidth=2.0, linestyle="none")


def _height(trial: Trial) -> float | None:
    """Returns where a trial is drawn: its value, else the last loss that was seen of it."""
    if trial.value is not None:
        return trial.value
    last = trial.points[max(trial.points)] if trial.points else None
    return last if last is not None and math.isfinite(last) else None


def _limits(losses: Sequence[float]) -> tuple[float, float] | None:
    """Returns the ends of the loss axis, with room for the marks; None when there is nothing to draw."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite or min(finite) == max(finite):
        return None
    if wants_log(finite):
        return min(finite) / 1.3, max(finite) * 1.3
    margin = 0.06 * (max(finite) - min(finite))
    return min(finite) - margin, max(finite) + margin


def _loss_axis(axes: Any, limits: tuple[float, float] | None, *, in_log: bool) -> None:
    if in_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _position: "")
    if limits is not None:
        axes.set_ylim(limits)


def _tick(choice: Any) -> str:
    text = f"{choice:g}" if isinstance(choice, int | float) and not isinstance(choice, bool) else str(choice)
    return text.replace("_with_", "\nwith ").replace("_", " ")


def _wrapped(text: str, columns: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, columns))


def _save(figure: Any, png: Path, svg: Path) -> None:
    for path, form, metadata in ((png, "png", {"Software": None}), (svg, "svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, dpi=DOTS_PER_INCH, metadata=metadata)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, buffer.getvalue())
