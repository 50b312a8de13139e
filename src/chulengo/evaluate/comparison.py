"""Two models on the same items: is the difference real, how large is it, and where did the second one get worse?

Paired bootstrap by group (Koehn 2004, with conversations for sentences): each draw takes the same groups for both
sides, so what makes an item hard for both cancels, and the interval of the difference is far narrower than two
intervals side by side suggest. It is computed from the counts that scores carry, so two stored results are compared
without model, data or text.

Few witnesses prove nothing. Where one or two items differ, every draw that takes one has a difference of the same sign,
and percentiles of the draws would call that certain. A sign test cannot reach 5 % before six differences point the
same way (2 / 2^5 is 6 %), so below six groups that differ the interval is extended to zero. A draw in which a score is
undefined on either side (the F1 of a label that is neither there nor given) shows no difference: it counts as 0.

For metrics of right or wrong there is also McNemar's test: of the items that one side gets right and the other wrong,
is the split other than even? It is the exact binomial form, two-sided. It takes items as independent; where groups
have several items, trust the interval.

Scores are compared only when they are scores of the same thing: the same items, the same metric, the same version and
definition. Everything else is refused: a difference between two definitions is a number without meaning. Simulations
alone are compared over the conversations that both have, see `shared_items`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chulengo.errors import DataError
from chulengo.evaluate.metrics.classification import LABEL_COLUMNS, is_right
from chulengo.evaluate.metrics.metric import Counts, ratio
from chulengo.evaluate.results import Score, finite
from chulengo.evaluate.scoring import DRAWS, FEWEST_DEFINED, count_defined, draw_sums, grouped, percentiles

VERSION = "paired-bootstrap/2"
FEWEST_DIFFERING = 6  # groups
LISTED = 20  # items named on either side
SHOWN = 3  # of ids in an error


@dataclass(frozen=True, slots=True)
class Comparison:
    """The tuned side less the base side, for one metric.

    Attributes:
        name: of the metric.
        version: of the metric.
        unit: of the metric.
        higher_is_better: of the metric.
        method: how the interval was made.
        base: value of the base side.
        tuned: value of the tuned side.
        difference: tuned - base, in the metric's unit.
        interval_95: of the difference; None where there are too few groups or draws that define it.
        verdict: better, worse, or unclear (the interval holds 0, there is none, or the metric has no good direction).
        num_items: items that count in the metric on either side.
        num_groups: groups with such an item.
        draws: how many resampled sets.
        seed: of the draws.
        p_mcnemar: two-sided exact p; None unless the metric is of right or wrong.
        only_base: items that only the base got right; None as above.
        only_tuned: items that only the tuned side got right; None as above.
        num_better: items on which the tuned side is better; 0 where the metric has no good direction. Of precision and
            F1 of a label, items that only the tuned side has right as far as this label goes.
        num_worse: items on which it is worse.
        num_equal: items on which both are equal.
        better_items: ids of up to 20 of the better ones, the largest gain first.
        worse_items: ids of up to 20 of the worse ones, the largest loss first.
    """

    name: str
    version: str
    unit: str
    higher_is_better: bool | None
    method: str
    base: float
    tuned: float
    difference: float
    interval_95: tuple[float, float] | None
    verdict: str
    num_items: int
    num_groups: int
    draws: int
    seed: int
    p_mcnemar: float | None
    only_base: int | None
    only_tuned: int | None
    num_better: int
    num_worse: int
    num_equal: int
    better_items: tuple[str, ...]
    worse_items: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the comparison as a JSON-able dictionary."""
        row = asdict(self)
        numbers = {key: finite(row[key]) for key in ("base", "tuned", "difference")}
        lists = {key: list(row[key]) for key in ("better_items", "worse_items")}
        return row | numbers | lists | {"interval_95": None if self.interval_95 is None else list(self.interval_95)}


@dataclass(frozen=True, slots=True)
class _Pair:
    base: Score
    tuned: Score
    ids: list[str]
    groups: list[str]
    combine: Callable[[Counts], NDArray[np.float64]]
    counts: tuple[Counts, Counts]


def compare(base: Score, tuned: Score, *, draws: int = DRAWS, seed: int = 0) -> Comparison:
    """Returns the comparison of two scores of one metric; see `compare_all`."""
    return compare_all([(base, tuned)], draws=draws, seed=seed)[0]


