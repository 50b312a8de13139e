"""The pictures of a run, made from its metric rows and nothing else, so that they can be made again at any time.

Matplotlib's object interface (`Figure`, no pyplot): no global figure list, no display, safe beside a server thread.
The same rows give the same bytes: no dates in the files, a fixed salt for SVG ids, and fonts that matplotlib ships.
Colours are Okabe and Ito's, which stay apart for colour-blind eyes; shape and width tell the curves apart as well.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chulengo.data.wording import four_digits
from chulengo.train.metrics import smoothed
from chulengo.train.whole_files import write_bytes

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#5F6670"
MAX_POINTS = 2000  # a curve: more cannot be told apart at 1,600 pixels and makes an SVG of megabytes
LOG_RATIO = 20.0  # a logarithmic loss axis pays once the range is this large; below, it only hides the size of a step
WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 8.0, 5.0, 200  # 1,600 px: sharp when a README shows it at 800

STYLE: dict[str, Any] = {
    "svg.hashsalt": "chulengo",
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#22262B",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": "#E4E7EB",
    "grid.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "path.simplify": True,
}


def plot_losses(rows: Iterable[Mapping[str, Any]], png: Path, svg: Path, *, title: str = "") -> None:
    """Writes the loss plot (training and validation, learning rate and gradient norm beneath) as PNG and SVG.

    Args:
        rows: metric rows in the order they were written; rows of other kinds are left out.
        png: where the PNG goes (1,600 x 1,000 pixels); its folder is made when missing.
        svg: where the SVG goes.
        title: what was trained, for example "Llama-2-7b-chat-hf on guanaco-llama2-1k".
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = list(rows)
    train = [row for row in rows if row.get("kind") == "train" and "step" in row]
    validation = [row for row in rows if row.get("kind") == "validation" and "step" in row]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(2.6, 1.0))
        loss_axes = figure.add_subplot(grid[0, :])
        _draw_losses(loss_axes, train, validation)
        heading = f"Loss: {title}" if title else "Loss"
        loss_axes.set_title(heading if len(heading) <= 84 else heading[:83] + "…", loc="left", fontweight="bold",
                            pad=24.0)
        _draw_small(figure.add_subplot(grid[1, 0]), train, "learning_rate", "learning rate", GREEN)
        _draw_small(figure.add_subplot(grid[1, 1]), train, "grad_norm", "gradient norm", PINK)
        _save(figure, png, "png", {"Software": None})
        _save(figure, svg, "svg", {"Date": None, "Creator": None})


