"""`chulengo eval` as it is typed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import tiny_models as tiny
from chulengo.cli.main import main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model_folder(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_adapter(base, tmp_path_factory.mktemp("run") / "adapter")


def evaluate(*words: object) -> int:
    return main(["eval", "--device", "cpu", "--max-new-tokens", "8", *map(str, words)])


def data(folder: Path, *pairs: tuple[str, str]) -> Path:
    file = folder / "held.jsonl"
    chosen = pairs or (("Who spits?", "Llamas."), ("Where?", "In the Andes, of course."), ("Why?", "Nobody knows."))
    file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in chosen))
    return file


def test_base_beside_tuned(base: Path, adapter: Path, tmp_path: Path, capsys: Any) -> None:
    file = data(tmp_path)
    assert evaluate("--adapter", adapter, "--data", file, "--exact-match", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert list(results["scores"]) == ["base", "tuned"]
    assert evaluate("--model", base, "--data", file, "--json") == 0
    alone = json.loads(capsys.readouterr().out)
    assert list(alone["scores"]) == ["base"]
    perplexity, match = results["scores"]["base"]
    assert perplexity == alone["scores"]["base"][0]
    assert results["scores"]["tuned"][0]["value"] != perplexity["value"]
    assert perplexity["version"] == "perplexity/1"
    assert perplexity["num_items"] == 3
    assert perplexity["value"] == pytest.approx(math.exp(perplexity["details"]["loss"]))
    assert {item["source"] for item in perplexity["items"]} == {item["source"] for item in match["items"]}
    assert match["interval_95"][0] == 0
    assert results["renderer"] == alone["renderer"]
    assert results["generation"]["max_new_tokens"] == 8
    assert alone["generation"] is None
    assert "torch" in results["versions"]


def test_the_model_s_own_answers_match_exactly(base: Path, tmp_path: Path, capsys: Any) -> None:
    questions = ["Who spits?", "Where?", "Hello"]
    answers = []
    for question in questions:
        main(["generate", "--device", "cpu", "--max-new-tokens", "8", "--model", str(base), "--prompt", question])
        answers.append(capsys.readouterr().out)
    file = data(tmp_path, *zip(questions, [*answers[:2], "something else"], strict=True))
    assert evaluate("--model", base, "--data", file, "--exact-match") == 0
    out = capsys.readouterr().out
    assert "exact-match/1  66.7% (20.8% to 93.9%)  3 rows" in out


def test_a_pipe_gets_a_plain_table_and_the_file_everything(base: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "scores" / "base.json"
    assert evaluate("--model", base, "--data", data(tmp_path), "--out", out) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[0].split() == ["score", "base", "over"]
    assert "\033" not in table
    assert len(json.loads(out.read_text())["scores"]["base"][0]["items"]) == 3


def test_batches_change_nothing(base: Path, tmp_path: Path, capsys: Any) -> None:
    file = data(tmp_path)
    tables = []
    for size in (1, 2, 3):
        assert evaluate("--model", base, "--data", file, "--exact-match", "--batch-size", size) == 0
        tables.append(capsys.readouterr().out)
    assert len(set(tables)) == 1


def test_one_side_alone(base: Path, adapter: Path, tmp_path: Path, capsys: Any) -> None:
    file = data(tmp_path, ("Who spits?", "Llamas."))
    for side in ("base", "tuned"):
        assert evaluate("--adapter", adapter, "--data", file, "--side", side, "--json") == 0
        assert list(json.loads(capsys.readouterr().out)["scores"]) == [side]
    assert evaluate("--model", base, "--data", file, "--side", "tuned") == 2
    assert "--side tuned needs an adapter" in capsys.readouterr().err
    assert evaluate("--model", base, "--data", file) == 0
    printed = capsys.readouterr()
    assert "over\n" in printed.out
    assert " 1 row, " in printed.out
    assert "perplexity, base: 1 row\n" in printed.err


def test_num_rows(base: Path, tmp_path: Path, capsys: Any) -> None:
    assert evaluate("--model", base, "--data", data(tmp_path), "--num-rows", 2, "--json") == 0
    assert json.loads(capsys.readouterr().out)["scores"]["base"][0]["num_items"] == 2


def test_rows_over_the_context(base: Path, tmp_path: Path, capsys: Any) -> None:
    file = data(tmp_path, ("Who?", "Llamas."), ("Where?", "far " * 200))
    assert evaluate("--model", base, "--data", file) == 2
    assert "held.jsonl:2" in capsys.readouterr().err
    words = ["--model", base, "--data", file, "--exact-match", "--set", "training.overlong=drop"]
    assert evaluate(*words) == 0
    captured = capsys.readouterr()
    assert "1 of 2 rows are too long and left out" in captured.err
    assert captured.out.count("1 row") == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "No data"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--data", "d.jsonl", "--adapter", "missing"], "no adapter folder"),
        (["--data", "d.jsonl", "--batch-size", "0"], "--batch-size"),
        (["--data", "d.jsonl", "--num-rows", "0"], "data.num_rows"),
        (["--data", "text.jsonl", "--exact-match"], "The one row has no"),
        (["--data", "d.jsonl", "--draws", "200"], "--draws 200 belongs to a task"),
        (["--data", "d.jsonl", "--seed", "3"], "--seed 3 belongs to a task"),
    ],
)
def test_mistakes_are_explained(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    data(tmp_path).rename(tmp_path / "d.jsonl")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "A text that is no chat."}) + "\n")
    assert evaluate("--model", base, *words) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""
