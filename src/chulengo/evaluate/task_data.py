"""The items of a task: from a data set's name to questions with their accepted answers, each under a stable id.

The ids are what everything later hangs on (predictions, resuming, comparing), so they come from the data, or from a
row's number in the whole source; a subset keeps the ids of the whole. It is the numbering of `chulengo generate`.

Scoring answers that exist needs no prompts, and filling templates is most of the work of reading 100,000 rows, so
prompts are only made when asked for.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from chulengo.data.cleaning import clean
from chulengo.data.format_definition import Format, NamedValues, value
from chulengo.data.formats import check_template, detect_format, format_named, renamed, to_example, unknown_format
from chulengo.data.prompts import PromptTemplate, as_text, fill
from chulengo.data.selection import sample, split_by_conversation
from chulengo.data.sources import file_of, is_hub_name, read_records
from chulengo.data.types import Example, Message, Record
from chulengo.errors import ConfigError, DataError, nearest
from chulengo.evaluate.task_items import NAMED, Item, items_of, question_text
from chulengo.evaluate.tasks import Split, Task

HEAD_ROWS = 20
EVERY_ROW = "all"  # the split that every task has


@dataclass(frozen=True, slots=True)
class Talk:
    """One whole row, for metrics of the loss: its id, group and conversation (or text)."""

    id: str
    group: str
    example: Example


@dataclass(frozen=True, slots=True)
class Choice:
    """What of a data set is taken, and how it is read, beside what the task says.

    Attributes:
        split: one of the task's splits; None: its default.
        format: overrides the task's.
        columns: over the task's.
        template: overrides the task's prompt.
        cleaning: cleaning steps.
        num_rows: size of a random subset of rows; None: all.
        seed: of the subset and of a held-out part.
        offline: no network.
        held_out: sources of the rows that a run held out of these data, which are what is taken; None: the split's.
        held_out_by: the run.
    """

    split: str | None = None
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    template: PromptTemplate | None = None
    cleaning: Sequence[str] = ()
    num_rows: int | None = None
    seed: int = 0
    offline: bool = False
    held_out: frozenset[str] | None = None
    held_out_by: str = ""


@dataclass(frozen=True, slots=True)
class TaskData:
    """What `read_task_data` found.

    Attributes:
        items: questions, in the order of the data.
        talks: whole rows, in the order of the data; () when prompts were not asked for.
        facts: where it came from, for the results: source, files, split, rows, hash.
    """

    items: tuple[Item, ...]
    talks: tuple[Talk, ...]
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Row:
    id: str
    group: str | None  # None: the row's own
    question: str
    references: tuple[str, ...]
    source: str
    fields: Mapping[str, Any]
    example: Example | None


def read_task_data(task: Task, source: str, choice: Choice | None = None, *, prompts: bool = True) -> TaskData:
    """Returns the items of a task over a data set.

    Args:
        task: what is asked.
        source: file, folder or Hub name.
        choice: what is taken of it.
        prompts: whether messages and talks are needed.

    Raises:
        DataError: the data cannot be read so; two rows have one id; rows have no accepted answer.
        ConfigError: the task has no such split, or the prompt does not apply.
        NetworkError: see `data.sources.read_records`.
    """
    choice = choice or Choice()
    name, split = chosen_split(task, choice.split)
    files, labels, without = _files(source, name, split)
    # what is held out is found by the conversations' first turns, and cleaning works on whole conversations
    whole = prompts or task.kind == "text" or bool(split.held_out or choice.cleaning or task.user_turns)
    rows = list(_rows(task, choice, files, split, labels, without, whole=whole))
    total = len(rows)
    if labels is not None:
        _check_labels(labels, rows, source)
    if choice.held_out is not None:
        rows = [row for row in rows if row.source in choice.held_out]
    elif split.held_out:
        apart = split_by_conversation([cast(Example, row.example) for row in rows], split.held_out, choice.seed)[1]
        chosen = {example.source for example in apart}
        rows = [row for row in rows if row.source in chosen]
    if choice.num_rows is not None:
        rows = cast(list[_Row], sample(cast(list[Example], rows), choice.num_rows, choice.seed))
    if not rows:
        raise DataError(f"{source} has no rows for the task {task.name}" + (f", split {name}." if name else "."),
                        next_step="name other data, or another --split")
    groups = _named_groups(rows)
    items = items_of(task, rows, groups)
    talks = tuple(Talk(r.id, g, r.example) for r, g in zip(rows, groups, strict=True) if prompts and r.example)
    facts = {
        "source": source, "files": files, "split": name or None, "held_out_by": choice.held_out_by or None,
        "rows_read": total, "rows": len(rows),
        "items": len(items), "num_rows": choice.num_rows, "seed": choice.seed, "cleaning": list(choice.cleaning),
        "hash": _hash(items),
    }
    return TaskData(items, talks, facts)


def chosen_split(task: Task, asked: str | None) -> tuple[str, Split]:
    """Returns name and definition of the split that is taken; "" where the task has none of its own.

    `all` is every row of the data, for every task that does not call something else so.

    Raises:
        ConfigError: the task has no such split.
    """
    name = asked or task.split
    if name in task.splits:
        return name, task.splits[name]
    if name in ("", EVERY_ROW):
        return name, Split(hub="train")
    close = nearest(name, [*task.splits, EVERY_ROW])
    raise ConfigError(
        f"The task {task.name} has no split '{name}'.", allowed=", ".join((*task.splits, EVERY_ROW)),
        next_step=f"--split {close or next(iter(task.splits), EVERY_ROW)}",
    )


def split_files(source: str, name: str, split: Split) -> list[str]:
    """Returns the sources that are read: the files of a folder that the split names, else the source itself.

    Raises:
        DataError: the folder has no file of the split.
    """
    path = Path(source).expanduser()
    if not (path.is_dir() and split.files):
        return [source]
    present = sorted(file.name for file in path.iterdir() if file.is_file())
    matches = (fnmatch.filter(present, pattern) for pattern in split.files)
    found = next((match for match in matches if match), [])
    if not found:
        raise DataError(
            f"The folder {path} has no file of the split {name} ({', '.join(split.files)}).",
            allowed=", ".join(present) or "a folder with such a file",
            next_step=f"--data with the file itself, or --split {EVERY_ROW} (every file)",
        )
    return [str(path / file) for file in found]


def _files(source: str, name: str, split: Split) -> tuple[list[str], dict[str, str] | None, frozenset[str]]:
    """Returns the sources to read, the split's labels by id, and the ids to leave out."""
    path = Path(source).expanduser()
    folder = path if path.is_dir() else path.parent
    files = split_files(source, name, split)
    given: dict[str, dict[str, str] | None] = {}
    for kind, file in (("labels", split.labels), ("without", split.without)):
        local = bool(file) and not (is_hub_name(source) and not path.exists())
        given[kind] = _labels(folder / file, name) if local else None
    return files, given["labels"], frozenset(given["without"] or ())


