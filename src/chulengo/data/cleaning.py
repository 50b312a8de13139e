"""Cleaning as named, listed, counted steps.

Nothing is cleaned unless its step is named (`data.cleaning`), steps run in the order given, and the load report says
for each how many rows it changed and how many it dropped. That is the alternative to a "cleaner" that improves data
in silence: on other data the same improvement is damage (stripping `@name` from a Python course).

Text steps apply to every turn, to the rejected answer of a pair and to the references alike, so that what is compared
later was cleaned the same way. Two steps are policies rather than operations (`drop_unreadable`,
`keep_leading_answers`): they tell `load` what to do with rows that are otherwise errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from chulengo.data import cleaning_text
from chulengo.data.completeness import has_empty_turn, missing_answer
from chulengo.data.types import Example, Message
from chulengo.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class CleaningStep:
    """One step.

    Attributes:
        name: what `data.cleaning` takes.
        description: one line for the reference.
        apply: the example and the parameter to the cleaned example, or None to drop the row.
        parameter: what the number after the colon means; None: the step takes none.
    """

    name: str
    description: str
    apply: Callable[[Example, int], Example | None]
    parameter: str | None = None


@dataclass(slots=True)
class CleaningCounts:
    """How many rows each step changed and dropped, by the step's text."""

    changed: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)


def clean(example: Example, steps: Sequence[str], counts: CleaningCounts | None = None) -> Example | None:
    """Returns the example after the steps, in order, or None when one of them drops it.

    Args:
        example: the row.
        steps: `name` or `name:number` each.
        counts: where changes and drops are counted.

    Raises:
        ConfigError: an unknown step, a missing or wrong number.
    """
    for text in steps:
        step, parameter = parse_step(text)
        cleaned = step.apply(example, parameter)
        if counts is not None and cleaned is not example and cleaned != example:
            tally = counts.dropped if cleaned is None else counts.changed
            tally[text] = tally.get(text, 0) + 1
        if cleaned is None:
            return None
        example = cleaned
    return example


def parse_step(text: str) -> tuple[CleaningStep, int]:
    """Returns the step and its number (0 where it takes none) of `name` or `name:number`.

    Raises:
        ConfigError: an unknown name, a missing, superfluous or wrong number.
    """
    name, colon, number = text.partition(":")
    if name not in STEPS:
        close = nearest(name, STEPS)
        raise ConfigError(
            f"There is no cleaning step '{name}'.",
            allowed=", ".join(each.name + (":N" if each.parameter else "") for each in STEPS.values()),
            next_step=f"--set data.cleaning=[{close}]" if close else None,
        )
    step = STEPS[name]
    if step.parameter is None:
        if colon:
            raise ConfigError(f"The cleaning step {name} takes no number, but '{text}' was given.")
        return step, 0
    if not number.isdecimal():
        raise ConfigError(
            f"The cleaning step {name} needs a number of {step.parameter}, but '{text}' was given.",
            allowed=f"{name}:N with N = 0, 1, 2, …",
            next_step=f"--set data.cleaning=[{name}:10]",
        )
    return step, int(number)


def _on_texts(change: Callable[[str], str]) -> Callable[[Example, int], Example | None]:
    def apply(example: Example, _: int) -> Example:
        messages = _changed(example.messages, change)
        rejected = _changed(example.rejected, change)
        references = tuple(change(text) for text in example.references)
        if messages is example.messages and rejected is example.rejected and references == example.references:
            return example
        return replace(example, messages=messages, rejected=rejected, references=references)

    return apply


def _changed(messages: tuple[Message, ...], change: Callable[[str], str]) -> tuple[Message, ...]:
    texts = [change(message.content) for message in messages]
    if all(text == message.content for text, message in zip(texts, messages, strict=True)):
        return messages
    return tuple(replace(message, content=text) for text, message in zip(texts, messages, strict=True))


def _lengths(example: Example) -> tuple[int, int]:
    # of a pair the two whole conversations, shorter and longer, in characters
    total = sum(len(message.content) for message in example.messages)
    if not example.rejected:
        return total, total
    other = total - len(example.messages[-1].content) + sum(len(message.content) for message in example.rejected)
    return min(total, other), max(total, other)


