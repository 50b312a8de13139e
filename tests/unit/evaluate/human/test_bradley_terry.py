"""Bradley–Terry against published estimates, closed forms, scipy and simulated systems."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from chulengo.evaluate.human.bradley_terry import bradley_terry, fit, is_bounded
from chulengo.evaluate.human.ratings import Choice, Rating
from rating_kit import rating


def strengths(result: dict[str, Any]) -> dict[str, float]:
    return {row["system"]: row["strength"] for row in result["strengths"]}


def test_published_journal_citations() -> None:
    """Stigler's (1994) table of who cites whom; the estimates are those of Turner and Firth's BradleyTerry2 (2012)."""
    names = ["Biometrika", "Comm Statist", "JASA", "JRSS-B"]
    wins = np.zeros((4, 4))
    for i, j, one, other in [(0, 1, 730, 33), (0, 2, 498, 320), (0, 3, 221, 284), (1, 2, 68, 813), (1, 3, 17, 276),
                             (2, 3, 142, 325)]:
        wins[i, j], wins[j, i] = one, other
    found = fit(wins[None])[0]
    against_biometrika = dict(zip(names, found - found[0], strict=True))
    assert {name: round(float(value), 4) for name, value in against_biometrika.items()} == {
        "Biometrika": 0.0, "Comm Statist": -2.9491, "JASA": -0.4796, "JRSS-B": 0.2690}


def test_two_systems_have_a_closed_form() -> None:
    choices: list[Choice] = ["left"] * 30 + ["right"] * 9 + ["tie"] * 10 + ["both bad"]
    result = bradley_terry([rating(n, choice) for n, choice in enumerate(choices)], ["tuned", "base"], draws=500)
    # half a win is added each way; strengths sum to zero
    difference = math.log((35.5 + 0.5) / (14.5 + 0.5))
    assert strengths(result) == pytest.approx({"tuned": difference / 2, "base": -difference / 2}, abs=1e-12)
    assert result["chances"][0]["chance"] == pytest.approx(36 / 51, abs=1e-12)
    low, high = result["chances"][0]["interval_95"]
    assert low < 36 / 51 < high


def test_random_matrices_against_scipy() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(3)
    for size in (2, 3, 5):
        wins = rng.uniform(0.2, 20, (size, size)) * (1 - np.eye(size))

        def loss(strength: Any, wins: Any = wins) -> float:
            difference = strength[:, None] - strength[None, :]
            return float((wins * np.logaddexp(0, -difference)).sum())

        best = optimize.minimize(loss, np.zeros(size), method="BFGS", options={"gtol": 1e-9}).x
        np.testing.assert_allclose(fit(wins[None])[0], best - best.mean(), atol=1e-6)


def test_extreme_matrices_converge() -> None:
    wins = np.array([[0, 1e4, 1e4], [1e-3, 0, 5], [1e-3, 1e-3, 0]])
    found = fit(wins[None])[0]
    chance = 1 / (1 + np.exp(found[None, :] - found[:, None]))
    games = wins + wins.T
    # the likelihood equations: as many wins as expected
    np.testing.assert_allclose((games * chance).sum(1) - np.diag(games) / 2, wins.sum(1), rtol=1e-6)


def simulated(rng: np.random.Generator, truth: dict[str, float], num_items: int) -> list[Rating]:
    names = list(truth)
    ratings = []
    for item in range(num_items):
        for i, one in enumerate(names):
            for other in names[i + 1 :]:
                wins = rng.random() < 1 / (1 + math.exp(truth[other] - truth[one]))
                ratings.append(rating(item, "left" if wins else "right", left=one, right=other))
    return ratings


def test_the_order_of_systems_and_files_changes_nothing() -> None:
    ratings = simulated(np.random.default_rng(0), {"a": 0.5, "b": 0.0, "c": -0.5}, 30)
    one = bradley_terry(ratings, ["a", "b", "c"], draws=300)
    assert bradley_terry(ratings[::-1], ["a", "b", "c"], draws=300) == one
    assert strengths(bradley_terry(ratings, ["c", "a", "b"], draws=300)) == pytest.approx(strengths(one), abs=1e-9)


def test_a_system_that_never_lost_is_unbounded() -> None:
    result = bradley_terry([rating(n, "left") for n in range(20)], ["tuned", "base"])
    assert result["reason"].startswith("unbounded: tuned lost nothing")
    assert result["strengths"][0]["interval_95"] is None
    assert strengths(result)["tuned"] == pytest.approx(math.log(20.5 / 0.5) / 2)
    one_tie = [*(rating(n, "left") for n in range(20)), rating(20, "tie")]
    assert bradley_terry(one_tie, ["tuned", "base"], draws=100)["reason"] is None


def test_groups_that_never_met() -> None:
    ratings = [rating(n, "left" if n % 2 else "right", left=a, right=b)
               for n in range(8) for a, b in (("a", "b"), ("c", "d"))]
    result = bradley_terry(ratings, ["a", "b", "c", "d"])
    assert result["reason"] == "c, d and a were never compared, not even through others"
    assert result["chances"][0]["interval_95"] is None


def test_one_item_gives_no_interval() -> None:
    ratings = [rating(1, "left", "x"), rating(1, "right", "y")]
    assert "one item alone" in bradley_terry(ratings, ["tuned", "base"])["reason"]


def test_bounded_means_a_chain_of_wins_both_ways() -> None:
    circle = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    assert is_bounded(circle)
    assert not is_bounded(np.triu(np.ones((3, 3)), 1))


def test_the_same_seed_gives_the_same_interval() -> None:
    ratings = simulated(np.random.default_rng(5), {"a": 0.2, "b": -0.2}, 40)
    one, two, three = (bradley_terry(ratings, ["a", "b"], draws=300, seed=seed) for seed in (0, 0, 1))
    assert one == two != three


def test_the_interval_holds_the_truth() -> None:
    truth = {"a": 0.6, "b": 0.1, "c": -0.7}
    rng = np.random.default_rng(7)
    held = []
    for number in range(120):
        result = bradley_terry(simulated(rng, truth, 60), list(truth), draws=500, seed=number)
        held += [row["interval_95"][0] <= truth[row["system"]] <= row["interval_95"][1] for row in result["strengths"]]
    # 360 intervals, in threes that go together: four standard deviations are at most 8 points
    assert 0.87 < np.mean(held) < 0.99
