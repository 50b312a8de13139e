"""The little world of the embedded model: writes the text that it is pretrained on.

What: conversations of a help desk for llama treks, and some plain text. Each document is drawn from its own
seed, so document number i of seed s is the same wherever and in whatever order it is written.

Why so: a model of four million parameters can speak well about very little. The world is that little: one kind of
company, four kinds of things, some forty topics, each asked in many wordings. The facts are drawn anew for every
conversation and stand in the system prompt, so the model must learn to *read* questions rather than to remember
answers; and one company without a fact sheet (`company.home_company`) is the same in every conversation, so that
it also learns to answer from memory. Fine-tuning on a new company uses both.

Limits: English only, no arithmetic beyond comparing two numbers, no knowledge of the real world. The demo
company's facts, persona and answer format never occur here (a test checks it).
"""

import random
from collections.abc import Callable
from typing import TypeAlias

from chulengo.nano import desk as desks
from chulengo.nano import dialogues
from chulengo.nano.company import Company, draw_company, home_company
from chulengo.nano.desk import Desk, Pair
from chulengo.nano.dialogues import home_speaker
from chulengo.nano.manners import Manner, apply, draw_manners
from chulengo.nano.names import person_name
from chulengo.nano.patterns import expand, pick
from chulengo.nano.sheets import write_sheet
from chulengo.nano.stories import write_text

Message: TypeAlias = dict[str, str]
Turn: TypeAlias = Callable[[Desk], list[Pair]]

TURNS: tuple[tuple[Turn, float], ...] = (
    (desks.fact_turn, 40),
    (desks.follow_turn, 20),
    (desks.swap_turn, 9),
    (desks.clarify_turn, 4),
    (desks.unknown_turn, 3),
    (desks.list_turn, 3),
    (desks.about_turn, 3),
    (desks.reverse_turn, 2),
    (dialogues.extreme_turn, 2),
    (dialogues.check_turn, 3),
    (dialogues.booking_turn, 2),
    (dialogues.lore_turn, 4),
    (dialogues.advice_turn, 4),
    (dialogues.talk_turn, 6),
    (dialogues.introduce_turn, 2),
    (dialogues.off_topic_turn, 4),
)
_TURN_KINDS = tuple(turn for turn, _ in TURNS)
_TURN_WEIGHTS = tuple(weight for _, weight in TURNS)
_NUM_TURNS = ((1, 2, 3, 4, 5, 6, 8, 11, 20), (26, 26, 18, 12, 8, 5, 3, 2, 1))

_ROLES = (
    "You are the help desk of {c}.",
    "You [work|answer questions|answer guests] [for|at] {c}.",
    "You are [an assistant|a friendly assistant|the assistant] [of|for|at] {c}.",
    "This is the help desk of {c}.",
    "You answer the [guests|customers] of {c}.",
    "You are the chat desk of {c}, a company for llama treks.",
)
_NAMED_ROLES = (
    "You are {p}, [a guide|the help desk|a herder|an assistant|a clerk] at {c}.",
    "Your name is {p}. You work for {c}.",
    "You are {p} from {c}.",
    "Your name is {p} and you answer the guests of {c}.",
    "{p} is your name. {c} is your company.",
)
_NAMED_ALONE = ("Your name is {p}.", "You are {p}.", "You are called {p}.", "{p} is your name.")


def system_prompt(company: Company, speaker: str | None, manners: list[Manner], rng: random.Random) -> str:
    """Returns role, manners and fact sheet in one text; empty when there is nothing to say."""
    slots = {"c": company.name, "p": speaker or ""}
    role = ""
    if not company.is_home:
        role = expand(pick(rng, _NAMED_ROLES if speaker else _ROLES), rng, slots)
    elif speaker:
        role = expand(pick(rng, _NAMED_ALONE), rng, slots)
    rules = " ".join(manner.instruction for manner in manners)
    sheet = "" if company.is_home else write_sheet(company, rng)
    head = f"{role} {rules}".strip()
    if not sheet:
        return head
    gap = pick(rng, ("\n", "\n\n", "\n"))
    if rules and rng.random() < 0.3:
        return f"{role}{gap}{sheet}{gap}{rules}"
    return f"{head}{gap}{sheet}"


_GREETINGS = ("Hi!", "Hello!", "Hello,", "Hi,", "Good morning!", "Hey,", "Excuse me,", "Good day,", "Quick question:")
_THANKS = ("Thanks!", "Thank you!", "Thank you.", "Please help.", "Please.")
_CONTEXTS = (
    "We are a family of four.",
    "I am new here.",
    "I am planning my holiday.",
    "My sister told me about you.",
    "We come in summer.",
    "I have one more question.",
    "We like walking.",
)


def _typo(text: str, rng: random.Random) -> str:
    position = 1 + int(rng.random() * max(1, len(text) - 2))
    if rng.random() < 0.5 or position + 1 >= len(text):
        return text[:position] + text[position + 1 :]
    return text[:position] + text[position + 1] + text[position] + text[position + 2 :]


def _as_typed(question: str, is_first: bool, rng: random.Random) -> str:
    """Returns the question as guests type it: with greetings, in lower case, without the question mark."""
    draw = rng.random()
    if draw < 0.55:
        return question
    if draw < 0.68 and is_first:
        return f"{pick(rng, _GREETINGS)} {question}"
    if draw < 0.73:
        return f"{question} {pick(rng, _THANKS)}"
    if draw < 0.78:
        return f"{pick(rng, _CONTEXTS)} {question}"
    if draw < 0.85:
        return question.rstrip("?.!")
    if draw < 0.92:
        return question.lower()
    if draw < 0.95:
        return question.lower().rstrip("?.!")
    if draw < 0.97:
        return _typo(question, rng)
    return question


def _turns(desk: Desk, num_turns: int) -> list[Pair]:
    pairs: list[Pair] = []
    while len(pairs) < num_turns:
        turn = desk.rng.choices(_TURN_KINDS, _TURN_WEIGHTS)[0]
        if turn is desks.follow_turn and not pairs:
            turn = desks.fact_turn
        pairs.extend(turn(desk))
    return pairs


def write_conversation(rng: random.Random) -> list[Message]:
    """Returns the messages of one conversation."""
    is_home = rng.random() < 0.32
    company = home_company() if is_home else draw_company(rng)
    named = rng.random() < (0.15 if is_home else 0.45)
    speaker = person_name(rng) if named else None
    manners = draw_manners(rng) if rng.random() < 0.42 else []
    system = system_prompt(company, speaker, manners, rng)
    desk = Desk(rng, company, home_speaker(speaker) if is_home else speaker)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for index, (question, reply) in enumerate(_turns(desk, rng.choices(*_NUM_TURNS)[0])):
        messages.append({"role": "user", "content": _as_typed(question, index == 0, rng)})
        messages.append({"role": "assistant", "content": apply(manners, reply)})
    return messages


def write_document(seed: int, index: int) -> dict[str, object]:
    """Returns document `index`: ``{"messages": [...]}`` or, one in sixteen, ``{"text": "..."}``."""
    rng = random.Random(f"{seed}/{index}")
    if rng.random() < 1 / 16:
        return {"text": write_text(rng)}
    return {"messages": write_conversation(rng)}
