"""By default the rows that a run held out are scored, not those it was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from chulengo.data.load import load_examples
from chulengo.data.selection import split_by_conversation
from command_kit import Capture, conversations, done, refused, write_lines

SHORT = ("--set", "training.max_steps=1", "--set", "model.device=cpu")
WORDS = ("--device", "cpu", "--max-new-tokens", "3", "--draws", "20", "--set", "training.overlong=drop")


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("talks") / "talks.jsonl", *conversations(24))


@pytest.fixture(scope="module")
def run(tiny_model: Path, talks: Path) -> Path:
    """A run on 20 of the 24 rows that held out a quarter of those, by a seed of its own."""
    from chulengo.cli.main import main

    out = talks.parent / "run"
    parts = ("--set", "data.validation_fraction=0.25", "--set", "data.seed=3", "--set", "data.num_rows=20")
    assert main(["train", "--model", str(tiny_model), "--data", str(talks), "--out", str(out), *SHORT, *parts]) == 0
    return out


@pytest.fixture(scope="module")
def apart(talks: Path) -> list[str]:
    """The ids of the rows that the run held out, found without it."""
    examples, _ = load_examples(str(talks), num_rows=20, seed=3)
    rows = split_by_conversation(examples, 0.25, 3)[1]
    assert len(rows) == 5
    return [row.source.rpartition(":")[2] for row in rows]


def ids(results: dict[str, Any]) -> list[str]:
    return [example["id"] for example in results["examples"]]


def test_the_rows_that_the_run_held_out(
    run: Path, talks: Path, apart: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("eval", "--task", "chat", *WORDS, "--json")
    out, said = done(capsys, *words, "--adapter", run, "--data", talks, "--out", tmp_path / "r")
    results = json.loads(out)
    assert ids(results) == apart
    assert f"the 5 rows that {run} held out of {talks} are scored" in said
    assert results["data"]["held_out_by"] == str(run)
    # the task's own tenth, by seed 0, has rows that this run was trained on
    named = json.loads(done(capsys, *words, "--adapter", run, "--data", talks, "--split", "held_out")[0])
    assert ids(named) == apart
    every, said = done(capsys, *words, "--adapter", run, "--data", talks, "--split", "all")
    assert len(ids(json.loads(every))) == 24
    assert "held out" not in said
    # the adapter for the run, and the data by another name of the same file
    monkeypatch.chdir(talks.parent)
    assert ids(json.loads(done(capsys, *words, "--adapter", "run/adapter", "--data", "talks.jsonl")[0])) == apart
    # without the model
    again = ("score", "--task", "chat", "--data", talks, "--predictions", tmp_path / "r" / "predictions-tuned.jsonl")
    assert "19 of 24 items have no prediction" in refused(capsys, *again)
    assert json.loads(done(capsys, *again, "--adapter", run, "--json")[0])["num_items"] == 5


def test_other_data_are_taken_whole(run: Path, talks: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ("eval", "--task", "chat", *WORDS, "--json", "--adapter", run, "--data")
    other = write_lines(tmp_path / "other.jsonl", *conversations(3))
    same_name = write_lines(tmp_path / "talks.jsonl", *conversations(4))
    for file, number in ((other, 3), (same_name, 4)):
        out, said = done(capsys, *words, file)
        assert len(ids(json.loads(out))) == number
        assert "held out" not in said
    in_columns = tmp_path / "other" / "talks.jsonl"  # of that name too, and in another format
    write_lines(in_columns, *({"question": f"q{n}", "answer": f"a{n}"} for n in range(2)))
    assert len(ids(json.loads(done(capsys, *words, in_columns)[0]))) == 2
    said = refused(capsys, *words[:-3], "--adapter", run.parent / "rnu", "--data", other)
    assert f"--adapter {run}" in said
    copy = tmp_path / "copy" / "talks.jsonl"
    copy.parent.mkdir()
    shutil.copy(talks, copy)
    out, said = done(capsys, *words, copy)
    assert len(ids(json.loads(out))) == 5
    assert "held out of" in said


def test_where_nothing_was_held_out(
    tiny_model: Path, run: Path, talks: Path, apart: list[str], tmp_path: Path, capsys: Capture
) -> None:
    words = ("eval", "--task", "chat", *WORDS)
    data, validation = tmp_path / "talks.jsonl", tmp_path / "valid.jsonl"
    shutil.copy(talks, data)
    write_lines(validation, *conversations(3))
    for name, setting, says in (
        ("none", "data.validation_fraction=0", "held out none of it (data.validation_fraction=0)"),
        ("beside", f"data.validation={validation}", f"held out none of it; it was validated on {validation}"),
    ):
        done(capsys, "train", "--model", tiny_model, "--data", data, "--out", tmp_path / name, *SHORT, "--set", setting)
        said = refused(capsys, *words, "--adapter", tmp_path / name, "--data", data, "--out", tmp_path / "r",
                       unmade=tmp_path / "r")
        assert says in said
        assert "--split all" in said
    _, said = done(capsys, *words, "--adapter", tmp_path / "beside", "--data", validation)
    assert "held out" not in said
    # an adapter without its run says so
    shutil.copytree(run / "adapter", tmp_path / "lone")
    _, said = done(capsys, *words, "--adapter", tmp_path / "lone", "--data", data)
    assert "lone lies in no run" in said
    # one of the held-out rows is another one now
    lines = talks.read_text().splitlines(keepends=True)
    before = lines[int(apart[0]) - 1]
    try:
        lines[int(apart[0]) - 1] = before.replace("It is", "It was")
        talks.write_text("".join(lines))
        assert "has changed since" in refused(capsys, *words, "--adapter", run, "--data", talks)
    finally:
        lines[int(apart[0]) - 1] = before
        talks.write_text("".join(lines))


def test_without_a_task_it_is_said(run: Path, talks: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ("eval", "--adapter", run, "--device", "cpu", "--data")
    assert f"{run} was trained on rows of {talks}" in done(capsys, *words, talks)[1]
    assert "trained on rows" not in done(capsys, *words, write_lines(tmp_path / "o.jsonl", *conversations(3)))[1]


def test_a_split_that_there_is_not(run: Path, talks: Path, capsys: Capture) -> None:
    said = refused(capsys, "eval", "--task", "chat", *WORDS, "--adapter", run, "--data", talks, "--split", "heldout")
    assert "allowed: held_out, all" in said
    assert "--split held_out" in said


def test_a_folder_with_the_training_file(
    run: Path, talks: Path, apart: list[str], tmp_path: Path, capsys: Capture
) -> None:
    words = ("eval", "--task", "chat", *WORDS, "--json", "--adapter", run, "--data")
    folder = tmp_path / "folder"
    write_lines(folder / "a.jsonl", *conversations(3))
    (folder / "z.jsonl").symlink_to(talks)
    renamed = tmp_path / "renamed" / "new.jsonl"
    renamed.parent.mkdir()
    shutil.copy(talks, renamed)
    for data in (folder, renamed, renamed.parent):
        out, said = done(capsys, *words, data)
        assert len(ids(json.loads(out))) == 5, data
        assert f"the 5 rows that {run} held out of {data} are scored" in said
    assert len(ids(json.loads(done(capsys, *words, folder, "--split", "all")[0]))) == 27
    assert f"{run} was trained on rows of {folder}" in done(
        capsys, "eval", "--adapter", run, "--device", "cpu", "--data", folder)[1]


def test_a_file_of_the_folder_trained_on(tiny_model: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "both"
    for name, first in (("test-a.jsonl", 0), ("train.jsonl", 12)):
        write_lines(folder / name, *conversations(24)[first : first + 12])
    out = tmp_path / "run"
    done(capsys, "train", "--model", tiny_model, "--data", folder, "--out", out, *SHORT,
         "--set", "data.validation_fraction=0.25")
    examples, _ = load_examples(str(folder))
    rows = [row.source for row in split_by_conversation(examples, 0.25, 0)[1]]
    task = tmp_path / "mine.yaml"
    task.write_text('metrics: [token_f1]\nsplits:\n  test: {files: ["test*"]}\nsplit: test\n')
    for name in ("test-a.jsonl", "train.jsonl"):
        own = [row.rpartition(":")[2] for row in rows if name in row]
        words = ("eval", *WORDS, "--json", "--adapter", out, "--task")
        said = json.loads(done(capsys, *words, "chat", "--data", folder / name)[0])
        assert ids(said) == own
        if name.startswith("test"):  # also where it is the task that chooses the file
            assert ids(json.loads(done(capsys, *words, task, "--data", folder)[0])) == own
    assert 0 < len(own) < len(rows)
    none = tmp_path / "none"
    done(capsys, "train", "--model", tiny_model, "--data", folder, "--out", none, *SHORT,
         "--set", "data.validation_fraction=0")
    said = refused(capsys, "eval", "--task", "chat", *WORDS, "--adapter", none, "--data", folder / "train.jsonl")
    assert f"{none} was trained on train.jsonl in {folder / 'train.jsonl'} and held out none of it" in said
