"""Writes exam questions with every answer that counts as correct, to measure the embedded model.

Kinds: ``sheet`` (facts stand in the system prompt), ``home`` (facts of the company the model knows by heart),
``manner`` (a sheet and an instruction that changes the answer's form), ``follow`` (a second question that leaves
the thing out).
"""

import random
from dataclasses import dataclass

from chulengo.nano.company import draw_company, home_company
from chulengo.nano.desk import Desk, answer_slots, fact_turn, follow_turn
from chulengo.nano.dialogues import home_speaker
from chulengo.nano.manners import Manner, Reply, apply, draw_manners
from chulengo.nano.patterns import tidy
from chulengo.nano.world import Message, system_prompt

KINDS = ("sheet", "home", "manner", "follow")


@dataclass(frozen=True)
class ExamQuestion:
    """A conversation that ends with a question, and the answers that count as correct."""

    kind: str
    messages: list[Message]
    accepted: frozenset[str]


def _accepted(desk: Desk, reply: Reply, manners: list[Manner]) -> frozenset[str]:
    """Returns `reply` in every wording of its topic, with the manners applied."""
    replies = [reply]
    thing, topic = desk.thing, desk.topic
    value = thing.facts.get(topic.key) if thing and topic else None
    if thing and topic and value is not None:
        for use_pronoun in (False, True):
            slots = answer_slots(thing, value, use_pronoun)
            for pattern in topic.answers:
                replies.append(Reply(tidy(pattern.format_map(slots)), reply.short, reply.key, reply.subject))
    return frozenset(apply(manners, one) for one in replies)


def draw_question(kind: str, rng: random.Random) -> ExamQuestion:
    """Returns one exam question of `kind` (one of `KINDS`)."""
    company = home_company() if kind == "home" else draw_company(rng)
    manners = draw_manners(rng) if kind == "manner" else []
    desk = Desk(rng, company, home_speaker(None) if kind == "home" else None)
    system = system_prompt(company, None, manners, rng)
    pairs = fact_turn(desk)
    if kind == "follow":
        pairs += follow_turn(desk)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for question, reply in pairs[:-1]:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": apply(manners, reply)})
    question, reply = pairs[-1]
    messages.append({"role": "user", "content": question})
    return ExamQuestion(kind, messages, _accepted(desk, reply, manners))


def write_exam(seed: int, num_each: int) -> list[ExamQuestion]:
    """Returns `num_each` questions of every kind, drawn from seeds that pretraining never uses."""
    return [
        draw_question(kind, random.Random(f"exam/{seed}/{kind}/{index}")) for kind in KINDS for index in range(num_each)
    ]
