from __future__ import annotations

import random
import unicodedata

import pytest

from chulengo.evaluate.metrics.words import words
from metric_kit import ODD_TEXTS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop, 3rd-rate _x_!", ["don", "t", "stop", "3rd", "rate", "x"]),
        ("Ёлка — это ёлка.", ["ёлка", "это", "ёлка"]),
        ("naïve cafe\u0301", ["naïve", "café"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("東京タワー2020年", ["東", "京", "タ", "ワ", "ー", "2020", "年"]),
        ("你好 world", ["你", "好", "world"]),
        ("STRASSE Straße ΣΊΣΥΦΟΣ σίσυφος", ["strasse", "strasse", "σίσυφοσ", "σίσυφοσ"]),
        ("👍 …", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_ascii_words_are_rouge_scores() -> None:
    tokenize = pytest.importorskip("rouge_score.tokenize").tokenize
    rng = random.Random(3)
    for _ in range(2000):
        text = "".join(chr(rng.randrange(128)) for _ in range(rng.randrange(40)))
        assert words(text) == tokenize(text, None)
        # by the pattern of all scripts, which one character more makes necessary
        assert words(text + " é") == [*words(text), "é"]


def test_every_letter_and_digit_is_in_a_word_and_nothing_else() -> None:
    assigned = (code for code in range(0x30000) if unicodedata.category(chr(code)) != "Cn")
    for code in assigned:
        character = unicodedata.normalize("NFC", chr(code).casefold())
        wanted = any(unicodedata.category(c)[0] in "LNM" for c in character)
        assert bool(words(chr(code))) == wanted, hex(code)


def test_composed_and_decomposed_text_have_the_same_words() -> None:
    for text in ODD_TEXTS:
        assert words(unicodedata.normalize("NFD", text)) == words(unicodedata.normalize("NFC", text)), text
