"""Krippendorff's alpha against his own examples, a second implementation, and simulated raters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from chulengo.evaluate.human.agreement import Level, choice_agreement, krippendorff_alpha, score_agreement
from chulengo.evaluate.human.ratings import Choice
from rating_kit import rating

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", part C: four observers, twelve units
TWELVE = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
# the example of three coders and fifteen units that the encyclopaedias carry
FIFTEEN = [".....34121133.3", "1.2133" "43.......", "..21344.21133.4"]


def counts(table: Sequence[str], num_values: int) -> Any:
    return np.array([[sum(row[unit] == str(value + 1) for row in table) for value in range(num_values)]
                     for unit in range(len(table[0]))], dtype=float)


def alpha(table: Sequence[str], level: Level, num_values: int) -> float | None:
    return krippendorff_alpha(counts(table, num_values), level, draws=100).value


def test_krippendorffs_own_example() -> None:
    assert {len(row) for row in TWELVE} == {12}
    assert alpha(TWELVE, "nominal", 5) == pytest.approx(0.743, abs=0.0005)
    assert alpha(TWELVE, "ordinal", 5) == pytest.approx(0.815, abs=0.0005)


def test_the_example_with_three_coders() -> None:
    assert {len(row) for row in FIFTEEN} == {15}
    assert alpha(FIFTEEN, "nominal", 4) == pytest.approx(0.691358, abs=5e-7)
    assert alpha(FIFTEEN, "ordinal", 4) == pytest.approx(0.807, abs=0.0005)


def by_pairs(table: Any, level: Level) -> float:
    """Alpha from pairs of ratings, one by one, without a matrix of coincidences."""
    units = [[value for value in column if value >= 0] for column in table.T]
    units = [unit for unit in units if len(unit) > 1]
    every = [value for unit in units for value in unit]

    def distance(one: int, other: int) -> float:
        if level == "nominal":
            return float(one != other)
        low, high = sorted((one, other))
        between = sum(low <= value <= high for value in every)
        return (between - (every.count(low) + every.count(high)) / 2) ** 2 if one != other else 0.0

    observed = sum(sum(distance(a, b) for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in units)
    expected = sum(distance(a, b) for a, b in itertools.permutations(every, 2)) / (len(every) - 1)
    return 1 - observed / expected


def random_table(rng: np.random.Generator, num_raters: int, num_units: int, num_values: int) -> Any:
    truth = rng.integers(num_values, size=num_units)
    noise = rng.integers(num_values, size=(num_raters, num_units))
    table = np.where(rng.random(noise.shape) < 0.6, truth, noise)
    return np.where(rng.random(table.shape) < 0.3, -1, table)


def value_counts(table: Any, num_values: int) -> Any:
    return np.stack([(table == value).sum(axis=0) for value in range(num_values)], axis=1).astype(float)


@pytest.mark.parametrize("level", ["nominal", "ordinal"])
def test_random_ratings_by_pairs(level: Level) -> None:
    rng = np.random.default_rng(2)
    for num_raters, num_units, num_values in [(2, 10, 2), (3, 12, 3), (5, 8, 5)]:
        for _ in range(5):
            table = random_table(rng, num_raters, num_units, num_values)
            found = krippendorff_alpha(value_counts(table, num_values), level, draws=100)
            assert found.value == pytest.approx(by_pairs(table, level), abs=1e-12)


@pytest.mark.parametrize("level", ["nominal", "ordinal"])
def test_random_ratings_against_the_krippendorff_package(level: Level) -> None:
    package = pytest.importorskip("krippendorff")
    rng = np.random.default_rng(4)
    for _ in range(50):
        table = random_table(rng, 4, 25, 5)
        expected = package.alpha(np.where(table < 0, np.nan, table), level_of_measurement=level,
                                 value_domain=list(range(5)))
        assert krippendorff_alpha(value_counts(table, 5), level, draws=100).value == pytest.approx(expected, abs=1e-12)


def test_perfect_and_opposite() -> None:
    assert krippendorff_alpha(np.array([[2.0, 0], [0, 2]]), "nominal").value == 1
    # observed 1, expected 4·4·2 / (8·7): alpha = 1 - 7/4
    opposite = krippendorff_alpha(np.ones((4, 2)), "nominal")
    assert opposite.value == pytest.approx(1 - 7 / 4)
    assert opposite.equal_pairs == 0


def test_equal_ratings_have_no_variation() -> None:
    result = krippendorff_alpha(np.array([[3.0, 0, 0]] * 5), "nominal")
    assert (result.value, result.interval_95) == (None, None)
    assert result.reason == "no variation: all ratings are equal"
    assert (result.num_units, result.num_ratings, result.equal_pairs) == (5, 15, 1.0)


def test_too_few_raters_or_items() -> None:
    single = np.array([[1.0, 0], [0, 1]])
    assert krippendorff_alpha(single, "nominal", num_raters=1).reason == "only one rater: agreement needs two"
    assert krippendorff_alpha(single, "nominal").reason == "nothing was rated by two people"
    one_unit = krippendorff_alpha(np.array([[1.0, 1]]), "nominal")
    assert one_unit.value == 0
    assert one_unit.interval_95 is None
    assert "one item alone" in one_unit.reason


def test_draws_without_variation_are_counted() -> None:
    result = krippendorff_alpha(np.array([[2.0, 0], [2, 0], [0, 2]]), "nominal", draws=2000)
    # three draws of the first two units: (2/3)^3, and three of the last: (1/3)^3
    assert result.num_undefined_draws / 2000 == pytest.approx(9 / 27, abs=0.04)


def test_choices_are_compared_by_system_not_by_side() -> None:
    ratings = []
    for item in range(6):
        choice: Choice = "left" if item % 2 else "right"
        ratings += [rating(item, choice, "anna"), rating(item, "right" if item % 2 else "left", "ben", "base", "tuned")]
    nominal, ordinal = choice_agreement(ratings, ["tuned", "base"], draws=100, seed=0)
    assert (nominal.level, nominal.value, ordinal.level, ordinal.value) == ("nominal", 1.0, "ordinal", 1.0)


def test_both_bad_is_another_choice_but_no_other_order() -> None:
    ratings = [rating(n, "left", rater) for n in range(4) for rater in "ab"]
    ratings += [rating(9, "tie", "a"), rating(9, "both bad", "b")]
    nominal, ordinal = choice_agreement(ratings, ["tuned", "base"], draws=100, seed=0)
    assert nominal.value is not None
    assert nominal.value < 1
    assert ordinal.value == 1


def test_repeats_are_not_other_raters() -> None:
    ratings = [rating(n, "left") for n in range(4)] + [rating(n, "right", showing=2) for n in range(4)]
    nominal, _ = choice_agreement(ratings, ["tuned", "base"], draws=100, seed=0)
    assert nominal.reason == "only one rater: agreement needs two"


def test_scores_of_one_answer_are_a_unit() -> None:
    ratings = [
        rating(item, None, rater, scores={("helpful", "tuned"): 1 + item, ("helpful", "base"): 5 - item})
        for item in range(5) for rater in "ab"
    ]
    result = score_agreement(ratings, "helpful", draws=100, seed=0)
    assert (result.value, result.num_units, result.level) == (1.0, 10, "ordinal")


def test_the_interval_holds_the_truth() -> None:
    rng = np.random.default_rng(11)

    def votes_of_three(num_items: int) -> Any:
        truth = rng.random(num_items) < 0.6
        table = np.where(rng.random((3, num_items)) < 0.8, truth, ~truth).astype(int)
        return value_counts(table, 2)

    # the truth in the limit: two raters agree with 0.68; 0.56 of the values are 1
    share = 0.6 * 0.8 + 0.4 * 0.2
    truth = 1 - (2 * 0.8 * 0.2) / (2 * share * (1 - share))
    assert krippendorff_alpha(votes_of_three(100_000), "nominal", draws=100).value == pytest.approx(truth, abs=0.01)
    num_studies, held = 200, 0
    for number in range(num_studies):
        result = krippendorff_alpha(votes_of_three(40), "nominal", draws=400, seed=number)
        assert result.interval_95 is not None
        held += result.interval_95[0] <= truth <= result.interval_95[1]
    # percentile intervals of 40 units are slightly narrow; four standard deviations are 6 points
    assert 0.87 < held / num_studies < 0.99
