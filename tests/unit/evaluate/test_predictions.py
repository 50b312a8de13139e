"""Answers on disk: resumable, torn, of other settings; and other programs' files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chulengo.errors import DataError
from chulengo.evaluate.predictions import RowsFile, match_predictions, read_predictions

SETTINGS = {"model": "m", "max_new_tokens": 8}


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "p.jsonl"
    file = RowsFile(path, SETTINGS)
    file.add([{"id": "a", "answer": "é\n"}, {"id": "b", "answer": ""}])
    assert path.read_bytes().count(b"\n") == 2  # on the disk before anything else happens
    file.add([{"id": "c", "answer": "x"}])
    assert list(RowsFile(path, SETTINGS).rows) == ["a", "b", "c"]
    assert RowsFile(path, SETTINGS).rows["a"]["answer"] == "é\n"


@pytest.mark.parametrize("torn", ['{"id": "c", "ans', '{"id": "c"', "{", '{"id": "c", "answer": "x", "settings": "y"}'])
def test_a_torn_last_line_is_taken_off(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "p.jsonl"
    RowsFile(path, SETTINGS).add([{"id": "a", "answer": "x"}])
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    file = RowsFile(path, SETTINGS)
    assert list(file.rows) == ["a"]
    assert path.read_bytes() == whole
    file.add([{"id": "b", "answer": "y"}])
    assert list(RowsFile(path, SETTINGS).rows) == ["a", "b"]


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    RowsFile(path, SETTINGS).add([{"id": "a", "answer": "x"}])
    with pytest.raises(DataError, match="max_new_tokens was 8, now 9") as caught:
        RowsFile(path, {**SETTINGS, "max_new_tokens": 9})
    assert "model was" not in str(caught.value)
    assert "another --out" in str(caught.value)
    assert RowsFile(path, SETTINGS).rows


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    for content in ('{"messages": []}\n', "some text", "some text\n", '{"id": 1}\n'):
        path.write_text(content)
        with pytest.raises(DataError, match=r"no finished item|no file of finished"):
            RowsFile(path, SETTINGS)
        assert path.read_text() == content


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_forms_of_predictions(tmp_path: Path) -> None:
    expected = {"a": ("x", ""), "7": ("", "")}
    forms = {
        "m.json": json.dumps({"a": "x", "7": "", "z": None}),
        "l.json": json.dumps([{"id": "a", "prediction": "x"}, {"id": 7, "prediction": ""}]),
        "a.jsonl": '{"id": "a", "answer": "x", "text": "y"}\n{"id": 7, "answer": ""}\n{"id": "z", "answer": null}\n',
        "t.jsonl": '{"id": "a", "text": "x"}\n{"id": "7", "text": ""}\n',
        "c.csv": "id,answer\na,x\n7,\n",
    }
    for name, text in forms.items():
        assert read_predictions(written(tmp_path / name, text)) == expected, name
    own = RowsFile(tmp_path / "own.jsonl", SETTINGS)
    own.add([{"id": "a", "answer": "x", "finish_reason": "stop"}])
    assert read_predictions(own.path) == {"a": ("x", "stop")}
    assert read_predictions(written(tmp_path / "one.json", '{"id": "a", "answer": "x"}')) == {"a": ("x", "")}
    assert read_predictions(written(tmp_path / "n.json", '{"a": 3}')) == {"a": ("3", "")}
    assert read_predictions(written(tmp_path / "bom.json", '\ufeff{"a": "x", "id": "y"}')) == {
        "a": ("x", ""), "id": ("y", "")}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.json", '{"a": "x", "b": "y", "a": "z"}', "id 'a' occurs twice"),
        ("p.jsonl", '{"id": "a", "answer": "x"}\n{"id": "a", "answer": "x"}\n', r"p.jsonl:2: the id 'a' occurs twice"),
        ("p.jsonl", '{"answer": "x"}\n', "has no id"),
        ("p.jsonl", '{"id": "a", "reply": "x"}\n', r"has no answer \(its columns: id, reply\)"),
        ("p.jsonl", '{"id": "a", "answer": {"b": 1}}\n', "p.jsonl:1: column 'answer' holds dict"),
        ("p.json", '{"a": "x",', "not valid JSON: line 1"),
        ("p.jsonl", "", "is empty"),
        ("p.bin", "x", "unknown suffix"),
        ("p.json", '{"a": "x", "b": ["y", "z"]}', "the answer of 'b' is a list: ..y., .z"),
        ("p.json", '{"a": "x", "b": {"text": "y"}}', "the answer of 'b' is an object: ..text.: .y"),
        ("p.json", '{"a": "x", "b": NaN}', "the answer of 'b' is nan, which is no text"),
        ("p.json", '{"a": "x", "b": -Infinity}', "the answer of 'b' is -inf"),
        ("p.jsonl", '{"id": "a", "answer": NaN}\n', "p.jsonl:1: the answer of 'a' is nan"),
        ("p.json", '{"a": "x", "b": "\\ud800"}', r"the answer of 'b' has half of a surrogate pair \(\\ud800\)"),
        ("p.json", '{"a": "x", "b\\udc00": "y"}', r"half of a surrogate pair \(\\udc00\)"),
    ],
)
def test_broken_predictions(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_predictions(written(tmp_path / name, text))
    with pytest.raises(DataError, match="no predictions file"):
        read_predictions(tmp_path / "absent.json")


def test_missing_and_unknown_ids() -> None:
    ids = [f"q{n}" for n in range(8)]
    some = {"q1": ("x", "stop")}
    with pytest.raises(DataError, match=r"7 of 8 items have no prediction in p: q0, q2, q3, q4, q5, …(.|\n)*--missing"):
        match_predictions(ids, some, missing_is_wrong=False, source="p")
    answers, lost = match_predictions(ids, some, missing_is_wrong=True, source="p")
    assert answers[:3] == [("", "missing"), ("x", "stop"), ("", "missing")]
    assert lost == ["q0", *ids[2:]]
    with pytest.raises(DataError, match=r"1 of 2 predictions in p belong to no item of the data: Q1"):
        match_predictions(ids, {**some, "Q1": ("x", "")}, missing_is_wrong=True, source="p")
