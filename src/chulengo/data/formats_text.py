"""Chats written into one string, and raw text: Llama 2, Guanaco, hh-rlhf, plain.

A string with markers in it cannot always be read back: nothing escapes a marker that somebody typed. What can be
decided is decided by the outer structure, and the rest by a stated rule, never by chance:

Llama 2, `<s>[INST] user [/INST] answer </s>` again and again:
  - a turn ends only where `</s>` is followed by another `[INST]` (with or without `<s>`, so Mistral's form is read
    too) and an answer has begun before it; `</s>`, `<s>` and `[INST]` anywhere else are text;
  - the user's part ends at the `[/INST]` that closes its `[INST]` when those in between come in pairs, so a quoted
    example stays whole; when they do not pair up, at the first one (a lone `[INST]` in the question and a lone
    `[/INST]` in the answer look like a pair, and the answer's first words go to the question);
  - `<<SYS>>` counts only at the very start of the first turn, and up to the first `<</SYS>>`;
  - a string that quotes `</s><s>[INST]` after a `[/INST]` is the one thing nobody can read: it becomes a turn.
Guanaco, `### Human: … ### Assistant: …`, and hh-rlhf, blank line and `Human:` / `Assistant:`:
  - a marker counts only when it is that speaker's turn to speak; out of turn it is text, and so is every other
    heading. A quoted dialogue that alternates on from where it stands is read as turns.
Spaces around a turn belong to the markers (Meta's rule strips them too) and are taken off.
"""

from __future__ import annotations

import re

from chulengo.data.format_definition import Fields, Format, column, value
from chulengo.data.types import Example, Message, Role
from chulengo.errors import DataError

TEXT = {"text": ("text",)}
_LLAMA2_START = re.compile(r"\s*(?:<s>)?\s*\[INST\]")
_LLAMA2_BORDER = re.compile(r"</s>\s*(?:<s>)?\s*\[INST\]")
_INST = re.compile(r"\[(/?)INST\]")
_LAST_END = re.compile(r"\s*</s>\s*\Z")
_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>", re.DOTALL)
_GUANACO_START = re.compile(r"\s*###\s?(?:Human|System):")
_GUANACO = re.compile(r"(?<!#)###\s?(Human|Assistant):")
_GUANACO_SYSTEM = re.compile(r"(?<!#)###\s?System:")
_HH = re.compile(r"(?:\n\n|\A)(Human|Assistant):")
_SPEAKERS: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


def llama2_turns(text: str) -> tuple[Message, ...]:
    """Returns the turns of one Llama 2 string.

    Raises:
        DataError: the string does not start with `[INST]`, or its first turn has no `[/INST]`.
    """
    start = _LLAMA2_START.match(text)
    if start is None:
        raise DataError(f"the text does not start with <s>[INST]: {text[:60]!r}")
    body = _LAST_END.sub("", text[start.end() :], count=1)
    turns: list[Message] = []
    for part in _llama2_parts(body):
        user, answer = _llama2_split(part)
        system = _SYSTEM.match(user) if not turns else None
        if system is not None:
            turns.append(Message("system", system.group(1).strip()))
            user = user[system.end() :]
        turns.append(Message("user", user.strip()))
        turns.append(Message("assistant", answer.strip()))
    return tuple(turns if turns[-1].content else turns[:-1])  # a last turn without answer is the user's


def _llama2_parts(body: str) -> list[str]:
    parts, start = [], 0
    for border in _LLAMA2_BORDER.finditer(body):
        if "[/INST]" in body[start : border.start()]:
            parts.append(body[start : border.start()])
            start = border.end()
    return [*parts, body[start:]]


def _llama2_split(part: str) -> tuple[str, str]:
    depth, first = 1, None
    for mark in _INST.finditer(part):
        depth += -1 if mark.group(1) else 1
        if mark.group(1) and first is None:
            first = mark
        if depth == 0:
            return part[: mark.start()], part[mark.end() :]
    if first is None:
        raise DataError(f"a turn has no [/INST]: {part[:60]!r}")
    return part[: first.start()], part[first.end() :]


def guanaco_turns(text: str) -> tuple[Message, ...]:
    """Returns the turns of one `### Human: … ### Assistant: …` string; what stands before them is the system prompt.

    Raises:
        DataError: the string has no `### Human:`.
    """
    before, turns = _alternating(text, _GUANACO)
    if not turns:
        raise DataError(f"the text has no '### Human:': {text[:60]!r}")
    system = _GUANACO_SYSTEM.sub("", before, count=1).strip()
    return (*((Message("system", system),) if system else ()), *turns)


def hh_turns(text: str) -> tuple[Message, ...]:
    """Returns the turns of one hh-rlhf string (blank line, `Human:` or `Assistant:`, text); an empty last one stays.

    Raises:
        DataError: there is text before the first speaker.
    """
    before, turns = _alternating(text, _HH)
    if before.strip() or not turns:
        raise DataError(f"the text does not start with 'Human:': {text[:60]!r}")
    return tuple(turns)


def is_hh(text: object) -> bool:
    """Returns True for a string that starts as hh-rlhf's do."""
    return isinstance(text, str) and re.match(r"\n\nHuman:", text) is not None


def _alternating(text: str, marker: re.Pattern[str]) -> tuple[str, list[Message]]:
    turns: list[tuple[Role, int, int]] = []  # role, where its marker starts, where its text starts
    expected = "Human"
    for match in marker.finditer(text):
        if match.group(1) == expected:
            turns.append((_SPEAKERS[expected], match.start(), match.end()))
            expected = "Assistant" if expected == "Human" else "Human"
    before = text[: turns[0][1]] if turns else text
    starts = [start for _, start, _ in turns]
    messages = [
        Message(role, text[start:end].strip())
        for (role, _, start), end in zip(turns, [*starts[1:], len(text)], strict=False)
    ]
    return before, messages


def _text(fields: Fields) -> str:
    text = value(fields, TEXT["text"])
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f"column '{column(fields, TEXT['text'])}' holds {type(text).__name__}, not text")
    return text


def _starts(fields: Fields, pattern: re.Pattern[str]) -> bool:
    text = value(fields, TEXT["text"])
    return isinstance(text, str) and pattern.match(text) is not None


def _is_plain(fields: Fields) -> bool:
    text = value(fields, TEXT["text"])
    return isinstance(text, str) and not (_LLAMA2_START.match(text) or _GUANACO_START.match(text))


TEXT_FORMATS = (
    Format(
        name="llama2",
        signature="column text, starting with <s>[INST]",
        columns=TEXT,
        recognises=lambda fields: _starts(fields, _LLAMA2_START),
        answer="text",
        read_turns=lambda fields, source: Example(llama2_turns(_text(fields)), source),
    ),
    Format(
        name="guanaco",
        signature="column text, starting with ### Human:",
        columns=TEXT,
        recognises=lambda fields: _starts(fields, _GUANACO_START),
        answer="text",
        read_turns=lambda fields, source: Example(guanaco_turns(_text(fields)), source),
    ),
    Format(
        name="text",
        signature="column text without chat markers, or txt files",
        columns=TEXT,
        recognises=_is_plain,
        answer="text",
        read_turns=lambda fields, source: Example((Message("text", _text(fields)),), source, kind="text"),
    ),
)
