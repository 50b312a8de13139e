"""What a format is: how it is recognised, which columns it reads, and how one row becomes a conversation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from chulengo.data.prompts import PromptTemplate
from chulengo.data.types import Example, Message

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class NamedValues:
    """The texts that a row of columns gives, under our names.

    Attributes:
        named: our field name -> text; what a template's `{name}` stands for.
        references: all accepted answers, where there are several.
        history: earlier turns of the same conversation.
    """

    named: dict[str, str]
    references: tuple[str, ...] = ()
    history: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class Format:
    """One way in which data sets write their rows.

    Attributes:
        name: what `--set data.format=` takes.
        signature: in words, what a row of it looks like; shown when it was detected and when nothing was.
        columns: our field name -> the column names that count as it, the usual one first.
        recognises: says whether a row looks like this format.
        answer: our name of the field that holds the answer; named in errors about rows without one.
        read_turns: makes the example, for formats whose rows hold the conversation itself; else None.
        read_columns: gives the texts by name, for formats of columns; `template` makes the conversation of them.
        template: the default prompt template of a format of columns.
    """

    name: str
    signature: str
    columns: Mapping[str, tuple[str, ...]]
    recognises: Callable[[Fields], bool]
    answer: str
    read_turns: Callable[[Fields, str], Example] | None = None
    read_columns: Callable[[Fields], NamedValues] | None = None
    template: PromptTemplate | None = field(default=None)


def column(fields: Fields, names: tuple[str, ...]) -> str | None:
    """Returns the first of `names` that the row has (else ignoring case and outer blanks), or None."""
    for name in names:
        if name in fields:
            return name
    lowered = {str(key).strip().lower(): key for key in fields}
    return next((str(lowered[name.lower()]) for name in names if name.lower() in lowered), None)


def value(fields: Fields, names: tuple[str, ...]) -> Any:
    """Returns the value of the first of `names` that the row has, or None."""
    for name in names:  # asked some times a row, and nearly always found so
        if name in fields:
            return fields[name]
    found = column(fields, names)
    return None if found is None else fields[found]
