"""Ratings from 1 to 5: means of systems and their differences, by item.

An item's value is the mean of its ratings, and items count equally, as in the win rate. A mean of 1 to 5 takes the
steps as equally wide; nobody knows whether they are, so the distribution stands beside it. The difference of two
systems is taken on the items where both were rated, and its interval from the paired bootstrap by item.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from chulengo.evaluate.human.agreement import score_agreement
from chulengo.evaluate.human.ratings import SCALE, Rating
from chulengo.evaluate.scoring import draw_sums, percentiles

VERSION = "criterion_mean/1"
DEFINITION = (
    "Mean over items of the item's mean rating, 1 (worst) to 5 (best); differences on items where both systems were "
    "rated; 95 % percentile bootstrap by item. Hidden repeats are not counted."
)


def criterion_names(ratings: Iterable[Rating]) -> list[str]:
    """Returns the criteria that occur."""
    return sorted({name for rating in ratings for name, _ in rating.scores})


def criterion(ratings: Sequence[Rating], name: str, systems: Sequence[str], *, draws: int, seed: int) -> dict[str, Any]:
    """Returns means, differences, distributions and agreement of one criterion, as a JSON-able dictionary."""
    scores: dict[str, dict[str, list[int]]] = {system: defaultdict(list) for system in systems}
    for rating in ratings:
        if rating.showing == 1:
            for (criterion_, system), score in rating.scores.items():
                if criterion_ == name:
                    scores[system][rating.item].append(score)
    means = {system: {item: sum(given) / len(given) for item, given in sorted(items.items())}
             for system, items in scores.items()}
    rows = []
    for system in systems:
        counts = Counter(score for given in scores[system].values() for score in given)
        rows.append({
            "system": system, **_mean(list(means[system].values()), draws, seed), "num_ratings": counts.total(),
            "distribution": {str(score): counts[score] for score in SCALE},
        })
    differences = []
    for one, other in itertools.combinations(systems, 2):
        shared = [item for item in means[one] if item in means[other]]
        differences.append({"system": one, "minus": other,
                            **_mean([means[one][item] - means[other][item] for item in shared], draws, seed)})
    return {
        "name": name, "version": VERSION, "definition": DEFINITION, "systems": rows, "differences": differences,
        "agreement": score_agreement(ratings, name, draws=draws, seed=seed).to_dict(),
    }


def _mean(values: Sequence[float], draws: int, seed: int) -> dict[str, Any]:
    if not values:
        return {"mean": None, "interval_95": None, "num_items": 0}
    column = np.array(values, dtype=np.float64)[:, None]
    [sums] = draw_sums([column], draws, seed)
    bounds = percentiles(sums[:, 0] / len(values))  # None for one item alone
    return {"mean": float(column.mean()), "interval_95": None if bounds is None else list(bounds),
            "num_items": len(values)}