def thinned(steps: Sequence[float], values: Sequence[float], most: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """Returns at most `most` points that look the same: of each stretch the lowest and the highest, in order.

    Taking every n-th point would drop exactly the spikes one looks for.
    """
    if len(values) <= most:
        return list(steps), list(values)
    stretch = math.ceil(len(values) / (most // 2))
    kept: list[int] = []
    for start in range(0, len(values), stretch):
        inside = [i for i in range(start, min(start + stretch, len(values))) if math.isfinite(values[i])]
        if inside:
            kept += sorted({min(inside, key=values.__getitem__), max(inside, key=values.__getitem__)})
    return [steps[i] for i in kept], [values[i] for i in kept]


def wants_log(values: Sequence[float]) -> bool:
    """Returns whether a logarithmic axis shows these losses better: all positive and spread over LOG_RATIO."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) > LOG_RATIO


def without_lag(values: Sequence[float], *, geometric: bool = False) -> list[float]:
    """Returns the values smoothed over about a fortieth of their number, without delay.

    `geometric` averages logarithms, for a logarithmic axis: there an arithmetic mean hangs above a falling curve.


    The mean of a moving average from the left and one from the right: one alone runs behind a falling loss, and the
    validation points, which are exact, would seem to lie below the training curve. Not finite values stay gaps.
    """
    if geometric:
        logs = [math.log(value) if math.isfinite(value) else value for value in values]
        return [math.exp(value) if math.isfinite(value) else value for value in without_lag(logs)]
    decay = 1.0 - 1.0 / max(5.0, len(values) / 40)
    forth = smoothed(values, decay)
    back = smoothed(list(values)[::-1], decay)[::-1]
    return [
        (left + right) / 2 if math.isfinite(value) else math.nan
        for value, left, right in zip(values, forth, back, strict=True)
    ]


def _draw_losses(axes: Any, train: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> None:
    steps, losses = _column(train, "loss")
    val_steps, val_losses = _column(validation, "loss")
    in_log = wants_log([*losses, *val_losses])
    alone = {"marker": "o", "markersize": 5.0} if len(losses) == 1 else {}
    if losses:
        smooth = len(losses) >= 10
        axes.plot(*thinned(steps, losses), color=BLUE, alpha=0.35 if smooth else 1.0,
                  linewidth=0.9 if smooth else 1.6, label="training", **alone)
        if smooth:
            curve = without_lag(losses, geometric=in_log)
            axes.plot(*thinned(steps, curve), color=BLUE, linewidth=2.0, label="training, smoothed")
    if val_losses:
        axes.plot(val_steps, val_losses, color=ORANGE, linewidth=1.4, linestyle=(0, (5, 2)), marker="o",
                  markersize=5.0 if len(val_losses) <= 60 else 0.0, label="validation")
        _ring_best(axes, val_steps, val_losses)
    broken = [step for step, loss in zip(steps, losses, strict=True) if not math.isfinite(loss)]
    if broken:
        axes.axvline(broken[0], color="black", linewidth=1.0, linestyle=":")
        axes.annotate(f"not finite from step {broken[0]:g}", (broken[0], 0.04), xycoords=("data", "axes fraction"),
                      xytext=(-5, 0), textcoords="offset points", ha="right", fontsize=9)
    if in_log:
        axes.set_yscale("log")
    if losses or val_losses:
        # beneath the title, outside the axes: wherever the curves run, nothing lies on them
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.99), borderaxespad=0.0, ncols=5, fontsize=9,
                    handlelength=1.6, columnspacing=1.2, borderpad=0.2)
    else:
        axes.text(0.5, 0.5, "no steps yet", transform=axes.transAxes, ha="center", color=GREY)
    axes.set_ylabel("loss (nats a token)")
    _whole_steps(axes, [*steps, *val_steps])


def _ring_best(axes: Any, steps: Sequence[float], losses: Sequence[float]) -> None:
    """Rings the lowest validation loss and names it in the legend."""
    finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
    if not finite:
        return
    best = min(finite, key=losses.__getitem__)
    axes.plot(
        steps[best], losses[best], marker="o", markersize=12, markerfacecolor="none", color=ORANGE,
        markeredgewidth=2.0, linestyle="none",
        label=f"best {losses[best]:.3g} (perplexity {_perplexity(losses[best])}), step {steps[best]:g}",
    )  # fmt: skip


def _draw_small(axes: Any, train: Sequence[Mapping[str, Any]], key: str, label: str, colour: str) -> None:
    steps, values = _column(train, key)
    if any(math.isfinite(value) for value in values):
        alone = {"marker": "o", "markersize": 4.0} if len(values) == 1 else {}
        axes.plot(*thinned(steps, values), color=colour, linewidth=1.2, **alone)
        axes.set_ylim(bottom=0.0)
    else:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=GREY)
    axes.set_title(label, loc="left", fontsize=10.0)
    axes.locator_params(axis="y", nbins=4)
    axes.yaxis.set_major_formatter(lambda value, _position: f"{value:.3g}")
    axes.tick_params(labelsize=9)
    _whole_steps(axes, steps)


def _whole_steps(axes: Any, steps: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, max([1.0, *steps]) * 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlabel("step")
    axes.tick_params(length=0)


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Returns steps and values of the rows that have the key."""
    having = [row for row in rows if row.get(key) is not None]
    return [float(row["step"]) for row in having], [float(row[key]) for row in having]


def _perplexity(loss: float) -> str:
    return four_digits(math.exp(loss)) if loss < 700 else "over 1e300"


def _save(figure: Any, path: Path, form: str, metadata: Mapping[str, None]) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, dpi=DOTS_PER_INCH, metadata=dict(metadata))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())
