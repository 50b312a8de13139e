"""Which rows: random subsets, train/validation splits, duplicates, and writing rows out as a data set.

All choices are made by hashing, not by a random generator's state: a row's place in the lottery depends on the seed
and its number (subset) or its text (split) alone. So nothing depends on how rows were chunked or on the Python
version, a subset of 500 is part of the subset of 1,000 with the same seed (one can grow a sample and compare), and a
conversation keeps its side of the split as long as it is drawn early.

A split is by conversation: rows that open with the same user message (ignoring case, spacing and Unicode form) go to
the same side, or the validation loss would partly measure memory; so do questions on the same passage. Where one
opening is shared by a large part of the data ("Hello"), the fraction can only be met from the other rows.
"""

from __future__ import annotations

import gzip
import hashlib
import heapq
import json
import os
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from chulengo.data.types import Example, Message
from chulengo.errors import ConfigError, DataError


def sample(examples: Iterable[Example], count: int, seed: int) -> list[Example]:
    """Returns `count` examples drawn without replacement, in the order they came; all when there are no more.

    Needs memory for `count` examples, whatever the iterator's length.

    Raises:
        ConfigError: `count` is not positive.
    """
    if count < 1:
        raise ConfigError(f"A subset of {count} rows was asked for.", allowed="data.num_rows of 1 or more, or null")
    heap: list[tuple[int, int, Example]] = []  # the `count` lowest tickets; the highest of them on top
    for index, example in enumerate(examples):
        ticket = _ticket(seed, str(index))
        if len(heap) < count:
            heapq.heappush(heap, (-ticket, index, example))
        elif ticket < -heap[0][0]:
            heapq.heapreplace(heap, (-ticket, index, example))
    return [example for _, _, example in sorted(heap, key=lambda entry: entry[1])]


def split_by_conversation(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Returns (train, validation), both in the order given; rows of a group, or a first user message, stay together.

    Validation gets `round(fraction * rows)` rows, fewer only where whole groups do not fit, and at least one when
    `fraction` is above 0 and there are two groups.

    Raises:
        ConfigError: `fraction` is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"A validation fraction of {fraction} was asked for.", allowed="0 or more, below 1")
    groups = _together(examples, lambda example: example.group.encode() or _opening(example))
    if len(groups) < 2:  # one passage that goes with every question parts nothing
        groups = _together(examples, _opening)
    if fraction == 0 or len(groups) < 2:
        return list(examples), []
    drawn = [groups[key] for key in sorted(groups, key=lambda key: _ticket(seed, key.hex()))]
    wanted = max(1, round(fraction * len(examples)))
    chosen: set[int] = set()
    left = len(groups)
    for rows in drawn:
        if left > 1 and len(chosen) + len(rows) <= wanted:
            chosen.update(rows)
            left -= 1
    if not chosen:
        smallest: list[int] = min(drawn, key=len)
        chosen.update(smallest)
    train = [example for index, example in enumerate(examples) if index not in chosen]
    return train, [example for index, example in enumerate(examples) if index in chosen]


def group_of(passage: str) -> str:
    """Returns the group of the rows that are about one passage; ignores case, spacing and Unicode form."""
    return _digest(_normal(passage).casefold()).hex()


def _together(examples: Sequence[Example], key: Callable[[Example], bytes]) -> dict[bytes, list[int]]:
    groups: dict[bytes, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(key(example), []).append(index)
    return groups


def duplicates(examples: Iterable[Example]) -> list[list[int]]:
    """Returns the groups of two or more rows with the same content, as indices, in order of appearance."""
    groups: dict[bytes, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(content_key(example), []).append(index)
    return [rows for rows in groups.values() if len(rows) > 1]


def content_key(example: Example) -> bytes:
    """Returns 16 bytes that are the same for rows with the same turns, answers and label.

    Spacing and Unicode form do not count; case, roles and the system prompt do.
    """
    parts: list[str] = [example.kind, str(example.desirable)]
    for message in (*example.messages, Message("text", "rejected"), *example.rejected):
        parts += [message.role, _normal(message.content)]
    return _digest("\x1f".join(parts))


def write_examples(path: str | Path, examples: Iterable[Example]) -> int:
    """Writes the examples as a JSON lines file of `messages` rows and returns their number.

    `load_examples` reads them back equal, but for `source`. The file appears whole or not at all: it is written
    beside its place under another name, then moved. A name that ends with `.gz` is compressed.

    Raises:
        DataError: the file cannot be written (no such folder, disk full).
    """
    path = Path(path)
    count = 0
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "wb") as raw:
            # mtime 0: the same examples give the same bytes
            packed = gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") if path.suffix == ".gz" else raw
            for example in examples:
                packed.write(json.dumps(_row(example), ensure_ascii=False).encode("utf-8") + b"\n")
                count += 1
            if packed is not raw:
                packed.close()
            raw.flush()
            os.fsync(raw.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return count


def _row(example: Example) -> dict[str, Any]:
    row: dict[str, Any] = {"messages": [_turn(message) for message in example.messages]}
    if example.kind != "chat":
        row["kind"] = example.kind
    if example.rejected:
        row["rejected"] = [_turn(message) for message in example.rejected]
    if example.desirable is not None:
        row["desirable"] = example.desirable
    if example.references:
        row["references"] = list(example.references)
    if example.group:
        row["split_group"] = example.group  # not `group`: data sets have columns of that name and any meaning
    return row


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.trained is not None:
        turn["trained"] = message.trained
    return turn


def _opening(example: Example) -> bytes:
    first = next((m for m in example.messages if m.role == "user"), None)
    texts = [first.content] if first is not None else [m.content for m in example.messages]
    return _digest("\x1f".join(_normal(text).casefold() for text in texts))


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _ticket(seed: int, what: str) -> int:
    return int.from_bytes(_digest(f"{seed}:{what}")[:8], "big")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
