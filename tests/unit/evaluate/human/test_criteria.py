"""Ratings from 1 to 5."""

from __future__ import annotations

import numpy as np
import pytest

from chulengo.evaluate.human.criteria import criterion, criterion_names
from rating_kit import rating


def scored(item: int, tuned: int, base: int | None, rater: str = "anna", showing: int = 1) -> object:
    scores = {("helpful", "tuned"): tuned} | ({("helpful", "base"): base} if base is not None else {})
    return rating(item, None, rater, scores=scores, showing=showing)


def test_means_by_hand() -> None:
    ratings = [scored(1, 5, 1), scored(1, 4, 1, "ben"), scored(2, 2, None), scored(1, 1, 5, showing=2)]
    result = criterion(ratings, "helpful", ["tuned", "base"], draws=200, seed=0)  # type: ignore[arg-type]
    tuned, base = result["systems"]
    assert (tuned["mean"], tuned["num_items"], tuned["num_ratings"]) == ((4.5 + 2) / 2, 2, 3)
    assert tuned["distribution"] == {"1": 0, "2": 1, "3": 0, "4": 1, "5": 1}
    assert (base["mean"], base["interval_95"]) == (1, None)
    [difference] = result["differences"]
    assert (difference["system"], difference["minus"], difference["mean"]) == ("tuned", "base", 3.5)
    assert criterion_names(ratings) == ["helpful"]  # type: ignore[arg-type]


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    hard = rng.integers(1, 5, size=60)  # items differ much, systems by exactly one
    result = criterion([scored(n, int(h) + 1, int(h)) for n, h in enumerate(hard)],  # type: ignore[misc]
                       "helpful", ["tuned", "base"], draws=500, seed=0)
    assert result["differences"][0]["interval_95"] == pytest.approx([1, 1])
    low, high = result["systems"][0]["interval_95"]
    assert high - low > 0.3


def test_the_interval_is_that_of_a_mean() -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(1, 6, size=400)
    result = criterion([scored(n, int(v), None) for n, v in enumerate(values)],  # type: ignore[misc]
                       "helpful", ["tuned"], draws=4000, seed=0)
    low, high = result["systems"][0]["interval_95"]
    half = 1.96 * values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
