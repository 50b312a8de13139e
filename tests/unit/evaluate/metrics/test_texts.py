from __future__ import annotations

import math

import numpy as np
import pytest

from chulengo.evaluate.metrics.metric import Metric
from chulengo.evaluate.metrics.texts import (
    answer_words,
    distinct,
    empty_answers,
    is_refusal,
    never_stops,
    refusals,
    repetition,
)
from metric_kit import item_values, outcomes, value


def scores(metric: Metric, *answers: str) -> list[float]:
    return item_values(metric, outcomes(answers, [()] * len(answers)))


def test_words_of_every_language() -> None:
    assert scores(answer_words(), "", "Don't stop.", "Ёлка в лесу", "你好", "…") == [0, 3, 3, 2, 0]
    assert value(answer_words(), outcomes(["a b", "a b c d"], [(), ()])) == 3


def test_distinct_by_hand() -> None:
    # the the cat the cat: 2 of 5 words differ; pairs: the-the, the-cat, cat-the, the-cat: 3 of 4
    text = "The the, cat. THE cat"
    assert scores(distinct(1), text) == [2 / 5]
    assert scores(distinct(2), text) == [3 / 4]


def test_distinct_is_the_mean_of_answers_not_of_the_corpus() -> None:
    items = outcomes(["a b", "a b", "a b"], [()] * 3)
    assert value(distinct(1), items) == 1  # over the corpus it would be 2 of 6, less the more answers there are
    mixed = outcomes(["a a a a", "b"], [()] * 2)
    assert value(distinct(1), mixed) == (1 / 4 + 1) / 2


def test_answers_too_short_are_left_out() -> None:
    items = outcomes(["one", "", "a a"], [()] * 3)
    assert value(distinct(2), items) == 1
    assert distinct(2).count(items).tolist() == [[0, 0], [0, 0], [1, 1]]
    assert np.isnan(value(repetition(), items))


def test_repetition() -> None:
    # 8 words, five 4-grams: a-b-c-d, b-c-d-a, c-d-a-b, d-a-b-c, a-b-c-d again
    assert scores(repetition(), "a b c d a b c d") == [pytest.approx(1 / 5)]
    assert scores(repetition(), "a b c d e f g h") == [0]
    assert scores(repetition(), "no " * 100)[0] == pytest.approx(96 / 97)


def test_never_stops_by_finish_reason() -> None:
    ends = ("stop", "length", "context", "", "missing")
    items = [outcomes(["text"], [()], finish=end)[0] for end in ends]
    assert never_stops().count(items).tolist() == [[0, 1], [1, 1], [1, 1], [0, 0], [0, 0]]
    assert value(never_stops(), items) == 2 / 3


def test_empty_answers() -> None:
    assert scores(empty_answers(), "", " \n\u3000", ".", "a") == [1, 1, 0, 0]


def test_a_missing_prediction_is_no_answer() -> None:
    items = outcomes([""], [()], finish="missing")
    for metric in (answer_words(), distinct(1), repetition(), refusals(), empty_answers()):
        assert math.isnan(value(metric, items)), metric.name


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I can’t assist with this request.",
        "I cannot provide medical advice.",
        "I apologize, but I cannot fulfill your request. It goes against my guidelines.",
        "As an AI language model, I do not have access to live data.",
        "I must decline.",
        "I'm not able to answer that question.",
        "It would not be appropriate for me to comment.",
        "I AM UNABLE TO\nPROVIDE that.",
    ],
)
def test_refusals(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I'm sorry to hear that. Try restarting the phone.",
        "We cannot be sure that you can write it down.",
        "Your body is unable to absorb nutrients.",
        "As an AI language model, I was trained on text.",
        "Do not share your password; I can help you to reset it.",
        "Yes. " * 100 + "I cannot provide more.",  # a refusal says so at once
        "Я не могу ответить на этот вопрос.",  # a known limit: English patterns
    ],
)
def test_no_refusals(text: str) -> None:
    assert not is_refusal(text)
