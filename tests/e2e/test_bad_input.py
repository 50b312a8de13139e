"""Bad data, typed by a user: one clear message, status 2, nothing left behind."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from command_kit import Capture, conversation, conversations, refused, write_lines

GOOD = "".join(json.dumps(row) + "\n" for row in conversations(3))


@pytest.fixture
def train(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command up to the data; the working folder is empty."""
    monkeypatch.chdir(tmp_path)
    return ["train", "--model", str(tiny_model), "--out", "out", "--data"]


def test_missing_data_names_the_nearest_file(train: list[str], capsys: Capture) -> None:
    write_lines(Path("talks.jsonl"), *conversations(3))
    said = refused(capsys, *train, "taks.jsonl", unmade=Path("out"))
    assert "There is no file or folder taks.jsonl." in said
    assert "try:     --data talks.jsonl" in said
    assert "parquet" in said
    assert "does not exist" in refused(capsys, *train, "nowhere/talks.jsonl", unmade=Path("out"))


def test_no_data_at_all(tiny_model: Path, capsys: Capture) -> None:
    said = refused(capsys, "train", "--model", tiny_model)
    assert "No data was given." in said
    assert "--data conversations.jsonl" in said


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.jsonl", b"", "empty.jsonl is empty"),
        ("blank.jsonl", b"\n\n", "blank.jsonl holds no rows"),
        ("none.json", b"[]", "none.json holds no rows"),
        ("header.csv", b"question,answer\n", "header.csv holds no rows"),
        ("sheet.docx", b"PK", "sheet.docx has an unknown suffix"),
        ("torn.parquet", b"PAR1", "torn.parquet is not a readable parquet file"),
        ("torn.jsonl.gz", gzip.compress(GOOD.encode())[:-9], "torn.jsonl.gz ends in the middle of its gzip stream"),
        ("wide.jsonl", GOOD.encode("utf-16"), "wide.jsonl is UTF-16 text"),
        ("folder/readme.md", b"x", "folder holds no data files (found: readme.md)"),
    ],
)
def test_files_without_usable_rows(train: list[str], capsys: Capture, name: str, content: bytes, says: str) -> None:
    file = Path(name)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    given = file if file.parent == Path(".") else file.parent
    assert says in refused(capsys, *train, given, unmade=Path("out"))


def test_broken_json_names_its_line(train: list[str], capsys: Capture) -> None:
    Path("b.jsonl").write_text(GOOD + '{"messages": [{"role": "user", "content": oops}]}\n' + GOOD)
    said = refused(capsys, *train, "b.jsonl", unmade=Path("out"))
    assert "b.jsonl is not valid JSON: line 4, column 43" in said
    assert '"content": oops' in said
    assert "sed -n 4p 'b.jsonl'" in said
    Path("b.json").write_text('[\n {"question": "a", "answer": "b"},\n {"question": "c" "answer": "d"}\n]')
    assert "b.json is not valid JSON: line 3, column 19" in refused(capsys, *train, "b.json", unmade=Path("out"))


def test_an_unknown_format_shows_the_columns_seen(train: list[str], capsys: Capture) -> None:
    write_lines(Path("odd.jsonl"), {"prompt_text": "a", "reply_text": "b"})
    said = refused(capsys, *train, "odd.jsonl", unmade=Path("out"))
    assert "The format of the data is unknown" in said
    assert "columns: prompt_text, reply_text" in said
    assert "alpaca            columns instruction, output" in said
    assert "--set data.columns.question=prompt_text" in said


def test_a_format_that_the_data_is_not(train: list[str], capsys: Capture) -> None:
    write_lines(Path("talks.jsonl"), *conversations(3))
    said = refused(capsys, *train, "talks.jsonl", "--set", "data.format=sharegpt", unmade=Path("out"))
    assert "not in the format sharegpt (column conversations" in said
    assert "columns: messages" in said
    said = refused(capsys, *train, "talks.jsonl", "--set", "data.format=mesages", unmade=Path("out"))
    assert "no data format 'mesages'" in said
    assert "--set data.format=messages" in said


def test_columns_that_are_not_there(train: list[str], capsys: Capture) -> None:
    write_lines(Path("qa.jsonl"), {"ask": "a", "say": "b"})
    columns = ["--set", "data.columns.question=aks", "--set", "data.columns.answer=say"]
    said = refused(capsys, *train, "qa.jsonl", *columns, unmade=Path("out"))
    assert "data.columns.question=aks: qa.jsonl has no column 'aks'" in said
    assert "allowed: ask, say" in said
    assert "--set data.columns.question=ask" in said
    said = refused(capsys, *train, "qa.jsonl", "--set", "data.columns.anwser=say", unmade=Path("out"))
    assert "--set data.columns.answer=say" in said


