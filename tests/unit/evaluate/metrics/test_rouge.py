from __future__ import annotations

import random

import pytest

from chulengo.evaluate.metrics.rouge import KINDS, rouge
from metric_kit import item_values, outcomes, value

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
TEXT = "The the cat, dog sat on mat\n and then ran off quickly . 3 1,000 (see) end_of it's\n"
WORDS = TEXT.split(" ")
SCRIPTS = ["Ёлка в лесу родилась.\nВ лесу она росла!", "東京は大きい都市です。", "नमस्ते मेरी दुनिया"]


def corpus(items: int = 60, references: int = 1) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(7)

    def text() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(0, 25)))

    return [text() for _ in range(items)], [[text() for _ in range(references)] for _ in range(items)]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_rouge_score_on_ascii(kind: str) -> None:
    answers, references = corpus()
    oracle = rouge_scorer.RougeScorer([kind])
    expected = [oracle.score(own[0], answer)[kind].fmeasure for answer, own in zip(answers, references, strict=True)]
    items = outcomes(answers, references)
    assert item_values(rouge(kind), items) == expected
    assert item_values(rouge(kind, ascii_only=True), items) == expected
    assert value(rouge(kind), items) == pytest.approx(sum(expected) / len(expected), rel=1e-14)
    assert sum(expected) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SCRIPTS)
def test_identical_text_of_any_script_scores_one(kind: str, text: str) -> None:
    items = outcomes([text], [[text]])
    assert value(rouge(kind), items) == 1
    # the wrong variant: rouge-score's own tokenizer, which the ascii names keep
    assert value(rouge(kind, ascii_only=True), items) == 0


def test_by_hand() -> None:
    # 3 of 4 words, 1 of 3 pairs; the longest common subsequence is "the sat here"
    items = outcomes(["the dog sat here"], [["the cat sat here"]])
    assert value(rouge("rouge1"), items) == 3 / 4
    assert value(rouge("rouge2"), items) == pytest.approx(1 / 3)
    assert value(rouge("rougeL"), items) == 3 / 4
    # 2 of 3 on one side, 2 of 2 on the other: F, neither precision (1) nor recall (2/3)
    f1 = value(rouge("rouge1"), outcomes(["кот спит"], [["рыжий кот спит"]]))
    assert f1 == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))


def test_lsum_takes_lines_for_sentences() -> None:
    items = outcomes(["b b\na a"], [["a a\nb b"]])
    assert value(rouge("rougeL"), items) == 0.5
    assert value(rouge("rougeLsum"), items) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_best_reference_by_f(kind: str) -> None:
    answers, references = corpus(references=3)
    oracle = rouge_scorer.RougeScorer([kind])
    expected = [oracle.score_multi(own, answer)[kind].fmeasure for answer, own in zip(answers, references, strict=True)]
    assert item_values(rouge(kind), outcomes(answers, references)) == expected
    assert item_values(rouge(kind), outcomes(answers, [own[:1] for own in references])) != expected


def test_empty_sides_score_zero() -> None:
    items = outcomes(["", "a", "", "👍"], [["a"], [""], [""], ["👍"]])
    for kind in KINDS:
        assert item_values(rouge(kind), items) == [0, 0, 0, 0]


def test_names_and_versions_tell_the_tokenizers_apart() -> None:
    own, ascii_only = rouge("rouge2"), rouge("rouge2", ascii_only=True)
    assert (own.name, ascii_only.name) == ("rouge2", "rouge2_ascii")
    assert own.version.startswith("rouge2/1 rouge-score:")
    assert own.version.split(" tokens:")[1] == "unicode/1"
    assert ascii_only.version.split(" tokens:")[1] == "ascii"
