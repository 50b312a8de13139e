"""From a source's name to examples: read, recognise, convert, clean, check, count, select; and the report of it all.

All rows that cannot be used are collected first and named in one error, since mending a data set one row and one run
at a time is what people give up on. None of them is left out in silence: the error names the cleaning step that
drops such rows, and then the report counts them. Streaming is the exception: there the first such row is the error,
because rows are handed on before the last is read.

Formats are detected for each file of a folder on its own, from its first rows, so a folder may mix them.

The order is fixed: clean, check, count duplicates (and drop them, when asked), then draw the subset, so that a
subset of 1,000 rows has 1,000 usable rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from chulengo.data.cleaning import CleaningCounts, clean, parse_step
from chulengo.data.completeness import has_answer, has_empty_turn, missing_answer, starts_with_answer
from chulengo.data.format_definition import Format, column
from chulengo.data.formats import (
    FORMATS,
    answer_column,
    check_template,
    detect_format,
    format_named,
    renamed,
    to_example,
    unknown_format,
)
from chulengo.data.prompts import PromptTemplate, unknown_column
from chulengo.data.selection import content_key, sample
from chulengo.data.sources import file_of, read_records
from chulengo.data.types import Example, Record
from chulengo.data.wording import counted
from chulengo.errors import ConfigError, DataError, nearest

_HEAD_ROWS = 20
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What happened between the source and the examples.

    Attributes:
        source: as given.
        formats: file (or Hub name) -> format; `reasons` says why each was taken.
        rows_read: rows of the source.
        rows_kept: examples returned.
        dropped: step, `duplicates` or `subset` -> rows it left out. rows_kept is rows_read less these.
        changed: cleaning step -> rows it changed.
        duplicates: rows that repeat an earlier one; None when they were not counted (streaming).
        duplicate_groups: the sources of up to five groups of equal rows.
        unused_columns: columns seen in the first rows that the format does not read.
        empty_turns: usable rows (before the subset) in which some turn but the last is empty; they are kept.
        subset: what was drawn, in words; None when all rows were taken.
    """

    source: str
    formats: dict[str, str]
    reasons: dict[str, str]
    rows_read: int
    rows_kept: int
    dropped: dict[str, int]
    changed: dict[str, int]
    duplicates: int | None
    duplicate_groups: list[list[str]]
    unused_columns: list[str]
    empty_turns: int
    subset: str | None

    @property
    def format(self) -> str:
        """The format, or several joined by commas."""
        return ", ".join(dict.fromkeys(self.formats.values()))

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON-able data."""
        return {"format": self.format, **asdict(self)}


@dataclass(slots=True)
class _Progress:
    """The counts while rows go by."""

    formats: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    rows_read: int = 0
    rows_usable: int = 0
    cleaning: CleaningCounts = field(default_factory=CleaningCounts)
    seen: dict[bytes, str] = field(default_factory=dict)
    repeated: dict[bytes, list[str]] = field(default_factory=dict)
    duplicates: int = 0
    unused_columns: dict[str, None] = field(default_factory=dict)
    empty_turns: int = 0
    bad_rows: int = 0
    bad_shown: list[str] = field(default_factory=list)
    mends: dict[str, None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the caller asked for."""

    source: str
    format: str
    columns: Mapping[str, str]
    template: PromptTemplate | None
    cleaning: tuple[str, ...]
    drop_duplicates: bool
    count_duplicates: bool
    collect_bad: bool


def load_examples(
    source: str,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    hub_split: str = "train",
    offline: bool = False,
    template: PromptTemplate | None = None,
    cleaning: Sequence[str] = (),
    num_rows: int | None = None,
    seed: int = 0,
    drop_duplicates: bool = False,
) -> tuple[list[Example], LoadReport]:
    """Returns the examples of a source, and the report of how they came about.

    Args:
        source: file, folder or Hub name.
        format: a key of `FORMATS`, or auto.
        columns: our field name -> the data's column name.
        hub_split: which split of a Hub data set.
        offline: True: never use the network.
        template: the user's prompt template, for formats of columns.
        cleaning: cleaning steps, in order.
        num_rows: size of the random subset; None: all rows.
        seed: of the subset.
        drop_duplicates: True: of equal rows only the first is kept.

    Raises:
        DataError: a source, format or row that cannot be used; all unusable rows are named at once.
        ConfigError: an unknown format, cleaning step or column name; a template that does not apply.
        NetworkError: a Hub name that cannot be read from here.
    """
    plan = _plan(source, format, columns, template, cleaning, drop_duplicates, count=True, collect=True)
    progress = _Progress()
    rows = _converted(plan, read_records(source, hub_split=hub_split, offline=offline), progress)
    examples = list(rows) if num_rows is None else sample(rows, num_rows, seed)
    _check(plan, progress)
    return examples, _report(plan, progress, len(examples), num_rows, seed)


