"""Filled-in sheets to ratings of systems, and ratings as files of their own.

Two kinds of files are read, CSV or JSONL, and may be mixed:

* sheets, whose rows have an `entry` that the key maps back;
* ratings with the names in plain sight: rater, item, left, right, choice (left, right, tie, both bad), `name_left` and
  `name_right` for a criterion, showing, comment, outputs. This is what `write_ratings` writes, and what ratings from
  elsewhere can be brought into. A and B mean sides in sheets alone: here they may be the names of systems, and the one
  called A may stand on the right.

Files may overlap. The same rating twice counts once; two different ones of the same row are an error that names both
places, since nobody can know which one is meant. All problems are reported at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from chulengo.data.sources import read_records
from chulengo.data.types import Record
from chulengo.data.wording import counted
from chulengo.errors import DataError
from chulengo.evaluate.human.cells import same_text, unprotected
from chulengo.evaluate.human.sheets import (
    KEY_NAME,
    SHEETS_NAME,
    criterion_columns,
    shown_texts,
    write_csv,
    write_jsonl,
)
from chulengo.evaluate.human.study import Entry, Study, read_key

Choice = Literal["left", "right", "tie", "both bad"]
SCALE = range(1, 6)
_CHOICES: dict[str, Choice] = {"left": "left", "right": "right", "tie": "tie", "both bad": "both bad"}
_SHEET_CHOICES: dict[str, Choice] = {**_CHOICES, "a": "left", "b": "right"}
_PLAIN = ("rater", "item", "left", "right", "choice", "showing", "comment", "outputs")
_SHEETS, _SPREADSHEETS = (".csv", ".tsv", ".jsonl"), (".xlsx", ".xls", ".ods", ".numbers")
_MAX_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class Rating:
    """What one person said about one pair of answers (or one answer).

    Attributes:
        rater: who.
        item: the item's id.
        left: the system shown on the left, or alone.
        right: the other system; "" where one answer was shown alone.
        choice: None where it was not asked for or left empty.
        scores: (criterion, system) -> 1 to 5.
        showing: 1, or 2 for a hidden repeat.
        comment: free text.
        source: file and line.
    """

    rater: str
    item: str
    left: str
    right: str
    choice: Choice | None
    scores: Mapping[tuple[str, str], int]
    showing: int = 1
    comment: str = ""
    source: str = ""

    @property
    def place(self) -> tuple[str, str, tuple[str, ...], int]:
        """What a rater can rate only once."""
        return self.rater, self.item, tuple(sorted((self.left, self.right))), self.showing

    @property
    def winner(self) -> str | None:
        """The system that was chosen; None for a tie, both bad, or no choice."""
        return {"left": self.left, "right": self.right}.get(self.choice or "")


@dataclass(frozen=True, slots=True)
class Collected:
    """The ratings of all files.

    Attributes:
        ratings: those with a choice or a score, repeats included.
        study: None where no file is a sheet.
        outputs: the mark of the answers that were rated; "" where unknown.
        num_rows: rows read.
        num_blank: rows read that hold no rating.
        num_twice: equal ratings beyond the first.
        num_missing: rater -> rows of the sheet that no file rates.
    """

    ratings: tuple[Rating, ...]
    study: Study | None
    outputs: str
    num_rows: int
    num_blank: int
    num_twice: int
    num_missing: Mapping[str, int]


def read_ratings(paths: Sequence[str], key: Path | None = None) -> Collected:
    """Returns what raters said, in all the files together.

    Args:
        paths: sheets and files of ratings, or folders of them (a folder that `write_study` wrote will do).
        key: the key of the sheets; None: `key.json` beside the sheets' folder, or in it.

    Raises:
        DataError: a file that is neither, unknown entries, ratings of other answers, contradicting ratings, values that
            are not allowed, or no rating at all.
    """
    records = [record for path in rating_files(paths) for record in read_records(str(path))]
    sheets = [record for record in records if "entry" in record.fields]
    study = read_key(key or _find_key(sheets[0])) if sheets else None
    reader = _Reader(study)
    for record in records:
        reader.read(record)
    return reader.collected()


def rating_files(paths: Sequence[str]) -> Iterator[Path]:
    """Yields the files that these paths stand for: themselves, and the sheets in folders.

    Raises:
        DataError: nothing is there, or a folder holds no sheets, or one that must be saved as CSV first.
    """
    for given in paths:
        path = Path(given).expanduser()
        if not path.exists():
            raise DataError(f"There is no file {given}.", next_step="name the sheets that came back, or their folder")
        if not path.is_dir():
            yield path
            continue
        inner = path / SHEETS_NAME if (path / SHEETS_NAME).is_dir() else path
        names = [file for file in sorted(inner.iterdir()) if not file.name.startswith((".", "~"))]
        if other := [file for file in names if file.suffix.lower() in _SPREADSHEETS]:
            raise DataError(f"{other[0]} is a spreadsheet program's own format.", allowed=", ".join(_SHEETS),
                            next_step="open it, save it as CSV (UTF-8), and take it out of the folder")
        found = [file for file in names if file.suffix.lower() in _SHEETS]
        if not found:
            raise DataError(f"{inner} has no sheets.", allowed=", ".join(_SHEETS), next_step="name the files")
        yield from found


def _find_key(record: Record) -> Path:
    folder = Path(record.source.rpartition(":")[0]).resolve().parent
    for place in (folder / KEY_NAME, folder.parent / KEY_NAME):
        if place.is_file():
            return place
    raise DataError(f"{record.source} is from a sheet, and its key is not beside it.",
                    allowed=f"{KEY_NAME} in the folder of the sheet or the one above",
                    next_step=f"--key {KEY_NAME}, from the folder that the sheets were made in")


class _Reader:
    """Gathers ratings and problems over all rows."""

    def __init__(self, study: Study | None) -> None:
        self._study = study
        self._entries: Mapping[str, Entry] = {} if study is None else {entry.id: entry for entry in study.entries}
        self._items = {} if study is None else {item.id: item for item in study.items}
        self._found: dict[Any, Rating] = {}
        self._marks: dict[str, str] = {} if study is None else {study.mark: "the key"}
        self._problems: list[str] = []
        self._counts: Counter[str] = Counter()
        self._columns: dict[tuple[str, bool], dict[str, None]] = {}  # (file, is a sheet) -> in order

    def read(self, record: Record) -> None:
        self._counts["rows"] += 1
        place = record.source.rpartition(":")[0], "entry" in record.fields
        self._columns.setdefault(place, {}).update(dict.fromkeys(record.fields))
        fields = {name: unprotected(value) if isinstance(value, str) and _is_csv(record) else value
                  for name, value in record.fields.items()}
        rating = self._of_sheet(fields, record.source) if "entry" in fields else self._plain(fields, record.source)
        if rating is None:
            return
        if rating.choice is None and not rating.scores:
            self._counts["blank"] += 1
            return
        before = self._found.setdefault(rating.place, rating)
        if before is rating:
            return
        if (before.choice, before.left, before.scores) == (rating.choice, rating.left, rating.scores):
            self._counts["twice"] += 1
        else:
            self._problems.append(f"{rating.source} and {before.source} rate the same row differently")

    def collected(self) -> Collected:
        if len(self._marks) > 1:
            said = ", ".join(f"{mark} ({place})" for mark, place in self._marks.items())
            self._problems.insert(0, f"these rate different sets of answers: {said}")
        self._problems[:0] = self._lacking_columns()
        if self._problems:
            more = len(self._problems) - _MAX_PROBLEMS
            lines = [*self._problems[:_MAX_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
            said = counted(len(self._problems), "problem")
            raise DataError(f"The ratings cannot be used, {said}:\n    " + "\n    ".join(lines),
                            next_step="mend these rows, or leave the file out")
        if not self._found:
            # a rater has each row twice, in the CSV and in the JSONL
            number = self._counts["rows"] if self._study is None else len(self._study.entries)
            choices = "left, right, tie, both bad" if self._study is None else "A, B, tie, both bad"
            given = "The one row holds no rating." if number == 1 else f"None of the {number:,} rows holds a rating."
            raise DataError(given, next_step=f"fill in choice ({choices}) or the criteria (1 to 5)")
        return Collected(
            tuple(self._found.values()), self._study, next(iter(self._marks), ""), self._counts["rows"],
            self._counts["blank"], self._counts["twice"], self._missing(),
        )

    def _lacking_columns(self) -> list[str]:
        """Returns in sentences which files lack a column that ratings stand in; without it they look unrated."""
        found = []
        for (file, is_sheet), columns in self._columns.items():
            if is_sheet:
                assert self._study is not None
                wanted = ["choice"] if len(self._study.systems) > 1 else criterion_columns(self._study)
                lacking = "" if any(name in columns for name in wanted) else " or ".join(wanted)
            else:
                rated = [name for name in columns if name == "choice" or name.endswith(("_left", "_right"))]
                lacking = "" if rated else "choice, and none such as helpful_left"
            if lacking:
                found.append(f"{file} has no column {lacking}; its columns: {', '.join(map(str, columns))}")
        return found

    def _missing(self) -> dict[str, int]:
        if self._study is None:
            return {}
        rated = Counter(rating.rater for rating in self._found.values())
        given = Counter(entry.rater for entry in self._study.entries)
        return {rater: max(0, given[rater] - rated[rater]) for rater in self._study.raters}

    def _of_sheet(self, fields: Mapping[str, Any], source: str) -> Rating | None:
        assert self._study is not None
        mark, name = str(fields.get("outputs") or self._study.mark), str(fields["entry"])
        if mark != self._study.mark:
            self._marks.setdefault(mark, source)
            return None
        entry = self._entries.get(name)
        if entry is None:
            self._problems.append(f"{source}: no sheet of this key has an entry {name!r}")
            return None
        for column, text in shown_texts(self._items[entry.item], entry).items():
            if column in fields and not same_text(str(fields[column] or ""), text):
                self._problems.append(f"{source}: {column} is not the text that was handed out")
                return None
        scores = {}
        for criterion in self._study.criteria:
            sides = ((f"{criterion}_A", entry.left), (f"{criterion}_B", entry.right)) if entry.right else (
                (criterion, entry.left),)
            for column, system in sides:
                if (score := self._score(fields.get(column), column, source)) is not None:
                    scores[criterion, system] = score
        choice = self._choice(fields.get("choice"), source, _SHEET_CHOICES) if entry.right else None
        return Rating(entry.rater, entry.item, entry.left, entry.right, choice, scores, entry.showing,
                      str(fields.get("comment") or ""), source)

    def _plain(self, fields: Mapping[str, Any], source: str) -> Rating | None:
        lacking = [name for name in ("rater", "item", "left") if not str(fields.get(name) or "").strip()]
        if lacking:
            self._problems.append(
                f"{source}: neither a row of a sheet (it has no entry) nor a rating (it has no {', '.join(lacking)})")
            return None
        rater, item, left = (str(fields[name]).strip() for name in ("rater", "item", "left"))
        right = str(fields.get("right") or "").strip()
        if left == right:
            self._problems.append(f"{source}: {left!r} is compared with itself")
            return None
        showing = str(fields.get("showing") or 1).strip()
        if showing not in ("1", "2"):
            self._problems.append(f"{source}: showing is {showing!r}; allowed: 1, or 2 for a repeat")
            return None
        if mark := str(fields.get("outputs") or "").strip():
            self._marks.setdefault(mark, source)
        scores = {}
        for column in fields:
            criterion, _, side = column.rpartition("_")
            system = {"left": left, "right": right}.get(side, "")
            if criterion and system and (score := self._score(fields[column], column, source)) is not None:
                scores[criterion, system] = score
        choice = self._choice(fields.get("choice"), source, _CHOICES)
        if choice is not None and not right:
            self._problems.append(f"{source}: it has a choice and no right, the other system of the two")
            return None
        return Rating(rater, item, left, right, choice, scores, int(showing), str(fields.get("comment") or ""), source)

    def _choice(self, value: Any, source: str, choices: Mapping[str, Choice]) -> Choice | None:
        text = " ".join(str(value if value is not None else "").replace("_", " ").casefold().split())
        if not text:
            return None
        if text not in choices:
            allowed = "A, B, tie, both bad, or nothing"
            if choices is _CHOICES:
                allowed = "left, right (the side of the chosen system), tie, both bad, or nothing"
            self._problems.append(f"{source}: the choice is {value!r}; allowed: {allowed}")
        return choices.get(text)

    def _score(self, value: Any, column: str, source: str) -> int | None:
        text = str(value if value is not None else "").strip()
        if not text:
            return None
        # a spreadsheet program may write 4 as 4.0, or 4,0
        whole = text.replace(",", ".").removesuffix(".0")
        if not (whole.isascii() and whole.isdigit() and int(whole) in SCALE):
            self._problems.append(f"{source}: {column} is {value!r}; allowed: 1, 2, 3, 4, 5, or nothing")
            return None
        return int(whole)


def _is_csv(record: Record) -> bool:
    name = record.source.rpartition(":")[0].lower().removesuffix(".gz")
    return name.endswith((".csv", ".tsv"))


def write_ratings(path: Path, collected: Collected) -> None:
    """Writes the ratings with the systems named, one row each: CSV or JSONL by the file's suffix.

    Raises:
        DataError: another suffix, or the file cannot be written.
    """
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise DataError(f"Ratings cannot be written as {path.name}.", allowed="a name that ends with .csv or .jsonl")
    names = sorted({criterion for rating in collected.ratings for criterion, _ in rating.scores})
    columns = [*_PLAIN[:5], *(f"{name}_{side}" for name in names for side in ("left", "right")), *_PLAIN[5:]]
    rows = [_row(rating, names, collected.outputs) for rating in collected.ratings]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".csv":
            write_csv(path, columns, rows)
        else:
            write_jsonl(path, rows)
    except OSError as error:
        raise DataError(f"The ratings cannot be written to {path}: {error.strerror or error}.",
                        next_step="--ratings with a file that can be written") from error


def _row(rating: Rating, criteria: Sequence[str], outputs: str) -> dict[str, Any]:
    scores = {
        f"{name}_{side}": rating.scores.get((name, system))
        for name in criteria for side, system in (("left", rating.left), ("right", rating.right))
    }
    return {
        "rater": rating.rater, "item": rating.item, "left": rating.left, "right": rating.right,
        "choice": cast(str | None, rating.choice), **scores, "showing": rating.showing, "comment": rating.comment,
        "outputs": outputs,
    }
