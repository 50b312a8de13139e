"""Sheets that come back, in every way in which they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chulengo.errors import DataError
from chulengo.evaluate.human.ratings import read_ratings, write_ratings
from chulengo.evaluate.human.sheets import write_study
from chulengo.evaluate.human.study import Item, Study, make_study
from chulengo.evaluate.human.summary import summarise, table
from rating_kit import fill_in, items, save_csv, save_jsonl, sheet_rows, taste_for

SYSTEMS = ("tuned", "base")


@pytest.fixture
def study() -> Study:
    return make_study(items(30), SYSTEMS, ("anna", "ben"), criteria=("helpful",))


@pytest.fixture
def sheets(study: Study, tmp_path: Path) -> Path:
    write_study(tmp_path / "study", study)
    return tmp_path / "study" / "sheets"


def tuned_always(row: dict[str, str]) -> dict[str, Any]:
    side = "A" if row["answer_A"].startswith("denut") else "B"
    return {"choice": side, f"helpful_{side}": 4}


def read(*paths: Path, key: Path | None = None) -> Any:
    return read_ratings([str(path) for path in paths], key)


def test_sheets_map_back_to_systems(sheets: Path, study: Study) -> None:
    for name in ("anna", "ben"):
        fill_in(sheets / f"{name}.csv", tuned_always)
    collected = read(sheets / "anna.csv", sheets / "ben.csv")
    assert {rating.winner for rating in collected.ratings} == {"tuned"}
    assert {rating.choice for rating in collected.ratings} == {"left", "right"}
    assert all(rating.scores == {("helpful", "tuned"): 4} for rating in collected.ratings)
    assert [rating.rater for rating in collected.ratings] == [entry.rater for entry in study.entries]
    assert collected.num_missing == {"anna": 0, "ben": 0}
    assert collected.outputs == study.mark


def test_a_folder_is_its_files_and_empty_rows_are_counted(sheets: Path, study: Study) -> None:
    """Each rater has two files; the JSONL that nobody filled in takes nothing away."""
    fill_in(sheets / "anna.csv", tuned_always)
    num_anna = sum(entry.rater == "anna" for entry in study.entries)
    num_ben = len(study.entries) - num_anna
    for place in (sheets, sheets.parent):
        collected = read(place)
        assert len(collected.ratings) == num_anna
        assert collected.num_rows == 2 * (num_anna + num_ben)
        assert collected.num_blank == num_anna + 2 * num_ben
        assert collected.num_missing == {"anna": 0, "ben": num_ben}


def test_csv_and_jsonl_say_the_same(sheets: Path) -> None:
    fill_in(sheets / "anna.csv", tuned_always)
    other = save_jsonl(sheets / "anna.jsonl", sheet_rows(sheets / "anna.csv"))
    one, two = read(sheets / "anna.csv"), read(other)
    assert [(r.place, r.choice, r.scores) for r in one.ratings] == [(r.place, r.choice, r.scores) for r in two.ratings]
    both = read(sheets / "anna.csv", other)
    assert len(both.ratings) == len(one.ratings) == both.num_twice


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize(("cell", "score", "choice"), [("4.0", 4, "a"), ("4,0", 4, " B "), (" 4 ", 4, "Both  bad"),
                                                       ("5", 5, "both_bad"), ("1", 1, "TIE")])
def test_what_spreadsheet_programs_make_of_cells(
    sheets: Path, delimiter: str, cell: str, score: int, choice: str
) -> None:
    def says(row: dict[str, str]) -> dict[str, Any]:
        return {"choice": choice, "helpful_A": cell, "answer_A": row["answer_A"].replace(" ", "\r\n") + " "}

    collected = read(fill_in(sheets / "anna.csv", says, delimiter))
    expected = {"a": "left", " B ": "right", "TIE": "tie"}.get(choice, "both bad")
    assert {rating.choice for rating in collected.ratings} == {expected}
    assert {value for rating in collected.ratings for value in rating.scores.values()} == {score}


def test_other_column_orders_and_left_out_texts_do_no_harm(sheets: Path) -> None:
    fill_in(sheets / "anna.csv", tuned_always)
    whole = read(sheets / "anna.csv")
    rows = [{name: row[name] for name in ("outputs", "entry", "choice")} for row in sheet_rows(sheets / "anna.csv")]
    less = read(save_csv(sheets / "less.csv", rows[::-1]))
    assert {(r.place, r.winner) for r in less.ratings} == {(r.place, r.winner) for r in whole.ratings}


def test_a_sheet_that_lost_the_column_of_choices_is_not_taken_for_an_empty_one(sheets: Path) -> None:
    fill_in(sheets / "anna.csv", tuned_always)
    rows = [{"vote" if name == "choice" else name: cell for name, cell in row.items()}
            for row in sheet_rows(sheets / "anna.csv")]
    lost = save_csv(sheets / "lost.csv", rows)
    with pytest.raises(DataError, match=r"lost\.csv has no column choice; its columns: row, .*, vote, helpful_A"):
        read(lost)


def test_people_who_have_not_rated_are_not_counted(sheets: Path) -> None:
    fill_in(sheets / "anna.csv", tuned_always)
    said = table(summarise(read(sheets), draws=200))
    assert " by 1 person, " in said.splitlines()[0]
    assert "\n  ben " in said


def test_one_is_written_in_the_singular(tmp_path: Path) -> None:
    plain = {"item": "1", "left": "a", "right": "b"}
    rows = [{**plain, "rater": "x", "choice": "tie"}, {**plain, "rater": "y", "choice": "left"}]
    said = table(summarise(read(save_jsonl(tmp_path / "x.jsonl", rows)), draws=200))
    one = table(summarise(read(save_jsonl(tmp_path / "one.jsonl", rows[:1])), draws=200))
    assert one.splitlines()[0] == "1 rating of 1 item by 1 person, 1 of them a vote"
    for text in ("1 lost, 1 tie, 0 both bad" if "b against a" in said else "0 lost, 1 tie, 0 both bad",
                 "of 1 vote, p", "over 1 unit;"):
        assert text in said, said


def test_odd_answers_come_back_too(tmp_path: Path) -> None:
    odd = ["a\rb", "a\r\nb\n\n", "\x00\x01", "a\u2028b\u2029c\x85d", '"";,\t',
           "=1+1\n=2", "", " ", "'", "\ufeffx", "\u202ex"]
    made = [Item(str(n), text, {"tuned": text, "base": f"no {text}"}) for n, text in enumerate(odd)]
    write_study(tmp_path / "odd", make_study(made, SYSTEMS, ("anna",), repeats=0.3))
    file = fill_in(tmp_path / "odd" / "sheets" / "anna.csv", lambda row: {"choice": "A"})
    assert len(read(file).ratings) == len(odd) + 3
    lines = (tmp_path / "odd" / "sheets" / "anna.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [{**json.loads(line), "choice": "A"} for line in lines if line]
    assert read(file, save_jsonl(tmp_path / "odd" / "anna.jsonl", rows)).num_twice == len(odd) + 3


def changed(sheets: Path, place: int, **cells: Any) -> Path:
    fill_in(sheets / "anna.csv", tuned_always)
    rows = sheet_rows(sheets / "anna.csv")
    rows[place].update(cells)
    return save_csv(sheets / "anna.csv", rows)


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ({"choice": "C"}, r"anna.csv:3: the choice is 'C'; allowed: A, B, tie, both bad"),
        ({"helpful_A": "6"}, "helpful_A is '6'; allowed: 1, 2, 3, 4, 5"),
        ({"helpful_B": "3.5"}, "helpful_B is '3.5'"),
        ({"helpful_B": "²"}, "helpful_B is '²'"),
        ({"entry": "r-0"}, "no sheet of this key has an entry 'r-0'"),
        ({"entry": ""}, "no sheet of this key has an entry ''"),
        ({"answer_A": "something else"}, "answer_A is not the text that was handed out"),
        ({"question": "something else"}, "question is not the text that was handed out"),
        ({"outputs": "o-123"}, r"different sets of answers: [a-p]{12} \(the key\), o-123 \(.*anna.csv:3\)"),
    ],
)
def test_rows_that_cannot_be_used(sheets: Path, cells: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        read(changed(sheets, 1, **cells))


def test_all_problems_are_told_at_once(sheets: Path) -> None:
    fill_in(sheets / "anna.csv", lambda row: {"choice": "?"})
    with pytest.raises(DataError, match=r"(?s)problems:.*anna.csv:2:.*anna.csv:3:.*and \d+ more"):
        read(sheets / "anna.csv")


def test_contradicting_ratings_of_one_row(sheets: Path) -> None:
    fill_in(sheets / "anna.csv", tuned_always)
    rows = sheet_rows(sheets / "anna.csv")
    rows[2]["choice"] = "tie"
    other = save_csv(sheets / "anna-late.csv", rows)
    with pytest.raises(DataError, match=r"anna-late.csv:4 and .*anna.csv:4 rate the same row differently"):
        read(sheets / "anna.csv", other)


def test_sheets_of_another_study_are_refused(sheets: Path, tmp_path: Path) -> None:
    fill_in(sheets / "anna.csv", tuned_always)
    answers = items(30)[:-1]
    write_study(tmp_path / "other", make_study(answers, SYSTEMS, ("anna",), criteria=("helpful",)))
    with pytest.raises(DataError, match="different sets of answers"):
        read(sheets / "anna.csv", key=tmp_path / "other" / "key.json")
    write_study(tmp_path / "again", make_study(items(30), SYSTEMS, ("anna", "ben"), criteria=("helpful",), seed=9))
    with pytest.raises(DataError, match="no sheet of this key has an entry"):
        read(sheets / "anna.csv", key=tmp_path / "again" / "key.json")


def test_the_key_is_beside_the_sheets_or_named(sheets: Path, tmp_path: Path) -> None:
    fill_in(sheets / "anna.csv", tuned_always)
    (tmp_path / "mail").mkdir()
    moved = (sheets / "anna.csv").rename(tmp_path / "mail" / "anna.csv")
    with pytest.raises(DataError, match=r"its key is not beside it[\s\S]*--key"):
        read(moved)
    assert read(moved, key=sheets.parent / "key.json").ratings


def test_files_without_any_rating(sheets: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rows holds a rating"):
        read(sheets)
    plain = {"rater": "x", "item": "1", "left": "a", "right": "b", "choice": ""}
    with pytest.raises(DataError, match=r"^The one row holds no rating\.\n.*choice \(left, right, tie, both bad\)"):
        read(save_jsonl(tmp_path / "one.jsonl", [plain]))
    with pytest.raises(DataError, match="There is no file"):
        read(tmp_path / "missing.csv")
    with pytest.raises(DataError, match="neither a row of a sheet"):
        read(save_jsonl(tmp_path / "x.jsonl", [{"text": "hello"}]))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="has no sheets"):
        read(tmp_path / "none")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_exported_ratings_come_back_the_same(sheets: Path, tmp_path: Path, suffix: str) -> None:
    nasty = ["=1+1", "'quoted", "a;b\nc", "007", ""]
    for number, name in enumerate(("anna", "ben")):
        taste = taste_for("tuned", number)
        fill_in(sheets / f"{name}.csv", lambda row, taste=taste: {  # type: ignore[misc]
            **taste(row), "comment": nasty[int(row["row"]) % 5], "helpful_A": int(row["row"]) % 5 + 1})
    collected = read(sheets / "anna.csv", sheets / "ben.csv")
    file = tmp_path / f"ratings{suffix}"
    write_ratings(file, collected)
    back = read(file)
    assert back.outputs == collected.outputs
    for one, other in zip(collected.ratings, back.ratings, strict=True):
        # a rater's own apostrophe cannot be told from ours in a CSV sheet; from here on nothing is lost
        assert (one.place, one.left, one.choice, dict(one.scores), one.comment) == (
            other.place, other.left, other.choice, dict(other.scores), other.comment)
    first, second = summarise(collected, draws=200), summarise(back, draws=200)
    for part in ("systems", "bradley_terry", "agreement", "self_consistency", "win_rates", "criteria", "position_bias"):
        assert first[part] == second[part], part


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"item": "1", "left": "a", "right": "b", "choice": "left"}, "it has no rater"),
        ({"rater": "x", "item": "1", "left": "a", "right": "a", "choice": "left"}, "'a' is compared with itself"),
        ({"rater": "x", "item": "1", "left": "a", "right": "b", "choice": "a is better"}, "the choice is"),
        ({"rater": "x", "item": "1", "left": "a", "right": "b", "choice": "tie", "showing": 3}, "showing is '3'"),
        ({"rater": "x", "item": "1", "left": "B", "right": "A", "choice": "A"}, "the choice is 'A'; allowed: left"),
        ({"rater": "x", "item": "1", "left": "a", "right": "b", "choice": "b"}, "1 problem:\n.*the choice is 'b'"),
        ({"rater": "x", "item": "1", "left": "a", "right": "b", "vote": "left"},
         "has no column choice, and none such as helpful_left; its columns: rater, item, left, right, vote"),
        ({"rater": "x", "item": "1", "left": "a", "helpful_left": 3, "choice": "left"}, "has a choice and no right"),
    ],
)
def test_ratings_from_elsewhere_that_cannot_be_used(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        read(save_jsonl(tmp_path / "x.jsonl", [row]))


def test_ratings_of_two_sets_of_answers_are_not_mixed(tmp_path: Path) -> None:
    plain = {"rater": "x", "left": "a", "right": "b", "choice": "left"}
    rows = [{**plain, "item": "1", "outputs": "o-1"}, {**plain, "item": "2", "outputs": "o-2"}]
    with pytest.raises(DataError, match="different sets of answers"):
        read(save_jsonl(tmp_path / "x.jsonl", rows))


def test_a_spreadsheet_that_was_not_saved_as_csv_is_not_passed_over(sheets: Path) -> None:
    fill_in(sheets / "anna.csv", tuned_always)
    (sheets / "~$ben.xlsx").write_bytes(b"")  # Excel's lock file
    assert read(sheets).ratings
    (sheets / "ben.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"ben\.xlsx is a spreadsheet program's own format"):
        read(sheets)


def test_other_suffixes_cannot_be_written(sheets: Path, tmp_path: Path) -> None:
    fill_in(sheets / "anna.csv", tuned_always)
    with pytest.raises(DataError, match=r"cannot be written as x\.xlsx"):
        write_ratings(tmp_path / "x.xlsx", read(sheets / "anna.csv"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="The ratings cannot be written"):
        write_ratings(tmp_path / "file" / "x.csv", read(sheets / "anna.csv"))
