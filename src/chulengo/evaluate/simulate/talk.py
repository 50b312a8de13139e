"""Client and agent in turn, all conversations of a pool together.

A speaker is a function from conversations to answers, so that this file knows no model: two adapters of one base, one
model twice, or a script in a test are the same to it. In each round every conversation of the pool gets one turn of
the client and one of the agent, each as one batched call; a conversation that has ended is handed out at once and its
place is taken by the next, so the batches stay full and what is finished can be written while others go on.

A turn's random numbers come from the seed, the conversation's id, the turn's number and the speaker alone. Neither the
pool's size, nor the other conversations, nor a restart change a transcript (but for the limit that the token engine
states: logits may differ in their last bits between batch sizes).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from chulengo.data.types import Message
from chulengo.errors import RenderError
from chulengo.evaluate.simulate.client import agent_messages, client_messages
from chulengo.evaluate.simulate.goals import says
from chulengo.evaluate.simulate.scenarios import Scenario
from chulengo.generate.engine import Answer

Speaker = Callable[[Sequence[Sequence[Message]], Sequence[int]], list[Answer]]
Ending = Literal["goal", "client_stop", "turns", "script", "context", "client_silent", "agent_silent"]
ENDINGS: dict[Ending, str] = {
    "goal": "the agent has said all that the goal asks for",
    "client_stop": "the client said its stop phrase",
    "turns": "the most turns were reached",
    "script": "the client's lines had all been said",
    "context": "a model's context was full",
    "client_silent": "the client said nothing",
    "agent_silent": "the agent said nothing",
}


@dataclass(frozen=True, slots=True)
class Said:
    """One turn of one speaker.

    Attributes:
        text: what was said.
        by_model: False for a line of the script; the rest is then empty.
        seed: asking the same again with this seed gives the same text.
        num_tokens: generated tokens.
        finish_reason: see `Answer.finish_reason`.
    """

    text: str
    by_model: bool = False
    seed: int | None = None
    num_tokens: int | None = None
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A conversation to be had: a scenario, for the nth time."""

    id: str
    scenario: Scenario
    repeat: int = 1


@dataclass(frozen=True, slots=True)
class Conversation:
    """A finished conversation.

    Attributes:
        asked: what it was about.
        client: what the client said, turn by turn.
        agent: what the agent answered; one fewer than the client's where it ended with the client.
        ended_by: see `ENDINGS`.
        reached: whether the goal was reached; None: the scenario has none.
        met: for each condition of the goal the agent's turn (from 1) that fulfilled it, or None.
    """

    asked: Asked
    client: tuple[Said, ...]
    agent: tuple[Said, ...]
    ended_by: Ending
    reached: bool | None
    met: tuple[int | None, ...] = ()


def conversations(scenarios: Sequence[Scenario], repeats: int = 1) -> list[Asked]:
    """Returns every scenario `repeats` times; the first time under its own id, then as `id/2`, `id/3`, …"""
    return [
        Asked(scenario.id if repeat == 1 else f"{scenario.id}/{repeat}", scenario, repeat)
        for scenario in scenarios
        for repeat in range(1, repeats + 1)
    ]


