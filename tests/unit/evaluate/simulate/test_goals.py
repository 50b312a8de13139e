from __future__ import annotations

from typing import Any

import pytest

from chulengo.errors import ConfigError
from chulengo.evaluate.simulate.goals import read_goal, says


@pytest.mark.parametrize(
    ("said", "text", "there"),
    [
        ("It costs 165 soles.", "165 soles", True),
        ("It costs 165\n  SOLES", "165 soles", True),
        ("It costs 1,165 soles", "165 soles", False),
        ("It costs 165.50", "165", False),
        ("It costs 165.", "165", True),
        ("From 15:30 on", "5:30", False),
        ("From 5:30 on", "5:30", True),
        ("the caféteria", "café", False),
        ("the cafe\u0301 is open", "café", True),
        ("costs $5!", "$5", True),
        ("STRASSE", "straße", True),
        ("", "x", False),
    ],
)
def test_a_fact_is_whole_words(said: str, text: str, there: bool) -> None:
    assert says(said, text) is there


def test_every_condition_must_hold_each_in_some_turn() -> None:
    goal = read_goal({"facts": ["165 soles", ["5:30", "half past five"]], "regex": r"Ref: \w+"}, "here")
    turns = ["Hello.", "It costs 165 soles. Ref: SM", "At half past five."]
    assert goal.met_in(turns[:1]) == [None, None, None]
    assert goal.met_in(turns[:2]) == [2, None, 2]
    assert goal.met_in(turns) == [2, 3, 2]


def test_a_fact_does_not_reach_over_turns() -> None:
    assert read_goal({"text": "165 soles"}, "here").met_in(["It costs 165", "soles are money"]) == [None]


def test_an_answer_is_letter_for_letter() -> None:
    goal = read_goal({"answer": ["yes", "no"]}, "here")
    assert goal.met_in(["Yes", " no \n"]) == [2]
    assert goal.met_in(["no way"]) == [None]


@pytest.mark.parametrize(
    ("given", "says_"),
    [
        ("165", "met_when is str"),
        ({}, "met_when is dict"),
        ({"fact": "a"}, "no kind 'fact'"),
        ({"facts": []}, "empty list"),
        ({"facts": [330]}, "quotation marks"),
        ({"facts": [[]]}, "None"),
        ({"text": " "}, "met_when.text"),
        ({"regex": "("}, "does not compile"),
        ({"answer": None}, "met_when.answer"),
    ],
)
def test_mistakes_are_named(given: Any, says_: str) -> None:
    with pytest.raises(ConfigError, match=r"^here: ") as error:
        read_goal(given, "here")
    assert says_ in str(error.value)
    assert "try:" in str(error.value)
