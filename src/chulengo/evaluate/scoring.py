"""From what items gave to a score with its interval.

A metric's counts are summed over items; the interval says how far the score would move had other conversations of the
same kind been drawn. It is the percentile bootstrap (Efron 1979): 10,000 times, as many groups are drawn with
replacement as there are, and the score of each draw is computed; 95 % of them lie in the interval. Groups, not items,
are drawn, since turns of one conversation (questions on one paragraph) rise and fall together: as if independent, ten
turns of one talk would count as ten witnesses.

Every metric is a function of summed counts, so a draw is a vector of how often each group was taken, times the matrix
of counts, and nothing is scored again. Two roads lead to the draws, with the same distribution:
  - few different rows of counts (right or wrong, an F1 over short answers): how often each *kind* of row is taken is
    multinomial, at a cost that does not grow with the number of items. 100,000 answers take 0.1 s instead of 4.
  - many: groups are drawn one by one and counted, in blocks of a few megabytes, for all metrics at once.

A share of independent right-or-wrong items has Wilson's interval instead. It is the better one there: where all of 20
answers are right, no draw is anything but 100 %, and the bootstrap would call the score certain. A score that is no
such share (an F1 of a label) has no interval where all draws are equal: that they are says nothing of other items.

A metric may not apply to an item (an answer of two words repeats no four; a missing prediction has no length). Such
items are in the draws and add nothing; they are neither trials of Wilson's interval nor counted in the n of a score.

Limits: with few groups (under some 20) a percentile bootstrap is too narrow. A draw in which a score is undefined (the
precision of a label that nothing was given) is left out of the percentiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chulengo.evaluate.metrics.classification import LABEL_COLUMNS
from chulengo.evaluate.metrics.metric import Counts, Metric, Outcome, ratio
from chulengo.evaluate.results import Score, finite, wilson_interval

DRAWS = 10_000
KINDS_SHARE = 40  # a kind costs a multinomial draw as much as so many drawn items do (60 ns, 2.5 ns), with a reserve
BLOCK = 1 << 21  # drawn groups at a time: 16 MB as int64
PIECE = 8192  # items that all metrics count before the next ones: their texts fit the metrics' caches
SAME = 1e-9  # relative: what rounding leaves between draws that are equal
FEWEST_DEFINED = 0.5  # share of the draws in which a score must be defined for it to have an interval


def score(metric: Metric, outcomes: Sequence[Outcome], *, draws: int = DRAWS, seed: int = 0) -> Score:
    """Returns the score of one metric; see `score_all`."""
    return score_all([metric], outcomes, draws=draws, seed=seed)[0]


def score_all(
    metrics: Sequence[Metric], outcomes: Sequence[Outcome], *, draws: int = DRAWS, seed: int = 0,
    labels: Sequence[str] = (), with_items: bool = True,
) -> list[Score]:
    """Returns the scores of outcomes, each with its interval and what every item counted.

    Args:
        metrics: what to compute.
        outcomes: one or more items.
        draws: how many resampled sets; 0: no intervals but Wilson's.
        seed: the same seed, items and metric give the same interval, whatever the order of the items.
        labels: the classes, where the metrics are of a classification.
        with_items: whether scores keep what every item counted, which comparisons need; 0.6 s for 100,000 items.
    """
    ids, groups = [o.id for o in outcomes], [o.group for o in outcomes]
    counts = _count(metrics, outcomes)
    return score_counts(metrics, ids, groups, counts, draws=draws, seed=seed, labels=labels, with_items=with_items)


def _count(metrics: Sequence[Metric], outcomes: Sequence[Outcome]) -> list[Counts]:
    """Returns each metric's counts, made piece by piece: metrics of one family share work on texts seen lately."""
    if len(outcomes) <= PIECE:
        return [metric.count(outcomes) for metric in metrics]
    pieces = [
        [metric.count(outcomes[start : start + PIECE]) for metric in metrics if not _is_whole(metric)]
        for start in range(0, len(outcomes), PIECE)
    ]
    joined = iter([np.concatenate(parts) for parts in zip(*pieces, strict=True)])
    return [metric.count(outcomes) if _is_whole(metric) else next(joined) for metric in metrics]


def _is_whole(metric: Metric) -> bool:
    return metric.name.startswith("bertscore")  # loads its encoder for every call


def score_counts(
    metrics: Sequence[Metric], ids: Sequence[str], groups: Sequence[str], counts: Sequence[Counts], *,
    draws: int = DRAWS, seed: int = 0, labels: Sequence[str] = (), with_items: bool = True,
) -> list[Score]:
    """Returns the scores of items that are counted already; see `score_all`.

    Args:
        metrics: what the counts are of.
        ids: one an item.
        groups: one an item.
        counts: for each metric its counts [items, columns].
        draws: see `score_all`.
        seed: see `score_all`.
        labels: see `score_all`.
        with_items: see `score_all`.
    """
    by_group = [grouped(groups, each) for each in counts]
    single = len(set(groups)) == len(groups)
    drawn = draw_sums(by_group, draws, seed)
    made = []
    for metric, own, sums in zip(metrics, counts, drawn, strict=True):
        value = float(metric.combine(own.sum(0)))
        values = metric.combine(own)
        num_counted, num_groups = count_defined(groups, ~np.isnan(values))
        interval, method = _wilson(metric, values, value, own, num_groups, single=single), "wilson"
        if interval is None:
            interval, method = percentiles(metric.combine(sums)), "bootstrap"
            if interval is not None and math.isclose(*interval, rel_tol=SAME):
                interval = None
        made.append(Score(
            name=metric.name, version=metric.version, definition=metric.definition, value=value, num_items=num_counted,
            interval=interval, unit=metric.unit, higher_is_better=metric.higher_is_better, columns=metric.columns,
            num_groups=num_groups, interval_method=method if interval is not None else "",
            combine="ratio" if metric.combine is ratio else metric.name, labels=tuple(labels),
            items=_items(ids, groups, values, own) if with_items else (),
        ))
    return made


