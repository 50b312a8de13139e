"""A data source's name to its rows: files, folders of files, Hub data sets.

The road is chosen by name alone (an existing path always wins over a Hub name), the reader by the file's suffix.
Rows come one at a time, so a source may be larger than memory. A folder is read recursively in sorted order, so that
the same folder gives the same order everywhere; hidden files and files without a known suffix (a README) are passed
over, and links to folders are not followed. What a row means is decided later, in `formats`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from chulengo.data.sources_hub import hub_records
from chulengo.data.sources_json import json_records, jsonl_records
from chulengo.data.sources_table import csv_records, parquet_records
from chulengo.data.sources_text import text_records
from chulengo.data.types import Record
from chulengo.errors import DataError, nearest

READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".json": json_records,
    ".jsonl": jsonl_records,
    ".ndjson": jsonl_records,
    ".csv": lambda path: csv_records(path, ","),
    ".tsv": lambda path: csv_records(path, "\t"),
    ".parquet": parquet_records,
    ".txt": text_records,
}
_ALLOWED = ", ".join(READERS) + " (each also with .gz), folders of them, Hub names org/name"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
_SUFFIX = re.compile(r"\.[A-Za-z]\w{0,7}$")
_SOURCE = re.compile(r"(.*)[:#]\d+", re.DOTALL)


def is_hub_name(spec: str) -> bool:
    """Returns True when `spec` can only be a Hub name: `org/name` (or `org/name:config`), no path and no suffix."""
    if not _HUB_NAME.fullmatch(spec) or _SUFFIX.search(spec.partition(":")[0]):
        return False
    return not Path(spec).exists()


def file_of(source: str) -> str:
    """Returns the file (or Hub name) part of a `Record.source`."""
    match = _SOURCE.fullmatch(source)
    return match.group(1) if match else source


def files_of(spec: str) -> list[Path]:
    """Returns the files that a source is read from, in the order in which they are read; [] where it is none here."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return _files_in(path)
    return [path] if path.is_file() else []


def read_records(spec: str, *, hub_split: str = "train", offline: bool = False) -> Iterator[Record]:
    """Returns an iterator over the rows of a file, folder or Hub data set.

    What can be known without reading (a missing file, an empty folder, an unknown suffix) is raised by the call
    itself, everything else while rows are taken.

    Args:
        spec: path of a file or folder, or a Hub name.
        hub_split: which split of a Hub data set.
        offline: True: never use the network.

    Raises:
        DataError: a source that is missing, empty, broken or of an unknown suffix.
        NetworkError: a Hub name that cannot be read from here.
    """
    if not spec.strip():
        raise DataError("No data were named.", allowed=_ALLOWED, next_step="--data FILE")
    path = Path(spec).expanduser()
    try:
        if path.is_dir():
            return _read_files(_files_in(path))
        if path.exists():
            _reader_of(path)
            return _read_files([path])
    except OSError as error:  # no permission to look, or a name longer than the system takes
        raise DataError(
            f"{spec[:200]} cannot be opened: {error.strerror or error}.", allowed=_ALLOWED,
            next_step="name a file that you may read",
        ) from error
    if is_hub_name(spec):
        return hub_records(spec, hub_split, offline, _nearest_path(path))
    raise _missing(path)


def _read_files(paths: list[Path]) -> Iterator[Record]:
    for path in paths:
        reader = _reader_of(path)
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty.", next_step="name a file with rows, or delete this one")
        empty = True
        for record in reader(path):
            empty = False
            yield record
        if empty:
            raise DataError(f"{path} holds no rows.", next_step="name a file with rows, or delete this one")


def _reader_of(path: Path) -> Callable[[Path], Iterator[Record]]:
    reader = READERS.get(_suffix(path))
    if reader is None:
        raise DataError(
            f"{path} has an unknown suffix.", allowed=_ALLOWED, next_step="write the rows as jsonl, one object a line"
        )
    return reader


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _files_in(folder: Path) -> list[Path]:
    found: list[Path] = []
    passed: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                file = Path(place, name)
                (found if _suffix(file) in READERS else passed).append(file)
    if not found:
        seen = ", ".join(sorted(file.name for file in passed)[:5]) or "nothing"
        raise DataError(
            f"{folder} holds no data files (found: {seen}).", allowed=_ALLOWED,
            next_step="name a folder with such files",
        )
    return sorted(found)


def _nearest_path(path: Path) -> str | None:
    if not path.parent.is_dir():
        return None
    close = nearest(path.name, (entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")))
    return str(path.parent / close) if close else None


def _missing(path: Path) -> DataError:
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    close = _nearest_path(path)
    given = f"There is no file or folder {path}."
    if parent != path.parent:
        given += f" (The folder {path.parent} does not exist; {parent} does.)"
    return DataError(given, allowed=_ALLOWED, next_step=f"--data {close}" if close else f"ls {parent}")