def _drop_short(example: Example, limit: int) -> Example | None:
    return example if _lengths(example)[0] >= limit else None


def _drop_long(example: Example, limit: int) -> Example | None:
    return example if _lengths(example)[1] <= limit else None


def _drop_short_answers(example: Example, limit: int) -> Example | None:
    return None if example.answer is not None and len(example.answer) < limit else example


def _cut_leading_answers(example: Example, _: int) -> Example:
    first = next((i for i, message in enumerate(example.messages) if message.role in ("user", "text")), None)
    kept = tuple(
        message for i, message in enumerate(example.messages)
        if message.role != "assistant" or (first is not None and i > first)
    )  # fmt: skip
    return example if len(kept) == len(example.messages) else replace(example, messages=kept)


def _cut_trailing_questions(example: Example, _: int) -> Example:
    end = len(example.messages)
    while end and example.messages[end - 1].role == "user":
        end -= 1
    # a row of questions alone stays what it is: a row without an answer
    if end == len(example.messages) or not any(m.role == "assistant" for m in example.messages[:end]):
        return example
    return replace(example, messages=example.messages[:end])


def _merge_turns(example: Example, _: int) -> Example:
    merged: list[Message] = []
    for message in example.messages:
        if merged and merged[-1].role == message.role and merged[-1].trained == message.trained:
            merged[-1] = replace(message, content=f"{merged[-1].content}\n\n{message.content}")
        else:
            merged.append(message)
    return example if len(merged) == len(example.messages) else replace(example, messages=tuple(merged))


def _same(example: Example, _: int) -> Example:
    return example


_ALL = (
    CleaningStep("strip_urls", "takes out web addresses; of a markdown link the words stay",
                 _on_texts(cleaning_text.strip_urls)),
    CleaningStep("strip_handles", "takes out @name handles, not e-mail addresses",
                 _on_texts(cleaning_text.strip_handles)),
    CleaningStep("unescape_html", "turns HTML entities into characters: &amp; into &",
                 _on_texts(cleaning_text.unescape_html)),
    CleaningStep("break_lines", "turns <br> tags into line ends", _on_texts(cleaning_text.break_lines)),
    CleaningStep("strip_control_chars", "takes out invisible characters; all line ends become \\n",
                 _on_texts(cleaning_text.strip_control_chars)),
    CleaningStep("collapse_whitespace", "makes runs of blanks one; line ends, indentation and fenced code stay",
                 _on_texts(cleaning_text.collapse_whitespace)),
    CleaningStep("compose_unicode", "writes composed characters (NFC)", _on_texts(cleaning_text.compose_unicode)),
    CleaningStep("merge_turns", "joins turns of the same speaker in a row by an empty line", _merge_turns),
    CleaningStep("cut_leading_answers", "takes out what the assistant says before the first user turn",
                 _cut_leading_answers),
    CleaningStep("cut_trailing_questions", "takes out user turns after the last answer", _cut_trailing_questions),
    CleaningStep("drop_unanswered", "drops rows without an answer",
                 lambda example, _: None if missing_answer(example) else example),
    CleaningStep("drop_empty", "drops rows with an empty turn anywhere, or without text",
                 lambda example, _: None if has_empty_turn(example) else example),
    CleaningStep("drop_short", "drops rows with fewer characters in all", _drop_short, "characters"),
    CleaningStep("drop_long", "drops rows with more characters in all", _drop_long, "characters"),
    CleaningStep("drop_short_answers", "drops rows whose last answer is shorter", _drop_short_answers, "characters"),
    CleaningStep("drop_unreadable", "drops rows that the format cannot read (tool calls, unknown roles)", _same),
    CleaningStep("keep_leading_answers", "allows conversations that the assistant starts (ChatML can render them)",
                 _same),
)  # fmt: skip
STEPS: dict[str, CleaningStep] = {step.name: step for step in _ALL}
