"""Scores of conversations written by hand."""

from __future__ import annotations

import math

import pytest

from chulengo.evaluate.results import Score, wilson_interval
from chulengo.evaluate.simulate.goals import read_goal
from chulengo.evaluate.simulate.scenarios import Scenario
from chulengo.evaluate.simulate.scores import due_turns, endings, goal_reached, simulation_scores
from chulengo.evaluate.simulate.talk import Asked, Conversation, Ending, Said

GOAL = read_goal({"text": "x"}, "here")


def made(
    name: str, *turns: tuple[str, str], reached: bool | None = None, ended_by: Ending = "turns",
    real: tuple[str, ...] = (), by_model: bool = True,
) -> Conversation:  # fmt: skip
    scenario = Scenario(name, "here", goal="g", met_when=None if reached is None else GOAL, real_answers=real,
                        script=tuple(f"q{n}" for n in range(len(real))))
    client = tuple(Said(asked, by_model) for asked, _ in turns)
    agent = tuple(Said(said, True, finish_reason="stop") for _, said in turns)
    return Conversation(Asked(name, scenario), client, agent, ended_by, reached)


def by_name(scores: list[Score]) -> dict[str, Score]:
    return {score.name: score for score in scores}


def test_the_share_that_reached_its_goal() -> None:
    talks = [made(str(n), ("q", "a"), reached=n < 3) for n in range(4)]
    score = goal_reached(talks)
    assert (score.value, score.num_items, score.interval) == (0.75, 4, wilson_interval(3, 4))
    assert score.version == "simulation_goal_reached/1"
    assert [item["value"] for item in score.items] == [1, 1, 1, 0]


def test_turns_and_repetition() -> None:
    loop = [("a b c d e", "one two three four"), ("f g h i j", "one two three four")]
    talks = [made("1", *loop, reached=True), made("2", ("a", "b"), reached=False)]
    scores = by_name(simulation_scores(talks, max_turns=8, draws=100))
    assert scores["turns"].value == 1.5
    assert (scores["turns_to_goal"].value, scores["turns_to_goal"].num_items) == (2, 1)
    # 8 words are 5 four-grams, of which the last repeats the first; 10 different words repeat none
    assert scores["agent_repetition"].value == pytest.approx(1 / 5)
    assert scores["agent_repetition"].num_items == 1
    assert scores["client_repetition"].value == 0


def test_a_script_is_nobodys_repetition() -> None:
    talks = [made("1", *[("a b c d", "e f g h")] * 2, by_model=False)]
    names = by_name(simulation_scores(talks, max_turns=8, draws=0))
    assert "client_repetition" not in names
    assert "goal_reached" not in names
    assert "token_f1" not in names


def test_overlap_with_the_real_agent() -> None:
    pytest.importorskip("rouge_score")
    talks = [made("1", ("q0", "we are sorry"), ("q1", "no idea"), real=("we are sorry", "call us"), ended_by="script")]
    scores = by_name(simulation_scores(talks, max_turns=8, draws=0))
    assert scores["token_f1"].value == pytest.approx(0.5)
    assert scores["rougeL"].value == pytest.approx(0.5)
    assert scores["token_f1"].num_items == 2


def test_a_turn_that_was_not_reached_counts_as_empty() -> None:
    silent = made("1", ("q0", ""), real=("a", "b", "c"), ended_by="agent_silent")
    due = due_turns([silent], max_turns=2)
    assert [(outcome.id, outcome.question, outcome.references, outcome.answer) for outcome in due] == [
        ("1#1", "q0", ("a",), ""), ("1#2", "q1", ("b",), ""),
    ]
    assert {outcome.group for outcome in due} == {"1"}


def test_endings_are_counted() -> None:
    talks = [made("1", ("a", "b")), made("2", ("a", "b"), ended_by="goal"), made("3", ("a", "b"))]
    assert endings(talks) == {"goal": 1, "turns": 2}


def test_nothing_is_scored_that_is_not_there() -> None:
    scores = simulation_scores([made("1", ("a", "b"), reached=False)], max_turns=8, draws=0)
    assert [score.name for score in scores] == ["goal_reached", "turns"]
    assert not any(math.isnan(score.value) for score in scores)
