from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from chulengo.data.types import Message
from chulengo.errors import DataError
from chulengo.generate.prompts import prompt_row, read_prompts, with_system


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("one\n\n  two é \r\nthree", encoding="utf-8")
    rows = read_prompts(str(file))
    assert [(row.id, row.messages) for row in rows] == [("1", user("one")), ("3", user("two é")), ("4", user("three"))]
    assert rows[1].source == f"{file}:3"
    raw = read_prompts(str(file), raw=True)
    assert raw[1].messages == (Message("text", "  two é "),)
    packed = tmp_path / "p.txt.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert [row.messages for row in read_prompts(str(packed))] == [row.messages for row in rows]


def test_rows_with_prompt(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    spec = jsonl(tmp_path / "p.jsonl", {"prompt": "x"}, {"id": "k", "prompt": "y", "system": "s"}, {"prompt": turns})
    rows = read_prompts(spec)
    assert [row.id for row in rows] == ["1", "k", "3"]
    assert rows[1].messages == (Message("system", "s"), Message("user", "y"))
    assert [m.content for m in rows[2].messages] == ["a", "b", "c"]
    assert [row.reference for row in rows] == [None] * 3


def test_rows_with_messages_lose_their_last_answer(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = read_prompts(jsonl(tmp_path / "p.jsonl", {"messages": turns}))[0]
    assert row.messages == user("a")
    assert row.reference == "b"


def test_rows_of_a_data_format(tmp_path: Path) -> None:
    row = read_prompts(jsonl(tmp_path / "p.jsonl", {"question": "a", "answer": "b"}))[0]
    assert (row.messages, row.reference) == (user("a"), "b")


def test_raw_rows(tmp_path: Path) -> None:
    rows = read_prompts(jsonl(tmp_path / "p.jsonl", {"text": "a"}, {"prompt": "b"}), raw=True)
    assert [row.messages[0] for row in rows] == [Message("text", "a"), Message("text", "b")]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"prompt": "a"}, {"prompt": ""}], "p.jsonl:2 has no prompt"),
        ([{"prompt": "a"}, {"other": "b"}], "p.jsonl:2 has no prompt"),
        ([{"prompt": [{"role": "user"}]}], "p.jsonl:1 has no prompt"),
        ([{"prompt": [{"role": "assistant", "content": "a"}]}], "no question"),
        ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}], "the same id '1'"),
        ([{"text": "a story"}], "no prompt"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_prompts(jsonl(tmp_path / "p.jsonl", *rows))


@pytest.mark.parametrize(("name", "content"), [("p.txt", b""), ("p.txt", b"\n \n"), ("p.jsonl", b"")])
def test_an_empty_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"no prompts|empty"):
        read_prompts(str(tmp_path / name))


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        read_prompts(str(tmp_path / "missing.txt"))
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_prompts(str(tmp_path / "p.txt"))


def test_with_system() -> None:
    row = prompt_row("a")
    assert [m.content for m in with_system(row, "s").messages] == ["s", "a"]
    assert with_system(with_system(row, "s"), "t") == with_system(row, "s")
    assert with_system(row, None) == row
    raw = prompt_row("a", raw=True)
    assert with_system(raw, "s") == raw
