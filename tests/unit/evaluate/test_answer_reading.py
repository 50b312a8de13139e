from __future__ import annotations

import pytest

from chulengo.evaluate.answer_reading import Reading, label_reader, reader

YES_NO = {"yes": ("yeah", "it does"), "no": (), "no idea": ()}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Yes.", "yes"), ("  **YES**, it is", "yes"), ("It does not matter: no", "yes"), ("No, yes", "no"),
        ("yesterday nobody knew", None), ("", None), ("I have no idea", "no idea"), ("ΝΟ", None), ("no\nyes", "no"),
    ],
)  # fmt: skip
def test_the_first_mention_of_a_label_counts(text: str, found: str | None) -> None:
    assert label_reader(YES_NO)(text) == found


@pytest.mark.parametrize(
    ("reading", "text", "found"),
    [
        (Reading(), "  two\nlines ", "two\nlines"),
        (Reading("first_line"), "\n  one \ntwo", "one"),
        (Reading("first_line"), "", ""),
        (Reading("first_line", after="Answer:"), "Answer: a? No. Answer: b\nc", "b"),
        (Reading("first_line", after="Answer:"), "no such mark\nb", "no such mark"),
        (Reading("number"), "3 + 4 = 7.", "7"),
        (Reading("number"), "It costs 1,234.50 euros", "1234.5"),
        (Reading("number"), "minus: −0.50", "-0.5"),
        (Reading("number"), "from 3 to -0", "0"),
        (Reading("number"), "007", "7"),
        (Reading("number"), "none", None),
        (Reading("json", field="label"), 'Sure: {"label": " a ", "why": {}} {"label": "b"}', "a"),
        (Reading("json", field="label"), '{broken {"label": 3}', "3"),
        (Reading("json", field="label"), '{"other": 1}', None),
        (Reading("json", field="label"), "nothing", None),
    ],
)
def test_rules(reading: Reading, text: str, found: str | None) -> None:
    assert reader(reading)(text) == found
