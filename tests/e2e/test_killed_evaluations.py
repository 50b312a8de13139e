"""`kill -9` in the middle of eval, generate and simulate, and a full disk: the same command goes on.

What was generated is counted, in the process that is killed and in the one that goes on: no answer that was on the disk
is generated again, and the result is that of a command which was left in peace.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny_models
from chulengo.evaluate import task_run
from chulengo.evaluate.simulate import speakers
from chulengo.generate import engine
from command_kit import Capture, conversations, done, refused, wait_for, write_lines

NUM_ROWS, SIZE = 14, 2
FAST = ("--device", "cpu", "--max-new-tokens", "5", "--batch-size", str(SIZE))
# writes a line for every answer, then leaves time to be killed before the answers of this batch are on the disk
COUNTING = """
import sys, time
from chulengo.generate import engine
real = engine.complete_all
def counting(model, prompts, *rest):
    answers = real(model, prompts, *rest)
    with open(sys.argv[1], "a") as log:
        log.write("answer\\n" * len(prompts))
    time.sleep(0.15)
    return answers
engine.complete_all = counting
from chulengo.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_adapter(tiny_model, tmp_path_factory.mktemp("run") / "adapter")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("rows") / "rows.jsonl", *conversations(NUM_ROWS))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The prompts that this process generates answers to, as they come."""
    real, found = engine.complete_all, list[Any]()

    def counting(model: Any, prompts: Any, *rest: Any) -> Any:
        found.extend(prompts)
        return real(model, prompts, *rest)

    for module in (engine, task_run, speakers):
        monkeypatch.setattr(module, "complete_all", counting)
    return found


def lines(*files: Path) -> int:
    """Returns how many whole lines there are."""
    return sum(file.read_bytes().count(b"\n") for file in files if file.exists())


def killed(log: Path, file: Path, count: int, *words: object) -> int:
    """Runs a command, kills it once the file has so many lines, and returns how many answers it generated."""
    log.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", COUNTING, str(log), *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        wait_for(process, file, count)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    return lines(log)


def test_eval_of_a_task(adapter: Path, rows: Path, tmp_path: Path, capsys: Capture, made: list[Any]) -> None:
    words = ["eval", "--task", "chat", *FAST, "--draws", "100", "--adapter", adapter, "--data", rows, "--out"]
    done(capsys, *words, tmp_path / "whole")
    assert len(made) == 2 * NUM_ROWS
    out = tmp_path / "killed"
    files = [out / f"predictions-{side}.jsonl" for side in ("base", "tuned")]
    for file in files:  # once in each side, the second time in a command that goes on already
        before = lines(*files)
        generated = killed(tmp_path / "log", file, 4, *words, out)
        assert 0 <= generated - (lines(*files) - before) <= SIZE, "more than the batch it was in is lost"
    assert 4 <= lines(files[1]) < NUM_ROWS == lines(files[0])
    assert not (out / "results.json").exists()
    left = NUM_ROWS - lines(files[1])
    made.clear()
    _, said = done(capsys, *words, out)
    assert f"answers, tuned: {NUM_ROWS - left} of {NUM_ROWS} are there, going on" in said
    assert len(made) == left, "a finished answer was generated twice"
    whole, results = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "whole", out))
    for key in ("scores", "comparisons", "examples"):
        assert results[key] == whole[key]
    made.clear()
    done(capsys, *words, out)
    assert made == []


def test_generate(adapter: Path, rows: Path, tmp_path: Path, capsys: Capture, made: list[Any]) -> None:
    words = ["generate", *FAST, "--adapter", adapter, "--prompts", rows, "--both", "--temperature", "1", "--out"]
    done(capsys, *words, tmp_path / "whole.jsonl")
    assert len(made) == 2 * NUM_ROWS
    out = tmp_path / "killed.jsonl"
    generated = killed(tmp_path / "log", out, 4, *words, out)
    there = lines(out)
    assert 4 <= there < NUM_ROWS
    assert 0 <= generated - 2 * there <= 2 * SIZE
    with out.open("a") as file:
        file.write('{"id": "3", "prompt": [{"ro')  # as if it had been killed while it wrote
    made.clear()
    _, said = done(capsys, *words, out)
    assert f"{there} of {NUM_ROWS} answers are there, going on" in said
    assert len(made) == 2 * (NUM_ROWS - there), "a finished answer was generated twice"
    assert without_times(out) == without_times(tmp_path / "whole.jsonl")


def without_times(file: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for row in found:
        del row["seconds"], row["base"]["seconds"]
    return found


def test_simulate(adapter: Path, tmp_path: Path, capsys: Capture, made: list[Any]) -> None:
    scenarios = tmp_path / "s.yaml"
    scenarios.write_text(yaml.safe_dump({"scenarios": [
        {"id": f"talk-{n}", "opening": [f"Say {n}."] * (1 + n % 3), "met_when": {"text": "never said"}}
        for n in range(24)
    ]}))  # fmt: skip
    words = ["simulate", "--device", "cpu", "--max-new-tokens", "5", "--batch-size", "1", "--adapter", adapter,
             "--scenarios", scenarios, "--turns", "3", "--out"]  # fmt: skip
    done(capsys, *words, tmp_path / "whole")
    whole = (tmp_path / "whole" / "transcripts.jsonl").read_text(encoding="utf-8")
    turns = {row["id"]: sum("seed" in message for message in row["messages"])
             for row in map(json.loads, whole.splitlines())}
    assert len(made) == sum(turns.values()) == 48
    out = tmp_path / "killed"
    file = out / "transcripts.jsonl"
    generated = killed(tmp_path / "log", file, 5, *words, out)
    there = [json.loads(line)["id"] for line in file.read_text(encoding="utf-8").splitlines(keepends=True)
             if line.endswith("\n")]
    assert 5 <= len(there) < 24
    finished = sum(turns[name] for name in there)
    assert finished <= generated < 48
    made.clear()
    _, said = done(capsys, *words, out)
    assert f"{len(there)} of 24 conversations are there, going on" in said
    assert len(made) == 48 - finished, "a finished conversation was had twice"
    assert file.read_text(encoding="utf-8") == whole


def test_eval_without_a_task_writes_its_file_whole_or_not(
    adapter: Path, rows: Path, tmp_path: Path, capsys: Capture
) -> None:
    out, log = tmp_path / "scores.json", tmp_path / "log"
    words = ["eval", "--exact-match", *FAST, "--adapter", adapter, "--data", rows, "--out", out]
    killed(log, log, 4, *words)
    assert not list(tmp_path.glob("scores*"))
    done(capsys, *words)
    assert json.loads(out.read_text(encoding="utf-8"))["scores"]["tuned"][1]["num_items"] == NUM_ROWS


@contextlib.contextmanager
def room(size: int) -> Iterator[None]:
    """Lets no file grow over this many bytes, as a full disk does; the signal is ignored, so that writing fails."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("verb", ["eval", "generate", "simulate"])
