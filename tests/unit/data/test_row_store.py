"""Rows on disk read back as they were, in little memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace

import pytest

from chulengo.data.renderer import RenderedRow
from chulengo.data.row_store import RowStore

ROWS = [
    RenderedRow([1, 31999, 5], [False, True, True], "a.jsonl:1", [3]),
    RenderedRow([7], [False], "ä#2", []),
    RenderedRow([], [], "empty", []),
    RenderedRow([2_000_000, 3], [True, False], "a.jsonl:3", [2]),
]


def test_rows_come_back() -> None:
    store = RowStore(iter(ROWS))
    assert len(store) == 4
    assert list(store) == [replace(row, turn_ends=[]) for row in ROWS]
    assert store[-1].ids == [2_000_000, 3]
    assert [row.source for row in store[1:3]] == ["ä#2", "empty"]
    with pytest.raises(IndexError):
        store[4]


def test_encoder_rows() -> None:
    rows = [RenderedRow([5, 1], [True, True], "x", [2], [8, 9, 1]), RenderedRow([4], [True], "y", [1], [])]
    assert [row.encoder_ids for row in RowStore(rows)] == [[8, 9, 1], []]


def test_no_rows() -> None:
    assert list(RowStore([])) == []


def test_memory_does_not_grow_with_tokens() -> None:
    def rows() -> Iterator[RenderedRow]:
        for number in range(2000):
            yield RenderedRow([number] * 1000, [True] * 1000, f"big:{number}")

    tracemalloc.start()
    store = RowStore(rows())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000  # two million tokens in a list are over 16 MB
    assert store[1999].ids[0] == 1999