def _labels(path: Path, split: str) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"The split {split} needs the file {path.name} beside the data: {path}: {error.strerror or error}.",
            next_step="put it there, or choose another --split",
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}.", next_step="copy or download it again") from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path} holds no labels.", allowed='{"id": "label", …}',
                        next_step="copy or download it again")
    return {str(key): as_text(label, path.name) for key, label in content.items()}


def _check_labels(labels: Mapping[str, str], rows: Sequence[_Row], source: str) -> None:
    found = {row.id for row in rows}
    lost = [key for key in labels if key not in found]
    if lost:
        raise DataError(
            f"{len(lost)} of {len(labels)} ids of the split are not in {source}: {', '.join(lost[:NAMED])}"
            + (", …." if len(lost) > NAMED else "."), next_step="name the data that the labels belong to",
        )


def _rows(
    task: Task, choice: Choice, files: Sequence[str], split: Split, labels: Mapping[str, str] | None,
    without: frozenset[str], *, whole: bool,
) -> Iterator[_Row]:
    records = itertools.chain.from_iterable(
        read_records(file, hub_split=split.hub, offline=choice.offline) for file in files
    )
    columns = {**task.columns, **choice.columns}
    template = choice.template or task.prompt
    seen: dict[str, str] = {}
    bad: list[str] = []
    number = 0
    for _, group in itertools.groupby(records, key=lambda record: file_of(record.source)):
        head = list(itertools.islice(group, HEAD_ROWS))
        chosen = _format(task, choice, template, [Record(dict(renamed(r.fields, columns)), r.source) for r in head])
        for record in itertools.chain(head, group):
            number += 1
            own = record.fields.get(task.id)
            key = str(number) if own is None else str(own)
            if key in without or (labels is not None and key not in labels):
                continue
            if key in seen:
                raise DataError(
                    f"{record.source} and {seen[key]} have the same id {key!r} (column '{task.id}').",
                    next_step="give every row an id of its own, or name another column in the task: id: COLUMN",
                )
            seen[key] = record.source
            try:
                row = _row(task, choice, chosen, template, columns, record, key, labels, whole=whole)
            except DataError as error:
                if "drop_unreadable" not in choice.cleaning:
                    bad.append(error.given)
                continue
            if row is not None:
                yield row
    if bad:
        listed = "".join(f"\n  {text}" for text in bad[:NAMED])
        more = f"\n  and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise DataError(f"{len(bad)} of {number} rows cannot be read:{listed}{more}",
                        next_step="mend them, or: --set data.cleaning=[drop_unreadable]")


