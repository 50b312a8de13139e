"""Answers of labels against always giving one: worked by hand, and what has no such comparison."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chulengo.evaluate.answer_reading import Reading
from chulengo.evaluate.metrics.metric import Outcome
from chulengo.evaluate.one_answer import OneAnswer, against_one_answer
from chulengo.evaluate.scoring import score_all
from chulengo.evaluate.task_scores import answer_metrics
from chulengo.evaluate.tasks import Task

TASK = Task("parity", read=Reading("label", labels={"odd": (), "even": ("pair",)}),
            metrics=("accuracy", "macro_f1", "recall:odd", "answer_words", "perplexity"), headline="accuracy")


def against(gold: list[str], said: list[str]) -> OneAnswer | None:
    outcomes = [Outcome(f"i{n}", f"i{n}", "q", (right,), answer, "stop")
                for n, (right, answer) in enumerate(zip(gold, said, strict=True))]
    scores = score_all(answer_metrics(TASK)[0], outcomes, draws=200, labels=TASK.labels)
    return against_one_answer(TASK, outcomes, scores, draws=200, seed=0)


def test_the_most_frequent_answer_by_hand() -> None:
    gold = ["even"] * 6 + ["odd"] * 4
    found = against(gold, ["pair"] * 6 + ["odd", "odd", "odd", "hm"])
    assert found is not None
    assert found.answer == "even"
    compared = {each.name: each for each in found.comparisons}
    assert list(compared) == ["accuracy", "macro_f1", "recall:odd"]  # lengths and losses are of no label
    assert (compared["accuracy"].base, compared["accuracy"].tuned) == (0.6, 0.9)
    # F1 of even: precision 6/10, recall 1: 0.75; of odd: 0
    assert compared["macro_f1"].base == pytest.approx(0.375)
    assert (compared["recall:odd"].base, compared["recall:odd"].tuned) == (0.0, 0.75)
    assert (compared["accuracy"].num_better, compared["accuracy"].num_worse) == (3, 0)


def test_answering_always_the_same_is_not_better() -> None:
    found = against(["even"] * 6 + ["odd"] * 4, ["even"] * 10)
    assert found is not None
    assert [(each.difference, each.verdict) for each in found.comparisons] == [(0.0, "unclear")] * 3


def test_of_equally_frequent_answers_the_task_s_first() -> None:
    found = against(["even", "odd"] * 3, ["odd"] * 6)
    assert found is not None
    assert found.answer == "odd"


def test_other_tasks_have_none() -> None:
    outcome = Outcome("i", "i", "q", ("odd",), "odd", "stop")
    for task in (Task("free", metrics=("token_f1",)), replace(TASK, metrics=("answer_words",))):
        assert against_one_answer(task, [outcome], [], draws=10, seed=0) is None
