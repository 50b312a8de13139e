"""`chulengo score` as it is typed, where the predictions or the data are not as they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from command_kit import done, refused, write_lines

Capture = pytest.CaptureFixture[str]


def squad_rows(*answers: str) -> list[dict[str, Any]]:
    return [{"id": f"q{n}", "question": f"What is {n}?", "context": "A llama.", "answers": {
        "text": [text] if text else [], "answer_start": [0] if text else []}} for n, text in enumerate(answers)]


def test_half_a_character_is_refused_before_anything_is_written(tmp_path: Path, capsys: Capture) -> None:
    data = write_lines(tmp_path / "d.jsonl", *squad_rows("llama"))
    (tmp_path / "p.json").write_text('{"q0": "\\ud800"}', encoding="utf-8")
    said = refused(capsys, "score", "--task", "squad", "--data", data, "--predictions", tmp_path / "p.json",
                   "--out", tmp_path / "r", unmade=tmp_path / "r")
    assert "p.json: the answer of 'q0' has half of a surrogate pair (\\ud800)" in said


def test_one_group_is_not_written_as_groups(tmp_path: Path, capsys: Capture) -> None:
    data = write_lines(tmp_path / "d.jsonl", *squad_rows("llama", "alpaca"))  # on one paragraph
    (tmp_path / "p.json").write_text('{"q0": "llama", "q1": "x"}')
    words = ("score", "--task", "squad", "--data", data, "--predictions", tmp_path / "p.json", "--out")
    out, _ = done(capsys, *words, tmp_path / "r")
    assert "2 in 1 group\n" in out
    out, _ = done(capsys, *words, tmp_path / "again", "--compare-with", tmp_path / "r")
    assert "better on 0 of 2 items\n" in out


def test_predictions_of_rows_that_cleaning_drops_do_no_harm(tmp_path: Path, capsys: Capture) -> None:
    data = write_lines(tmp_path / "d.jsonl", *squad_rows("llama", "", "alpaca"))
    answers = tmp_path / "p.json"
    answers.write_text(json.dumps({"q0": "llama", "q1": "guanaco", "q2": "x"}))
    words = ("score", "--task", "squad", "--data", data, "--predictions", answers, "--json")
    assert "--set data.cleaning=[drop_unanswered]" in refused(capsys, *words)
    dropping = ("--set", "data.cleaning=[drop_unanswered]")
    out, err = done(capsys, *words, *dropping)
    assert json.loads(out)["exact_match"] == 50.0
    assert "note: 1 prediction not scored, of rows that data.cleaning=[drop_unanswered] leaves out: q1\n" in err
    answers.write_text(json.dumps({"q0": "llama", "q1": "guanaco", "q2": "x", "other": "y"}))
    assert "1 of 3 predictions" in refused(capsys, *words, *dropping)
    answers.write_text(json.dumps({"q0": "llama", "q1": "guanaco", "q2": "x"}))
    # which row the subset passed over is not the matter of cleaning
    assert "belong to no item" in refused(capsys, *words, *dropping, "--num-rows", 1)
