"""Bradley–Terry strengths: one number for each system such that the difference of two gives the chance of winning.

P(i beats j) = 1 / (1 + exp(s_j - s_i)) (Bradley and Terry 1952). A tie or both bad is half a win for each; votes on
one item and pair are averaged first, so that an item counts once, as in the win rate. Strengths sum to zero.

Without losses a system's likeliest strength is infinite. Every pair of the k systems therefore gets 2/k of a tie that
nobody cast, k - 1 in all: for two systems half a win each way, which is Firth's correction of the logit (Firth 1993,
"Bias reduction of maximum likelihood estimates") and moves a win rate over 100 items by at most 0.5 points. Where some
systems never lost a half to the others (Ford 1957), that prior is all that keeps the strength finite, and every
resample says the same; then no interval is given and the result says "unbounded". Where two groups of systems were
never compared it says so.

The interval is the percentile bootstrap by item. A draw's fit is Newton's method, for all draws at once.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chulengo.evaluate.human.ratings import Rating
from chulengo.evaluate.human.win_rate import value_for, votes
from chulengo.evaluate.scoring import draw_sums, percentiles

Floats = NDArray[np.float64]

VERSION = "bradley_terry/1"
DEFINITION = (
    "Bradley–Terry strengths in log-odds, summing to 0; ties and both bad are half a win each, votes on one item and "
    "pair are averaged; every pair of k systems has 2/k of a tie added. 95 % percentile bootstrap by item."
)
_MAX_STEPS = 100
_LARGEST_STEP = 2.0  # log-odds; a full Newton step can overshoot where one side wins nearly always


def bradley_terry(ratings: Iterable[Rating], systems: Sequence[str], *, draws: int = 10_000, seed: int = 0
                  ) -> dict[str, Any]:
    """Returns the strengths, their intervals and every pair's chance of winning, as a JSON-able dictionary.

    Args:
        ratings: votes on pairs of these systems.
        systems: two or more names.
        draws: bootstrap draws.
        seed: of the draws.
    """
    wins_INN = _wins_by_item(votes(ratings), systems)
    total_NN = wins_INN.sum(axis=0)
    num_systems = len(systems)
    strengths_N = fit(_with_prior(total_NN)[None])[0]
    reason = _no_interval(total_NN, systems, len(wins_INN))
    drawn_DN: Floats | None = None
    if reason is None:
        [sums] = draw_sums([wins_INN.reshape(len(wins_INN), -1)], draws, seed)
        drawn_DN = fit(_with_prior(sums.reshape(-1, num_systems, num_systems)))
    return {
        "name": "bradley_terry", "version": VERSION, "definition": DEFINITION, "num_items": len(wins_INN),
        "draws": draws if reason is None else 0, "seed": seed, "reason": reason,
        "strengths": [
            {"system": name, "strength": float(strengths_N[i]),
             "interval_95": None if drawn_DN is None else _interval(drawn_DN[:, i])}
            for i, name in enumerate(systems)
        ],
        "chances": [
            {"system": systems[i], "against": systems[j], "chance": float(_chance(strengths_N[i] - strengths_N[j])),
             "interval_95": None if drawn_DN is None else _interval(_chance(drawn_DN[:, i] - drawn_DN[:, j]))}
            for i, j in itertools.combinations(range(num_systems), 2)
        ],
    }


def fit(wins_DNN: Floats) -> Floats:
    """Returns the likeliest strengths of each matrix of wins, [draws, systems], every row summing to 0.

    Args:
        wins_DNN: [draws, systems, systems]; [d, i, j] is how often i beat j, fractions allowed. Each must be
            strongly connected (see `is_bounded`).
    """
    num_systems = wins_DNN.shape[1]
    games_DNN = wins_DNN + wins_DNN.transpose(0, 2, 1)
    won_DN = wins_DNN.sum(axis=2)
    strengths_DN = np.zeros(wins_DNN.shape[:2])
    diagonal = np.arange(num_systems)
    for _ in range(_MAX_STEPS):
        chance_DNN = _chance(strengths_DN[:, :, None] - strengths_DN[:, None, :])
        slope_DN = won_DN - (games_DNN * chance_DNN).sum(axis=2)
        curve_DNN = -games_DNN * chance_DNN * (1 - chance_DNN)
        curve_DNN[:, diagonal, diagonal] = 0
        curve_DNN[:, diagonal, diagonal] = -curve_DNN.sum(axis=2)
        # the last system is held, since only differences count; the others move relative to it
        step_DN = np.linalg.solve(curve_DNN[:, :-1, :-1], slope_DN[:, :-1, None])[..., 0]
        largest_D1 = np.abs(step_DN).max(axis=1, keepdims=True)
        step_DN = step_DN * np.minimum(1, _LARGEST_STEP / np.maximum(largest_D1, 1e-300))
        strengths_DN[:, :-1] += step_DN
        if largest_D1.max() < 1e-11:
            break
    centred_DN: Floats = strengths_DN - strengths_DN.mean(axis=1, keepdims=True)
    return centred_DN


def _interval(drawn_D: Floats) -> list[float] | None:
    bounds = percentiles(drawn_D)
    return None if bounds is None else list(bounds)


def is_bounded(wins_NN: Floats) -> bool:
    """Returns whether every system can be reached from every other by a chain of wins (Ford 1957)."""
    return bool(_reached(wins_NN > 0).all())


def _chance(difference: Floats) -> Floats:
    chance: Floats = 0.5 * (1 + np.tanh(difference / 2))  # 1 / (1 + exp(-x)) without overflow
    return chance


def _with_prior(wins: Floats) -> Floats:
    num_systems = wins.shape[-1]
    # a tie is half a win each way: 2/k of one is 1/k
    with_ties: Floats = wins + (1 - np.eye(num_systems)) / num_systems
    return with_ties


def _wins_by_item(ratings: Sequence[Rating], systems: Sequence[str]) -> Floats:
    values: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    place = {name: i for i, name in enumerate(systems)}
    for rating in ratings:
        one, other = sorted((place[rating.left], place[rating.right]))
        values[rating.item][one, other].append(value_for(rating, systems[one]))
    wins_INN = np.zeros((len(values), len(systems), len(systems)))
    for number, item in enumerate(sorted(values)):
        for (one, other), said in values[item].items():
            share = sum(said) / len(said)
            wins_INN[number, one, other], wins_INN[number, other, one] = share, 1 - share
    return wins_INN


def _no_interval(total_NN: Floats, systems: Sequence[str], num_items: int) -> str | None:
    compared = total_NN + total_NN.T > 0
    if not _reached(compared).all():
        names = [name for name, met in zip(systems, _reached(compared)[0], strict=True) if not met]
        return f"{', '.join(names)} and {systems[0]} were never compared, not even through others"
    if not is_bounded(total_NN):
        reached = _reached(total_NN > 0)
        # a system that beats its way to all others, while some never get back to it
        top = [name for i, name in enumerate(systems) if reached[i].all() and not reached[:, i].all()]
        return (f"unbounded: {', '.join(top) or 'some systems'} lost nothing to the others; the strength rests on the "
                "added tie alone")
    return "one item alone says nothing about others" if num_items < 2 else None


def _reached(edges_NN: Any) -> Any:
    reached = edges_NN | np.eye(len(edges_NN), dtype=bool)
    for _ in range(len(edges_NN)):
        reached = (reached.astype(int) @ reached.astype(int)) > 0
    return reached
