"""Rendered rows on disk instead of in memory, for data sets larger than memory.

Ids, loss marks and sources are appended to unnamed temporary files as rows come; what stays in memory is three numbers
a row. Reading a row maps its part of the files. The files have no name, so they are gone when the process ends,
however it ends. They lie in the system's temporary folder (TMPDIR), about 5 bytes a token.
"""

from __future__ import annotations

import mmap
import tempfile
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, overload

import numpy as np

from chulengo.data.renderer import RenderedRow


class RowStore(Sequence[RenderedRow]):
    """A sequence of rendered rows that lie on disk. `turn_ends` and `answer_spans` are not kept: the ledger's
    policies, which need them, have been applied before."""

    def __init__(self, rows: Iterable[RenderedRow]) -> None:
        """Writes all rows; they may come from a generator."""
        self._sizes = {"ids": array("q"), "encoder": array("q"), "source": array("q")}
        self._has_encoder = False
        files = {name: tempfile.TemporaryFile() for name in ("ids", "trained", "encoder", "source")}  # noqa: SIM115
        for row in rows:
            self._append(row, files)
        self._ends = {name: np.cumsum(np.frombuffer(sizes, dtype=np.int64)) if sizes else np.zeros(0, np.int64)
                      for name, sizes in self._sizes.items()}
        self._maps = {name: _mapped(file) for name, file in files.items()}

    def _append(self, row: RenderedRow, files: Mapping[str, IO[bytes]]) -> None:
        encoder, source = row.encoder_ids or [], row.source.encode()
        self._has_encoder = self._has_encoder or row.encoder_ids is not None
        files["ids"].write(np.asarray(row.ids, dtype=np.int32).tobytes())
        files["trained"].write(np.asarray(row.trained, dtype=np.bool_).tobytes())
        files["encoder"].write(np.asarray(encoder, dtype=np.int32).tobytes())
        files["source"].write(source)
        for name, size in (("ids", len(row.ids)), ("encoder", len(encoder)), ("source", len(source))):
            self._sizes[name].append(size)

    def __len__(self) -> int:
        return len(self._sizes["ids"])

    @overload
    def __getitem__(self, index: int) -> RenderedRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[RenderedRow]: ...
    def __getitem__(self, index: int | slice) -> RenderedRow | list[RenderedRow]:
        """Returns one row, or several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return RenderedRow(
            ids=np.frombuffer(self._part("ids", "ids", index, 4), dtype=np.int32).tolist(),
            trained=np.frombuffer(self._part("ids", "trained", index, 1), dtype=np.bool_).tolist(),
            source=self._part("source", "source", index, 1).decode(),
            encoder_ids=np.frombuffer(self._part("encoder", "encoder", index, 4), dtype=np.int32).tolist()
            if self._has_encoder else None,
        )

    def _part(self, sizes: str, file: str, index: int, width: int) -> bytes:
        end = int(self._ends[sizes][index])
        return self._maps[file][(end - self._sizes[sizes][index]) * width : end * width]


def _mapped(file: IO[bytes]) -> mmap.mmap | bytes:
    file.flush()
    if file.tell() == 0:  # an empty file cannot be mapped
        file.close()
        return b""
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    file.close()  # the map keeps the file
    return mapped
