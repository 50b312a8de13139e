"""Bytes of a file to text: gzip, byte-order marks, invalid UTF-8, and plain text documents.

Everything is read as strict UTF-8. The alternative, guessing an encoding or replacing what does not decode, trains on
wrong characters in silence; the price is that a Latin-1 file must be converted first, and the error says with what.

A txt file is one document. Splitting it at blank lines would turn one text into thousands of unrelated rows and lose
what follows what, so a file is cut only when it is long (over `DOCUMENT_CHARS`), then at the next blank line, and all
the pieces joined are the file again. Limits: a text without any blank line is cut at the end of a line instead, after
sixteen times that length; a single endless line is held in memory whole.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

from chulengo.data.types import Record
from chulengo.errors import DataError

CHUNK_BYTES = 1 << 16
DOCUMENT_CHARS = 1 << 20
_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Yields the file's bytes, decompressed when its name ends with `.gz`.

    Raises:
        DataError: the file cannot be opened, or its gzip stream is broken or ends early.
    """
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path, "rb") as stream:
                yield cast(BinaryIO, stream)
        else:
            with path.open("rb") as stream:
                yield stream
    except EOFError as error:
        raise DataError(
            f"{path} ends in the middle of its gzip stream: the file is cut off.",
            next_step="copy or download it again",
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} is not a readable gzip file: {error}.",
            next_step="copy or download it again, or take .gz off its name if it is not compressed",
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line with its line end) of a UTF-8 file; a byte-order mark is left out."""
    place = 0
    with open_bytes(path) as stream:
        for number, raw in enumerate(stream, start=1):
            start = len(_BOM) if number == 1 and raw.startswith(_BOM) else 0
            try:
                text = raw[start:].decode("utf-8")
            except UnicodeDecodeError as error:
                _refuse_bytes(path, place + start + error.start, number, raw[start:], error.start)
            place += len(raw)
            yield number, text


def text_chunks(path: Path) -> Iterator[str]:
    """Yields the text of a UTF-8 file in pieces of about 64 KiB; a byte-order mark is left out."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    place, line = 0, 1
    with open_bytes(path) as stream:
        while True:
            chunk = stream.read(CHUNK_BYTES)
            if place == 0 and chunk.startswith(_BOM):
                chunk, place = chunk[len(_BOM) :], len(_BOM)
            held = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut in two
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                _refuse_bytes(path, place - held + error.start, line, error.object, error.start)
            if not chunk:
                return
            place += len(chunk)
            line += chunk.count(b"\n")
            yield text


def text_records(path: Path) -> Iterator[Record]:
    """Yields a txt file as one record with the field `text`, or several when it is long (see the top of this file)."""
    row, held, parts, size = 0, "", list[str](), 0
    for _, line in numbered_lines(path):
        parts.append(line[:-2] + "\n" if line.endswith("\r\n") else line)
        size += len(line)
        at_border = not line.strip() or size >= 16 * DOCUMENT_CHARS
        if size >= DOCUMENT_CHARS and at_border:
            if held:
                row += 1
                yield Record({"text": held}, f"{path}#{row}")
            held, parts, size = "".join(parts), [], 0
    rest = "".join(parts)
    if held and not rest.strip():
        held, rest = held + rest, ""  # blank lines at the end are no document of their own
    for text in (held, rest):
        if text.strip():
            row += 1
            yield Record({"text": text}, f"{path}#{row}")


def _refuse_bytes(path: Path, offset: int, line: int, raw: bytes, place: int) -> NoReturn:
    if offset <= 3 and raw.startswith(_UTF16_BOMS):
        raise DataError(
            f"{path} is UTF-16 text.",
            allowed="UTF-8",
            next_step=f"iconv -f utf-16 -t utf-8 '{path}' > converted{path.suffix}",
        )
    raise DataError(
        f"{path} is not UTF-8 text: byte 0x{raw[place]:02x} at offset {offset} (line {line}).",
        allowed="UTF-8",
        next_step=f"iconv -f latin1 -t utf-8 '{path}' > converted{path.suffix}   (if it is Latin-1)",
    )
