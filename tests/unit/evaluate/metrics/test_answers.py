from __future__ import annotations

import json
import random
import re
import string
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from chulengo.errors import DataError
from chulengo.evaluate.metrics.answers import (
    exact_match,
    normalise,
    squad_exact_match,
    squad_f1,
    token_f1,
    token_precision,
    token_recall,
)
from metric_kit import ODD_TEXTS, item_values, outcomes, value

# --- the official rule, written from its description: lower case, then every ASCII punctuation mark deleted, then each
# of the words a, an, the replaced by a space, then white space collapsed; F1 over multisets; the best reference


def official_form(text: str) -> str:
    lowered = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", lowered).split())


def official_f1(answer: str, reference: str) -> float:
    ours, theirs = official_form(answer).split(), official_form(reference).split()
    same = sum((Counter(ours) & Counter(theirs)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


def official(answer: str, references: list[str]) -> tuple[float, float]:
    exact = max(official_form(answer) == official_form(reference) for reference in references)
    return 100.0 * exact, 100.0 * max(official_f1(answer, reference) for reference in references)


def check(answers: list[str], references: list[list[str]]) -> None:
    items = outcomes(answers, references)
    expected = [official(answer, own) for answer, own in zip(answers, references, strict=True)]
    assert item_values(squad_exact_match(), items) == [exact for exact, _ in expected]
    assert item_values(squad_f1(), items) == [f1 for _, f1 in expected]
    for metric, scores in zip((squad_exact_match(), squad_f1()), zip(*expected, strict=True), strict=True):
        assert value(metric, items) == pytest.approx(sum(scores) / len(scores), rel=1e-13)


def test_every_pair_of_odd_texts_is_official() -> None:
    pairs = [(a, b) for a in ODD_TEXTS for b in ODD_TEXTS]
    check([a for a, _ in pairs], [[b] for _, b in pairs])


def test_random_answers_are_official() -> None:
    rng = random.Random(2)
    parts = [*ODD_TEXTS, "the", "The", "an", "A.", "cat", "cat,", "cats", "Denver Broncos", "é", "-", "’s", "1990s"]

    def text() -> str:
        return rng.choice(["", " ", "  "]).join(rng.choice(parts) for _ in range(rng.randint(0, 6)))

    check([text() for _ in range(3000)], [[text() for _ in range(rng.randint(1, 4))] for _ in range(3000)])


def test_real_questions_are_official(shared_data: Path) -> None:
    articles = json.loads((shared_data / "squad" / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    references = [
        [answer["text"] for answer in question["answers"]]
        for article in articles for paragraph in article["paragraphs"] for question in paragraph["qas"]
    ]
    rng = random.Random(4)
    answers = []
    for own in references:
        words = rng.choice(own).split()
        kept = [word for word in words if rng.random() < 0.8] + ([rng.choice(words)] if rng.random() < 0.3 else [])
        answers.append(rng.choice(["", "The ", "the "]) + " ".join(kept) + rng.choice(["", "."]))
    assert len(references) == 1190
    check(answers, references)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat's, pyjamas!", "cats pyjamas"),
        ("an apple a day", "apple day"),
        ("Theatre anthem", "theatre anthem"),
        ("the-cat", "thecat"),  # punctuation goes before articles do
        ("a.", ""),
        ("«the»", "« »"),
        ("à la", "à la"),
        ("Привет, МИР", "привет мир"),
        ("a\u00a0b", "b"),
    ],
)
def test_normalisation_by_hand(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_f1_is_over_multisets() -> None:
    # the wrong variant over sets would give precision 1, recall 1
    items = outcomes(["cat cat cat dog"], [["cat dog dog"]])
    assert item_values(token_precision(), items) == [2 / 4]
    assert item_values(token_recall(), items) == [2 / 3]
    assert item_values(token_f1(), items) == [pytest.approx(4 / 7)]
    assert item_values(squad_f1(), items) == [pytest.approx(400 / 7)]


def test_the_best_reference_gives_all_three() -> None:
    # F1 2/3 with the second (precision 1/2, recall 1); the first has the better precision only
    items = outcomes(["red cat"], [["red cat on the old grey mat there", "cat"]])
    assert item_values(token_f1(), items) == [pytest.approx(2 / 3)]
    assert item_values(token_precision(), items) == [1 / 2]
    assert item_values(token_recall(), items) == [1.0]


def test_nothing_equals_nothing_but_shares_no_token() -> None:
    items = outcomes(["", "The", "", ""], [["the"], [""], ["cat"], ["cat", "a"]])
    assert item_values(squad_exact_match(), items) == [100, 100, 0, 100]
    assert item_values(squad_f1(), items) == [0, 0, 0, 0]


def test_a_missing_prediction_is_wrong() -> None:
    items = outcomes(["", ""], [["the"], [""]], finish="missing")
    for make in (squad_exact_match, squad_f1, exact_match, token_precision, token_recall, token_f1):
        assert value(make(), items) == 0


def test_letter_for_letter() -> None:
    answers = [" Yes.\n", "yes.", "Yes", "Yes. No.", "", "Sure."]
    items = outcomes(answers, [["Yes."], ["Yes."], ["Yes."], ["Yes."], ["Yes."], ["Yes.", " Sure."]])
    assert item_values(exact_match(), items) == [1, 0, 0, 0, 0, 1]
    assert value(exact_match(), items) == 2 / 6
    assert item_values(squad_exact_match(), items) == [100, 100, 100, 0, 0, 100]


def test_items_without_references_are_named() -> None:
    with pytest.raises(DataError, match="1 of 2 items have no reference, which squad_f1 needs: 1"):
        squad_f1().count(outcomes(["a", "b"], [["a"], []]))


def test_ten_times_the_predictions_take_ten_times_as_long() -> None:
    """What 100,000 take in seconds is a measurement (3.5 to 4.4 s of one core), and depends on the machine."""
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(5000)] + ["the", "a", "of", "in", "and"] * 200
    pool = rng.choices(vocabulary, k=1_000_000)
    texts = [" ".join(pool[start : start + 1 + start % 6]) for start in range(400_000)]
    items = outcomes(texts[:100_000], [texts[start : start + 3] for start in range(100_000, 400_000, 3)])

    def seconds(some: Sequence[Any]) -> float:
        normalise.cache_clear()
        start = time.process_time()
        for metric in (squad_exact_match(), squad_f1()):
            value(metric, some)
        return time.process_time() - start

    assert seconds(items) < 25 * seconds(items[:10_000])
