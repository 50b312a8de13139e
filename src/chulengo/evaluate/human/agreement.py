"""Krippendorff's alpha: how much better raters agree than if their ratings were dealt at random.

alpha = 1 - observed disagreement / expected disagreement, from the matrix of coincidences: a unit with m ratings adds
every ordered pair of its ratings with weight 1/(m - 1); units with one rating add nothing (Krippendorff 2011,
"Computing Krippendorff's Alpha-Reliability"). 1 is perfect, 0 is chance, below is worse than chance. Nominal: two
values differ or not. Ordinal: two values differ by how many ratings lie between them, squared.

Where all ratings are equal there is nothing to agree about beyond chance: 0/0, said as "no variation". Alpha falls
when one value is much more frequent than the others, however often raters say the same; the plain share of equal pairs
stands beside it for that reason.

The interval is the percentile bootstrap by item (Zapf and others 2016, "Measuring inter-rater reliability for nominal
data", find it right for alpha). Draws without variation define no alpha; they are counted and left out, and where they
are the most there is no interval. With few items rated by two people it is too narrow: three raters who are right four
times in five, 2,000 simulated studies each, give intervals that hold the truth in 87 % with 10 shared items, 92 % with
20, 94 % with 40.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chulengo.evaluate.human.ratings import SCALE, Rating
from chulengo.evaluate.human.win_rate import votes
from chulengo.evaluate.scoring import draw_sums, percentiles

Floats = NDArray[np.float64]
Level = Literal["nominal", "ordinal"]
VERSION = "krippendorff_alpha/1"


@dataclass(frozen=True, slots=True)
class Alpha:
    """Krippendorff's alpha of one variable.

    Attributes:
        level: nominal or ordinal.
        value: None where it cannot be computed; `reason` says why.
        interval_95: None where it cannot be computed.
        num_units: units with two ratings or more.
        num_ratings: of these units.
        equal_pairs: share of equal ones among the pairs of ratings on one unit.
        num_undefined_draws: bootstrap draws without variation, left out.
        reason: why a value or interval is missing; "" where none is.
    """

    level: Level
    value: float | None
    interval_95: tuple[float, float] | None
    num_units: int
    num_ratings: int
    equal_pairs: float | None
    num_undefined_draws: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as a JSON-able dictionary."""
        return {"name": "krippendorff_alpha", "version": VERSION, **asdict(self),
                "interval_95": None if self.interval_95 is None else list(self.interval_95)}


def krippendorff_alpha(
    counts_UV: Floats, level: Level, *, clusters: Sequence[int] | None = None, draws: int = 10_000, seed: int = 0,
    num_raters: int = 2,
) -> Alpha:
    """Returns alpha with its interval.

    Args:
        counts_UV: [units, values]: how many raters gave the unit the value; ordinal values in their order.
        level: nominal or ordinal.
        clusters: the item that each unit belongs to, drawn together by the bootstrap; None: each its own.
        draws: bootstrap draws.
        seed: of the draws.
        num_raters: how many people rated at all; only for saying why alpha is missing.
    """
    rated_U = counts_UV.sum(axis=1) >= 2
    counts_UV = counts_UV[rated_U]
    num_units, num_values = counts_UV.shape
    if num_units == 0:
        why = "only one rater: agreement needs two" if num_raters < 2 else "nothing was rated by two people"
        return Alpha(level, None, None, 0, 0, None, 0, why)
    coincidences_UVV = _coincidences(counts_UV)
    total_VV = coincidences_UVV.sum(axis=0)
    sizes_U = counts_UV.sum(axis=1)
    equal = float((counts_UV * (counts_UV - 1)).sum() / (sizes_U * (sizes_U - 1)).sum())
    value = float(_alpha(total_VV[None], level)[0])
    known = (num_units, int(sizes_U.sum()), equal)
    if np.isnan(value):
        return Alpha(level, None, None, *known, 0, "no variation: all ratings are equal")
    names = np.arange(num_units) if clusters is None else np.asarray(clusters)[rated_U]
    _, item_U = np.unique(names, return_inverse=True)
    items_IC = np.zeros((item_U.max() + 1, num_values**2))
    np.add.at(items_IC, item_U, coincidences_UVV.reshape(num_units, -1))
    if len(items_IC) < 2:
        return Alpha(level, value, None, *known, 0, "no interval: one item alone says nothing about others")
    [sums] = draw_sums([items_IC], draws, seed)
    drawn_D = _alpha(sums.reshape(-1, num_values, num_values), level)
    interval = percentiles(drawn_D)
    why = "" if interval else "no interval: most draws of the items have no variation"
    return Alpha(level, value, interval, *known, int(np.isnan(drawn_D).sum()), why)