def _format(task: Task, choice: Choice, template: PromptTemplate | None, head: list[Record]) -> Format:
    if task.user_turns:
        return format_named("template")
    wanted = choice.format or task.format
    if wanted == "auto":
        try:
            wanted = detect_format(head)
        except DataError:
            if template is None:
                raise
            wanted = "template"
    chosen = format_named(wanted)
    if wanted != "template" and not any(chosen.recognises(record.fields) for record in head):
        if template is None:
            raise unknown_format(head, f"The task {task.name} reads the format {wanted} ({chosen.signature}).")
        chosen = format_named("template")
    check_template(chosen, template)
    return chosen


def _row(
    task: Task, choice: Choice, chosen: Format, template: PromptTemplate | None, columns: Mapping[str, str],
    record: Record, key: str, labels: Mapping[str, str] | None, *, whole: bool,
) -> _Row | None:
    cells = ((name, value(record.fields, (name,))) for name in task.group)
    group = next((as_text(cell, name) for name, cell in cells if cell is not None), None)
    if task.user_turns:
        return _Row(key, group, "", (), record.source, record.fields, None)
    label = None if labels is None else labels[key]
    if not whole and chosen.read_columns is not None:
        return _lean_row(task, chosen, template, renamed(record.fields, columns), record, key, group, label)
    example: Example | None = to_example(record, chosen.name, template=template, columns=columns)
    example = clean(cast(Example, example), choice.cleaning)
    if example is None or example.desirable is False:
        return None
    example = _with_gold(task, example, label)
    references = () if example.answer is None else (example.references or (example.answer,))
    return _Row(key, group, question_text(example), _accepted(references), record.source, record.fields, example)


def _lean_row(
    task: Task, chosen: Format, template: PromptTemplate | None, fields: Mapping[str, Any], record: Record, key: str,
    group: str | None, label: str | None,
) -> _Row:
    """Returns the row without its prompt, with the references that the whole row would have."""
    try:
        values = cast(Any, chosen.read_columns)(fields)
        assert isinstance(values, NamedValues)
        references = values.references
        if label is not None:
            references = (label,)
        elif not references:
            written = cast(PromptTemplate, template or chosen.template).answer
            references = (fill(written, {**fields, **values.named}),)
    except DataError as error:
        raise DataError(f"{record.source}: {error.given}") from error
    references = tuple(task.gold.get(each, each) for each in references)
    question = values.named.get("question") or values.named.get("text") or values.named.get("dialogue") or ""
    return _Row(key, group, question, _accepted(references), record.source, record.fields, None)


def _with_gold(task: Task, example: Example, label: str | None) -> Example:
    if example.answer is None or (label is None and not task.gold):
        return example
    if label is not None:
        return replace(example, messages=(*example.messages[:-1], Message("assistant", label)), references=())
    answer = task.gold.get(example.answer, example.answer)
    references = tuple(task.gold.get(each, each) for each in example.references)
    return replace(example, messages=(*example.messages[:-1], Message("assistant", answer)), references=references)


def _accepted(references: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in references if text.strip()))


def _named_groups(rows: Sequence[_Row]) -> list[str]:
    """Returns each row's group, called by the id of its first row, which is shorter than a paragraph."""
    first: dict[str, str] = {}
    return [row.id if row.group is None else first.setdefault(row.group, row.id) for row in rows]


def _hash(items: Sequence[Item]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update("\x1f".join((item.id, item.group, *item.references)).encode("utf-8", "surrogatepass") + b"\x1e")
    return digest.hexdigest()
