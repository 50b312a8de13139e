"""A file of prompts to conversations that wait for an answer.

A text file has one prompt a line. Any other source that training reads will do too: rows with a `prompt` or with
`messages`, and every data format besides; where a row ends with an answer, that answer is what the model is asked for,
and is kept beside the model's own as `reference`.
"""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chulengo.data.types import Message, Record
from chulengo.errors import DataError

if TYPE_CHECKING:
    from chulengo.data.prompts import PromptTemplate

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt.

    Attributes:
        id: the row's own `id`, else its number from 1; unique in the file.
        messages: the turns before the answer; a raw prompt is one message of role `text`.
        source: file and line.
        reference: the row's own answer, when it has one.
    """

    id: str
    messages: tuple[Message, ...]
    source: str
    reference: str | None = None


def read_prompts(
    spec: str, *, raw: bool = False, format_name: str = "auto", columns: Mapping[str, str] | None = None,
    template: PromptTemplate | None = None, hub_split: str = "train", offline: bool = False,
) -> list[PromptRow]:
    """Returns the prompts of a source, in its order.

    Args:
        spec: a text file with one prompt a line, or any data source.
        raw: prompts are plain text to go on from, not messages.
        format_name: a data format, or auto.
        columns: our field name -> the data's column name.
        template: a prompt template that names the columns.
        hub_split: which split of a Hub data set.
        offline: no network.

    Raises:
        DataError: the source is missing, empty or broken, a row has no prompt, or two rows have the same id.
    """
    path = Path(spec).expanduser()
    if path.is_file() and path.name.lower().removesuffix(".gz").endswith(".txt"):
        rows = list(_lines(path, raw))
    else:
        rows = list(_rows(spec, raw, format_name, columns or {}, template, hub_split, offline))
    if not rows:
        raise DataError(f"{spec} has no prompts.", allowed="one prompt a line, or rows with prompt or messages")
    seen: dict[str, str] = {}
    for row in rows:
        if row.id in seen:
            raise DataError(
                f"{row.source} and {seen[row.id]} have the same id {row.id!r}.",
                next_step="give every row an id of its own, or none",
            )
        seen[row.id] = row.source
    return rows


def with_system(row: PromptRow, system: str | None) -> PromptRow:
    """Returns the row with this system prompt, unless it has one of its own or is raw text."""
    if system is None or row.messages[0].role in ("system", "text"):
        return row
    return replace(row, messages=(Message("system", system), *row.messages))


def prompt_row(text: str, *, raw: bool = False) -> PromptRow:
    """Returns the one prompt that was typed."""
    return PromptRow("1", (Message("text" if raw else "user", text),), "--prompt")


def _lines(path: Path, raw: bool) -> Iterator[PromptRow]:
    packed = path.name.lower().endswith(".gz")
    try:
        with gzip.open(path, "rt", encoding="utf-8") if packed else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if text := line.strip("\r\n") if raw else line.strip():
                    yield PromptRow(str(number), (Message("text" if raw else "user", text),), f"{path}:{number}")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path} is not readable UTF-8 text: {error}") from error


def _rows(
    spec: str, raw: bool, format_name: str, columns: Mapping[str, str], template: PromptTemplate | None,
    hub_split: str, offline: bool,
) -> Iterator[PromptRow]:
    from chulengo.data.formats import detect_format
    from chulengo.data.sources import read_records

    records = read_records(spec, hub_split=hub_split, offline=offline)
    head = list(itertools.islice(records, 100))
    as_is = format_name == "auto" and template is None and not columns
    named = raw or (as_is and any(_has_prompt(record) for record in head))
    chosen = format_name
    if not named and format_name == "auto":
        chosen = "template" if template is not None else detect_format(head)
    for number, record in enumerate(itertools.chain(head, records), 1):
        own = record.fields.get("id")
        messages = _own_messages(record, raw) if named else _from_format(record, chosen, template, columns)
        reference = None
        if messages[-1].role == "assistant":
            messages, reference = messages[:-1], messages[-1].content
        if not messages:
            raise DataError(f"{record.source} has an answer and no question.")
        yield PromptRow(str(number) if own is None else str(own), messages, record.source, reference)


def _has_prompt(record: Record) -> bool:
    return isinstance(record.fields.get("prompt"), str | list) and "messages" not in record.fields


def _own_messages(record: Record, raw: bool) -> tuple[Message, ...]:
    given = record.fields.get("prompt")
    if raw:
        text = given if isinstance(given, str) else record.fields.get("text")
        if not isinstance(text, str):
            raise _no_prompt(record, "a row with prompt or text, for --raw")
        return (Message("text", text),)
    if isinstance(given, str) and given.strip():
        system = record.fields.get("system")
        first = (Message("system", system),) if isinstance(system, str) and system.strip() else ()
        return (*first, Message("user", given))
    if isinstance(given, list) and given:
        return tuple(_message(turn, record) for turn in given)
    raise _no_prompt(record, "a row with prompt: a text, or a list of messages")


def _message(turn: Any, record: Record) -> Message:
    role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
    if role not in ROLES or not isinstance(content, str):
        raise _no_prompt(record, 'messages such as {"role": "user", "content": "…"}')
    return Message(role, content)


def _from_format(
    record: Record, name: str, template: PromptTemplate | None, columns: Mapping[str, str]
) -> tuple[Message, ...]:
    from chulengo.data.formats import to_example

    example = to_example(record, name, template=template, columns=columns)
    if not example.messages or example.kind == "text" or example.messages[0].role == "text":
        raise _no_prompt(record, "rows with a prompt; --raw goes on from plain text")
    return example.messages


def _no_prompt(record: Record, allowed: str) -> DataError:
    return DataError(f"{record.source} has no prompt (its columns: {', '.join(record.fields) or 'none'}).",
                     allowed=allowed)