def turn_seed(seed: int, conversation: str, turn: int, speaker: str) -> int:
    """Returns the seed of one turn: 48 bits of sha256 over the run's seed, the conversation's id, turn and speaker."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{turn}:{speaker}:{conversation}".encode()).digest()[:6], "big")


def talk(
    asked: Iterable[Asked], client: Speaker, agent: Speaker, *, max_turns: int, seed: int = 0, pool_size: int = 64
) -> Iterator[Conversation]:
    """Yields every conversation when it has ended, in the order in which they end.

    Args:
        asked: the conversations to be had.
        client: speaks as the client; reads the roles swapped. Not called for scripts.
        agent: speaks as the agent.
        max_turns: most turns of the agent in a conversation.
        seed: where the random numbers start.
        pool_size: conversations that are held at a time.
    """
    waiting = iter(asked)
    pool: list[_Live] = []
    while True:
        pool += [_Live(each) for each in itertools.islice(waiting, pool_size - len(pool))]
        if not pool:
            return
        _client_turns(pool, client, seed)
        _agent_turns([live for live in pool if live.ended_by is None], agent, max_turns, seed)
        for live in pool:
            if live.ended_by is not None:
                yield live.finished()
        pool = [live for live in pool if live.ended_by is None]


@dataclass(slots=True)
class _Live:
    asked: Asked
    client: list[Said] = field(default_factory=list)
    agent: list[Said] = field(default_factory=list)
    ended_by: Ending | None = None

    @property
    def scenario(self) -> Scenario:
        return self.asked.scenario

    def pairs(self) -> list[tuple[str, str]]:
        return [(asked.text, said.text) for asked, said in zip(self.client, self.agent, strict=False)]

    def met(self) -> tuple[int | None, ...]:
        goal = self.scenario.met_when
        return () if goal is None else tuple(goal.met_in([said.text for said in self.agent]))

    def finished(self) -> Conversation:
        assert self.ended_by is not None
        met = self.met()
        reached = None
        if self.scenario.has_goal:
            reached = all(turn is not None for turn in met) if met else self.ended_by == "client_stop"
        return Conversation(self.asked, tuple(self.client), tuple(self.agent), self.ended_by, reached, met)


def _client_turns(pool: Sequence[_Live], client: Speaker, seed: int) -> None:
    speaking = []
    for live in pool:
        turn = len(live.client)
        if turn < len(live.scenario.script):
            live.client.append(Said(live.scenario.script[turn]))
        else:
            speaking.append(live)
    seeds = [turn_seed(seed, live.asked.id, len(live.client) + 1, "client") for live in speaking]
    prompts = [client_messages(live.scenario, live.pairs()) for live in speaking]
    for live, answer in zip(speaking, _spoken(client, prompts, seeds, speaking), strict=True):
        if _no_room(answer):
            live.ended_by = "context"
        elif not answer.text.strip():
            live.ended_by = "client_silent"
        else:
            live.client.append(_said(answer))
    for live in pool:
        stop = live.scenario.client_stop
        if live.ended_by is None and stop is not None and says(live.client[-1].text, stop):
            live.ended_by = "client_stop"


def _agent_turns(pool: Sequence[_Live], agent: Speaker, max_turns: int, seed: int) -> None:
    seeds = [turn_seed(seed, live.asked.id, len(live.client), "agent") for live in pool]
    prompts = [agent_messages(live.scenario, live.pairs(), live.client[-1].text) for live in pool]
    for live, answer in zip(pool, _spoken(agent, prompts, seeds, pool), strict=True):
        if _no_room(answer):
            live.ended_by = "context"
            continue
        live.agent.append(_said(answer))
        met = live.met()
        if not answer.text.strip():
            live.ended_by = "agent_silent"
        elif met and None not in met:
            live.ended_by = "goal"
        elif not live.scenario.played and len(live.agent) == len(live.scenario.script):
            live.ended_by = "script"
        elif len(live.agent) >= max_turns:
            live.ended_by = "turns"


def _spoken(
    speaker: Speaker, prompts: list[list[Message]], seeds: list[int], pool: Sequence[_Live]
) -> Sequence[Answer]:
    if not prompts:
        return ()
    try:
        return speaker(prompts, seeds)
    except RenderError as error:
        where = pool[0].scenario.source
        raise RenderError(f"{where} or one after it: {error.given}", allowed=error.allowed,
                          next_step=error.next_step) from error


def _no_room(answer: Answer) -> bool:
    return answer.finish_reason == "context" and not answer.ids


def _said(answer: Answer) -> Said:
    return Said(answer.text.strip(), True, answer.seed, len(answer.ids), answer.finish_reason)
