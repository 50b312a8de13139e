"""The share of conversations whose last answer is, letter for letter, one of the accepted ones.

The strictest score there is: no lower-casing, no dropping of articles or punctuation. It suits answers that are right
or wrong (a fact, a format, a label) and says nothing about long free answers, where it is near 0 for every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chulengo.data.types import Example, Message
from chulengo.errors import DataError
from chulengo.evaluate.results import Score, wilson_interval
from chulengo.generate.engine import Answer

VERSION = "exact-match/1"
DEFINITION = (
    "Share of conversations whose generated last answer equals an accepted answer after white space at both ends is "
    "stripped from both; case and punctuation count. Earlier turns are given as in the data. An answer cut by the "
    "token limit or the context is scored as it is. Interval: Wilson, 95 %."
)


def question_of(example: Example) -> list[Message]:
    """Returns the turns before the last answer."""
    return list(example.messages[:-1])


def accepted_answers(example: Example) -> tuple[str, ...]:
    """Returns every accepted answer, stripped: the row's own and its references."""
    answers = [example.answer or "", *example.references]
    return tuple(dict.fromkeys(answer.strip() for answer in answers))


def answerable(examples: Sequence[Example]) -> list[Example]:
    """Returns the examples that end with an answer of at least one letter.

    Raises:
        DataError: there is none.
    """
    kept = [example for example in examples if (example.answer or "").strip() and len(example.messages) > 1]
    if not kept:
        raise DataError(
            ("The one row has no answer at its end" if len(examples) == 1 else
             f"None of the {len(examples):,} rows ends with an answer") + ", so exact match has nothing to compare.",
            next_step="leave out --exact-match, or give rows with a question and an answer",
        )
    return kept


def exact_match(examples: Sequence[Example], answers: Sequence[Answer]) -> Score:
    """Returns the score of generated answers to the questions of `examples` (see `question_of`).

    Args:
        examples: one or more, each ending with an answer.
        answers: what was generated, one an example.
    """
    items: list[dict[str, Any]] = []
    for example, answer in zip(examples, answers, strict=True):
        accepted = accepted_answers(example)
        items.append({
            "source": example.source,
            "question": example.messages[-2].content,
            "accepted": list(accepted),
            "answer": answer.text.strip(),
            "correct": answer.text.strip() in accepted,
            "finish_reason": answer.finish_reason,
        })
    correct = sum(bool(item["correct"]) for item in items)
    cut = sum(item["finish_reason"] != "stop" for item in items)
    return Score(
        name="exact_match", version=VERSION, definition=DEFINITION, value=correct / len(items), num_items=len(items),
        interval=wilson_interval(correct, len(items)), details={"correct": correct, "cut_answers": cut},
        items=tuple(items),
    )
