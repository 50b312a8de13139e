"""The sample-size curve: the same recipe on 100, 1,000, 10,000 rows, and what it says about collecting more.

What is run. For each repeat the rows are drawn by lot once, and the sizes are nested: the 1,000 contain the 100. The
repeats differ in the lot and in the training seed; the validation rows are the same everywhere. Nested sizes make the
differences between sizes within a repeat less noisy than those of independent draws.

The rule. "Do I need more data?" is a question about the *next* rows, so only the last stretch counts: the gain from the
second largest to the largest size, divided by the number of doublings between them, in each repeat; then the mean over
the repeats with its 95 % interval (Student's t). The answer is
- yes, when the whole interval lies above `worth` (a gain that is worth a doubling of the data),
- no, when the whole interval lies below it,
- not clear, when it lies on both sides; more repeats make it narrower,
- unknown, with fewer than two sizes or two repeats: there is no interval. Also where every run of both sizes gave the
  same value: an exact match of 0 everywhere is a metric that sees nothing of these runs, and its interval, 0 to 0,
  would be taken for certainty.
Gains shrink as data grow, so the gain of the last doubling is an upper estimate of that of the next. No curve is
fitted: three sizes do not tell a power law from a logarithm, and the extrapolation is where those differ.

Limits. The interval is over lots and seeds, not over validation rows. With equal epochs, larger sizes also take more
steps; equal steps tell the two apart, at the price of running every size as long as the largest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chulengo.errors import ConfigError
from chulengo.evaluate.search.identity import check_same
from chulengo.train.metrics import MetricsFile

LOSS, EXACT_MATCH = "validation loss", "exact match"
HIGHER_IS_BETTER = {LOSS: False, EXACT_MATCH: True}
UNITS = {LOSS: "nats a token", EXACT_MATCH: "share of answers"}
BOUNDS: dict[str, tuple[float, float] | None] = {LOSS: None, EXACT_MATCH: (0.0, 1.0)}  # a loss has no upper end
WORTH = {LOSS: 0.01, EXACT_MATCH: 0.01}  # 1 % of the perplexity; one answer in a hundred
# two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the normal 1.96 is 2 % too narrow
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

RunSize = Callable[[int, int], Mapping[str, float]]  # (rows, repeat) -> value by metric


@dataclass(frozen=True, slots=True)
class Point:
    """One size: the values of its repeats, in their order."""

    rows: int
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean of the repeats."""
        return statistics.fmean(self.values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the point as JSON; `low` and `high` are the lowest and the highest of the repeats."""
        return {"rows": self.rows, "value": self.mean, "low": min(self.values), "high": max(self.values),
                "values": list(self.values)}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the last stretch of a curve says.

    Attributes:
        answer: "yes", "no", "not clear" or "unknown".
        gain: of a doubling, positive when it helps; None when unknown.
        interval: 95 %, over the repeats; None when unknown.
        worth: the gain that the interval was compared with.
        text: the answer as a sentence or two.
    """

    answer: str
    gain: float | None
    interval: tuple[float, float] | None
    worth: float
    text: str


def read_sizes(text: str, num_rows: int) -> list[int]:
    """Returns the sizes of `100,1000,all`, ascending.

    Raises:
        ConfigError: a size that is no positive number, twice the same, or more than there are rows.
    """
    sizes = []
    for part in text.split(","):
        word = part.strip().replace("_", "")
        if word != "all" and not (word.isdecimal() and int(word) > 0):
            raise ConfigError(f"{part.strip()!r} is no number of rows.", allowed="whole numbers above 0, and `all`",
                              next_step="--sample-sizes 100,1000,all")
        sizes.append(num_rows if word == "all" else int(word))
    beyond = [size for size in sizes if size > num_rows]
    if beyond:
        fitting = ",".join([*(str(size) for size in sizes if size < num_rows), "all"])
        raise ConfigError(
            f"Sizes of {', '.join(f'{size:,}' for size in beyond)} asked for; there are {num_rows:,} training rows.",
            next_step=f"--sample-sizes {fitting}",
        )
    if len(set(sizes)) < len(sizes):
        raise ConfigError(f"--sample-sizes {text} names a size twice.", allowed="different sizes",
                          next_step=f"--sample-sizes {','.join(map(str, sorted(set(sizes))))}")
    return sorted(sizes)


def open_runs(path: Path, identity: Mapping[str, Any]) -> dict[tuple[int, int], dict[str, float]]:
    """Returns the values of the runs that are in the file, by (rows, repeat); begins the file when there is none.

    Raises:
        ConfigError: the file is that of another curve.
    """
    file = MetricsFile(path)
    rows = file.rows()
    if not rows:
        file.append({"kind": "identity", **identity})
        file.close()
        return {}
    first = dict(rows[0])
    known = {key: value for key, value in first.items() if key != "kind"} if first.get("kind") == "identity" else None
    check_same(path, known, identity, "curve")
    return {(row["rows"], row["repeat"]): row["values"] for row in rows[1:] if row.get("kind") == "run"}


def run_curve(
    path: Path, identity: Mapping[str, Any], sizes: Sequence[int], repeats: int, run_size: RunSize, *,
    on_end: Callable[[int, int, Mapping[str, float], bool], None] = lambda *_: None,
) -> dict[str, list[Point]]:
    """Returns the points of every metric, smallest size first.

    Args:
        path: where each finished run is noted, so that a curve goes on where it was left.
        identity: see `search.identity`.
        sizes: ascending.
        repeats: runs a size.
        run_size: runs one size of one repeat.
        on_end: called with rows, repeat, values, and whether they come from the file.
    """
    values = open_runs(path, identity)
    file = MetricsFile(path)
    try:
        for repeat in range(repeats):  # a whole curve first: an early look is at all sizes
            for size in sizes:
                known = (size, repeat) in values
                if not known:
                    values[size, repeat] = dict(run_size(size, repeat))
                    file.append({"kind": "run", "rows": size, "repeat": repeat, "values": values[size, repeat]})
                on_end(size, repeat, values[size, repeat], known)
    finally:
        file.close()
    metrics = list(values[sizes[0], 0])
    return {
        metric: [Point(size, tuple(values[size, repeat][metric] for repeat in range(repeats))) for size in sizes]
        for metric in metrics
    }


def judge(points: Sequence[Point], metric: str, worth: float | None = None) -> Verdict:
    """Returns whether more data would help, by the rule at the top of this file.

    Args:
        points: ascending in rows, each with the values of the same repeats.
        metric: LOSS or EXACT_MATCH.
        worth: the gain that is worth a doubling, in the metric's unit; None: 0.01.
    """
    worth = WORTH[metric] if worth is None else worth
    if len(points) < 2:
        return Verdict("unknown", None, None, worth, "One size says nothing about others: give two or more sizes.")
    before, last = points[-2:]
    doublings = math.log2(last.rows / before.rows)
    sign = 1.0 if HIGHER_IS_BETTER[metric] else -1.0
    gains = [sign * (b - a) / doublings for a, b in zip(before.values, last.values, strict=True)]
    gain = statistics.fmean(gains)
    said = f"from {before.rows:,} to {last.rows:,} rows, {_gain(metric, gain)} a doubling"
    if len(gains) < 2:
        return Verdict("unknown", gain, None, worth,
                       f"One repeat has no interval ({said}); three or more repeats give an answer.")  # fmt: skip
    if len({*before.values, *last.values}) == 1:
        return Verdict("unknown", gain, None, worth, f"Unknown: {metric} is {last.values[0]:.4g} in every run with "
                       f"{before.rows:,} and {last.rows:,} rows, so it cannot tell whether more data would help.")
    t = T_95[len(gains) - 2] if len(gains) - 2 < len(T_95) else 1.96
    half = t * statistics.stdev(gains) / math.sqrt(len(gains))
    low, high = gain - half, gain + half
    answer = "yes" if low > worth else "no" if high < worth else "not clear"
    measured = f"{said} (95 % interval {_number(metric, low)} to {_number(metric, high)})"
    meaning = {
        "yes": f"Yes, more data would help: {measured}, more than the {_number(metric, worth)} that count as worth it.",
        "no": f"No, more data of this kind would hardly help: {measured}, less than the {_number(metric, worth)} that "
        "count as worth it.",
        "not clear": f"Not clear: {measured}, and {_number(metric, worth)} would count as worth it. More repeats "
        "narrow the interval.",
    }[answer]
    return Verdict(answer, gain, (low, high), worth, meaning)


def curve_dict(curves: Mapping[str, Sequence[Point]], verdicts: Mapping[str, Verdict], **more: Any) -> dict[str, Any]:
    """Returns `curve.json`: the validation loss on top, every metric under `curves`."""
    each = {
        metric: {
            "metric": metric, "unit": UNITS[metric], "higher_is_better": HIGHER_IS_BETTER[metric],
            "points": [point.to_dict() for point in points], "verdict": _verdict_dict(verdicts[metric]),
        }
        for metric, points in curves.items()
    }
    return {"format": "chulengo-curve/1", **each[LOSS], "curves": list(each.values()), **more}


def _verdict_dict(verdict: Verdict) -> dict[str, Any]:
    return {"answer": verdict.answer, "gain_per_doubling": verdict.gain, "worth": verdict.worth, "text": verdict.text,
            "interval_95": None if verdict.interval is None else list(verdict.interval)}  # fmt: skip


def _gain(metric: str, gain: float) -> str:
    if metric == EXACT_MATCH:
        return f"exact match {'rises' if gain >= 0 else 'falls'} by {_number(metric, abs(gain))}"
    percent = 100.0 * -math.expm1(-gain)
    return (
        f"validation loss {'falls' if gain >= 0 else 'rises'} by {abs(gain):.3g} nats a token "
        f"(perplexity {'−' if gain >= 0 else '+'}{abs(percent):.2g} %)"
    )


def _number(metric: str, value: float) -> str:
    if metric != EXACT_MATCH:
        return f"{value:.3g}"
    points = f"{100 * value:.3g}"
    return f"{points} percentage point{'' if points in ('1', '-1') else 's'}"