def count_defined(groups: Sequence[str], defined: NDArray[np.bool_]) -> tuple[int, int]:
    """Returns the number of items for which a score is defined, and the number of groups that have such an item.

    Args:
        groups: one an item.
        defined: [items].
    """
    return int(defined.sum()), len({group for group, own in zip(groups, defined.tolist(), strict=True) if own})


def _items(
    ids: Sequence[str], groups: Sequence[str], values: NDArray[np.float64], counts: Counts
) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"id": id_, "group": group, "value": finite(value), "counts": row}
        for id_, group, value, row in zip(ids, groups, values.tolist(), counts.tolist(), strict=True)
    )


def _wilson(
    metric: Metric, values: NDArray[np.float64], value: float, counts: Counts, num_groups: int, *, single: bool
) -> tuple[float, float] | None:
    """Returns Wilson's interval where the score is a share of right or wrong items that are independent, else None.

    Also where items are not independent but all the same, with a group as one trial: no draw could differ there. Items
    that the metric does not apply to are no trials.
    """
    top = {"share": 1.0, "points": 100.0}.get(metric.unit)
    trials = _trials(metric, counts)
    if top is None or trials is None or not np.isin(trials, (0.0, 1.0)).all():
        return None
    counted = values[trials == 1]
    if not len(counted) or not np.isin(counted, (0.0, top)).all():
        return None
    alike = bool((counted == counted[0]).all())
    if not single and not alike:
        return None
    low, high = wilson_interval(round(value / top * num_groups), num_groups)
    return low * top, high * top


def _trials(metric: Metric, counts: Counts) -> NDArray[np.float64] | None:
    """Returns the counts of what a metric is a share of; None where it is no share of items."""
    if metric.columns[1:2] == ("items",):
        return counts[:, 1]
    part = metric.name.partition(":")[0]
    if metric.columns == LABEL_COLUMNS and part != "f1":
        return counts[:, LABEL_COLUMNS.index("predicted" if part == "precision" else "gold")]
    return None


def grouped(groups: Sequence[str], counts: Counts) -> Counts:
    """Returns the counts summed by group, groups in alphabetical order."""
    place = {group: number for number, group in enumerate(sorted(set(groups)))}
    owner = np.fromiter((place[group] for group in groups), np.int64, len(groups))
    columns = [np.bincount(owner, counts[:, column], len(place)) for column in range(counts.shape[1])]
    return np.stack(columns, axis=1) if columns else np.zeros((len(place), 0))


def draw_sums(units: Sequence[Counts], draws: int, seed: int) -> list[Counts]:
    """Returns the summed counts of every draw, [draws, columns] for each unit of [groups, columns].

    All units have the same groups. What a unit gets depends on itself, `draws` and `seed`, not on other units.
    """
    if not units or draws == 0 or len(units[0]) < 2:
        return [np.full((0, unit.shape[1]), np.nan) for unit in units]
    kinds = [_kinds(unit) for unit in units]
    many = [number for number, (rows, _) in enumerate(kinds) if len(rows) * KINDS_SHARE > len(units[number])]
    drawn: dict[int, Counts] = {
        number: _draw_kinds(*kinds[number], draws, seed) for number in range(len(units)) if number not in many
    }
    if many:
        joined = _draw_groups(np.concatenate([units[number] for number in many], axis=1), draws, seed)
        ends = np.cumsum([units[number].shape[1] for number in many])[:-1]
        drawn |= dict(zip(many, np.split(joined, ends, axis=1), strict=True))
    return [drawn[number] for number in range(len(units))]


def _kinds(rows: Counts) -> tuple[Counts, NDArray[np.int64]]:
    """Returns the different rows, sorted, and how many there are of each."""
    ordered = rows[np.lexsort(rows.T[::-1])]
    first = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])
    return ordered[first], np.diff(np.append(first.nonzero()[0], len(rows)))


def _draw_kinds(kinds: Counts, copies: NDArray[np.int64], draws: int, seed: int) -> Counts:
    rng = np.random.default_rng(seed)
    total = int(copies.sum())
    size = max(1, BLOCK // len(kinds))
    blocks = [
        rng.multinomial(total, copies / total, size=min(size, draws - start)).astype(np.float64) @ kinds
        for start in range(0, draws, size)
    ]
    return np.concatenate(blocks)


def _draw_groups(rows: Counts, draws: int, seed: int) -> Counts:
    rng = np.random.default_rng(seed)
    total = len(rows)
    size = max(1, BLOCK // total)
    blocks = []
    for start in range(0, draws, size):
        number = min(size, draws - start)
        taken = rng.integers(0, total, (number, total), dtype=np.int32)
        weights = np.empty((number, total))
        for place, own in enumerate(taken):
            weights[place] = np.bincount(own, minlength=total)
        blocks.append(weights @ rows)
    return np.concatenate(blocks)


def percentiles(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """Returns the 2.5th and 97.5th percentile of the defined values; None where too few of the draws define one."""
    defined = values[np.isfinite(values)]
    if not len(values) or len(defined) < FEWEST_DEFINED * len(values):
        return None
    low, high = np.quantile(defined, (0.025, 0.975))
    return float(low), float(high)

