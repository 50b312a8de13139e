"""A resumed run chooses anew what was left to the plan, keeps what was insisted on, and is told what can be typed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import command_kit
import tiny_models
from chulengo.cli.main import main
from chulengo.config.schema import RunConfig
from chulengo.data.batches import mean_length
from chulengo.errors import DoesNotFitError
from chulengo.model.fast import FastModel
from chulengo.model.plan import DeviceMemory
from chulengo.train import engine
from chulengo.train.finetune import plan_settings
from chulengo.train.resume import advise_resumed, asked_policies, decisive

PLENTY, SCARCE = 64 << 30, 1 << 20


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    data = command_kit.write_lines(tmp_path / "talks.jsonl", *command_kit.conversations(24))
    folder = tiny_models.write_model_folder(tmp_path / "llama", max_position_embeddings=512)
    words = ["train", "--model", str(folder), "--data", str(data), "--out", str(tmp_path / "run")]
    for each in ("training.max_steps=2", "training.save_every_steps=1", "training.max_seq_tokens=320",
                 "training.overlong=drop", "data.validation_fraction=0", "model.cpu_threads=1"):  # fmt: skip
        words += ["--set", each]
    return words


def memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(engine, "device_memory", lambda device: DeviceMemory("this machine", "cpu", free, free))


def trained_with(run: Path) -> str:
    return str(json.loads((run / "manifest.json").read_text())["engine"]["activations"])


def test_what_was_left_to_the_plan_is_chosen_anew(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    memory(monkeypatch, PLENTY)
    assert main(words) == 0
    assert trained_with(run).startswith("keep")
    assert "activations_policy: keep" in (run / "config.yaml").read_text()
    memory(monkeypatch, SCARCE)
    monkeypatch.setattr(engine, "check_room", lambda *_, **__: None)
    monkeypatch.setattr("chulengo.model.plan_policies.needed_bytes", lambda plan: 2 * SCARCE)
    assert main(["train", "--resume", str(run)]) == 0
    assert trained_with(run).startswith("full")
    capsys.readouterr()
    # what is set while resuming is insisted on, and what decides a number cannot be set
    assert main(["train", "--resume", str(run), "--set", "model.activations_policy=keep"]) == 0
    assert trained_with(run).startswith("keep")
    assert main(["train", "--resume", str(run), "--set", "lora.rank=3"]) == 2
    said = capsys.readouterr().err
    assert "--set cannot be given with it" in said
    assert "model.activations_policy" in said


def test_what_was_insisted_on_stays_and_the_way_out_can_be_typed(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    memory(monkeypatch, PLENTY)
    assert main([*words, "--set", "model.activations_policy=keep"]) == 0
    memory(monkeypatch, SCARCE)
    monkeypatch.setattr("chulengo.model.plan_policies.needed_bytes", lambda plan: 2 * SCARCE)

    def planned(*_: object, **__: object) -> None:
        raise DoesNotFitError("This run does not fit.", next_step="--set model.activations_policy=auto   (then 1 GiB)")

    monkeypatch.setattr(engine, "check_room", planned)
    capsys.readouterr()
    assert main(["train", "--resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert f"try:     chulengo train --resume {run} --set model.activations_policy=auto   (then 1 GiB)" in said
    monkeypatch.setattr(engine, "check_room", lambda *_, **__: None)
    assert main(["train", "--resume", str(run)]) == 0
    assert trained_with(run).startswith("keep")
    assert main(["train", "--resume", str(run), "--set", "model.activations_policy=auto"]) == 0
    assert trained_with(run).startswith("full")


def test_an_optimiser_of_another_order_is_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, wanted = tmp_path / "run", FastModel.trainable_names
    memory(monkeypatch, PLENTY)
    assert main(words) == 0
    for name in ("adapter", "checkpoints/checkpoint-2"):  # so there is a step left
        shutil.rmtree(run / name)
    state = torch.load(run / "checkpoints" / "checkpoint-1" / "optimizer.pt", weights_only=True)
    assert len(set(state["order"])) == len(state["order"]) > 7
    monkeypatch.setattr(FastModel, "trainable_names", lambda self: wanted(self)[::-1])
    assert main(["train", "--resume", str(run)]) == 2
    assert "another order of the adapter's tensors: another version wrote it" in capsys.readouterr().err
    monkeypatch.setattr(FastModel, "trainable_names", wanted)
    assert main(["train", "--resume", str(run)]) == 0


def test_where_rows_are_packed_they_are_full() -> None:
    assert (mean_length([10, 21]), mean_length([]), mean_length([0])) == (16, 1, 1)
    config = RunConfig()
    packed = replace(config, training=replace(config.training, batching="packed"))
    assert [plan_settings(each, 21, 16)["mean_tokens"] for each in (config, packed)] == [16, None]


def test_asked_policies(tmp_path: Path) -> None:
    written = {"model.weights_policy": "resident-fp8", "model.activations_policy": "keep", "lora.rank": 4}
    asked = {"model.weights_policy": "fp8", "model.activations_policy": "auto"}
    assert asked_policies(tmp_path, written) == {}
    (tmp_path / "manifest.json").write_text(json.dumps({"config": written, "asked": asked}))
    assert asked_policies(tmp_path, written) == asked
    by_hand = written | {"model.activations_policy": "full"}
    assert asked_policies(tmp_path, by_hand) == {"model.weights_policy": "fp8"}
    assert decisive(written | asked) == decisive(written)
    for broken in ("[]", "{", '{"config": null, "asked": {"model.weights_policy": "auto"}}', '{"config": {}}'):
        (tmp_path / "manifest.json").write_text(broken)
        assert asked_policies(tmp_path, written) == {}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--set model.weights_policy=auto --set model.activations_policy=auto",
         "chulengo train --resume 'my run' --set model.weights_policy=auto --set model.activations_policy=auto"),
        ("--set training.batch_size=1 --set model.weights_policy=auto",
         "make room on the device and type the same again; or a new run with --set training.batch_size=1 "
         "--set model.weights_policy=auto"),
        ("a smaller model or a larger device", "a smaller model or a larger device"),
    ],
)  # fmt: skip
def test_advice(given: str, expected: str) -> None:
    error = DoesNotFitError("No room.", next_step=given)
    advise_resumed(error, "my run")
    assert error.next_step == expected


def test_a_finished_run_that_is_resumed_keeps_its_peak(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tmp_path / "run" / "result.json"
    memory(monkeypatch, PLENTY)
    assert main(words) == 0
    before = json.loads(result.read_text())["peak_bytes"]
    monkeypatch.setattr("chulengo.train.trainer.peak_bytes", lambda device: 1)  # no step is taken again
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert before > 1
    assert json.loads(result.read_text())["peak_bytes"] >= before // 2
