"""Rows to items: which answers of a conversation are asked for, and which passages of a plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from chulengo.data.types import Example, Message
from chulengo.errors import DataError
from chulengo.evaluate.tasks import Task

NAMED = 5  # rows or ids shown in an error
FEWEST_DOCUMENTS = 20  # with fewer texts a passage is a group of its own: there would be too few to draw from

_WORD = re.compile(r"\S+")


@dataclass(frozen=True, slots=True)
class Item:
    """One question and what is accepted as its answer.

    Attributes:
        id: unique in the data.
        group: the conversation; see `evaluate.metrics.metric.Outcome`.
        question: the text before the answer, for people.
        references: accepted answers; () where the task has none.
        messages: the prompt; () when prompts were not asked for. A raw text to go on with is one message `text`.
        asked_before: how many earlier user turns of `user_turns` come first, each answered by the model itself.
    """

    id: str
    group: str
    question: str
    references: tuple[str, ...]
    messages: tuple[Message, ...] = ()
    asked_before: int = 0


class Row(Protocol):
    """What is needed of a row of the data."""

    id: str
    question: str
    references: tuple[str, ...]
    fields: Any
    example: Example | None


def question_text(example: Example) -> str:
    """Returns what comes before the last answer, for people: the user's text, or the turns with who says them."""
    turns = [m for m in example.messages[: -1 if example.answer is not None else None] if m.role != "system"]
    return turns[0].content if len(turns) == 1 else "\n\n".join(f"{m.role}: {m.content}" for m in turns)


def items_of(task: Task, rows: Sequence[Any], groups: Sequence[str]) -> tuple[Item, ...]:
    """Returns the items of rows, in their order.

    Args:
        task: what is asked.
        rows: of the data; see `Row`.
        groups: the conversation of each row.

    Raises:
        DataError: rows without an accepted answer, without questions, or with nothing to go on from.
    """
    if task.user_turns:
        return tuple(item for row, group in zip(rows, groups, strict=True) for item in _asked_in_turn(task, row, group))
    if task.kind == "text":
        return _passages(task, rows, groups)
    if task.turns == "each" and all(row.example is not None for row in rows):
        items = [item for row, group in zip(rows, groups, strict=True) for item in _each_answer(row, group)]
    else:
        items = [_last_answer(row, group) for row, group in zip(rows, groups, strict=True)]
    without = [item.id for item in items if not item.references]
    if without:
        more = ", …" if len(without) > NAMED else ""
        raise DataError(
            f"{len(without)} of {len(items)} items have no accepted answer: {', '.join(without[:NAMED])}{more}.",
            next_step="mend those rows, or leave them out: --set data.cleaning=[drop_unanswered]",
        )
    return tuple(items)


def _last_answer(row: Row, group: str) -> Item:
    example = row.example
    if example is None:
        return Item(row.id, group, row.question, row.references)
    turns = example.messages[:-1] if example.answer is not None else example.messages
    return Item(row.id, group, row.question, row.references, turns)


def _each_answer(row: Row, group: str) -> list[Item]:
    assert row.example is not None
    messages = row.example.messages
    places = [place for place, message in enumerate(messages) if message.role == "assistant"]
    made = []
    for number, place in enumerate(places, 1):
        asked = question_text(Example(messages[: place + 1], row.id))
        last = place == len(messages) - 1
        references = row.references if last else tuple(t for t in (messages[place].content,) if t.strip())
        made.append(Item(f"{row.id}/{number}", group, asked, references, messages[:place]))
    return made or [Item(row.id, group, row.question, ())]


def _asked_in_turn(task: Task, row: Row, group: str) -> list[Item]:
    turns = row.fields.get(task.user_turns)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise DataError(f"The row {row.id} has no list of questions in the column '{task.user_turns}'.",
                        next_step="name the right column in the task: user_turns: COLUMN")
    return [
        Item(f"{row.id}/{number}", group, "\n\n".join(turns[:number]), (),
             tuple(Message("user", turn) for turn in turns[:number]), number - 1)
        for number in range(1, len(turns) + 1)
    ]


def _passages(task: Task, rows: Sequence[Row], groups: Sequence[str]) -> tuple[Item, ...]:
    """Returns `num_prompts` passages that lie evenly over all texts, none overlapping another."""
    if not task.answer_metrics:
        return ()
    size = task.prompt_words + task.answer_words
    found = []
    for row, group in zip(rows, groups, strict=True):
        text = row.example.messages[0].content if row.example is not None else ""
        words = list(_WORD.finditer(text))
        for number, start in enumerate(range(0, len(words) - size + 1, size), 1):
            border, end = words[start + task.prompt_words].start(), words[start + size - 1].end()
            asked = text[words[start].start() : border].rstrip()
            own = group if len(rows) >= FEWEST_DOCUMENTS else f"{row.id}/{number}"
            found.append(Item(f"{row.id}/{number}", own, asked, (text[border:end],), (Message("text", asked),)))
    if not found:
        raise DataError(f"No text is as long as a prompt and its answer, {size} words.",
                        next_step="name longer texts, or set prompt_words and answer_words in a task of your own")
    number = min(task.num_prompts, len(found))
    return tuple(found[place * len(found) // number] for place in range(number))
