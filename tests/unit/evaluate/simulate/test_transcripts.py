from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from chulengo.data.formats import detect_format, to_example
from chulengo.data.types import Message, Record
from chulengo.errors import DataError
from chulengo.evaluate.simulate.goals import read_goal
from chulengo.evaluate.simulate.scenarios import Scenario
from chulengo.evaluate.simulate.talk import Asked, Conversation, conversations, talk
from chulengo.evaluate.simulate.transcripts import SETTINGS_FILE, TranscriptFile, conversation_of, row_of
from chulengo.generate.engine import Answer

GOAL = read_goal({"facts": ["x 1", ["y", "z"]]}, "here")
ASKED = conversations([Scenario(f"s{n}", "here", goal="g", script=("hi",) * (n % 2), system="be kind", met_when=GOAL,
                                real_answers=("r",)) for n in range(3)])


def speak(chats: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[Answer]:
    return [Answer(f"x {seed % 2} é", (1, 2), "stop", 3, seed, 0.1) for seed in seeds]


def talked(asked: Sequence[Asked]) -> list[Conversation]:
    return list(talk(asked, speak, speak, max_turns=2))


def test_a_row_holds_the_whole_conversation() -> None:
    for conversation in talked(ASKED):
        row = json.loads(json.dumps(row_of(conversation)))
        assert conversation_of(row, conversation.asked) == conversation


def test_a_row_is_training_data() -> None:
    conversation = talked(ASKED[1:2])[0]
    record = Record(row_of(conversation), "t.jsonl:1")
    assert detect_format([record]) == "messages"
    example = to_example(record, "messages")
    assert [message.role for message in example.messages] == ["system", *["user", "assistant"] * 2]
    assert example.messages[1].content == "hi"
    assert example.answer == conversation.agent[-1].text


def test_a_torn_row_is_taken_off_and_had_again(tmp_path: Path) -> None:
    file = TranscriptFile(tmp_path / "out", {"seed": 0}, ASKED)
    for conversation in reversed(talked(file.left)):
        file.append(conversation)
    assert [each.asked.id for each in file.in_order()] == ["s0", "s1", "s2"]
    whole = file.path.read_text(encoding="utf-8")
    lines = whole.splitlines(keepends=True)
    file.path.write_text(lines[1] + lines[0][:-20], encoding="utf-8")
    again = TranscriptFile(tmp_path / "out", {"seed": 0}, ASKED)
    assert [each.id for each in again.left] == ["s0", "s2"]
    assert file.path.read_text(encoding="utf-8") == lines[1]
    for conversation in talked(again.left):
        again.append(conversation)
    again.in_order()
    assert file.path.read_text(encoding="utf-8") == whole


def test_more_scenarios_may_be_asked_for_later(tmp_path: Path) -> None:
    file = TranscriptFile(tmp_path, {}, ASKED[:1])
    file.append(talked(file.left)[0])
    assert [each.id for each in TranscriptFile(tmp_path, {}, ASKED).left] == ["s1", "s2"]


@pytest.mark.parametrize(
    ("settings", "asked", "says"),
    [
        ({"seed": 1, "heat": (1, 2)}, ASKED, "other seed"),
        ({"seed": 0, "heat": (1, 2)}, ASKED[1:], "of other scenarios"),
        ({"seed": 0, "heat": (1, 2)}, [Asked("s0", Scenario("s0", "here", goal="other")), *ASKED[1:]],
         "of other scenarios"),
    ],
)
def test_another_simulation_is_left_alone(
    tmp_path: Path, settings: dict[str, Any], asked: list[Asked], says: str
) -> None:
    file = TranscriptFile(tmp_path, {"seed": 0, "heat": (1, 2)}, ASKED)
    for conversation in talked(ASKED):
        file.append(conversation)
    before = file.path.read_bytes()
    with pytest.raises(DataError, match=says):
        TranscriptFile(tmp_path, settings, asked)
    assert file.path.read_bytes() == before
    assert not TranscriptFile(tmp_path, {"seed": 0, "heat": (1, 2)}, ASKED).left


def test_files_that_are_something_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "transcripts.jsonl").write_text("notes\n")
    with pytest.raises(DataError, match=r"no simulation\.json"):
        TranscriptFile(tmp_path / "a", {}, ASKED)
    TranscriptFile(tmp_path / "b", {}, ASKED).path.write_text("notes\n")
    with pytest.raises(DataError, match="is no transcript"):
        TranscriptFile(tmp_path / "b", {}, ASKED)
    (tmp_path / "b" / SETTINGS_FILE).write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        TranscriptFile(tmp_path / "b", {}, ASKED)