def stream_examples(
    source: str,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    hub_split: str = "train",
    offline: bool = False,
    template: PromptTemplate | None = None,
    cleaning: Sequence[str] = (),
    num_rows: int | None = None,
    seed: int = 0,
    drop_duplicates: bool = False,
    on_report: Callable[[LoadReport], None] | None = None,
) -> Iterator[Example]:
    """Returns an iterator over the examples of a source that may be larger than memory.

    As `load_examples`, but: the first unusable row raises; duplicates are not counted unless they are to be dropped
    (which takes about 200 bytes a row); a subset takes one pass over all rows and memory for `num_rows` examples.

    Args:
        on_report: called with the report when the iterator is exhausted.
    """
    plan = _plan(source, format, columns, template, cleaning, drop_duplicates, count=drop_duplicates, collect=False)
    progress = _Progress()
    rows = _converted(plan, read_records(source, hub_split=hub_split, offline=offline), progress)
    return _streamed(plan, progress, rows, num_rows, seed, on_report)


def _streamed(
    plan: _Plan, progress: _Progress, rows: Iterator[Example], num_rows: int | None, seed: int,
    on_report: Callable[[LoadReport], None] | None,
) -> Iterator[Example]:  # fmt: skip
    kept = 0
    for example in rows if num_rows is None else sample(rows, num_rows, seed):
        kept += 1
        yield example
    _check(plan, progress)
    if on_report is not None:
        on_report(_report(plan, progress, kept, num_rows, seed))


def _plan(
    source: str, format: str, columns: Mapping[str, str] | None, template: PromptTemplate | None,
    cleaning: Sequence[str], drop_duplicates: bool, *, count: bool, collect: bool,
) -> _Plan:  # fmt: skip
    if format != "auto":
        check_template(format_named(format), template)
    for text in cleaning:
        parse_step(text)
    known = {name for each in FORMATS.values() for name in each.columns}
    for name in columns or {}:
        if name not in known and template is None:
            close = nearest(name, known)
            raise ConfigError(
                f"data.columns.{name}: no format has a field '{name}'.",
                allowed=", ".join(sorted(known)),
                next_step=f"--set data.columns.{close}={(columns or {})[name]}" if close else None,
            )
    return _Plan(source, format, columns or {}, template, tuple(cleaning), drop_duplicates, count, collect)


def _converted(plan: _Plan, records: Iterator[Record], progress: _Progress) -> Iterator[Example]:
    for file, rows in itertools.groupby(records, key=lambda record: file_of(record.source)):
        head = list(itertools.islice(rows, _HEAD_ROWS))
        chosen = _choose(plan, file, head, progress)
        for record in itertools.chain(head, rows):
            progress.rows_read += 1
            example = _convert(plan, chosen, record, progress)
            if example is not None and _is_wanted(plan, example, progress):
                progress.rows_usable += 1
                progress.empty_turns += has_empty_turn(example)
                yield example


def _choose(plan: _Plan, file: str, head: list[Record], progress: _Progress) -> Format:
    _check_renaming(plan, file, head)
    head = [Record(dict(renamed(record.fields, plan.columns)), record.source) for record in head]
    seen = {str(name): None for record in head for name in record.fields}
    if plan.format == "auto":
        name, reason = _detect(plan, head)
    else:
        name, reason = plan.format, "named by data.format"
        chosen = FORMATS[name]
        if name != "template" and not any(chosen.recognises(record.fields) for record in head):
            raise unknown_format(head, f"The rows of {file} are not in the format {name} ({chosen.signature}).")
    chosen = FORMATS[name]
    check_template(chosen, plan.template)
    _check_columns(plan, chosen, seen)
    progress.formats[file], progress.reasons[file] = name, reason
    used = {column(seen, names) for names in chosen.columns.values()}
    used |= set(plan.template.columns) if plan.template else set()
    progress.unused_columns.update(dict.fromkeys(each for each in seen if each not in used))
    return chosen


def _check_renaming(plan: _Plan, file: str, head: list[Record]) -> None:
    theirs = {str(name): None for record in head for name in record.fields}
    for name, column_name in plan.columns.items():
        if column_name not in theirs:
            close = nearest(column_name, theirs)
            raise DataError(
                f"data.columns.{name}={column_name}: {file} has no column '{column_name}'.",
                allowed=", ".join(theirs),
                next_step=f"--set data.columns.{name}={close or next(iter(theirs), 'COLUMN')}",
            )


def _detect(plan: _Plan, head: list[Record]) -> tuple[str, str]:
    try:
        name = detect_format(head)
    except DataError:
        if plan.template is None:
            raise
        return "template", f"no known format; the prompt template '{plan.template.name}' names the columns"
    return name, f"detected: {FORMATS[name].signature}"


def _check_columns(plan: _Plan, chosen: Format, seen: Mapping[str, None]) -> None:
    if plan.template is None:
        return
    known = list(dict.fromkeys([*chosen.columns, *seen]))
    for name in (*plan.template.columns, *plan.template.labels):
        if name not in known:
            raise unknown_column(name, known)


