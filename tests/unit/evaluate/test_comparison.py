"""Paired differences against brute force, McNemar against the binomial, and refusals of what cannot be compared."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import numpy as np
import pytest

from chulengo.errors import DataError
from chulengo.evaluate.comparison import compare, compare_all, mcnemar_exact
from chulengo.evaluate.loss_metrics import perplexity_metric
from chulengo.evaluate.metrics.metric import Metric, Outcome, mean_of
from chulengo.evaluate.metrics.registry import MetricOptions, make_metric
from chulengo.evaluate.results import Score, score_from_dict
from chulengo.evaluate.scoring import score, score_all, score_counts


def value_metric(higher: bool | None = True) -> Metric:
    return mean_of("v", "v/1", "the number", lambda o: float(o.answer), unit="number", higher_is_better=higher)


def made(values: list[float], *, groups: list[str] | None = None, metric: Metric | None = None) -> Score:
    outcomes = [
        Outcome(f"i{n:03}", groups[n] if groups else f"g{n:03}", "", (), str(value)) for n, value in enumerate(values)
    ]
    return score(metric or value_metric(), outcomes, draws=200)


def right(values: list[int]) -> Score:
    metric = mean_of("right", "right/1", "share", lambda o: float(o.answer))
    return made([float(v) for v in values], metric=metric)


def test_a_shift_of_every_item_is_certain() -> None:
    numbers = random.Random(0)
    base = [numbers.random() * 100 for _ in range(50)]
    found = compare(made(base), made([value + 1 for value in base]))
    assert found.difference == pytest.approx(1)
    assert found.interval_95 == pytest.approx((1, 1))  # the items' own spread of 100 cancels
    assert (found.verdict, found.num_better, found.num_worse) == ("better", 50, 0)


def test_the_interval_equals_brute_force() -> None:
    numbers = random.Random(2)
    groups = [f"g{n // 3:02}" for n in range(60)]
    base = [numbers.gauss(0, 3) for _ in range(60)]
    tuned = [value + numbers.gauss(0.5, 1) for value in base]
    drawn = []
    for _ in range(10_000):
        groups_drawn = [numbers.randrange(20) for _ in range(20)]
        picked = [3 * group + n for group in groups_drawn for n in range(3)]
        drawn.append(sum(tuned[i] - base[i] for i in picked) / 60)
    low, high = np.quantile(drawn, (0.025, 0.975))
    found = compare(made(base, groups=groups), made(tuned, groups=groups))
    assert found.interval_95 == pytest.approx((low, high), abs=0.04 * (high - low))
    assert (found.num_items, found.num_groups, found.draws) == (60, 20, 10_000)


def test_a_difference_of_ratios_is_no_mean_of_differences() -> None:
    metric = perplexity_metric("p/1", "d")
    base = score_counts([metric], ["a", "b"], ["a", "b"], [np.array([[2.0, 1.0], [30.0, 30.0]])], draws=10)[0]
    tuned = score_counts([metric], ["a", "b"], ["a", "b"], [np.array([[1.0, 1.0], [30.0, 30.0]])], draws=10)[0]
    found = compare(base, tuned)
    assert found.difference == pytest.approx(math.exp(1) - math.exp(32 / 31))
    assert found.better_items == ("a",)  # lower is better
    assert json.loads(json.dumps(found.to_dict()))["better_items"] == ["a"]


def test_stored_scores_compare_as_fresh_ones() -> None:
    base, tuned = made([1, 2, 3, 9]), made([2, 2, 1, 12])
    stored = [score_from_dict(json.loads(json.dumps(each.to_dict()))) for each in (base, tuned)]
    assert compare(*stored) == compare(base, tuned)


def test_order_of_items_does_not_matter() -> None:
    numbers = random.Random(3)
    base, tuned = made([numbers.random() for _ in range(40)]), made([numbers.random() for _ in range(40)])
    mixed = dataclasses.replace(tuned, items=tuple(reversed(tuned.items)))
    assert compare(base, mixed) == compare(base, tuned)
    assert compare(base, tuned, seed=1).interval_95 != compare(base, tuned).interval_95


def test_where_it_got_worse() -> None:
    found = compare(made([1, 1, 1, 1, 5]), made([3, 0, 2, 1, 1]))
    assert found.better_items == ("i000", "i002")
    assert found.worse_items == ("i004", "i001")
    assert (found.num_better, found.num_worse, found.num_equal) == (2, 2, 1)
    assert compare(made([1.0] * 50), made([float(n) for n in range(50)])).num_better == 48
    assert len(compare(made([1.0] * 50), made([float(n) for n in range(50)])).better_items) == 20


def test_a_metric_without_a_good_direction_has_no_verdict() -> None:
    metric = value_metric(None)
    found = compare(made([1, 2, 3], metric=metric), made([4, 5, 6], metric=metric))
    assert (found.verdict, found.num_better, found.num_worse, found.better_items) == ("unclear", 0, 0, ())


def test_lower_is_better() -> None:
    metric = value_metric(False)
    found = compare(made([4, 5, 6] * 2, metric=metric), made([1, 2, 3] * 2, metric=metric))
    assert (found.verdict, found.difference) == ("better", -3)


@pytest.mark.parametrize("others", [0, 1, 50])
def test_no_verdict_below_six_groups_that_differ(others: int) -> None:
    for differing in range(1, 9):
        base, tuned = right([0] * (differing + others)), right([1] * differing + [0] * others)
        for first, second, says in ((base, tuned, "better"), (tuned, base, "worse")):
            found = compare(first, second)
            assert found.verdict == (says if differing >= 6 else "unclear"), differing
            if differing + others > 1:  # one group has no draws
                assert found.interval_95 is not None
                assert found.interval_95[0] <= found.difference <= found.interval_95[1]
            assert found.p_mcnemar is not None
            assert (found.p_mcnemar < 0.05) == (found.verdict != "unclear")
    # many items in one conversation are one witness
    groups = [f"g{n % 3}" for n in range(60)]
    assert compare(made([1.0] * 60, groups=groups), made([2.0] * 60, groups=groups)).verdict == "unclear"


def labelled(gold: str, answers: str) -> list[Outcome]:
    return [Outcome(f"{n:03}", str(n), "", (own,), answer) for n, (own, answer) in
            enumerate(zip(gold, answers, strict=True))]


def of_label(name: str, gold: str, base: str, tuned: str) -> tuple[Score, Score]:
    metric = make_metric(name, MetricOptions(labels=("y", "n")))
    first, second = (score_all([metric], labelled(gold, said), labels=("y", "n"))[0] for said in (base, tuned))
    return first, second


def test_draws_without_a_label_show_no_difference() -> None:
    # the label is there once: a third of the draws lack it, and all others find it gained
    gold = "y" + "n" * 29
    found = compare(*of_label("f1:y", gold, "n" * 30, "y" + "n" * 29))
    assert (found.base, found.tuned, found.verdict) == (0, 1, "unclear")
    gold = "y" * 10 + "n" * 20
    assert compare(*of_label("f1:y", gold, "y" + "n" * 29, "y" * 10 + "n" * 20)).verdict == "better"


def test_items_of_a_label_are_better_where_it_is_rightly_given_or_not_given() -> None:
    gold = "yyyynnnnnnnn"
    base, tuned = "y" * 12, "yyynnnnnnnny"
    for name in ("f1:y", "precision:y"):
        found = compare(*of_label(name, gold, base, tuned))
        assert found.tuned > found.base
        assert (found.num_better, found.num_worse) == (7, 1)
        assert found.worse_items == ("003",)
        assert set(found.better_items) == {f"{n:03}" for n in range(4, 11)}
    found = compare(*of_label("recall:y", gold, base, tuned))
    assert (found.num_better, found.num_worse, found.num_equal, found.num_items) == (0, 1, 3, 4)


def test_mcnemar() -> None:
    # 1 against 8: 2 (C(9,0) + C(9,1)) / 2^9
    assert mcnemar_exact(1, 8) == pytest.approx(20 / 512, rel=1e-12)
    assert mcnemar_exact(8, 1) == mcnemar_exact(1, 8)
    assert mcnemar_exact(0, 0) == mcnemar_exact(5, 5) == 1.0
    scipy = pytest.importorskip("scipy.stats")
    for first, second in [(0, 3), (2, 17), (40, 70), (300, 410), (5000, 5300)]:
        expected = scipy.binomtest(first, first + second, 0.5).pvalue
        assert mcnemar_exact(first, second) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_is_for_right_or_wrong() -> None:
    base, tuned = right([1, 1, 0, 0, 0, 1]), right([1, 0, 1, 1, 1, 1])
    found = compare(base, tuned)
    assert (found.only_base, found.only_tuned, found.p_mcnemar) == (1, 3, pytest.approx(2 * 5 / 16))
    assert compare(made([1, 2]), made([0, 1])).p_mcnemar is None


def test_what_cannot_be_compared() -> None:
    base = made([1, 2, 3])
    with pytest.raises(DataError, match=r"other items.*1 only in the first \(i002"):
        compare(base, made([1, 2]))
    for change in ({"version": "v/2"}, {"definition": "another number"}, {"name": "w"}, {"labels": ("a", "b")}):
        with pytest.raises(DataError, match=f"their {next(iter(change))} differs"):
            compare(base, dataclasses.replace(base, **change))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="other groups"):
        compare(base, made([1, 2, 3], groups=["g000", "g001", "x"]))
    with pytest.raises(DataError, match="no counts"):
        compare(dataclasses.replace(base, columns=()), dataclasses.replace(base, columns=()))


def test_pairs_of_other_groups_in_one_call() -> None:
    groups = ["a", "a", "b", "b"]
    pairs = [(made([1, 2, 3, 4]), made([2, 2, 3, 5])),
             (made([1, 2, 3, 4], groups=groups), made([2, 2, 3, 5], groups=groups))]
    assert compare_all(pairs) == [compare(*pairs[0]), compare(*pairs[1])]


def test_macro_f1_is_no_share_of_right_items() -> None:
    outcomes = [Outcome(str(i), str(i), "", ("yes" if i % 3 else "no",), "") for i in range(30)]
    options = MetricOptions(labels=("yes", "no"), read_label=str)
    sides = {
        name: [dataclasses.replace(o, answer=texts[i % 2]) for i, o in enumerate(outcomes)]
        for name, texts in {"base": ("yes", "yes"), "tuned": ("yes", "no")}.items()
    }
    for metric, has_p in (("accuracy", True), ("macro_f1", False)):
        base, tuned = (
            score_all([make_metric(metric, options)], rows, draws=50, labels=("yes", "no"))[0]
            for rows in sides.values()
        )
        assert (compare(base, tuned, draws=50).p_mcnemar is not None) == has_p
