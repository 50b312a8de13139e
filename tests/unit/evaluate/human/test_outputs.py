"""Answers from results and from files of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chulengo.errors import DataError
from chulengo.evaluate.human.outputs import read_answers, read_results
from rating_kit import save_jsonl


def row(number: int, answer: str, question: str = "Q", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{question}{number}"}]
    return {"id": str(number), "messages": messages, "answer": answer, **more}


def results(folder: Path, **examples: dict[str, Any]) -> Path:
    content = {"format": "chulengo-results/1", "examples": [
        {"id": name, "group": name, "question": "Q", "references": [], "answers": answers}
        for name, answers in examples.items()]}
    folder.mkdir(exist_ok=True)
    (folder / "squad.json").write_text(json.dumps(content))
    (folder / "other.json").write_text("{}")
    return folder


def said(text: str, reason: str = "stop") -> dict[str, str]:
    return {"text": text, "finish_reason": reason}


def test_files_are_systems(tmp_path: Path) -> None:
    one = save_jsonl(tmp_path / "one.jsonl", [row(1, "a"), row(2, "")])
    two = save_jsonl(tmp_path / "two.jsonl", [row(2, "d"), row(1, "c")])
    outputs = read_answers([str(one), str(two)])
    assert outputs.systems == ("one", "two")
    assert [(item.id, item.question, dict(item.answers)) for item in outputs.items] == [
        ("1", "Q1", {"one": "a", "two": "c"}), ("2", "Q2", {"one": "", "two": "d"})]


def test_a_file_with_both_is_two_systems(tmp_path: Path) -> None:
    both = save_jsonl(tmp_path / "x.jsonl", [row(1, "a", base={"answer": "b"})])
    assert read_answers([str(both)]).items[0].answers == {"tuned": "a", "base": "b"}


def test_several_turns_are_all_shown(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    file = save_jsonl(tmp_path / "x.jsonl", [{"messages": turns, "answer": "d"}])
    assert read_answers([str(file)]).items[0].question == "user: a\nassistant: b\nuser: c"


def test_equal_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_jsonl(tmp_path / name / "x.jsonl", [row(1, name)])
    files = [str(tmp_path / name / "x.jsonl") for name in ("a", "b")]
    assert read_answers(files).systems == ("a/x", "b/x")
    with pytest.raises(DataError, match="Two files have one name"):
        read_answers([files[0], files[0]])


def test_missing_answers_are_named(tmp_path: Path) -> None:
    one = str(save_jsonl(tmp_path / "one.jsonl", [row(1, "a"), row(2, "b")]))
    two = str(save_jsonl(tmp_path / "two.jsonl", [row(2, "c"), row(3, "d")]))
    with pytest.raises(DataError, match=r"one lacks 1 \(3\); two lacks 1 \(1\)"):
        read_answers([one, two])
    outputs = read_answers([one, two], common=True)
    assert [item.id for item in outputs.items] == ["2"]
    assert outputs.num_left_out == 2
    three = str(save_jsonl(tmp_path / "three.jsonl", [row(9, "z")]))
    with pytest.raises(DataError, match="Not every system answered all 3"):
        read_answers([one, three], common=True)


@pytest.mark.parametrize(
    ("rows", "says"),
    [([row(1, "a"), row(1, "b")], "occurs twice"), ([row(1, "a", "Other")], "asks something else"),
     ([{"id": "1"}], "has no answer"), ([], "is empty")],
)
def test_broken_answers(tmp_path: Path, rows: list[dict[str, Any]], says: str) -> None:
    one = str(save_jsonl(tmp_path / "one.jsonl", [row(1, "a")]))
    two = str(save_jsonl(tmp_path / "two.jsonl", rows))
    with pytest.raises(DataError, match=says):
        read_answers([one, two])


def test_a_name_that_is_no_file_is_not_looked_up_on_the_network() -> None:
    with pytest.raises(DataError, match="There is no file"):
        read_answers(["org/name"])


def test_results_put_tuned_first(tmp_path: Path) -> None:
    folder = results(tmp_path / "r", q1={"base": said("a"), "tuned": said("b")})
    for path in (folder, folder / "squad.json"):
        outputs = read_results(path)
        assert outputs.systems == ("tuned", "base")
        assert outputs.items[0].answers == {"tuned": "b", "base": "a"}


def test_half_a_character_becomes_one_that_can_be_written(tmp_path: Path) -> None:
    folder = results(tmp_path / "r", q1={"base": said("a\ud83d"), "tuned": said("🦙")})
    assert read_results(folder).items[0].answers == {"tuned": "🦙", "base": "a\ufffd"}


def test_results_without_some_answers(tmp_path: Path) -> None:
    folder = results(tmp_path / "r", q1={"base": said("a"), "tuned": said("b")},
                     q2={"base": said("a"), "tuned": said("", "missing")})
    with pytest.raises(DataError, match=r"tuned lacks 1 \(q2\)"):
        read_results(folder)
    assert len(read_results(folder, common=True).items) == 1


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no results file"):
        read_results(tmp_path)
    with pytest.raises(DataError, match="There are no results"):
        read_results(tmp_path / "missing")
    (tmp_path / "a.json").write_text('{"format": "chulengo-results/1"}')
    with pytest.raises(DataError, match="no answers to rate"):
        read_results(tmp_path)
    (tmp_path / "b.json").write_text('{"format": "chulengo-results/1"}')
    with pytest.raises(DataError, match="2 results files"):
        read_results(tmp_path)
