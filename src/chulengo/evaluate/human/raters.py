"""What the ratings say about the raters: how many they gave, a liking for one side, and whether they repeat themselves.

Position bias: sides are fair coins of their own for every rater and item, so a person who judges by content alone
chooses the left answer with chance one half each time, independently, however good the systems are and however much
raters agree. The number of left choices is then binomial, and the two-sided test is exact. Hidden repeats are left
out: their sides are the first showing's swapped, not a new coin. Ratings from elsewhere may have had one system on one
side; then the test would measure that system, and it is not given.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from chulengo.evaluate.comparison import mcnemar_exact
from chulengo.evaluate.human.ratings import Rating
from chulengo.evaluate.human.win_rate import votes
from chulengo.evaluate.results import wilson_interval

BIAS_VERSION, CONSISTENCY_VERSION = "position_bias/1", "self_consistency/1"
_COIN_DOUBT = 0.005  # sides this unlikely under fair coins were not dealt by coins


def binomial_test_half(successes: int, trials: int) -> float:
    """Returns the exact two-sided p-value of so many successes when each has the chance one half."""
    # McNemar's exact test is this one, of the items that only one side has right
    return mcnemar_exact(successes, trials - successes)


def position_bias(ratings: Iterable[Rating], *, sides_by_coin: bool = False) -> dict[str, Any]:
    """Returns how often the left answer was chosen, the exact test against one half, and the same for every rater.

    Args:
        ratings: votes are taken.
        sides_by_coin: it is known that the sides were dealt by fair coins (sheets); else it is looked at.
    """
    cast = votes(ratings)
    result = {
        "name": "position_bias", "version": BIAS_VERSION,
        "definition": "Left choices among decisive votes; exact two-sided binomial test against one half; Wilson "
                      "interval. Hidden repeats are not counted.",
        **_left(cast), "reason": "" if sides_by_coin else _sides_not_dealt(cast),
        "by_rater": {rater: _left([r for r in cast if r.rater == rater]) for rater in sorted({r.rater for r in cast})},
    }
    if result["reason"]:
        return result | {"p_value": None, "by_rater": {}}
    return result


def _left(cast: Sequence[Rating]) -> dict[str, Any]:
    decisive = [rating for rating in cast if rating.winner is not None]
    left = sum(rating.choice == "left" for rating in decisive)
    if not decisive:
        return {"left": 0, "n": 0, "share": None, "interval_95": None, "p_value": None}
    return {"left": left, "n": len(decisive), "share": left / len(decisive),
            "interval_95": list(wilson_interval(left, len(decisive))),
            "p_value": binomial_test_half(left, len(decisive))}


def _sides_not_dealt(cast: Sequence[Rating]) -> str:
    sides: dict[frozenset[str], Counter[str]] = defaultdict(Counter)
    for rating in cast:
        sides[frozenset((rating.left, rating.right))][rating.left] += 1
    for counts in sides.values():
        name, times = counts.most_common(1)[0]
        if binomial_test_half(times, counts.total()) < _COIN_DOUBT:
            return (f"{name} was on the left {times} of {counts.total()} times, so a liking for it and for the left "
                    "cannot be told apart")
    return ""


def self_consistency(ratings: Iterable[Rating]) -> dict[str, Any]:
    """Returns how often a rater said the same of a pair that came back with its sides swapped, in all and by rater."""
    shown: dict[tuple[Any, ...], dict[int, Rating]] = defaultdict(dict)
    for rating in ratings:
        shown[rating.place[:3]][rating.showing] = rating
    twice = [(both[1], both[2]) for both in shown.values() if len(both) == 2]
    chosen = [(first, again) for first, again in twice if first.choice is not None and again.choice is not None]
    return {
        "name": "self_consistency", "version": CONSISTENCY_VERSION,
        "definition": "Hidden repeats with the same choice (the same system, tie, or both bad) as at first; Wilson "
                      "interval. changed_system: decisive both times, for another system, so the same side was chosen.",
        **_consistent(chosen),
        "by_rater": {
            rater: _consistent([pair for pair in chosen if pair[0].rater == rater])
            for rater in sorted({first.rater for first, _ in chosen})
        },
        "scores": _score_consistency(twice),
    }


def _consistent(pairs: Sequence[tuple[Rating, Rating]]) -> dict[str, Any]:
    same = sum(_said(first) == _said(again) for first, again in pairs)
    changed = sum(bool(first.winner and again.winner and first.winner != again.winner) for first, again in pairs)
    if not pairs:
        return {"same": 0, "n": 0, "share": None, "interval_95": None, "changed_system": 0}
    return {"same": same, "n": len(pairs), "share": same / len(pairs),
            "interval_95": list(wilson_interval(same, len(pairs))), "changed_system": changed}


def _said(rating: Rating) -> str | None:
    return rating.winner or rating.choice


def _score_consistency(twice: Sequence[tuple[Rating, Rating]]) -> dict[str, Any]:
    steps: dict[str, list[int]] = defaultdict(list)
    for first, again in twice:
        for place, score in first.scores.items():
            if place in again.scores:
                steps[place[0]].append(abs(score - again.scores[place]))
    return {
        name: {"n": len(found), "same": found.count(0), "mean_difference": sum(found) / len(found)}
        for name, found in sorted(steps.items())
    }


def rater_counts(ratings: Iterable[Rating], missing: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Returns for every rater how many rows were rated, repeats among them, each kind of choice, and rows missing.

    Args:
        ratings: of all raters.
        missing: rater -> rows of the sheet that were not rated; raters that are not in it have no sheet.
    """
    by_rater: dict[str, list[Rating]] = {rater: [] for rater in missing}
    for rating in ratings:
        by_rater.setdefault(rating.rater, []).append(rating)
    counts = {}
    for rater, own in by_rater.items():
        choices = Counter(rating.choice for rating in own if rating.showing == 1)
        counts[rater] = {
            "rated": len(own), "repeats": sum(rating.showing == 2 for rating in own),
            "left": choices["left"], "right": choices["right"], "tie": choices["tie"],
            "both_bad": choices["both bad"],
            **({"missing": missing[rater]} if rater in missing else {}),
        }
    return counts
