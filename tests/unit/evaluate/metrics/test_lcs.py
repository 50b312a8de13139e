from __future__ import annotations

import random
import time

import pytest

from chulengo.evaluate.metrics.lcs import lcs_length, lcs_places
from chulengo.evaluate.metrics.rouge import UnicodeTokenizer, rouge
from metric_kit import item_values, outcomes

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
ALPHABETS = [["a"], list("ab"), ["кот", "спит", "ёлка", "cafe\u0301", "café", "猫", "👍", "नमस्ते"],
             [f"w{n}" for n in range(300)]]  # fmt: skip


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_equal_to_rouge_score_on_random_word_lists(alphabet: list[str]) -> None:
    rng = random.Random(5)
    some = 0
    for number in range(200):
        longest = 300 if number % 20 == 0 else 40  # beyond 64 and 256 bits too
        first, second = ([rng.choice(alphabet) for _ in range(rng.randint(0, longest))] for _ in range(2))
        places = rouge_scorer.lcs_ind(first, second)
        assert lcs_places(first, second) == places
        assert lcs_length(first, second) == rouge_scorer._lcs_table(first, second)[-1][-1] == len(places)
        some += 0 < len(places) < min(len(first), len(second))
    assert some > 50 or len(alphabet) == 1


@pytest.mark.parametrize("kind", ["rougeL", "rougeLsum"])
def test_whole_texts_of_any_script(kind: str) -> None:
    rng = random.Random(6)
    words = ["Ёлка", "в", "лесу", "東京は大きい", "cafe\u0301", "naïve", "the", "cat", "👍", "...", "\n", "\n\n",
             "\r\n", "x\ny"]  # fmt: skip

    def text() -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(0, 60)))

    answers, references = [text() for _ in range(150)], [[text(), text()] for _ in range(150)]
    oracle = rouge_scorer.RougeScorer([kind], tokenizer=UnicodeTokenizer())
    expected = [oracle.score_multi(own, answer)[kind].fmeasure for answer, own in zip(answers, references, strict=True)]
    assert item_values(rouge(kind), outcomes(answers, references)) == expected
    assert len(set(expected)) > 50


def test_long_answers_are_quick() -> None:
    # the table of lists takes 86 ms a pair of 500 words, this 0.2: a fifth of the former leaves room for any machine
    rng = random.Random(7)
    pairs = [[[rng.choice(ALPHABETS[3]) for _ in range(500)] for _ in range(2)] for _ in range(5)]
    started = time.process_time()
    ours = [lcs_length(*pair) for pair in pairs]
    between = time.process_time()
    assert ours == [rouge_scorer._lcs_table(*pair)[-1][-1] for pair in pairs]
    assert between - started < (time.process_time() - between) / 5