def compare_all(
    pairs: Sequence[tuple[Score, Score]], *, draws: int = DRAWS, seed: int = 0
) -> list[Comparison]:
    """Returns the comparisons of scores of the same items, as `scoring` makes them or `results` reads them back.

    Args:
        pairs: base and tuned for each metric.
        draws: how many resampled sets.
        seed: the same seed and items give the same intervals, whatever the order of the items.

    Raises:
        DataError: the sides have other items, groups, versions or definitions, or a score has no counts.
    """
    matched = [_matched(base, tuned) for base, tuned in pairs]
    units: dict[int, Counts] = {}
    for number, pair in enumerate(matched):
        units[number] = grouped(pair.groups, np.concatenate(pair.counts, axis=1))
    made = []
    # pairs of one evaluation have the same groups and share their draws
    by_groups: dict[tuple[str, ...], list[int]] = {}
    for number, pair in enumerate(matched):
        by_groups.setdefault(tuple(pair.groups), []).append(number)
    drawn: dict[int, Counts] = {}
    for numbers in by_groups.values():
        sums = draw_sums([units[number] for number in numbers], draws, seed)
        drawn |= dict(zip(numbers, sums, strict=True))
    for number, pair in enumerate(matched):
        made.append(_comparison(pair, units[number], drawn[number], draws, seed))
    return made


def shared_items(base: Score, tuned: Score) -> tuple[Score, Score, tuple[str, ...], tuple[str, ...]]:
    """Returns both scores over the items that both are of, and the ids that only the first and only the second has.

    For scores that leave out items by what was answered, such as the turns to a goal: what is compared then are the
    items to which the score applies on both sides. The values of the two scores themselves stay those of all items.
    """
    first, second = ({item["id"] for item in score.items} for score in (base, tuned))
    kept = [replace(score, items=tuple(item for item in score.items if item["id"] in first & second))
            for score in (base, tuned)]
    only_first = tuple(item["id"] for item in base.items if item["id"] not in second)
    only_second = tuple(item["id"] for item in tuned.items if item["id"] not in first)
    return kept[0], kept[1], only_first, only_second


def _comparison(pair: _Pair, unit: Counts, sums: Counts, draws: int, seed: int) -> Comparison:
    base, tuned = (float(pair.combine(counts.sum(0))) for counts in pair.counts)
    values = [pair.combine(counts) for counts in pair.counts]
    num_items, num_groups = count_defined(pair.groups, ~(np.isnan(values[0]) & np.isnan(values[1])))
    interval = _interval(pair, unit, sums, tuned - base)
    sign = {True: 1.0, False: -1.0, None: 0.0}[pair.base.higher_is_better]
    gain = sign * _gains(pair, values)
    better, worse = int((gain > 0).sum()), int((gain < 0).sum())
    # the id settles the order of equals, so that the order of the items does not
    order = sorted(range(len(gain)), key=lambda i: (-gain[i], pair.ids[i]))
    backwards = sorted(range(len(gain)), key=lambda i: (gain[i], pair.ids[i]))
    p_mcnemar, only_base, only_tuned = None, None, None
    # a macro-F1 is 0 or 1 for an item alone, but no share of items: only what is their mean is of right and wrong ones
    if np.allclose([base, tuned], [values[0].mean(), values[1].mean()], rtol=1e-9, atol=1e-12):
        p_mcnemar, only_base, only_tuned = _mcnemar(pair.base.unit, *values)
    return Comparison(
        name=pair.base.name, version=pair.base.version, unit=pair.base.unit,
        higher_is_better=pair.base.higher_is_better, method=VERSION, base=base, tuned=tuned, difference=tuned - base,
        interval_95=interval, verdict=_verdict(interval, sign), num_items=num_items, num_groups=num_groups,
        draws=draws, seed=seed, p_mcnemar=p_mcnemar, only_base=only_base, only_tuned=only_tuned, num_better=better,
        num_worse=worse, num_equal=num_items - better - worse,
        better_items=tuple(pair.ids[i] for i in order[: min(better, LISTED)]),
        worse_items=tuple(pair.ids[i] for i in backwards[: min(worse, LISTED)]),
    )


def _interval(pair: _Pair, unit: Counts, sums: Counts, difference: float) -> tuple[float, float] | None:
    """Returns the 95 % interval of the difference, extended to zero where too few groups differ for a verdict.

    Args:
        pair: what is compared.
        unit: counts of each group, the base side's columns first.
        sums: those of each draw.
        difference: of all items.
    """
    width = unit.shape[1] // 2
    base, tuned = pair.combine(sums[:, :width]), pair.combine(sums[:, width:])
    undefined = np.isnan(base) | np.isnan(tuned)
    if not len(sums) or math.isnan(difference) or undefined.mean() > 1 - FEWEST_DEFINED:
        return None
    with np.errstate(invalid="ignore"):  # infinite on both sides
        found = percentiles(np.where(undefined, 0.0, tuned - base))
    counting = 2 if pair.base.combine == "ratio" else width  # a ratio's further columns do not change it
    differing = int((unit[:, :counting] != unit[:, width : width + counting]).any(axis=1).sum())
    if found is None or differing >= FEWEST_DIFFERING:
        return found
    return min(found[0], 0.0), max(found[1], 0.0)


