"""Intervals against brute force and theory; both roads to the draws; what they may not depend on."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from chulengo.evaluate import scoring
from chulengo.evaluate.metrics.metric import Metric, Outcome, mean_of
from chulengo.evaluate.metrics.registry import MetricOptions, make_metric
from chulengo.evaluate.results import Score, score_from_dict, wilson_interval
from chulengo.evaluate.scoring import draw_sums, grouped, percentiles, score, score_all


def outcome(number: int, answer: str, group: str | None = None) -> Outcome:
    return Outcome(f"i{number}", group or f"g{number}", "q", ("1",), answer)


def length() -> Metric:
    return mean_of("length", "length/1", "mean length", lambda o: float(len(o.answer)), unit="number")


def right(unit: Any = "share") -> Metric:
    return mean_of("right", "right/1", "share right", lambda o: float(o.answer == "1"), unit=unit)


def texts(values: Sequence[int]) -> list[Outcome]:
    return [outcome(number, "x" * value) for number, value in enumerate(values)]


def test_value_and_items() -> None:
    made = score(length(), texts([1, 2, 6]), draws=100)
    assert (made.value, made.num_items, made.num_groups) == (3.0, 3, 3)
    assert made.items[2] == {"id": "i2", "group": "g2", "value": 6.0, "counts": [6.0, 1.0]}
    assert (made.unit, made.columns, made.combine) == ("number", ("sum", "items"), "ratio")
    assert score_from_dict(made.to_dict()) == made


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    numbers = random.Random(0)
    values = [numbers.randrange(50) for _ in range(400)]
    made = score(length(), texts(values))
    half = 1.96 * float(np.std(values)) / math.sqrt(400)
    assert made.interval_method == "bootstrap"
    assert made.interval == pytest.approx((made.value - half, made.value + half), abs=0.1 * half)


def test_draws_equal_brute_force() -> None:
    # percentiles of a ratio of sums (no mean of means), drawn one at a time by Python's own generator
    numbers = random.Random(1)
    rows = np.array([[numbers.random() * 5, numbers.randrange(1, 9)] for _ in range(30)])
    drawn = []
    for _ in range(20_000):
        picked = rows[[numbers.randrange(30) for _ in range(30)]].sum(0)
        drawn.append(picked[0] / picked[1])
    sums = draw_sums([rows], 20_000, 0)[0]
    ours = percentiles(sums[:, 0] / sums[:, 1])
    low, high = np.quantile(drawn, (0.025, 0.975))
    assert ours == pytest.approx((low, high), abs=0.03 * (high - low))


def test_both_roads_have_the_same_distribution() -> None:
    rows = np.array([[1.0, 1.0]] * 60 + [[0.0, 1.0]] * 30 + [[5.0, 1.0]] * 10)
    by_group = scoring._draw_groups(rows, 20_000, 3)
    by_kind = scoring._draw_kinds(*scoring._kinds(rows), 20_000, 4)
    for quantile in (0.025, 0.25, 0.5, 0.75, 0.975):
        assert np.quantile(by_kind[:, 0], quantile) == pytest.approx(np.quantile(by_group[:, 0], quantile), abs=2)
    assert (by_kind[:, 1] == 100).all()
    assert (by_group[:, 1] == 100).all()
    assert float(by_kind[:, 0].std()) == pytest.approx(float(by_group[:, 0].std()), rel=0.03)


def test_few_kinds_take_the_cheap_road(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("drawn one by one")

    monkeypatch.setattr(scoring, "_draw_groups", never)
    draw_sums([np.array([[1.0, 1.0], [0.0, 1.0]] * 500)], 100, 0)
    with pytest.raises(AssertionError, match="one by one"):
        draw_sums([np.random.default_rng(0).random((1000, 2))], 100, 0)


def test_the_same_seed_gives_the_same_interval_in_any_order_and_company() -> None:
    outcomes = texts([n * n % 37 for n in range(200)])
    first = score(length(), outcomes, seed=5)
    shuffled = outcomes[:]
    random.Random(0).shuffle(shuffled)
    assert score(length(), shuffled, seed=5).interval == pytest.approx(first.interval, rel=1e-12)
    assert score(length(), outcomes, seed=6).interval != first.interval
    other = mean_of("square", "square/1", "", lambda o: float(len(o.answer) ** 2), unit="number")
    assert score_all([other, length()], outcomes, seed=5)[1].interval == pytest.approx(first.interval, rel=1e-12)


def test_groups_are_drawn_not_items() -> None:
    # ten equal items in each of 40 groups know no more than 40 items
    values = [n % 7 for n in range(40)]
    alone = score(length(), texts(values))
    copies = [outcome(10 * g + n, "x" * value, f"g{g}") for g, value in enumerate(values) for n in range(10)]
    together = score(length(), copies)
    assert (together.num_items, together.num_groups) == (400, 40)
    assert alone.interval is not None
    assert together.interval == pytest.approx(alone.interval, abs=0.05)
    independent = score(length(), texts([v for v in values for _ in range(10)]))
    assert width(independent) < 0.4 * width(together)


def width(made: Score) -> float:
    assert made.interval is not None
    return made.interval[1] - made.interval[0]


def test_shares_of_independent_items_have_wilson_s_interval() -> None:
    outcomes = [outcome(n, "1" if n < 37 else "0") for n in range(120)]
    assert score(right(), outcomes).interval == wilson_interval(37, 120)
    assert score(right(), outcomes).interval_method == "wilson"
    points = Metric("p", "p/1", "", "points", True, ("sum", "items"), right().count,
                    lambda counts: 100 * right().combine(counts))
    low, high = wilson_interval(37, 120)
    assert score(points, outcomes).interval == pytest.approx((100 * low, 100 * high))


def test_all_right_is_not_certain() -> None:
    grouped_alike = [outcome(n, "1", f"g{n // 4}") for n in range(80)]
    made = score(right(), grouped_alike)
    assert made.interval == wilson_interval(20, 20)


def test_dependent_shares_are_bootstrapped() -> None:
    made = score(right(), [outcome(n, "1" if n % 3 else "0", f"g{n // 4}") for n in range(80)])
    assert made.interval_method == "bootstrap"


def test_one_group_has_no_interval() -> None:
    made = score(length(), [outcome(n, "x" * n, "g") for n in range(9)])
    assert (made.interval, made.interval_method) == (None, "")


def test_items_that_a_metric_does_not_apply_to() -> None:
    some = mean_of("m", "m/1", "", lambda o: math.nan if o.answer == "x" else float(len(o.answer)), unit="number")
    made = score(some, texts([1, 2, 4]), draws=500)
    assert made.value == 3.0
    assert [item["value"] for item in made.items] == [None, 2.0, 4.0]
    nothing = score(some, texts([1, 1, 1]), draws=50)
    assert math.isnan(nothing.value)
    assert nothing.interval is None
    assert nothing.to_dict()["value"] is None


def test_n_is_what_a_score_is_taken_over() -> None:
    some = mean_of("m", "m/1", "", lambda o: math.nan if o.answer == "x" else float(len(o.answer)), unit="number")
    made = score(some, texts([1, 2, 4, 1]), draws=500)
    assert (made.num_items, made.num_groups, len(made.items)) == (2, 2, 4)
    in_groups = [outcome(n, "x" * (1 + n % 2), f"g{n // 4}") for n in range(12)]
    made = score(some, [*in_groups, outcome(99, "x")], draws=500)
    assert (made.num_items, made.num_groups) == (6, 3)
    assert (score(some, texts([1, 1]), draws=50).num_items, score(some, texts([1, 1]), draws=50).num_groups) == (0, 0)


def test_items_that_do_not_count_are_no_trials() -> None:
    some = mean_of("m", "m/1", "", lambda o: math.nan if o.answer == "?" else float(o.answer == "1"))
    outcomes = [outcome(n, "?" if n % 3 else "1") for n in range(60)]
    made = score(some, outcomes)
    assert (made.value, made.interval, made.interval_method) == (1.0, wilson_interval(20, 20), "wilson")
    mixed = [*outcomes, outcome(60, "0")]
    assert score(some, mixed).interval == wilson_interval(20, 21)


def test_recall_and_precision_are_shares_of_a_label_s_items() -> None:
    labels = ("y", "n")
    answers = ["y"] * 6 + ["n"] * 4 + ["y"] * 3 + ["n"] * 17  # of 10 with gold label y, then of 20 with n
    items = [Outcome(str(n), str(n), "", ("y" if n < 10 else "n",), said) for n, said in enumerate(answers)]
    metrics = [make_metric(f"{part}:y", MetricOptions(labels=labels)) for part in ("recall", "precision", "f1")]
    recall, precision, f1 = score_all(metrics, items, labels=labels)
    assert (recall.interval, recall.num_items) == (wilson_interval(6, 10), 10)
    assert (precision.interval, precision.num_items) == (wilson_interval(6, 9), 9)
    assert (f1.interval_method, f1.num_items) == ("bootstrap", 13)


def test_equal_draws_are_no_certainty() -> None:
    labels = ("y", "n")
    f1 = make_metric("f1:y", MetricOptions(labels=labels))
    all_right = [Outcome(str(n), str(n), "", ("yn"[n % 2],), "yn"[n % 2]) for n in range(20)]
    made = score_all([f1], all_right, labels=labels)[0]
    assert (made.value, made.interval, made.interval_method) == (1.0, None, "")
    third = mean_of("third", "t/1", "", lambda _: 1 / 3, unit="number")  # sums of it are not equal to the last bit
    assert score(third, texts(range(1, 20))).interval is None
    assert score(length(), texts([1] * 19 + [2])).interval is not None


def test_counting_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = texts([n % 11 for n in range(50)])
    whole = score_all([length(), right()], outcomes, draws=100)
    monkeypatch.setattr(scoring, "PIECE", 7)
    assert score_all([length(), right()], outcomes, draws=100) == whole


def test_groups_are_summed_by_name() -> None:
    summed = grouped(["b", "a", "b"], np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert summed.tolist() == [[3.0, 4.0], [6.0, 8.0]]
