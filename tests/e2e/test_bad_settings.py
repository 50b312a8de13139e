"""Mistakes in what was typed: commands, options, settings, recipes, output folders, memory."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from chulengo.cli.main import main
from command_kit import Capture, conversations, refused, write_lines

SEVEN_B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture
def train(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command that would train; the working folder holds `talks.jsonl` only."""
    monkeypatch.chdir(tmp_path)
    write_lines(Path("talks.jsonl"), *conversations(6))
    return ["train", "--model", str(tiny_model), "--data", "talks.jsonl", "--out", "out"]


def test_commands_and_options(capsys: Capture) -> None:
    assert "chulengo train --help" in refused(capsys, "trian")
    assert "--data" in refused(capsys, "train", "--dta", "x")
    assert "Unrecognized arguments: talks.jsonl." in refused(capsys, "train", "talks.jsonl")
    assert "--set: expected one argument" in refused(capsys, "train", "--set")


def test_unknown_keys_name_the_nearest(train: list[str], capsys: Capture) -> None:
    words = ["--set", "lora.rnk=3", "--set", "learning_rate=1e-3", "--set", "modle.name=x", "--set", "lora.rank"]
    said = refused(capsys, *train, *words, unmade=Path("out"))
    assert "4 problems" in said
    assert "unknown key lora.rnk; did you mean lora.rank?" in said
    assert "unknown key learning_rate; did you mean training.learning_rate?" in said
    assert "unknown key modle; did you mean model?" in said
    assert "--set 'lora.rank' is not of the form section.key=value" in said
    assert "chulengo train --help-config" in said


def test_contradictions_and_ranges_all_at_once(train: list[str], capsys: Capture) -> None:
    wrong = ["training.epochs=3", "training.max_steps=9", "model.quantization=int8", "model.double_quant=true",
             "lora.rank=abc", "lora.alpha=-1", "training.overlong=cutt", "training.report_to=[wandbb]"]  # fmt: skip
    said = refused(capsys, *train, *(word for key in wrong for word in ("--set", key)), unmade=Path("out"))
    assert "6 problems with the configuration" in said
    for sentence in (
        "training.epochs and training.max_steps both say how long to train; give one",
        "model.double_quant needs 4-bit weights, but model.quantization is int8",
        "lora.rank is a whole number, given 'abc'",
        "lora.alpha must be above 0 and finite, given -1",
        "training.overlong is one of error, drop, drop_turns, cut, split, given 'cutt'",
        "training.report_to knows tensorboard, trackio, mlflow, wandb, given 'wandbb'",
    ):
        assert f"\n  - {sentence}" in said


def test_recipes(train: list[str], capsys: Capture) -> None:
    Path("a.yaml").write_text("model:\n  name: [nano\n")
    assert "a.yaml is not valid YAML: line 3, column 1" in refused(capsys, "train", "--config", "a.yaml")
    Path("b.yaml").write_text("- nano\n- talks.jsonl\n")
    said = refused(capsys, "train", "--config", "b.yaml")
    assert "b.yaml holds a list, not sections" in said
    assert "allowed: the sections model, data, prompt, lora, training, out" in said
    Path("c.yaml").write_text("trainig:\n  epochs: 1\nlora:\n  rnak: 4\n")
    said = refused(capsys, "train", "--config", "c.yaml")
    assert "2 problems with the configuration in c.yaml" in said
    assert "did you mean training?" in said
    assert "did you mean lora.rank?" in said
    assert "--config c.yaml" in refused(capsys, "train", "--config", "cc.yaml")
    assert "is a folder" in refused(capsys, "train", "--config", ".")


def test_what_the_model_and_machine_cannot_have(train: list[str], capsys: Capture) -> None:
    cases = {
        "lora.targets=[q_prj]": ("lora.targets names q_prj, which this model does not have", "q_proj"),
        "model.device=gpu": ("model.device is 'gpu'", "allowed: auto, cpu, cuda, cuda:N"),
        "model.device=cuda:77": ("but this machine has", "model.device=cpu"),
        "training.report_to=[wandb]": ("training.report_to", "pip install wandb"),
        "training.precision=fp16": ("needs a GPU", "float32 or bf16"),
    }
    for setting, (given, allowed) in cases.items():
        # all of them are found after the run folder was made, or may be: it must be free for the next try
        said = refused(capsys, *train, "--set", "model.quantization=none", "--set", setting, unmade=Path("out"))
        assert given in said
        assert allowed in said