def test_rows_without_an_answer_are_named(train: list[str], capsys: Capture) -> None:
    write_lines(Path("talks.jsonl"), *conversations(3), conversation("Well?", None))
    said = refused(capsys, *train, "talks.jsonl", unmade=Path("out"))
    assert "1 row of 4 cannot be used" in said
    assert "talks.jsonl:4: no answer in column 'messages' (the last turn is the user's)" in said
    assert "--set data.cleaning=[drop_unanswered]" in said
    Path("qa.csv").write_text("question,answer\nwho,me\nwhat,\nwhere,\n")
    said = refused(capsys, *train, "qa.csv", unmade=Path("out"))
    assert "2 rows of 3 cannot be used" in said
    assert "qa.csv:3: no answer in column 'answer'" in said


def test_zero_supervised_tokens(train: list[str], capsys: Capture) -> None:
    write_lines(Path("talks.jsonl"), *conversations(12))
    said = refused(capsys, *train, "talks.jsonl", "--set", "prompt.train_roles=[system]", unmade=Path("out"))
    assert "11 of 11 rows are without a single token that carries loss (talks.jsonl :" in said
    assert "prompt.train_roles" in said
    assert "Validation: 1 of 1 row is without" in said, "the rows held out are looked at too"


def test_rows_longer_than_the_context(train: list[str], capsys: Capture) -> None:
    long = conversation("And?", "llama " * 200)
    write_lines(Path("talks.jsonl"), *conversations(3), long)
    keep = ["--set", "data.validation_fraction=0"]
    said = refused(capsys, *train, "talks.jsonl", *keep, unmade=Path("out"))
    assert "1 of 4 rows is longer than 128 tokens, and no policy for them is named (talks.jsonl:4" in said
    assert "--set training.overlong=drop_turns (or drop, or cut)" in said
    said = refused(capsys, *train, "talks.jsonl", *keep, "--set", "training.overlong=cut", unmade=Path("out"))
    assert "cut in mid-answer and would teach the model not to stop (talks.jsonl:4)" in said
    said = refused(capsys, *train, "talks.jsonl", *keep, "--set", "training.max_seq_tokens=4096", unmade=Path("out"))
    assert "training.max_seq_tokens is 4096, but the model's positions end at 128" in said
    write_lines(Path("held.jsonl"), long)
    said = refused(capsys, *train, "talks.jsonl", "--set", "data.validation=held.jsonl", "--dry-run")
    assert "Validation: 1 of 1 row is longer than 128 tokens" in said


def test_a_hub_data_set_while_offline(train: list[str], capsys: Capture) -> None:
    said = refused(capsys, *train, "someone/some-talks", "--offline", unmade=Path("out"))
    assert "someone/some-talks is a Hub data set, the run is offline" in said
    assert "name a file" in said


def test_templates(train: list[str], capsys: Capture) -> None:
    Path("qa.csv").write_text("question,answer\nwho,me\nwhat,this\n")

    def with_template(text: str | None) -> str:
        if text is not None:
            Path("t.yaml").write_text(text)
        given = f"prompt.template={'t.yaml' if text is not None else 'tt.yaml'}"
        return refused(capsys, *train, "qa.csv", "--set", given, unmade=Path("out"))

    said = with_template("user: '{quesion}'\nanswer: '{answer}'\n")
    assert "names the column 'quesion', which the data do not have" in said
    assert "write {question} in the template" in said
    assert "--set prompt.template=t.yaml" in with_template(None)
    assert "t.yaml is not valid YAML: line 2, column 1" in with_template("user: [a\n")
    assert "stray '{' at character 1" in with_template("user: '{question'\nanswer: '{answer}'\n")
    said = with_template("usr: '{question}'\nanswer: '{answer}'\n")
    assert "unknown key 'usr' (did you mean 'user'?); 'user' is missing" in said


def test_cleaning_and_style_name_the_nearest(train: list[str], capsys: Capture) -> None:
    write_lines(Path("talks.jsonl"), *conversations(3))
    said = refused(capsys, *train, "talks.jsonl", "--set", "data.cleaning=[strip_url]", unmade=Path("out"))
    assert "There is no cleaning step 'strip_url'." in said
    assert "--set data.cleaning=[strip_urls]" in said
    said = refused(capsys, *train, "talks.jsonl", "--set", "data.cleaning=[drop_short]", unmade=Path("out"))
    assert "needs a number of characters" in said
    said = refused(capsys, *train, "talks.jsonl", "--set", "prompt.style=lama2", unmade=Path("out"))
    assert "There is no chat style 'lama2'." in said
    assert "--set prompt.style=llama2" in said
    said = refused(capsys, *train, "talks.jsonl", "--set", "prompt.train_roles=[asistant]", unmade=Path("out"))
    assert "allowed: system, user, assistant" in said
