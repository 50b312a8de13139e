"""A raw row to a conversation: which format the rows are in, and the one function that reads any of them.

A format is recognised by the columns of the first rows, and where all formats look alike (a column `text`), by how
the text starts. The order of `FORMATS` breaks ties, the narrower format first: a set with `messages` and `text` is
read as messages. What was detected, and why, is in the load report; `data.format` overrides it, and `data.columns`
says under which names the data keep what a format needs.

A row without an answer is read, as a conversation that ends with the user; whether that is an error is decided in
`load`, where all such rows can be named at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chulengo.data.format_definition import Format, NamedValues, column
from chulengo.data.formats_columns import COLUMN_FORMATS
from chulengo.data.formats_text import TEXT_FORMATS
from chulengo.data.formats_turns import TURN_FORMATS
from chulengo.data.prompts import PromptTemplate, fill, named_values, template_columns
from chulengo.data.selection import group_of
from chulengo.data.types import Example, Message, Record
from chulengo.errors import ConfigError, DataError, nearest

TEMPLATE = Format(
    name="template",
    signature="any columns, with a prompt template that names them (prompt.template)",
    columns={},
    recognises=lambda fields: False,
    answer="answer",
    read_columns=lambda fields: NamedValues({}),
)
# files that come with known data sets and hold no text to learn from: columns, what is missing, where it is
_WITHOUT_TEXT = (
    ({"tweet_ids_sentence_offset", "annotations"}, "TweetSumm's annotations name tweets by number, without their text.",
     "--data FILE.csv of TweetSumm with the texts (columns dialogue, summary)"),
    ({"question_id", "model_id", "choices"}, "MT-Bench answers of a model; the questions are in another file.",
     "--data question.jsonl"),
)  # fmt: skip
_MARKED, _PLAIN = TEXT_FORMATS[:-1], TEXT_FORMATS[-1]
FORMATS: dict[str, Format] = {
    each.name: each for each in (*TURN_FORMATS, *_MARKED, *COLUMN_FORMATS, _PLAIN, TEMPLATE)
}


def format_named(name: str) -> Format:
    """Returns the format of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in FORMATS:
        close = nearest(name, FORMATS)
        raise ConfigError(
            f"There is no data format '{name}'.",
            allowed="auto, " + ", ".join(FORMATS),
            next_step=f"--set data.format={close}" if close else None,
        )
    return FORMATS[name]


def detect_format(head: Sequence[Record]) -> str:
    """Returns the name of the format that recognises most of the first rows (at least half of them).

    Raises:
        DataError: none does; the error lists the columns seen and the formats known.
    """
    counts = {name: sum(each.recognises(record.fields) for record in head) for name, each in FORMATS.items()}
    best = max(counts, key=lambda name: counts[name])
    if not head or counts[best] * 2 < len(head):
        raise unknown_format(head)
    return best


def unknown_format(head: Sequence[Record], given: str = "") -> DataError:
    """Returns the error for rows that no format (or not the one asked for) recognises."""
    seen = list(dict.fromkeys(str(name) for record in head for name in record.fields))
    shown = ", ".join(seen[:20]) + (f" and {len(seen) - 20} more" if len(seen) > 20 else "")
    where = head[0].source if head else "the data"
    for columns, what, next_step in _WITHOUT_TEXT:
        if columns <= set(seen):
            return DataError(f"{where}: {what}\n  columns: {shown}", next_step=next_step)
    known = "".join(f"\n    {each.name:18}{each.signature}" for each in FORMATS.values())
    first, second = [*seen, "COLUMN", "COLUMN"][:2]
    return DataError(
        (given or f"The format of the data is unknown (looked at {where} and the rows after it).")
        + f"\n  columns: {shown}",
        allowed=known,
        next_step=f"--set data.columns.question={first} --set data.columns.answer={second}   (the right names),\n"
        "           --set data.format=FORMAT, or a prompt template: --set prompt.template=FILE.yaml",
    )


def renamed(fields: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """Returns the row with its columns under our names; `columns` maps our name to the data's."""
    if not columns:
        return fields
    theirs = set(columns.values())
    ours = {name: fields[their] for name, their in columns.items() if their in fields}
    return {**{name: cell for name, cell in fields.items() if name not in theirs}, **ours}


def to_example(
    record: Record,
    format_name: str,
    *,
    template: PromptTemplate | None = None,
    columns: Mapping[str, str] | None = None,
) -> Example:
    """Returns the conversation of one row.

    Args:
        record: the row.
        format_name: a key of `FORMATS`.
        template: the user's prompt template, for formats of columns; None: the format's own.
        columns: our field name -> the data's column name.

    Raises:
        ConfigError: unknown format, or one that a template does not fit.
        DataError: a row that cannot be read so; its text starts with the row's source.
    """
    chosen = format_named(format_name)
    check_template(chosen, template)
    fields = renamed(record.fields, columns or {})
    try:
        if chosen.read_turns is not None:
            return chosen.read_turns(fields, record.source)
        return _filled(chosen, template or chosen.template, fields, record.source)
    except DataError as error:
        given = f"{record.source}: {error.given}"
        raise DataError(given, allowed=error.allowed, next_step=error.next_step) from error


def check_template(chosen: Format, template: PromptTemplate | None) -> None:
    """Raises `ConfigError` when a template and a format contradict each other."""
    if template is not None and chosen.read_turns is not None:
        raise ConfigError(
            f"The prompt template '{template.name}' does not apply: rows of the format {chosen.name} "
            "hold their conversation already.",
            next_step="--set data.format=template   (make the conversation from columns), or leave prompt.template out",
        )
    if template is None and chosen.read_turns is None and chosen.template is None:
        raise ConfigError(
            f"The format {chosen.name} needs a prompt template.", next_step="--set prompt.template=FILE.yaml"
        )


def _filled(chosen: Format, template: PromptTemplate | None, fields: Mapping[str, Any], source: str) -> Example:
    assert template is not None  # check_template saw to it
    assert chosen.read_columns is not None
    values = chosen.read_columns(fields)
    known = {**fields, **values.named}
    known |= named_values(template, known)
    system = fill(template.system, known) if template.system else ""
    answer = fill(template.answer, known)
    messages = [Message("system", system)] if system.strip() else []
    messages += [*values.history, Message("user", fill(template.user, known))]
    if answer.strip():
        messages.append(Message("assistant", answer))
    passage = values.named.get("context", "")
    return Example(
        tuple(messages), source, references=values.references, group=group_of(passage) if passage.strip() else ""
    )


def answer_column(chosen: Format, template: PromptTemplate | None, fields: Mapping[str, Any]) -> str:
    """Returns the name, as the data have it, of the column that holds the answer; for error messages."""
    if template is not None:
        return ", ".join(template_columns(template.answer))
    names = chosen.columns.get(chosen.answer, (chosen.answer,))
    return column(fields, names) or names[0]
