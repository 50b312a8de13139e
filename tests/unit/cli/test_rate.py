"""`chulengo rate` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chulengo.cli.main import main
from command_kit import done, refused
from rating_kit import fill_in, items, save_jsonl, sheet_rows, taste_for

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def answers(tmp_path: Path) -> list[Path]:
    made = items(50)
    return [
        save_jsonl(tmp_path / f"{name}.jsonl", [
            {"id": item.id, "messages": [{"role": "user", "content": item.question}], "answer": item.answers[name]}
            for item in made])
        for name in ("tuned", "base")
    ]


@pytest.fixture
def study(answers: list[Path], tmp_path: Path, capsys: Capture) -> Path:
    folder = tmp_path / "study"
    out, _ = done(capsys, "rate", "sheet", "--answers", *answers, "--raters", 3, "--out", folder)
    assert "50 pairs of answers" in out
    assert "194 decisive votes" in out
    return folder


def rated(study: Path, **more: float) -> Path:
    for number, file in enumerate(sorted((study / "sheets").glob("*.csv"))):
        fill_in(file, taste_for("tuned", number, **more))
    return study


def scores(capsys: Capture, *words: object) -> dict[str, Any]:
    out, _ = done(capsys, "rate", "score", *words, "--json", "--draws", 500)
    loaded: dict[str, Any] = json.loads(out)
    return loaded


def test_from_answers_to_a_table(study: Path, capsys: Capture, tmp_path: Path) -> None:
    rated(study)
    out, err = done(capsys, "rate", "score", study, "--out", tmp_path / "s.json", "--ratings", tmp_path / "r.csv")
    for words in ("tuned against base:", "win rate, ties as half", "tuned is preferred", "Bradley–Terry strength",
                  "no sign of a liking for one side", "agreement, nominal", "same choice when repeated", "rater-3"):
        assert words in out
    assert "wrote" in err
    written = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert written["format"] == "chulengo-ratings/1"
    assert written["win_rates"][0]["system"] == "tuned"
    for part in ("bradley_terry", "position_bias", "self_consistency"):
        assert written[part]["version"].endswith("/1")
        assert written[part]["definition"]
    # the exported ratings are as good as the sheets
    assert scores(capsys, tmp_path / "r.csv")["win_rates"] == scores(capsys, study)["win_rates"] == written["win_rates"]


def test_one_row_is_not_written_as_rows(answers: list[Path], tmp_path: Path, capsys: Capture) -> None:
    out, _ = done(capsys, "rate", "sheet", "--answers", *answers, "--num-items", 1, "--out", tmp_path / "one")
    assert "1 pair of answers, answers frozen" in out
    assert "1 row, 0 of them hidden repeats" in out


def test_the_numbers_are_those_of_the_sheets(study: Path, capsys: Capture) -> None:
    """Counted here a second time from the files, with the key."""
    rated(study, left=0.1)
    key = json.loads((study / "key.json").read_text(encoding="utf-8"))
    entries = {entry["id"]: entry for entry in key["entries"]}
    by_item: dict[str, list[float]] = {}
    left = decisive = 0
    for file in (study / "sheets").glob("*.csv"):
        for row in sheet_rows(file):
            entry = entries[row["entry"]]
            assert row["answer_A"].startswith(entry["left"][::-1])
            if entry["showing"] == 2:
                continue
            winner = {"A": entry["left"], "B": entry["right"]}.get(row["choice"])
            by_item.setdefault(entry["item"], []).append(0.5 if winner is None else float(winner == "tuned"))
            decisive += winner is not None
            left += row["choice"] == "A"
    found = scores(capsys, study)
    rate = found["win_rates"][0]
    assert rate["ties_half"]["value"] == pytest.approx(sum(sum(v) / len(v) for v in by_item.values()) / len(by_item))
    assert rate["ties_half"]["n"] == 50
    assert (found["position_bias"]["left"], found["position_bias"]["n"]) == (left, decisive)
    assert found["counts"]["missing"] == 0


def test_one_rater_gets_everything_but_agreement(answers: list[Path], tmp_path: Path, capsys: Capture) -> None:
    done(capsys, "rate", "sheet", "--answers", *answers, "--raters", "anna", "--out", tmp_path / "one")
    rated(tmp_path / "one")
    out, _ = done(capsys, "rate", "score", tmp_path / "one")
    assert out.count("alpha not computed: only one rater: agreement needs two") == 2
    assert "win rate, ties left out" in out
    assert "[" in out.split("same choice when repeated")[1]


def test_everybody_always_says_the_same(study: Path, capsys: Capture) -> None:
    for file in (study / "sheets").glob("*.csv"):
        fill_in(file, lambda row: {"choice": "tie"})
    out, _ = done(capsys, "rate", "score", study)
    assert out.count("alpha not computed: no variation: all ratings are equal") == 2
    assert "no decisive votes" in out
    assert "undecided" in out
    rated(study, strength=1.0, tie=0.0)
    out, _ = done(capsys, "rate", "score", study)
    assert "no interval: unbounded: tuned lost nothing" in out
    assert "tuned is preferred" in out


def test_half_finished_sheets_are_scored_and_counted(study: Path, capsys: Capture) -> None:
    taste = taste_for("tuned", 1)
    fill_in(study / "sheets" / "rater-1.csv", lambda row: taste(row) if int(row["row"]) <= 10 else {})
    found = scores(capsys, study / "sheets" / "rater-1.csv")
    assert found["counts"]["ratings"] == 10
    assert found["raters"]["rater-1"]["missing"] == len(sheet_rows(study / "sheets" / "rater-1.csv")) - 10
    assert found["raters"]["rater-2"]["rated"] == 0
    out, _ = done(capsys, "rate", "score", study / "sheets" / "rater-1.csv")
    assert "rows not rated yet" in out


def test_criteria_of_one_system(answers: list[Path], tmp_path: Path, capsys: Capture) -> None:
    words = ["--answers", answers[0], "--raters", 2, "--criteria", "helpful", "correct"]
    done(capsys, "rate", "sheet", *words, "--out", tmp_path / "c")
    for file in (tmp_path / "c" / "sheets").glob("*.csv"):
        assert "choice" not in sheet_rows(file)[0]
        fill_in(file, lambda row: {"helpful": len(row["question"]) % 3 + 2, "correct": 5})
    found = scores(capsys, tmp_path / "c")
    assert "win_rates" not in found
    correct, helpful = found["criteria"]
    assert (correct["systems"][0]["mean"], correct["agreement"]["reason"]) == (5, "no variation: all ratings are equal")
    assert helpful["agreement"]["value"] == 1
    out, _ = done(capsys, "rate", "score", tmp_path / "c")
    assert "helpful, 1 to 5" in out
    assert "helpful repeated" in out


def test_three_systems(tmp_path: Path, capsys: Capture) -> None:
    made = items(20, ("aa", "bb", "cc"))
    files = [save_jsonl(tmp_path / f"{name}.jsonl", [{"id": i.id, "prompt": i.question, "answer": i.answers[name]}
                                                     for i in made]) for name in ("aa", "bb", "cc")]
    done(capsys, "rate", "sheet", "--answers", *files, "--raters", 2, "--out", tmp_path / "three")
    for file in (tmp_path / "three" / "sheets").glob("*.csv"):
        fill_in(file, lambda row: {"choice": "AB"[int(row["row"]) % 2]})
    found = scores(capsys, tmp_path / "three")
    assert [(rate["system"], rate["against"]) for rate in found["win_rates"]] == [
        ("aa", "bb"), ("aa", "cc"), ("bb", "cc")]
    assert len(found["bradley_terry"]["strengths"]) == 3
    assert [alpha["level"] for alpha in found["agreement"]] == ["nominal"]
    assert "aa against cc" in done(capsys, "rate", "score", tmp_path / "three")[0]


def test_from_results(tmp_path: Path, capsys: Capture) -> None:
    examples = [{"id": i.id, "group": i.id, "question": i.question, "references": [],
                 "answers": {name: {"text": i.answers[name], "finish_reason": "stop"} for name in ("base", "tuned")}}
                for i in items(12)]
    (tmp_path / "results.json").write_text(json.dumps({"format": "chulengo-results/1", "examples": examples}))
    out, _ = done(capsys, "rate", "sheet", "--results", tmp_path / "results.json", "--out", tmp_path / "s")
    assert out.startswith("tuned against base: 12 pairs")


def test_the_same_command_gives_the_same_sheets(answers: list[Path], tmp_path: Path, capsys: Capture) -> None:
    for name in ("one", "two"):
        done(capsys, "rate", "sheet", "--answers", *answers, "--raters", 2, "--out", tmp_path / name)
    for file in sorted((tmp_path / "one").rglob("*.*")):
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "rate needs an action"), (["shet"], "invalid choice"), (["sheet", "--out", "x"], "--results --answers"),
        (["sheet", "--answers", "missing.jsonl", "--out", "x"], "There is no file missing.jsonl"),
        (["sheet", "--results", "missing", "--out", "x"], "There are no results"),
        (["score"], "SHEET"), (["score", "missing.csv"], "There is no file missing.csv"),
        (["score", "x", "--draws", "5"], "--draws is 5"),
        (["score", "x", "--ratings", "r.xlsx"], "--ratings is r.xlsx"),
        (["score", "x", "--jsn"], "Unrecognized arguments: --jsn"),
    ],
)
def test_mistakes_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["rate", *words]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--raters", "0"], "--raters is 0"), (["--raters", "a/b"], "named after"), (["--overlap", "2"], "overlap is 2"),
     (["--criteria", "a b"], "named 'a b'")],
)
def test_settings_that_are_refused_leave_nothing(
    answers: list[Path], tmp_path: Path, capsys: Capture, words: list[str], says: str
) -> None:
    assert main(["rate", "sheet", "--answers", *map(str, answers), "--out", str(tmp_path / "s"), *words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_missing_answers_name_the_way_out(answers: list[Path], tmp_path: Path, capsys: Capture) -> None:
    lines = answers[1].read_text().splitlines(keepends=True)
    answers[1].write_text("".join(lines[3:]))
    words = ["rate", "sheet", "--answers", *answers, "--out", tmp_path / "s"]
    assert "base lacks 3 (q0, q1, q2)" in refused(capsys, *words, unmade=tmp_path / "s")
    out, _ = done(capsys, *words, "--common")
    assert "3 items that not every system answered" in out


def test_a_study_is_never_written_over(answers: list[Path], study: Path, capsys: Capture) -> None:
    before = {file: file.read_bytes() for file in study.rglob("*.*")}
    assert "is there already" in refused(capsys, "rate", "sheet", "--answers", *answers, "--out", study)
    assert {file: file.read_bytes() for file in study.rglob("*.*")} == before


def test_scores_never_take_the_place_of_sheets(study: Path, capsys: Capture) -> None:
    rated(study)
    for option, place in (("--ratings", study / "sheets" / "rater-1.csv"), ("--out", study / "key.json")):
        before = place.read_bytes()
        assert "is one of the files that are read" in refused(capsys, "rate", "score", study, option, place)
        assert place.read_bytes() == before


def test_what_to_type_next_after_an_empty_sheet(study: Path, capsys: Capture) -> None:
    rows = sum(file.read_bytes().count(b"\n") for file in (study / "sheets").glob("*.jsonl"))
    assert f"None of the {rows} rows holds a rating" in refused(capsys, "rate", "score", study)
