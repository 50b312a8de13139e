"""Writes, tokenises and packs the pretraining corpus with several processes.

A packed row holds whole documents back to back. Each entry is one uint16: the low 13 bits are the token id, bit 14
says that the token belongs to an answer, bit 15 that it is the first of a document. Id 0 (unknown, which byte
fallback never produces) fills the rest of a row.
"""

import multiprocessing
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import nano_tokenizer
from chulengo.nano.world import write_document

ID_MASK, ANSWER_BIT, START_BIT = (1 << 13) - 1, 1 << 14, 1 << 15
_NUM_OPEN_ROWS = 24


class Shard(NamedTuple):
    """One worker's share of the corpus."""

    folder: str
    seed: int
    first: int
    num_documents: int
    row_tokens: int


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Any:
    return nano_tokenizer.load_tokenizer(Path(folder))


def encode_document(tokenizer: Any, document: dict[str, Any]) -> np.ndarray:
    """Returns one document as uint16 entries (see the module docstring), shape (num_tokens,)."""
    if "text" in document:
        ids = [nano_tokenizer.BOS, *tokenizer.encode(document["text"]), nano_tokenizer.EOS]
        is_answer = [False] * len(ids)
    else:
        ids, is_answer = nano_tokenizer.encode_chat(tokenizer, document["messages"])
    entries = np.array(ids, np.uint16) | np.array(is_answer, np.uint16) * np.uint16(ANSWER_BIT)
    entries[0] |= START_BIT
    return entries


def pack_shard(shard: Shard) -> tuple[np.ndarray, int]:
    """Returns packed rows, uint16 of shape (num_rows, row_tokens), and how many documents were too long."""
    tokenizer = _tokenizer(shard.folder)
    open_rows: list[list[np.ndarray]] = []
    fills: list[int] = []
    done: list[list[np.ndarray]] = []
    num_too_long = 0
    for index in range(shard.first, shard.first + shard.num_documents):
        entries = encode_document(tokenizer, write_document(shard.seed, index))
        if len(entries) > shard.row_tokens:
            num_too_long += 1
            continue
        fitting = [row for row, fill in enumerate(fills) if fill + len(entries) <= shard.row_tokens]
        if fitting:
            row = max(fitting, key=fills.__getitem__)
            open_rows[row].append(entries)
            fills[row] += len(entries)
            continue
        if len(open_rows) == _NUM_OPEN_ROWS:
            fullest = max(range(len(fills)), key=fills.__getitem__)
            done.append(open_rows.pop(fullest))
            fills.pop(fullest)
        open_rows.append([entries])
        fills.append(len(entries))
    rows = np.zeros((len(done) + len(open_rows), shard.row_tokens), np.uint16)
    for packed, parts in zip(rows, done + open_rows, strict=True):
        joined = np.concatenate(parts)
        packed[: len(joined)] = joined
        if len(joined) < shard.row_tokens:
            packed[len(joined)] = START_BIT
    return rows, num_too_long


def write_corpus(
    folder: Path, seed: int, num_documents: int, row_tokens: int, num_processes: int, documents_per_shard: int = 10_000
) -> tuple[np.ndarray, int]:
    """Returns the whole corpus as packed rows and the number of documents that were too long.

    The result does not depend on `num_processes`. Workers are forked, so call this before CUDA is in use.
    """
    shards = [
        Shard(str(folder), seed, first, min(documents_per_shard, num_documents - first), row_tokens)
        for first in range(0, num_documents, documents_per_shard)
    ]
    if num_processes == 1:
        packed = [pack_shard(shard) for shard in shards]
    else:
        with multiprocessing.get_context("fork").Pool(num_processes) as pool:
            packed = pool.map(pack_shard, shards, chunksize=1)
    return np.concatenate([rows for rows, _ in packed]), sum(num_too_long for _, num_too_long in packed)
