"""JSON and JSON lines to records, a row at a time, with the line and column of what is broken.

`json.load` needs a whole file in memory several times over, and a JSON array is often one line of gigabytes. Here a
growing window of text is decoded one array element at a time. A window that ends inside an element fails to decode
just as a broken one does; the two are told apart by where decoding stopped: within the last few characters (or in a
string that does not end) more text is read, twice as much each time so that the work stays linear; anywhere else the
file is broken, and that is said at once.

A file of objects without an outer array is read as JSON lines whatever its name. A single object is held in memory
whole and read by its shape, in this order:

    {"messages": [{"role": …}, …], …}                     one row
    {"data": [{"paragraphs": [{"qas": …}]}], …}           SQuAD v1: one row a question
    {"anything": [{…}, {…}], other scalars}               the rows are that list
    {"question": […], "answer": […]}                      columns of equal length
    {"question": {"0": …}, "answer": {"0": …}}            columns as pandas writes them
    {"some id": {…}, "other id": {…}}                     rows by key; the key becomes the field `id`
    anything else                                         one row
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from chulengo.data.sources_text import numbered_lines, text_chunks
from chulengo.data.types import Record
from chulengo.errors import DataError

_NEAR_END = 16  # characters: longer than any literal or escape that a window can cut in two
_BLANK = " \t\r\n"


def jsonl_records(path: Path) -> Iterator[Record]:
    """Yields one record a line, `source` being `path:line`. Blank lines are skipped.

    Raises:
        DataError: a line that is not a JSON object.
    """
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            _refuse(path, number, error.pos + 1, error.msg, line, error.pos)
        except (RecursionError, ValueError) as error:
            raise DataError(f"{path}, line {number}: JSON that cannot be read: {error}.") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number}: {_kind(row)} where a JSON object is needed: {_start(line)}",
                next_step="if the file is one JSON array, give it the suffix .json" if isinstance(row, list) else None,
            )
        _check_surrogates(row, line, f"{path}, line {number}")
        yield Record(row, f"{path}:{number}")


def json_records(path: Path) -> Iterator[Record]:
    """Yields the rows of a JSON file, `source` being `path#row`, in one of the layouts named at this file's top.

    Raises:
        DataError: broken JSON, with line and column, or a layout that has no rows.
    """
    for number, row in enumerate(_expanded(_rows(path)), start=1):
        yield Record(row, f"{path}#{number}")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    window = _Window(path)
    first = window.peek()
    if first == "[":
        yield from _array(window)
    elif first == "{":
        row = window.value()
        if window.peek() == "":
            yield from rows_of_object(row, str(path))
            return
        yield row
        while window.peek() != "":
            yield _object(window)
    elif first != "":
        window.refuse("a JSON file starts with [ or {", fault="cannot be read")


def _array(window: _Window) -> Iterator[dict[str, Any]]:
    window.skip()
    if window.peek() == "]":
        window.skip()
    else:
        while True:
            yield _object(window)
            after = window.peek()
            if after not in (",", "]"):
                window.refuse("the file ends inside its array" if after == "" else "expected , or ] after a row")
            window.skip()
            if after == "]":
                break
    if window.peek() != "":
        window.refuse("text after the end of the array")


def _object(window: _Window) -> dict[str, Any]:
    start = window.peek()
    if start == "":
        window.refuse("the file ends inside its array")
    if start != "{":
        window.refuse("every row must be an object {…}", fault="cannot be read")
    row: dict[str, Any] = window.value()
    return row


def rows_of_object(document: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Returns the rows of one JSON object by its shape (see the top of this file)."""
    lists = {name: value for name, value in document.items() if isinstance(value, list)}
    tables = {name: value for name, value in lists.items() if value and all(isinstance(v, dict) for v in value)}
    if len(tables) == 1 and len(lists) == 1:
        rows: list[dict[str, Any]] = next(iter(tables.values()))
        return [document] if _is_turn(rows[0]) else rows
    if len(tables) > 1 and len(lists) == len(tables) and not any(_is_turn(rows[0]) for rows in tables.values()):
        raise DataError(
            f"{where} holds several lists of rows: {', '.join(tables)}.",
            allowed="one list of rows a file",
            next_step="write each list to a file of its own",
        )
    if lists and len(lists) == len(document):
        lengths = {name: len(value) for name, value in lists.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{where} holds columns of different lengths: {lengths}.")
        return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    if document and all(isinstance(value, dict) and value for value in document.values()):
        return _rows_by_key(document)
    return [document] if document else []


def _rows_by_key(document: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    indices = list(next(iter(document.values())))
    if all(key.isdigit() for key in indices) and all(list(column) == indices for column in document.values()):
        return [{name: column[index] for name, column in document.items()} for index in indices]
    return [{"id": key, **row} for key, row in document.items()]


def _expanded(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    # an article of SQuAD v1 holds many questions; everywhere else a row is a row
    for row in rows:
        paragraphs = row.get("paragraphs")
        if not (isinstance(paragraphs, list) and paragraphs and isinstance(paragraphs[0], dict)):
            yield row
            continue
        if not all(isinstance(p, dict) and isinstance(p.get("qas"), list) for p in paragraphs):
            yield row
            continue
        for paragraph in paragraphs:
            for question in paragraph["qas"]:
                yield {"title": row.get("title"), "context": paragraph.get("context"), **question}


def _is_turn(row: dict[str, Any]) -> bool:
    return {"role", "content"} <= row.keys() or {"from", "value"} <= row.keys()


class _Window:
    """The part of a JSON text that is being decoded, and where in the file it is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._chunks = text_chunks(path)
        self._text = ""
        self._place = 0
        self._line = 1  # of the first character of _text
        self._column = 1
        self._ended = False
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Returns the next character that is not blank, or "" at the end of the file."""
        while True:
            while self._place < len(self._text):
                character = self._text[self._place]
                if character not in _BLANK:
                    return character
                self._place += 1
            if self._ended:
                return ""
            self._read_more()

    def skip(self) -> None:
        """Moves past the character that `peek` returned."""
        self._place += 1

    def value(self) -> Any:
        """Returns the value that starts at the character that `peek` returned, and moves past it."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _NEAR_END
                if self._ended or not cut:
                    self.refuse(error.msg, error.pos)
                self._read_more()
                continue
            except (RecursionError, ValueError) as error:
                self.refuse(str(error))
            if self._text.find("\\u", self._place, end) >= 0:
                where = f"{self._path}, line {self._position(self._place)[0]}"
                _check_surrogates(value, self._text[self._place : end], where)
            self._place = end
            return value

    def refuse(self, what: str, place: int | None = None, fault: str = "is not valid JSON") -> NoReturn:
        """Raises `DataError` with the line, the column and the text around it."""
        place = self._place if place is None else place
        line, column = self._position(place)
        start = self._text.rfind("\n", 0, place) + 1
        end = self._text.find("\n", place)
        text = self._text[start : end if end >= 0 else None]
        _refuse(self._path, line, column, what, text, place - start, fault)

    def _position(self, place: int) -> tuple[int, int]:
        line = self._line + self._text.count("\n", 0, place)
        newline = self._text.rfind("\n", 0, place)
        return line, (self._column + place if newline < 0 else place - newline)

    def _read_more(self) -> None:
        self._line, self._column = self._position(self._place)
        parts = [self._text[self._place :]]
        wanted = max(len(parts[0]), 1)
        self._place = 0
        for chunk in self._chunks:
            parts.append(chunk)
            wanted -= len(chunk)
            if wanted <= 0:
                break
        else:
            self._ended = True
        self._text = "".join(parts)


def _refuse(
    path: Path, line: int, column: int, what: str, text: str, place: int, fault: str = "is not valid JSON"
) -> NoReturn:
    raise DataError(
        f"{path} {fault}: line {line}, column {column}: {what}.\n  {_start(text, place)}",
        next_step=f"mend that line, then: python -m json.tool '{path}' > /dev/null"
        if path.suffix == ".json"
        else f"sed -n {line}p '{path}'   shows the whole line",
    )


def _start(text: str, place: int = 0) -> str:
    text = text.rstrip("\r\n")
    if place <= 60:
        return text[:80] + ("…" if len(text) > 80 else "")
    return "…" + text[place - 50 : place + 30] + ("…" if len(text) > place + 30 else "")


def _check_surrogates(row: Any, source: str, where: str) -> None:
    # "\ud83d" alone is legal JSON and no text: nothing later could encode it
    if "\\ud" not in source.lower():
        return
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half of a surrogate pair (\\u{ord(error.object[error.start]):04x}) is not a character.",
            next_step="write the file again with a tool that does not cut characters in two",
        ) from error


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "null")
