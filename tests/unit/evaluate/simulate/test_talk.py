"""Conversations of scripted speakers: no model, every rule by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from chulengo.data.types import Message
from chulengo.evaluate.simulate.goals import read_goal
from chulengo.evaluate.simulate.scenarios import Scenario
from chulengo.evaluate.simulate.talk import Asked, Conversation, Speaker, conversations, talk, turn_seed
from chulengo.generate.engine import Answer

PLAYED = Scenario("p", "here", goal="x")


def speaker(say: Callable[[Sequence[Message], int], str]) -> Speaker:
    def speak(chats: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[Answer]:
        return [Answer(say(chat, seed), (1,), "stop", len(chat), seed, 0.0)
                for chat, seed in zip(chats, seeds, strict=True)]

    return speak


def lines(*texts: str) -> Speaker:
    """Says its nth text in its nth turn."""
    return speaker(lambda chat, _: texts[sum(m.role == "assistant" for m in chat)])


def held(scenario: Scenario, client: Speaker, agent: Speaker, max_turns: int = 3) -> Conversation:
    return next(talk([Asked("c", scenario)], client, agent, max_turns=max_turns))


def test_they_speak_in_turn_and_hear_each_other() -> None:
    echo = speaker(lambda chat, _: f"<{chat[-1].content}>")
    talked = held(replace(PLAYED, script=("hi",)), echo, echo, max_turns=2)
    assert [said.text for said in talked.client] == ["hi", "<<hi>>"]
    assert [said.text for said in talked.agent] == ["<hi>", "<<<hi>>>"]
    assert [said.by_model for said in talked.client] == [False, True]
    assert (talked.ended_by, talked.reached) == ("turns", None)


def test_the_goal_ends_a_conversation() -> None:
    scenario = replace(PLAYED, met_when=read_goal({"facts": ["one", "two"]}, "here"))
    talked = held(scenario, lines("a", "b", "c"), lines("one", "nothing", "two"), max_turns=5)
    assert (talked.ended_by, talked.reached, talked.met, len(talked.agent)) == ("goal", True, (1, 3), 3)
    missed = held(scenario, lines("a", "b"), lines("one", "one"), max_turns=2)
    assert (missed.ended_by, missed.reached, missed.met) == ("turns", False, (1, None))


def test_the_clients_stop_phrase() -> None:
    scenario = replace(PLAYED, client_stop="goodbye")
    talked = held(scenario, lines("a", "Thanks. Goodbye!"), lines("x", "y"))
    assert (talked.ended_by, talked.reached, len(talked.client), len(talked.agent)) == ("client_stop", True, 2, 1)
    # with a goal of its own the phrase ends the conversation and reaches nothing
    gave_up = held(replace(scenario, met_when=read_goal({"text": "z"}, "here")), lines("goodbye"), lines("x"))
    assert (gave_up.ended_by, gave_up.reached) == ("client_stop", False)


def test_a_script_ends_with_its_last_line() -> None:
    talked = held(Scenario("s", "here", script=("a", "b"), played=False), lines(), lines("x", "y", "z"))
    assert (talked.ended_by, [said.text for said in talked.agent]) == ("script", ["x", "y"])
    short = held(Scenario("s", "here", script=("a", "b"), played=False), lines(), lines("x", "y"), max_turns=1)
    assert (short.ended_by, len(short.agent)) == ("turns", 1)


def test_silence_and_a_full_context() -> None:
    assert held(PLAYED, lines("a", " "), lines("x")).ended_by == "client_silent"
    silent = held(PLAYED, lines("a"), lines(""))
    assert (silent.ended_by, [said.text for said in silent.agent]) == ("agent_silent", [""])

    def full(chats: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[Answer]:
        return [Answer("", (), "context", 9, seed, 0.0) for seed in seeds]

    at_agent, at_client = held(PLAYED, lines("a"), full), held(PLAYED, full, lines("x"))
    assert (at_agent.ended_by, len(at_agent.client), len(at_agent.agent)) == ("context", 1, 0)
    assert (at_client.ended_by, at_client.client) == ("context", ())


@pytest.mark.parametrize("pool", [1, 2, 3, 100])
def test_a_transcript_depends_on_nothing_around_it(pool: int) -> None:
    def say(chat: Sequence[Message], seed: int) -> str:
        return f"{seed % 1000} after {len(chat)}" + (" stop" if seed % 3 == 0 else "")

    scenarios = [Scenario(f"s{n}", "here", goal="x", client_stop="stop") for n in range(7)]
    asked = conversations(scenarios, repeats=2)
    kwargs = {"max_turns": 6, "seed": 5}
    alone = {each.id: next(talk([each], speaker(say), speaker(say), **kwargs)) for each in asked}
    found = list(talk(asked, speaker(say), speaker(say), pool_size=pool, **kwargs))
    assert {each.asked.id: each for each in found} == alone
    assert len(found) == 14
    assert len({len(each.agent) for each in found}) > 1


def test_batches_stay_full() -> None:
    sizes = []

    def agent(chats: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[Answer]:
        sizes.append(len(chats))
        return lines(*"xyz")(chats, seeds)

    scenarios = [Scenario(str(n), "here", script=("a",) * (n % 3 + 1), played=False) for n in range(9)]
    assert len(list(talk(conversations(scenarios), lines(), agent, max_turns=3, pool_size=3))) == 9
    assert sum(sizes) == 18
    assert sizes[:4] == [3, 3, 3, 3]


def test_repeats_have_ids_and_random_numbers_of_their_own() -> None:
    asked = conversations([PLAYED], repeats=3)
    assert [each.id for each in asked] == ["p", "p/2", "p/3"]
    seeds = [turn_seed(0, each.id, turn, who) for each in asked for turn in (1, 2) for who in ("client", "agent")]
    assert len(set(seeds)) == 12
    assert turn_seed(0, "p", 1, "agent") == seeds[1] != turn_seed(1, "p", 1, "agent")
