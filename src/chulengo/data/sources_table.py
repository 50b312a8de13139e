"""Tables to records: csv, tsv and parquet.

The csv reader is the standard library's in strict mode: a quote that is not closed, or a row with more or fewer cells
than the header, is an error with its line. The lenient alternative swallows every row up to the next quote. A header
of a single column that holds a semicolon or a tab is read with that as the delimiter, as spreadsheets in many
countries write it. Parquet is read a few hundred rows at a time.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chulengo.data.sources_text import numbered_lines, open_bytes
from chulengo.data.types import Record
from chulengo.errors import DataError

_MAX_CELL_CHARS = 1 << 27  # the library's own limit of 131,072 is shorter than real documents
_PARQUET_ROWS = 256  # rows turned into Python objects at a time


def csv_records(path: Path, delimiter: str) -> Iterator[Record]:
    """Yields one record a row, `source` being `path:line` with the line that the row starts on.

    Raises:
        DataError: no header, column names twice, a row of another width, a quote that is never closed.
    """
    csv.field_size_limit(_MAX_CELL_CHARS)
    header: list[str] | None = None
    for line, cells in _rows(path, delimiter):
        if header is None:
            header = [name.strip() for name in cells]
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise DataError(f"{path}: column names occur twice: {', '.join(twice)}.")
        elif len(cells) != len(header):
            raise DataError(
                f"{path}, line {line}: {len(cells)} cells where the header has {len(header)} ({', '.join(header)}).",
                next_step="put cells that contain the delimiter, quotes or line ends in double quotes",
            )
        else:
            yield Record(dict(zip(header, cells, strict=True)), f"{path}:{line}")


def _rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    lines = (line for _, line in numbered_lines(path))
    first = next(lines, "")
    for other in (";", "\t"):
        if delimiter not in first and other in first:
            delimiter = other
            break
    reader = csv.reader(_chain(first, lines), delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}, row starting on line {start}: {error}.",
                allowed="cells with line ends, quotes or delimiters stand in double quotes, quotes inside doubled",
            ) from error
        if cells is None:
            return
        if cells:  # the reader gives [] for a blank line
            yield start, cells


def _chain(first: str, lines: Iterator[str]) -> Iterator[str]:
    yield first
    yield from lines


def parquet_records(path: Path) -> Iterator[Record]:
    """Yields one record a row, `source` being `path#row`. A `.parquet.gz` is decompressed in memory.

    Raises:
        DataError: the file is not parquet, is cut off, or holds text that is not UTF-8.
    """
    import pyarrow
    import pyarrow.parquet

    source: Any = path
    if path.suffix.lower() == ".gz":
        with open_bytes(path) as stream:
            source = pyarrow.BufferReader(stream.read())
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for fields in batch.to_pylist():
                    row += 1
                    yield Record(fields, f"{path}#{row}")
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path} is not a readable parquet file: {reason}", next_step="copy or download it again"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: a text after row {row} is not UTF-8 (byte {error.start}).") from error