def _gains(pair: _Pair, values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Returns how much more each item scores on the tuned side, 0 where it is undefined on a side."""
    if pair.base.columns == LABEL_COLUMNS and not pair.base.name.startswith("recall:"):
        # alone, an item of another label is undefined where it was rightly not given this one, and 0 where it was
        base, tuned = (is_right(counts).astype(np.float64) for counts in pair.counts)
        return tuned - base
    gain: NDArray[np.float64] = values[1] - values[0]
    gain[np.isnan(gain)] = 0.0
    return gain


def _verdict(interval: tuple[float, float] | None, sign: float) -> str:
    if interval is None or sign == 0 or interval[0] <= 0 <= interval[1]:
        return "unclear"
    return "better" if interval[0] * sign > 0 else "worse"


def _mcnemar(
    unit: str, base: NDArray[np.float64], tuned: NDArray[np.float64]
) -> tuple[float | None, int | None, int | None]:
    top = {"share": 1.0, "points": 100.0}.get(unit)
    if top is None or not (np.isin(base, (0.0, top)).all() and np.isin(tuned, (0.0, top)).all()):
        return None, None, None
    only_base, only_tuned = int((base > tuned).sum()), int((tuned > base).sum())
    return mcnemar_exact(only_base, only_tuned), only_base, only_tuned


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Returns the two-sided exact p of McNemar's test (McNemar 1947): a binomial test of the split of the items that
    one side has right and the other wrong against even chances; 1 where there are none.

    Args:
        only_first: items that only the first side has right.
        only_second: items that only the second side has right.
    """
    total, fewer = only_first + only_second, min(only_first, only_second)
    if 2 * fewer >= total:
        return 1.0
    log_ways = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2.0 * math.fsum(map(math.exp, log_ways)))


def _matched(base: Score, tuned: Score) -> _Pair:
    """Returns the two sides with the tuned side's items in the order of the base's."""
    for name in ("name", "version", "definition", "columns", "labels"):
        one, other = getattr(base, name), getattr(tuned, name)
        if one != other:
            raise DataError(
                f"The scores of {base.name} are not of the same thing: their {name} differs ({one!r} and {other!r}).",
                next_step="evaluate both with the same version and task, then compare",
            )
    if not base.columns:
        raise DataError(
            f"The score {base.name} keeps no counts of its items, so it cannot be compared by item.",
            next_step="evaluate with --task; such results can be compared",
        )
    items = {item["id"]: item for item in tuned.items}
    ids = [item["id"] for item in base.items]
    _check_ids(base.name, ids, items)
    groups = [item["group"] for item in base.items]
    moved = [item["id"] for item in base.items if items[item["id"]]["group"] != item["group"]]
    if moved:
        raise DataError(f"Items are in other groups on the two sides: {_some(moved)}.",
                        next_step="evaluate both with the same task, then compare")
    counts = (
        np.array([item["counts"] for item in base.items], np.float64),
        np.array([items[id_]["counts"] for id_ in ids], np.float64),
    )
    return _Pair(base, tuned, ids, groups, combine_of(base), counts)


def _check_ids(name: str, ids: list[str], other: dict[str, dict[str, Any]]) -> None:
    own = set(ids)
    only_base, only_tuned = [i for i in ids if i not in other], [i for i in other if i not in own]
    if only_base or only_tuned:
        parts = [
            f"{len(some)} only in the {side} ({_some(some)})"
            for side, some in (("first", only_base), ("second", only_tuned)) if some
        ]
        raise DataError(
            f"The two scores of {name} are of other items: {', '.join(parts)}.",
            next_step="evaluate both on the same data, split and --num-rows, then compare",
        )


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (", …" if len(ids) > SHOWN else "")


def combine_of(score: Score) -> Callable[[Counts], NDArray[np.float64]]:
    """Returns what turns a score's summed counts into its value."""
    if score.combine == "ratio":
        return ratio
    from chulengo.evaluate.loss_metrics import LOSS_COMBINES
    from chulengo.evaluate.metrics.registry import MetricOptions, make_metric

    if score.combine in LOSS_COMBINES:
        return LOSS_COMBINES[score.combine]
    return make_metric(score.combine, MetricOptions(labels=score.labels)).combine
