"""Answers on disk: written as they come, read back after an interruption, and read from other programs' files.

Our own file is JSON lines, one answer a line, written a batch at a time and pushed to the disk before the next batch
starts. So an evaluation that is killed loses at most the batch it was in, and the same command goes on after the last
whole line; a line torn by the kill is taken off. Every line carries a hash of everything that decides an answer
(model, adapter, prompt, generation settings), and the settings themselves lie beside: a file of other settings is
refused, with what differs, since mixing them would give the score of no model at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chulengo.data.prompts import as_text
from chulengo.data.sources import read_records
from chulengo.errors import DataError, nearest

ANSWER_COLUMNS = ("answer", "text", "prediction", "prediction_text")
NAMED = 5  # ids shown in an error
MISSING = "missing"  # finish_reason of an item without a prediction
SETTINGS_SUFFIX = ".settings.json"


class RowsFile:
    """An appended JSON-lines file of finished items, by id, all made with the same settings."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Reads what is there.

        Args:
            path: the file; made with its folder when there is none.
            settings: JSON-able; everything that decides what an item gives.

        Raises:
            DataError: the file was made with other settings, or is none of ours.
        """
        self.path = path
        self._settings = json.loads(json.dumps(settings))
        self._hash = settings_hash(self._settings)
        self.rows: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()
        described = path.with_name(path.name + SETTINGS_SUFFIX)
        if not self.rows or not described.exists():
            described.write_text(json.dumps(self._settings, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends finished items, each with an `id`; they are on the disk when this returns.

        Raises:
            DataError: the file cannot be written.
        """
        made = [{**row, "settings": self._hash} for row in rows]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(
                f"The answers cannot be written to {self.path}: {error.strerror or error}.",
                next_step="make room, then type the same again: it goes on",
            ) from error
        self.rows.update((str(row["id"]), row) for row in made)

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            row = _object(line)
            if row is None or "id" not in row or "settings" not in row:
                raise DataError(f"{self.path}, line {number} is no finished item of an evaluation.",
                                next_step="name another --out, or move the file away")
            if row["settings"] != self._hash:
                raise self._other_settings()
            self.rows[str(row["id"])] = row
        if len(whole) < len(content):
            if not whole and not content.lstrip().startswith(b'{"id"'):
                raise DataError(f"{self.path} is no file of finished items.", next_step="name another --out")
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    def _other_settings(self) -> DataError:
        described = self.path.with_name(self.path.name + SETTINGS_SUFFIX)
        try:
            before = json.loads(described.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = {}
        changed = [f"{key} was {before.get(key)!r}, now {self._settings.get(key)!r}"
                   for key in sorted({*before, *self._settings}) if before.get(key) != self._settings.get(key)]
        listed = "".join(f"\n  - {line[:200]}" for line in changed)
        return DataError(
            f"{self.path} holds what another evaluation gave" + (f":{listed}" if changed else "."),
            next_step="name another --out, or move that folder away",
        )


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Returns 16 hexadecimal digits that are the same for equal settings."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_predictions(path: Path) -> dict[str, tuple[str, str]]:
    """Returns (answer, finish reason) by id of a file of predictions.

    Three forms: a JSON object {id: text}, as SQuAD's official script takes; rows with `id` and one of
    `ANSWER_COLUMNS` (JSON lines, JSON, csv, …); the files that `eval` and `generate` write. A null answer counts as
    missing. The finish reason is "" where the file has none.

    Raises:
        DataError: a missing or broken file, a row without id or answer, an id that occurs twice.
    """
    if not path.exists():
        siblings = [file.name for file in path.parent.glob(f"*{path.suffix}")] if path.parent.is_dir() else []
        close = nearest(path.name, siblings)
        raise DataError(
            f"There is no predictions file {path}.", allowed="a JSON, JSON lines or csv file with ids and answers",
            next_step=f"--predictions {path.parent / close}" if close else "--predictions FILE",
        )
    if path.suffix.lower() == ".json":
        mapping = _mapping(path)
        if mapping is not None:
            return mapping
    found: dict[str, tuple[str, str]] = {}
    for record in read_records(str(path)):
        fields = record.fields
        if fields.get("id") is None:
            raise DataError(f"{record.source} has no id (its columns: {', '.join(map(str, fields))}).",
                            next_step='rows such as {"id": "…", "answer": "…"}')
        column = next((name for name in ANSWER_COLUMNS if name in fields), None)
        if column is None:
            raise DataError(
                f"{record.source} has no answer (its columns: {', '.join(map(str, fields))}).",
                allowed=", ".join(ANSWER_COLUMNS), next_step='rows such as {"id": "…", "answer": "…"}',
            )
        key = as_text(fields["id"], "id")
        if key in found:
            raise DataError(f"{record.source}: the id {key!r} occurs twice in {path}.",
                            next_step="keep one answer for each id")
        if fields[column] is not None:
            _check_text(fields[column], f"{record.source}: the answer of {key!r}")
            try:
                text = as_text(fields[column], column)
            except DataError as error:
                raise DataError(f"{record.source}: {error.given}.", next_step="write the answer as text") from error
            found[key] = (text, str(fields.get("finish_reason") or ""))
    return found


def _mapping(path: Path) -> dict[str, tuple[str, str]] | None:
    """Returns the answers of a file that is one JSON object {id: text}; None where it is something else."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None  # the reader of rows says what is wrong
    if not text.lstrip().startswith("{"):
        return None
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        return None
    keys = {key for key, _ in pairs}
    if "id" in keys and keys & set(ANSWER_COLUMNS):
        return None  # one row, or columns
    if pairs and not any(isinstance(answer, str | int | float | None) for _, answer in pairs):
        return None  # rows by key, or in a list
    found: dict[str, tuple[str, str]] = {}
    seen: set[str] = set()
    for key, answer in pairs:
        if key in seen:
            raise DataError(f"{path}: the id {key!r} occurs twice.", next_step="keep one answer for each id")
        seen.add(key)
        if isinstance(answer, list):
            kind = "an object" if isinstance(answer, _Pairs) else "a list"
            shown = json.dumps(dict(answer) if isinstance(answer, _Pairs) else answer)[:80]
            raise DataError(f"{path}: the answer of {key!r} is {kind}: {shown}.", allowed='{"id": "text", …}',
                            next_step="write one text for each id")
        _check_text(key, f"{path}: the id {key!r}")
        if answer is not None:
            _check_text(answer, f"{path}: the answer of {key!r}")
            found[key] = (as_text(answer, key), "")
    return found


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as the file has it, with keys that occur twice."""


def _check_text(value: object, what: str) -> None:
    """Raises `DataError` for what JSON can say and no text can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{what} is {value}, which is no text.",
                        allowed='a text; "" for an empty answer, null for none', next_step="write the answer as text")
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{what} has half of a surrogate pair (\\u{ord(value[error.start]):04x}), which is not a character.",
                next_step="write the file again with a tool that does not cut characters in two",
            ) from error


def match_predictions(
    ids: Sequence[str], predictions: Mapping[str, tuple[str, str]], *, missing_is_wrong: bool, source: str
) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns (answer, finish reason) for every id, in order, and the ids that have none.

    Args:
        ids: of the items.
        predictions: as `read_predictions` returns them.
        missing_is_wrong: whether an item without a prediction is scored, as wrong.
        source: the predictions' file, for errors.

    Raises:
        DataError: a prediction that belongs to no item; an item without one, unless they are scored as wrong.
    """
    known = set(ids)
    unknown = [key for key in predictions if key not in known]
    if unknown:
        close = nearest(unknown[0], list(known)[:20_000])
        raise DataError(
            f"{len(unknown)} of {len(predictions)} predictions in {source} belong to no item of the data: "
            f"{_some(unknown)}.",
            allowed=f"ids such as {_some(list(ids))}" + (f" (nearest to {unknown[0]}: {close})" if close else ""),
            next_step="name the data, --adapter, --split and --num-rows that the predictions were made for",
        )
    lost = [key for key in ids if key not in predictions]
    if lost and not missing_is_wrong:
        raise DataError(
            f"{len(lost)} of {len(ids)} items have no prediction in {source}: {_some(lost)}.",
            allowed="a prediction for every item that --adapter, --split and --num-rows leave; an empty text is one",
            next_step="add them, or score them as wrong: --missing wrong",
        )
    return [predictions.get(key, ("", MISSING)) for key in ids], lost


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:NAMED]) + (", …" if len(ids) > NAMED else "")


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
