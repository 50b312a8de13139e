from __future__ import annotations

import json
from pathlib import Path

import pytest

from chulengo.errors import DataError
from chulengo.generate.answer_file import AnswerFile, Row, answer_row, same_prompts
from chulengo.generate.engine import Answer
from chulengo.generate.prompts import PromptRow, prompt_row

COMMON = {"settings": {"seed": 0, "sizes": (1, 2)}, "model": "m"}


def prompt(id_: str, text: str = "a", *, raw: bool = False) -> PromptRow:
    return PromptRow(id_, prompt_row(text, raw=raw).messages, f"p:{id_}", reference="r")


ROWS = [prompt("1"), prompt("2", "b"), prompt("3"), prompt("4", "c"), prompt("5")]


def made(row: PromptRow) -> Row:
    return answer_row(row, Answer(f"é {row.id}", (1, 2), "stop", 3, 9, 0.5), COMMON)


def test_a_row_stands_for_itself() -> None:
    assert made(ROWS[1]) == {
        "id": "2", "prompt": [{"role": "user", "content": "b"}], "reference": "r",
        "completion": [{"role": "assistant", "content": "é 2"}], "answer": "é 2", "finish_reason": "stop",
        "num_tokens": 2, "num_prompt_tokens": 3, "seed": 9, "seconds": 0.5, **COMMON,
    }
    raw = made(prompt("1", "Once", raw=True))
    assert (raw["prompt"], raw["text"], "completion" in raw) == ("Once", "Onceé 1", False)


def test_prompts_that_occur_again() -> None:
    assert {first: [row.id for row in rows] for first, rows in same_prompts(ROWS).items()} == {"1": ["3", "5"]}
    assert same_prompts([prompt("1"), prompt("2", raw=True)]) == {}


@pytest.mark.parametrize("torn", ['{"id": "3", "pro', "{", '{"id": "3"}'])
def test_a_torn_row_is_taken_off(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "a.jsonl"
    file = AnswerFile(path, ROWS, COMMON, both=False)
    file.append([made(row) for row in ROWS[:2]])
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole + torn, encoding="utf-8")
    again = AnswerFile(path, ROWS, COMMON, both=False)
    assert path.read_text(encoding="utf-8") == whole
    assert list(again.finished) == ["1", "2"]
    again.append([made(row) for row in ROWS[2:]])
    assert [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()] == list("12345")


def test_the_rows_end_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "a.jsonl", ROWS, COMMON, both=False)
    for row in (ROWS[3], ROWS[0], ROWS[4]):
        file.append([made(row)])
    file.put_in_order()
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == json.loads(json.dumps([made(ROWS[n]) for n in (0, 3, 4)]))
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]


def test_answers_of_another_command(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    AnswerFile(path, ROWS, COMMON, both=False).append([made(ROWS[0])])
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"a\.jsonl:1 .*other model"):
        AnswerFile(path, ROWS, {**COMMON, "model": "n"}, both=False)
    with pytest.raises(DataError, match="other prompts"):
        AnswerFile(path, [prompt("1", "other")], COMMON, both=False)
    with pytest.raises(DataError, match="other --both"):
        AnswerFile(path, ROWS, COMMON, both=True)
    with pytest.raises(DataError, match="is a folder"):
        AnswerFile(tmp_path, ROWS, COMMON, both=False)
    with pytest.raises(DataError, match="no folder"):
        AnswerFile(tmp_path / "missing" / "a.jsonl", ROWS, COMMON, both=False)
    assert path.read_bytes() == before


def test_a_full_disk_says_what_to_do(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    file = AnswerFile(tmp_path / "a.jsonl", ROWS, COMMON, both=False)
    file.path = Path("/dev/full")
    with pytest.raises(DataError, match="it goes on"):
        file.append([made(ROWS[0])])