def _coincidences(counts_UV: Floats) -> Floats:
    pairs_UVV = counts_UV[:, :, None] * counts_UV[:, None, :]
    diagonal = np.arange(counts_UV.shape[1])
    pairs_UVV[:, diagonal, diagonal] -= counts_UV
    weighted: Floats = pairs_UVV / (counts_UV.sum(axis=1) - 1)[:, None, None]
    return weighted


def _alpha(coincidences_DVV: Floats, level: Level) -> Floats:
    frequency_DV = coincidences_DVV.sum(axis=2)
    total_D = frequency_DV.sum(axis=1)
    distance_DVV = _squared_distances(frequency_DV, level)
    observed_D = (coincidences_DVV * distance_DVV).sum(axis=(1, 2))
    expected_D = (frequency_DV[:, :, None] * frequency_DV[:, None, :] * distance_DVV).sum(axis=(1, 2))
    # sums of weights 1/(m - 1) leave 1e-15 where a value does not occur
    varied_D = expected_D > 1e-9
    alpha_D: Floats = np.full(len(total_D), np.nan)
    alpha_D[varied_D] = 1 - (total_D[varied_D] - 1) * observed_D[varied_D] / expected_D[varied_D]
    return alpha_D


def _squared_distances(frequency_DV: Floats, level: Level) -> Floats:
    num_values = frequency_DV.shape[1]
    if level == "nominal":
        return np.broadcast_to(1 - np.eye(num_values), (len(frequency_DV), num_values, num_values))
    # ratings below the middle of each value's own block; the difference of two is what lies between them
    middle_DV = frequency_DV.cumsum(axis=1) - frequency_DV / 2
    squared: Floats = (middle_DV[:, :, None] - middle_DV[:, None, :]) ** 2
    return squared


def choice_agreement(ratings: Iterable[Rating], systems: Sequence[str], *, draws: int, seed: int) -> list[Alpha]:
    """Returns alpha over the choices: nominal over (each system's name, tie, both bad), and for two systems ordinal.

    The ordinal form orders them as first system, tie or both bad, second system. Among three systems or more the order
    would depend on which one is named first, so only the nominal form is given.
    """
    cast = votes(ratings)
    nominal = {name: i for i, name in enumerate([*systems, "tie", "both bad"])}
    results = [_over_units(cast, lambda r: nominal[r.winner or str(r.choice)], len(nominal), "nominal", draws, seed)]
    if len(systems) == 2:
        order = {systems[0]: 0, None: 1, systems[1]: 2}
        results.append(_over_units(cast, lambda r: order[r.winner], 3, "ordinal", draws, seed))
    return results


def score_agreement(ratings: Iterable[Rating], criterion: str, *, draws: int, seed: int) -> Alpha:
    """Returns ordinal alpha over the 1 to 5 ratings of one criterion; the unit is an answer of a system to an item.

    An answer that a rater saw in several pairs is rated several times; the first rating counts.
    """
    units: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for rating in ratings:
        if rating.showing == 1:
            for (name, system), score in rating.scores.items():
                if name == criterion:
                    units[rating.item, system].setdefault(rating.rater, score - SCALE.start)
    return _of_units({unit: list(given.values()) for unit, given in units.items()}, len(SCALE), "ordinal", draws, seed,
                     len({rater for given in units.values() for rater in given}))


def _over_units(cast: Sequence[Rating], value: Any, num_values: int, level: Level, draws: int, seed: int) -> Alpha:
    units: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rating in cast:
        units[rating.item, "\0".join(sorted((rating.left, rating.right)))].append(value(rating))
    return _of_units(units, num_values, level, draws, seed, len({rating.rater for rating in cast}))


def _of_units(
    units: Mapping[tuple[str, str], Sequence[int]], num_values: int, level: Level, draws: int, seed: int,
    num_raters: int,
) -> Alpha:
    order = sorted(units)
    items = {item: number for number, item in enumerate(dict.fromkeys(item for item, _ in order))}
    counts_UV = np.zeros((len(order), num_values))
    for row, unit in enumerate(order):
        for value in units[unit]:
            counts_UV[row, value] += 1
    return krippendorff_alpha(counts_UV, level, clusters=[items[item] for item, _ in order], draws=draws, seed=seed,
                              num_raters=num_raters)
