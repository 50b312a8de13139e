"""Win rates by hand, against scipy, and on simulated raters whose truth is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from chulengo.evaluate.human.ratings import Choice, Rating
from chulengo.evaluate.human.win_rate import compared_pairs, still_needed, votes_needed, win_rate
from chulengo.evaluate.results import wilson_interval
from rating_kit import rating


def rate(ratings: list[Rating]) -> dict[str, Any]:
    return win_rate(ratings, "tuned", "base")


def test_one_vote_an_item_is_wilson_as_published() -> None:
    stats = pytest.importorskip("scipy.stats")
    made: list[Choice] = ["left"] * 61 + ["right"] * 39
    result = rate([rating(n, choice) for n, choice in enumerate(made)])
    interval = stats.binomtest(61, 100).proportion_ci(method="wilson")
    for row in (result["ties_half"], result["ties_excluded"], result["over_votes"]["ties_half"]):
        assert row["value"] == 0.61
        assert row["interval_95"] == pytest.approx([interval.low, interval.high], rel=1e-12)
    assert (result["wins"], result["losses"], result["num_votes"]) == (61, 39, 100)


def test_ties_and_both_bad_by_hand() -> None:
    made: list[Choice] = ["left"] * 5 + ["right"] * 2 + ["tie"] * 2 + ["both bad"]
    result = rate([rating(n, choice) for n, choice in enumerate(made)])
    assert (result["ties"], result["both_bad"]) == (2, 1)
    assert (result["ties_half"]["value"], result["ties_half"]["n"]) == (0.65, 10)
    assert (result["ties_excluded"]["value"], result["ties_excluded"]["n"]) == (5 / 7, 7)
    assert result["ties_excluded"]["interval_95"] == list(wilson_interval(5, 7))
    low, high = result["ties_half"]["interval_95"]
    # the published formula's bounds solve (share - p)^2 = z^2 p (1 - p) / n, whatever the share is
    for bound in (low, high):
        assert (0.65 - bound) ** 2 == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / 10, rel=1e-9)


def test_votes_on_one_item_count_once() -> None:
    ratings = [rating(1, "left", "a"), rating(1, "left", "b"), rating(1, "right", "c"), rating(2, "right", "a"),
               rating(3, "tie", "a")]
    result = rate(ratings)
    assert result["ties_half"] == {**result["ties_half"], "n": 3, "value": pytest.approx((2 / 3 + 0 + 0.5) / 3)}
    assert result["ties_excluded"] == {**result["ties_excluded"], "n": 2, "value": pytest.approx((2 / 3) / 2)}
    assert result["over_votes"]["ties_half"]["value"] == 0.5
    assert result["items"] == [{"id": "1", "value": pytest.approx(2 / 3), "num_votes": 3},
                               {"id": "2", "value": 0, "num_votes": 1}, {"id": "3", "value": 0.5, "num_votes": 1}]


def test_sides_repeats_and_others_do_not_matter() -> None:
    ratings = [rating(1, "left", left="base", right="tuned"), rating(2, "right", left="base", right="tuned"),
               rating(2, "left", left="base", right="tuned", showing=2), rating(1, "left", left="tuned", right="third"),
               rating(3, None)]
    result = rate(ratings)
    assert (result["wins"], result["losses"], result["num_votes"]) == (1, 1, 2)
    assert compared_pairs(ratings, ["base", "third", "tuned"]) == [("base", "tuned"), ("third", "tuned")]


def test_nothing_but_ties() -> None:
    result = rate([rating(n, "tie") for n in range(4)])
    assert result["ties_half"]["value"] == 0.5
    assert result["ties_excluded"] == {"value": None, "interval_95": None, "n": 0, "reason": "no decisive votes"}
    assert [row["needed"] for row in result["still_needed"]["rows"]] == [194, 783, None]


def test_published_numbers_of_votes() -> None:
    assert votes_needed(0.6) == votes_needed(0.4) == 194
    assert votes_needed(0.55) == 783
    assert votes_needed(0.5) is None


@pytest.mark.parametrize("share", [0.55, 0.6, 0.7])
def test_so_many_votes_find_the_share_four_times_in_five(share: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    needed = votes_needed(share)
    assert needed is not None

    def power(n: int) -> float:
        wins = np.arange(n + 1)
        found = np.abs(wins / n - 0.5) > stats.norm.ppf(0.975) * 0.5 / math.sqrt(n)
        return float(stats.binom.pmf(wins, n, share)[found].sum())

    # whole votes make the power jump by some per cent from one n to the next
    assert np.mean([power(n) for n in range(needed - 10, needed + 11)]) == pytest.approx(0.8, abs=0.015)


def test_votes_still_needed() -> None:
    result = still_needed([1.0] * 60 + [0.0] * 40, num_votes=150, num_decisive=100)
    assert result["have"] == 100
    rows = {row["if_true_share"]: row for row in result["rows"]}
    assert (rows["60:40"]["more"], rows["60:40"]["more_with_ties"]) == (94, 141)
    assert (rows["as seen"]["share"], rows["as seen"]["needed"]) == (0.6, 194)
    assert still_needed([1.0] * 900 + [0.0] * 100, 1000, 1000)["rows"][0]["more"] == 0


def simulated(rng: np.random.Generator, num_items: int, tie: float) -> list[Rating]:
    """Items differ in how clear they are; a fifth is rated by three people, who therefore vote alike."""
    chance = rng.beta(1.2, 0.8, size=num_items)  # mean 0.6
    ratings = []
    for item in range(num_items):
        for rater in "abc" if item % 5 == 0 else "a":
            choice: Choice = "tie" if rng.random() < tie else "left" if rng.random() < chance[item] else "right"
            ratings.append(rating(item, choice, rater))
    return ratings


@pytest.mark.parametrize(("tie", "truth_half"), [(0.0, 0.6), (0.3, 0.57)])
def test_the_interval_holds_the_truth(tie: float, truth_half: float) -> None:
    rng = np.random.default_rng(0)
    num_studies = 300
    half = excluded = 0
    for _ in range(num_studies):
        result = rate(simulated(rng, 100, tie))
        low, high = result["ties_half"]["interval_95"]
        half += low <= truth_half <= high
        low, high = result["ties_excluded"]["interval_95"]
        excluded += low <= 0.6 <= high
    # 95 % or a little more; four standard deviations of 300 studies are 5 points. Ties make the first one wider
    assert half / num_studies > 0.91
    assert 0.90 < excluded / num_studies < 0.995


def test_counting_every_vote_as_an_item_would_be_too_narrow() -> None:
    rng = np.random.default_rng(1)
    by_item = over_votes = 0
    for _ in range(150):
        ratings = [rating(item, "left" if clear else "right", rater)
                   for item, clear in enumerate(rng.random(50) < 0.6) for rater in "abc"]
        result = rate(ratings)
        by_item += result["ties_half"]["interval_95"][0] <= 0.6 <= result["ties_half"]["interval_95"][1]
        votes = result["over_votes"]["ties_half"]["interval_95"]
        over_votes += votes[0] <= 0.6 <= votes[1]
    # 95 % and, with a third of the variance that there is, 74 %
    assert by_item / 150 > 0.87
    assert over_votes / 150 < 0.87
