"""Sheets: blind, safe in a spreadsheet program, and never written over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chulengo.errors import DataError
from chulengo.evaluate.human.cells import protected, same_text, unprotected
from chulengo.evaluate.human.sheets import NO_ANSWER, num_over_long, write_csv, write_study
from chulengo.evaluate.human.study import Item, make_study
from rating_kit import items, sheet_rows

SYSTEMS = ("tuned", "base")
ACTIVE = ['=1+1', '=HYPERLINK("http://x";"y")', "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "  =1", "＝1", "＋1",
          "－1", "＠x", "- a list\n- of two", "'=1", "'"]
TAKEN_FOR_NUMBERS = ["007", "1-2", "3/4", "12:30", "1e5", "5 May 2020", "Monday, 5 May", "3 pm", "TRUE", "false", "5 %",
                     "12345678901234567890", "123456789012", "1,5", "5. Oktober", "00", "٣", "1 "]
PLAIN = ["", "Llamas", "A sentence with the number 7 in it.", "tie", "a\nb", 'say "x", then y; z', "é 🦙 שלום", "a=b",
         "What is 2+2?", "0", "45", "12345678901"]


@pytest.mark.parametrize("text", [*ACTIVE, *TAKEN_FOR_NUMBERS, *PLAIN])
def test_a_text_comes_back_from_its_cell(text: str) -> None:
    assert unprotected(protected(text)) == text


@pytest.mark.parametrize("text", [*ACTIVE, *TAKEN_FOR_NUMBERS])
def test_what_a_program_would_act_on_is_protected(text: str) -> None:
    assert protected(text) == "'" + text


@pytest.mark.parametrize("text", PLAIN)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert protected(text) == text


def test_texts_are_compared_but_for_what_programs_change() -> None:
    assert same_text("a\r\nb ", "'a\nb")
    assert same_text("e\u0301", "é")
    assert not same_text("a b", "a c")


def test_a_csv_comes_back_through_the_csv_reader(tmp_path: Path) -> None:
    every = [*ACTIVE, *TAKEN_FOR_NUMBERS, *PLAIN]
    write_csv(tmp_path / "x.csv", ["text", "number"], [{"text": text, "number": 4} for text in every])
    rows = sheet_rows(tmp_path / "x.csv")
    assert [unprotected(row["text"]) for row in rows] == every
    assert not any(row["text"].lstrip().startswith(tuple("=+-@")) for row in rows)
    assert {row["number"] for row in rows} == {"4"}
    assert (tmp_path / "x.csv").read_bytes().startswith(b"\xef\xbb\xbf")


def test_no_sheet_names_a_system_or_marks_a_repeat(tmp_path: Path) -> None:
    study = make_study(items(40), SYSTEMS, ("anna", "ben"), criteria=("helpful",), repeats=0.3)
    written = write_study(tmp_path / "study", study)
    assert [file.name for file in written] == ["anna.csv", "ben.csv"]
    assert sorted(p.name for p in (tmp_path / "study").iterdir()) == ["key.json", "sheets"]
    for file in (tmp_path / "study" / "sheets").iterdir():
        text = file.read_text(encoding="utf-8-sig")
        assert "tuned" not in text
        assert "base" not in text
    rows = sheet_rows(written[0])
    assert list(rows[0]) == ["row", "question", "answer_A", "answer_B", "choice", "helpful_A", "helpful_B", "comment",
                             "entry", "outputs"]
    assert [row["row"] for row in rows] == [str(n) for n in range(1, len(rows) + 1)]
    lines = (written[0].with_suffix(".jsonl")).read_text(encoding="utf-8").splitlines()
    for line, row in zip(map(json.loads, lines), rows, strict=True):
        assert {name: "" if value is None else str(value) for name, value in line.items()} == {
            name: unprotected(value) for name, value in row.items()}


def test_an_empty_answer_can_be_seen(tmp_path: Path) -> None:
    study = make_study([Item("1", "Who?", {"tuned": "", "base": "me"})], SYSTEMS, ("anna",))
    [row] = sheet_rows(write_study(tmp_path / "s", study)[0])
    assert {row["answer_A"], row["answer_B"]} == {NO_ANSWER, "me"}
    alone = make_study([Item("1", "Who?", {"tuned": ""})], ("tuned",), ("anna",), criteria=("helpful",))
    assert sheet_rows(write_study(tmp_path / "alone", alone)[0])[0]["answer"] == NO_ANSWER


def test_texts_that_excel_cuts_are_counted() -> None:
    long = Item("1", "Who?", {"tuned": "x" * 40_000, "base": "me"})
    assert num_over_long(make_study([long, *items(3)], SYSTEMS, ("anna", "ben"), overlap=1, repeats=0)) == 2


def test_nothing_is_written_over(tmp_path: Path) -> None:
    study = make_study(items(3), SYSTEMS, ("anna",))
    (tmp_path / "empty").mkdir()
    sheet = write_study(tmp_path / "empty", study)[0]
    sheet.write_text("filled in")
    with pytest.raises(DataError, match="is there already"):
        write_study(tmp_path / "empty", study)
    assert sheet.read_text() == "filled in"
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is there already"):
        write_study(tmp_path / "file", study)
    with pytest.raises(DataError, match="cannot be written"):
        write_study(tmp_path / "file" / "study", study)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file"]