def test_a_full_disk(verb: str, adapter: Path, tmp_path: Path, capsys: Capture, made: list[Any]) -> None:
    number = 30
    rows = write_lines(tmp_path / "rows.jsonl", *conversations(number))
    scenarios, task = tmp_path / "s.yaml", tmp_path / "t.yaml"
    scenarios.write_text(yaml.safe_dump({"scenarios": [
        {"id": f"talk-{n}", "opening": f"Say {n}.", "met_when": {"text": "never said"}} for n in range(number)
    ]}))  # fmt: skip
    task.write_text("metrics: [token_f1]\n")

    def words(folder: Path) -> list[object]:
        folder.mkdir(exist_ok=True)
        return [verb, *FAST, "--adapter", adapter, *{
            "eval": ("--task", task, "--side", "base", "--draws", "10", "--data", rows, "--out", folder),
            "generate": ("--prompts", rows, "--out", folder / "answers.jsonl"),
            "simulate": ("--scenarios", scenarios, "--turns", "1", "--out", folder),
        }[verb]]

    name = {"eval": "predictions-base.jsonl", "generate": "answers.jsonl", "simulate": "transcripts.jsonl"}[verb]
    done(capsys, *words(tmp_path / "whole"))
    size = (tmp_path / "whole" / name).stat().st_size
    out = tmp_path / "full"
    file = out / name
    with room(size * 6 // 10):
        said = refused(capsys, *words(out))
    assert "cannot be written to" in said
    assert "goes on" in said
    there = lines(file)
    assert 0 < there < number
    assert not file.read_bytes().endswith(b"\n"), "the last line was to be torn"
    # room for the answers, not for what is made of them
    if verb != "generate":
        with room(size + 100):
            assert "make room, then type the same again" in refused(capsys, *words(out))
        assert lines(file) == number
        assert not (out / "results.json").exists()
        there = number
    made.clear()
    done(capsys, *words(out))
    assert len(made) == number - there
    assert lines(file) == number
    assert not list(out.glob("*.unfinished"))
