from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from chulengo.errors import ConfigError, DataError
from chulengo.evaluate.metrics.classification import UNREADABLE, accuracy, macro_f1, of_label, weighted_f1
from chulengo.evaluate.metrics.metric import Metric
from metric_kit import item_values, outcomes, resample, value

LABELS = ("yes", "no", "maybe")
MUMBLE = "I would rather not say"


def every_metric() -> list[Metric]:
    parts = [of_label(part, label, LABELS) for part in ("precision", "recall", "f1") for label in LABELS]
    return [accuracy(LABELS), macro_f1(LABELS), weighted_f1(LABELS), *parts]


def by_scikit(gold: list[str], read: list[str]) -> list[float]:
    """The same twelve numbers from scikit-learn, with the policy spelt out."""
    sk = pytest.importorskip("sklearn.metrics")
    present = [label for label in LABELS if label in gold]
    per_label = {"labels": list(LABELS), "average": None, "zero_division": np.nan}
    return [
        sk.accuracy_score(gold, read),
        sk.f1_score(gold, read, labels=present, average="macro", zero_division=0),
        sk.f1_score(gold, read, labels=list(LABELS), average="weighted", zero_division=0),
        *sk.precision_score(gold, read, **per_label), *sk.recall_score(gold, read, **per_label),
        *sk.f1_score(gold, read, **per_label),
    ]


def random_answers(items: int, seed: int, gold_labels: tuple[str, ...] = LABELS) -> tuple[list[str], list[str]]:
    rng = random.Random(seed)
    gold = [rng.choice(gold_labels) for _ in range(items)]
    weights = (5, 3, 1, 2)
    return gold, [own if rng.random() < 0.4 else rng.choices((*LABELS, MUMBLE), weights)[0] for own in gold]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.parametrize("items", [1, 2, 3, 7, 200])
@pytest.mark.parametrize("gold_labels", [LABELS, ("yes", "no"), ("maybe",)])
def test_equal_to_scikit_learn(items: int, gold_labels: tuple[str, ...]) -> None:
    for seed in range(5):
        gold, answers = random_answers(items, seed, gold_labels)
        read = [UNREADABLE if answer == MUMBLE else answer for answer in answers]
        ours = [value(metric, outcomes(answers, [[label] for label in gold])) for metric in every_metric()]
        assert ours == pytest.approx(by_scikit(gold, read), rel=1e-14, nan_ok=True)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
def test_draws_are_scikit_learns_of_the_resampled_items() -> None:
    gold, answers = random_answers(25, seed=9)
    items = outcomes(answers, [[label] for label in gold])
    indices = resample(len(items), 40)
    draws = [metric.combine(metric.count(items)[indices].sum(axis=1)) for metric in every_metric()]
    for draw, own in enumerate(indices):
        read = [UNREADABLE if answers[i] == MUMBLE else answers[i] for i in own]
        expected = by_scikit([gold[i] for i in own], read)
        assert [scores[draw] for scores in draws] == pytest.approx(expected, rel=1e-14, nan_ok=True)


def test_published_human_scores_of_pubmedqa(shared_data: Path) -> None:
    answers = json.loads((shared_data / "pubmedqa" / "ori_pqal.json").read_text(encoding="utf-8"))
    truth = json.loads((shared_data / "pubmedqa" / "test_ground_truth.json").read_text(encoding="utf-8"))
    assert len(truth) == 500
    items = outcomes([answers[key]["reasoning_required_pred"] for key in truth], [[truth[key]] for key in truth])
    assert 100 * value(accuracy(LABELS), items) == 78.0
    assert round(100 * value(macro_f1(LABELS), items), 2) == 72.19
    # the wrong variants: weighted for macro, and accuracy for either
    assert round(100 * value(weighted_f1(LABELS), items), 2) != 72.19


def test_an_unreadable_answer_is_wrong_and_counted() -> None:
    items = outcomes(["yes", MUMBLE, MUMBLE, ""], [["yes"], ["yes"], ["no"], ["no"]])
    metric = accuracy(LABELS)
    assert value(metric, items) == 1 / 4  # dropped, it would be 1
    assert dict(zip(metric.columns, metric.count(items).sum(axis=0), strict=True)) == {
        "correct": 1, "items": 4, UNREADABLE: 3,
    }
    assert value(of_label("recall", "yes", LABELS), items) == 1 / 2
    assert value(of_label("precision", "yes", LABELS), items) == 1
    # the mean is over yes (F1 2/3) and no (0): neither "unreadable" nor the absent "maybe" is a third class
    assert value(macro_f1(LABELS), items) == pytest.approx(1 / 3)


def test_confusion_matrix_by_name() -> None:
    metric = macro_f1(("yes", "no"))
    counts = metric.count(outcomes(["no", "yes", "?", "yes"], [["yes"], ["yes"], ["no"], ["no"]])).sum(axis=0)
    assert dict(zip(metric.columns, counts, strict=True)) == {
        "yes>yes": 1, "yes>no": 1, "yes>unreadable": 0, "no>yes": 1, "no>no": 0, "no>unreadable": 1,
    }


def test_undefined_is_nan_not_zero() -> None:
    items = outcomes(["yes", "yes"], [["yes"], ["yes"]])
    assert np.isnan(value(of_label("precision", "no", LABELS), items))
    assert np.isnan(value(of_label("recall", "no", LABELS), items))
    assert np.isnan(value(of_label("f1", "no", LABELS), items))
    assert value(macro_f1(LABELS), items) == 1


def test_labels_are_read_by_the_tasks_rule() -> None:
    def read(text: str) -> str | None:
        found = re.findall(r"\b(yes|no|maybe)\b", text.casefold())
        return found[0] if found else None

    items = outcomes(["Yes, it does.", "Surely not", "No!", " MAYBE"], [["yes"], ["no"], ["no"], ["Maybe."]])
    assert item_values(accuracy(LABELS, read), items) == [1, 0, 1, 1]
    # without a rule the whole answer must be the label
    assert item_values(accuracy(LABELS), outcomes(["Yes, it does.", " YES\n"], [["yes"], ["yes"]])) == [0, 1]


def test_a_missing_prediction_is_unreadable_even_where_nothing_reads_as_a_label() -> None:
    items = outcomes(["", ""], [["yes"], ["no"]], finish="missing")
    assert value(accuracy(LABELS, lambda text: text or "yes"), items) == 0


@pytest.mark.parametrize("references", [["perhaps"], ["yes", "no"], [""]])
def test_a_gold_label_that_is_none_is_named(references: list[str]) -> None:
    with pytest.raises(DataError, match=r"reference of item 1 is no single label(.|\n)*allowed: yes, no, maybe"):
        macro_f1(LABELS).count(outcomes(["yes", "no"], [["yes"], references]))


@pytest.mark.parametrize("labels", [(), ("yes",), ("yes", "Yes"), ("yes", "unreadable")])
def test_labels_that_cannot_be_used(labels: tuple[str, ...]) -> None:
    for make in (accuracy, macro_f1, weighted_f1):
        with pytest.raises(ConfigError, match="cannot be computed over the labels"):
            make(labels)


def test_a_reader_that_reads_another_label() -> None:
    with pytest.raises(ConfigError, match="reads the label 'nope'"):
        accuracy(LABELS, lambda text: "nope").count(outcomes(["x"], [["yes"]]))