def test_a_folder_that_was_there_stays_but_empty(train: list[str], capsys: Capture) -> None:
    Path("out").mkdir()
    refused(capsys, *train, "--set", "lora.targets=[q_prj]")
    assert list(Path("out").iterdir()) == []


def test_output_folders_in_use(train: list[str], capsys: Capture) -> None:
    run = Path("out")
    run.mkdir()
    (run / "config.yaml").write_text("model: {}\n")
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 7}\n')
    before = {path: path.read_bytes() for path in run.iterdir()}
    said = refused(capsys, *train)
    assert "The output folder out holds another run: 7 steps done, no checkpoint." in said
    assert "chulengo train --resume out" in said
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    Path("notes").mkdir()
    Path("notes/diary.txt").write_text("x")
    said = refused(capsys, *train[:-1], "notes")
    assert "holds files that no run wrote: diary.txt" in said
    assert "is a file" in refused(capsys, *train[:-1], "talks.jsonl")
    # the folder is looked at before the data are read
    assert "holds another run" in refused(capsys, "train", "--data", "missing.jsonl", "--out", "out")
    assert "holds another run" in refused(capsys, "demo", *train[1:3], "--out", "out")


def test_places_that_cannot_be_written(
    train: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Cannot write to talks.jsonl/x: Not a directory." in refused(capsys, *train[:-1], "talks.jsonl/x")
    if Path("/proc").is_dir():
        assert "Cannot write to /proc/x" in refused(capsys, *train[:-1], "/proc/x")
    assert "File name too long" in refused(capsys, *train[:-1], "x" * 300)

    # who runs the tests may be root, for whom nothing is forbidden
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out")

    monkeypatch.setattr(Path, "mkdir", refuse)
    said = refused(capsys, *train)
    assert "Cannot write to out: Permission denied." in said
    assert "choose another --out" in said


def test_no_room_as_planned(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SEVEN_B))
    words = ["plan", "--model", tmp_path, "--device-memory", "8GiB"]
    said = refused(capsys, *words)
    assert "This run does not fit: it needs" in said
    assert "the planned device has 8.00 GiB free. Largest parts:" in said
    change = next(line for line in said.splitlines() if line.startswith("  try:"))[9:].split("   (then")[0]
    assert "training.batch_size=2" in change
    assert main([*map(str, words), *change.split()]) == 0, "what it says to type, typed, fits"
    said = refused(capsys, "plan", "--model", tmp_path, "--device-memory", "3GiB")
    assert "a smaller model or a larger device" in said


def test_no_room_when_training_starts(
    train: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chulengo.model import plan
    from chulengo.train import engine

    device = plan.DeviceMemory("a small GPU", "cuda", 1 << 20, 1 << 30)
    for module in (plan, engine):  # both have the name, whichever was imported first
        monkeypatch.setattr(module, "device_memory", lambda _: device)
    said = refused(capsys, *train, unmade=Path("out"))
    assert "This run does not fit: it needs" in said
    assert "a small GPU has 1 MiB free" in said


def test_a_report_without_its_package_is_found_before_anything_is_read(train: list[str], capsys: Capture) -> None:
    said = refused(capsys, *train, "--data", "missing.jsonl", "--set", "training.report_to=[trackio]",
                   unmade=Path("out"))  # fmt: skip
    assert "training.report_to needs trackio, which is not installed." in said
    assert "pip install trackio" in said


def test_an_engine_that_does_not_cover_the_run(train: list[str], capsys: Capture) -> None:
    words = ["--engine", "fast", "--set", "lora.dora=true", "--set", "lora.dropout=0.1"]
    for more in ([], ["--dry-run"]):
        said = refused(capsys, *train, *words, *more, unmade=Path("out"))
        assert "model.engine is fast, which does not cover this run. lora.dora is true with lora.dropout 0.1" in said
        assert "--set model.engine=reference" in said
