"""How often one system is preferred to another, with Wilson's interval, and how many votes would settle it.

The unit is the item, not the vote: votes of several people on one item are averaged to one value between 0 and 1 (win
1, tie or both bad ½, loss 0) and items count equally. Three votes on one answer are not three answers.

Wilson's interval is made for whole successes. Here the successes are the *sum of the items' values* and the trials the
*number of items*. A variable that lies in [0, 1] and has the mean p varies by at most p(1 - p), the variance of a coin;
so with ties as halves, or with averaged votes, the interval is at least as wide as it must be, the more so the more
ties there are. With ties left out, items without a decisive vote drop out, and each other item's value is the share of
its decisive votes; where every item has one vote this is Wilson's interval as published.

`over_votes` gives the same rates with every vote as a trial of its own, as most tools do. Where raters overlap it is
too narrow.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

from chulengo.evaluate.human.ratings import Rating
from chulengo.evaluate.results import wilson_interval

VERSION = "win_rate/1"
DEFINITION = (
    "Mean over items of the item's mean vote (win 1, tie or both bad 0.5, loss 0); ties excluded: of the item's "
    "decisive votes only. Wilson score interval, 95 %, with the sum of the items' values as successes and the number "
    "of items as trials. Hidden repeats are not counted."
)


def votes(ratings: Iterable[Rating]) -> list[Rating]:
    """Returns the ratings that are votes: a choice was made, and it is not a hidden repeat."""
    return [rating for rating in ratings if rating.choice is not None and rating.showing == 1]


def value_for(rating: Rating, system: str) -> float:
    """Returns 1 where the system was chosen, 0 where the other was, ½ for a tie or both bad."""
    return 0.5 if rating.winner is None else float(rating.winner == system)


def compared_pairs(ratings: Iterable[Rating], systems: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the pairs of systems with votes, the earlier system of `systems` first."""
    seen = {frozenset((rating.left, rating.right)) for rating in votes(ratings)}
    return [pair for pair in itertools.combinations(systems, 2) if frozenset(pair) in seen]


def win_rate(ratings: Iterable[Rating], system: str, other: str) -> dict[str, Any]:
    """Returns how often `system` was preferred to `other`, as a JSON-able dictionary.

    Args:
        ratings: of any systems; those of this pair are taken.
        system: whose wins are counted.
        other: the one it is compared with.
    """
    pair = [rating for rating in votes(ratings) if {rating.left, rating.right} == {system, other}]
    decisive = [rating for rating in pair if rating.winner is not None]
    counts = Counter("win" if r.winner == system else "loss" if r.winner else str(r.choice) for r in pair)
    return {
        "name": "win_rate", "version": VERSION, "definition": DEFINITION, "system": system, "against": other,
        "num_votes": len(pair), "wins": counts["win"], "losses": counts["loss"], "ties": counts["tie"],
        "both_bad": counts["both bad"],
        "ties_half": _rate(_by_item(pair, system)),
        "ties_excluded": _rate(_by_item(decisive, system)),
        "over_votes": {
            "ties_half": _rate([value_for(rating, system) for rating in pair]),
            "ties_excluded": _rate([value_for(rating, system) for rating in decisive]),
        },
        "still_needed": still_needed(_by_item(decisive, system), len(pair), len(decisive)),
        "items": [{"id": item, "value": _mean(values), "num_votes": len(values)}
                  for item, values in _values(pair, system).items()],
    }


def _values(ratings: Iterable[Rating], system: str) -> dict[str, list[float]]:
    values: dict[str, list[float]] = defaultdict(list)
    for rating in sorted(ratings, key=lambda rating: rating.place):
        values[rating.item].append(value_for(rating, system))
    return dict(sorted(values.items()))


def _by_item(ratings: Iterable[Rating], system: str) -> list[float]:
    return [_mean(values) for values in _values(ratings, system).values()]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _rate(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {"value": None, "interval_95": None, "n": 0, "reason": "no decisive votes"}
    wins = min(math.fsum(values), float(len(values)))
    # Wilson's formula takes halves as well as whole wins; see the top of this file
    low, high = wilson_interval(wins, len(values))
    return {"value": wins / len(values), "interval_95": [low, high], "n": len(values)}


def votes_needed(share: float, *, significance: float = 0.05, power: float = 0.8) -> int | None:
    """Returns how many decisive votes, each on an item of its own, tell this share from one half.

    n = ((z₁ √(½·½) + z₂ √(p(1-p))) / |p - ½|)², with z₁ the two-sided quantile of the significance and z₂ the
    quantile of the power (Fleiss, Levin and Paik 2003, "Statistical Methods for Rates and Proportions", eq. 2.7,
    without the continuity correction). 0.6 needs 194, 0.55 needs 783.

    Args:
        share: the true share of decisive votes that one system would win.
        significance: of the two-sided test against one half.
        power: chance of finding it.

    Returns:
        The number, rounded up; None at one half, where no number is enough.
    """
    if share == 0.5:
        return None
    normal = NormalDist()
    at_half = normal.inv_cdf(1 - significance / 2) * 0.5
    at_share = normal.inv_cdf(power) * math.sqrt(share * (1 - share))
    return math.ceil(((at_half + at_share) / abs(share - 0.5)) ** 2 - 1e-9)


def still_needed(decisive_values: Sequence[float], num_votes: int, num_decisive: int) -> dict[str, Any]:
    """Returns how many votes are still to be collected, if the true share is 60:40, 55:45, or as seen.

    Args:
        decisive_values: of every item with a decisive vote.
        num_votes: ties included.
        num_decisive: those of them that chose a system.
    """
    have = len(decisive_values)
    shares: Mapping[str, float | None] = {
        "60:40": 0.6, "55:45": 0.55, "as seen": math.fsum(decisive_values) / have if have else None,
    }
    rows = []
    for name, share in shares.items():
        needed = None if share is None else votes_needed(share)
        more = None if needed is None else max(0, needed - have)
        with_ties = None if more is None or not num_decisive else math.ceil(more * num_votes / num_decisive)
        rows.append({"if_true_share": name, "share": share, "needed": needed, "more": more,
                     "more_with_ties": with_ties})
    return {
        "definition": "Decisive votes on items of their own that tell the share from one half: two-sided 5 %, power "
                      "80 %, normal approximation. more_with_ties: votes to collect if ties stay as frequent as seen.",
        "have": have, "rows": rows,
    }