def _convert(plan: _Plan, chosen: Format, record: Record, progress: _Progress) -> Example | None:
    try:
        example = to_example(record, chosen.name, template=plan.template, columns=plan.columns)
    except DataError as error:
        if "drop_unreadable" in plan.cleaning:
            dropped = progress.cleaning.dropped
            dropped["drop_unreadable"] = dropped.get("drop_unreadable", 0) + 1
        else:
            _bad(plan, progress, error.given, "drop_unreadable")
        return None
    cleaned = clean(example, plan.cleaning, progress.cleaning)
    if cleaned is None:
        return None
    problem = _problem(plan, chosen, record, cleaned)
    if problem is None:
        return cleaned
    _bad(plan, progress, f"{record.source}: {problem[0]}", *problem[1:])
    return None


def _problem(plan: _Plan, chosen: Format, record: Record, example: Example) -> tuple[str, ...] | None:
    # what is wrong with the row, and the cleaning steps that would mend or drop it
    unanswered = missing_answer(example)
    if unanswered is not None:
        name = answer_column(chosen, plan.template, renamed(record.fields, plan.columns))
        name = plan.columns.get(name, name)
        cut = ("cut_trailing_questions",) if has_answer(example) and example.messages[-1].role == "user" else ()
        return (f"no answer in column '{name}' ({unanswered})", *cut, "drop_unanswered")
    if example.kind == "text" and has_empty_turn(example):
        return ("the text is empty", "drop_empty")
    if starts_with_answer(example) and "keep_leading_answers" not in plan.cleaning:
        return ("the assistant speaks first", "cut_leading_answers", "drop_unanswered")
    return None


def _bad(plan: _Plan, progress: _Progress, what: str, *mends: str) -> None:
    progress.bad_rows += 1
    progress.mends.update(dict.fromkeys(mends))
    if len(progress.bad_shown) < _SHOWN:
        progress.bad_shown.append(what)
    if not plan.collect_bad:
        _check(plan, progress)


def _is_wanted(plan: _Plan, example: Example, progress: _Progress) -> bool:
    if not plan.count_duplicates:
        return True
    key = content_key(example)
    first = progress.seen.setdefault(key, example.source)
    if first is example.source:
        return True
    progress.duplicates += 1
    if key in progress.repeated or len(progress.repeated) < _SHOWN:
        group = progress.repeated.setdefault(key, [first])
        if len(group) < _SHOWN:
            group.append(example.source)
    return not plan.drop_duplicates


def _check(plan: _Plan, progress: _Progress) -> None:
    if progress.bad_rows:
        # steps that save part of a row come before those that drop it whole
        mends = sorted(progress.mends, key=lambda name: not name.startswith("cut_"))
        steps = list(dict.fromkeys([*plan.cleaning, *mends]))
        rows = counted(progress.bad_rows, "row")
        more = progress.bad_rows - len(progress.bad_shown)
        listed = "".join(f"\n  {text}" for text in progress.bad_shown) + (f"\n  and {more} more" if more else "")
        upto = f"{rows} of {progress.rows_read}" if plan.collect_bad else f"row {progress.rows_read}"
        raise DataError(
            f"{plan.source}: {upto} cannot be used:{listed}",
            next_step=f"mend them, or: --set data.cleaning=[{','.join(steps)}]   (such rows are counted in the report)",
        )
    if not progress.rows_usable:
        dropped = ", ".join(f"{name} {count}" for name, count in progress.cleaning.dropped.items())
        raise DataError(f"{plan.source}: no row is left of {progress.rows_read} (dropped by: {dropped or 'nothing'}).")


def _report(plan: _Plan, progress: _Progress, kept: int, num_rows: int | None, seed: int) -> LoadReport:
    dropped = dict(progress.cleaning.dropped)
    if plan.drop_duplicates:
        dropped["duplicates"] = progress.duplicates
    subset = None
    if num_rows is not None:
        usable = progress.rows_usable
        if num_rows > usable:
            subset = f"{num_rows:,} rows were asked for, there {'is' if usable == 1 else 'are'} {usable:,}: all taken"
        else:
            subset = f"{num_rows:,} of {counted(usable, 'row')}, drawn at random with seed {seed}"
        dropped["subset"] = progress.rows_usable - kept
    return LoadReport(
        source=plan.source,
        formats=progress.formats,
        reasons=progress.reasons,
        rows_read=progress.rows_read,
        rows_kept=kept,
        dropped=dropped,
        changed=dict(progress.cleaning.changed),
        duplicates=progress.duplicates if plan.count_duplicates else None,
        duplicate_groups=list(progress.repeated.values()),
        unused_columns=list(progress.unused_columns),
        empty_turns=progress.empty_turns,
        subset=subset,
    )
