"""What the ratings say about the raters."""

from __future__ import annotations

import numpy as np
import pytest

from chulengo.evaluate.human.raters import binomial_test_half, position_bias, rater_counts, self_consistency
from chulengo.evaluate.human.ratings import Choice, Rating
from rating_kit import rating


def dealt(rng: np.random.Generator, count: int, *, likes_tuned: float, likes_left: float = 0.0, rater: str = "anna"
          ) -> list[Rating]:
    ratings = []
    for item in range(count):
        left, right = ("tuned", "base") if rng.random() < 0.5 else ("base", "tuned")
        chosen = "tuned" if rng.random() < likes_tuned else "base"
        by_side = rng.random() < likes_left
        ratings.append(rating(item, "left" if by_side or left == chosen else "right", rater, left, right))
    return ratings


@pytest.mark.parametrize("trials", [1, 2, 7, 100, 1001])
def test_binomial_test_against_scipy(trials: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    for successes in {0, 1, trials // 3, trials // 2, trials // 2 + 1, trials - 1, trials} - {-1}:
        if successes <= trials:
            expected = stats.binomtest(successes, trials).pvalue
            assert binomial_test_half(successes, trials) == pytest.approx(expected, rel=1e-9)


def test_binomial_test_by_hand() -> None:
    assert binomial_test_half(9, 10) == pytest.approx(2 * 11 / 1024)
    assert binomial_test_half(5, 10) == 1
    assert binomial_test_half(0, 2_000) == 0 or binomial_test_half(0, 2_000) < 1e-300


def test_a_liking_for_the_left_is_found_and_one_for_a_system_is_not() -> None:
    rng = np.random.default_rng(0)
    content = position_bias(dealt(rng, 300, likes_tuned=0.95))
    assert content["p_value"] > 0.05
    sided = position_bias(dealt(rng, 300, likes_tuned=0.6, likes_left=0.3))
    assert sided["p_value"] < 0.001
    assert sided["share"] > 0.5


def test_by_rater() -> None:
    rng = np.random.default_rng(1)
    both = dealt(rng, 200, likes_tuned=0.6) + dealt(rng, 200, likes_tuned=0.6, likes_left=0.5, rater="ben")
    found = position_bias(both)["by_rater"]
    assert found["anna"]["p_value"] > 0.01
    assert found["ben"]["p_value"] < 1e-6


def test_no_bias_is_found_one_time_in_twenty_at_most_however_alike_raters_vote() -> None:
    rng = np.random.default_rng(2)
    found = 0
    for _ in range(400):
        likes = 0.5 + 0.5 * rng.random()  # the same for all three
        ratings = [r for rater in "abc" for r in dealt(rng, 30, likes_tuned=likes, rater=rater)]
        found += position_bias(ratings, sides_by_coin=True)["p_value"] < 0.05
    # exact: 3.4 % for 90 coins; four standard deviations of 400 studies are 4 points
    assert found / 400 < 0.075


def test_ties_and_repeats_are_left_out() -> None:
    ratings = [rating(1, "tie"), rating(2, "both bad"), rating(3, "left"), rating(3, "left", showing=2)]
    assert (position_bias(ratings)["n"], position_bias(ratings)["left"]) == (1, 1)
    nothing = position_bias([rating(1, "tie")])
    assert (nothing["n"], nothing["p_value"]) == (0, None)


def test_sides_that_no_coin_dealt() -> None:
    ratings = [rating(n, "left") for n in range(20)]
    result = position_bias(ratings)
    assert result["p_value"] is None
    assert result["reason"] == (
        "tuned was on the left 20 of 20 times, so a liking for it and for the left cannot be told apart")
    assert position_bias(ratings, sides_by_coin=True)["p_value"] < 0.001


def again(item: int, first: Choice, second: Choice, rater: str = "anna") -> list[Rating]:
    return [rating(item, first, rater, "tuned", "base"), rating(item, second, rater, "base", "tuned", showing=2)]


def test_self_consistency_by_hand() -> None:
    ratings = [*again(1, "left", "right"), *again(2, "left", "left"), *again(3, "tie", "tie"),
               *again(4, "tie", "both bad"), *again(5, "right", "tie"), *again(6, "right", "left", "ben"),
               rating(7, "left"), rating(8, "left", showing=2)]
    result = self_consistency(ratings)
    assert (result["same"], result["n"], result["changed_system"]) == (3, 6, 1)
    assert result["by_rater"]["anna"]["n"] == 5
    assert result["by_rater"]["ben"]["share"] == 1
    assert self_consistency([rating(1, "left")])["n"] == 0


def test_scores_of_repeats() -> None:
    first = rating(1, None, scores={("helpful", "tuned"): 4, ("helpful", "base"): 2})
    second = rating(1, None, left="base", right="tuned", showing=2,
                    scores={("helpful", "tuned"): 4, ("helpful", "base"): 5, ("short", "base"): 1})
    assert self_consistency([first, second])["scores"] == {"helpful": {"n": 2, "same": 1, "mean_difference": 1.5}}


def test_counts() -> None:
    ratings = [*again(1, "left", "right"), rating(2, "tie"), rating(3, "both bad", "ben")]
    assert rater_counts(ratings, {"anna": 4, "carla": 9}) == {
        "anna": {"rated": 3, "repeats": 1, "left": 1, "right": 0, "tie": 1, "both_bad": 0, "missing": 4},
        "carla": {"rated": 0, "repeats": 0, "left": 0, "right": 0, "tie": 0, "both_bad": 0, "missing": 9},
        "ben": {"rated": 1, "repeats": 0, "left": 0, "right": 0, "tie": 0, "both_bad": 1},
    }
