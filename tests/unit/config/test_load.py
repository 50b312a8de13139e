"""Configuration: YAML, overrides, and every problem in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from chulengo.config import RunConfig, load_config, to_yaml
from chulengo.config.describe import settings
from chulengo.config.load import flatten
from chulengo.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_yaml_then_overrides(tmp_path: Path) -> None:
    file = write(tmp_path, "model: {name: some/folder}\ntraining:\n  learning_rate: 2e-4\n  epochs: 3\n")
    config = load_config(file, ["training.epochs=5", "lora.targets=[q_proj, v_proj]", "lora.rank=64"])
    assert config.model.name == "some/folder"
    assert config.training.learning_rate == 2e-4
    assert config.training.epochs == 5
    assert config.lora.targets == ("q_proj", "v_proj")
    assert config.lora.rank == 64


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load_config(None, ["data.columns.question=Frage", "prompt.system='1.0'", "training.seed=3", "out=x"])
    assert load_config(write(tmp_path, to_yaml(config))) == config


def test_all_problems_in_one_message(tmp_path: Path) -> None:
    file = write(tmp_path, "training:\n  lerning_rate: 1\n  epochs: 2\n  max_steps: 10\nlora: {rank: 0}\nrank: 4\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["model.quantization=nf5", "training.batch_size=1.5"])
    text = str(caught.value)
    assert "did you mean training.learning_rate?" in text
    assert "did you mean lora.rank?" in text
    assert "training.epochs and training.max_steps" in text
    assert "lora.rank must be at least 1, given 0" in text
    assert "model.quantization is one of nf4, fp4, int8, none, given 'nf5'" in text
    assert "training.batch_size is a whole number, given 1.5" in text
    assert text.startswith("6 problems")


def test_a_default_does_not_contradict_what_is_said() -> None:
    assert load_config(None, ["training.max_steps=10"]).training.max_steps == 10


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.warmup_ratio=0.1", "training.warmup_steps=5"], "warmup"),
        (["model.quantization=none", "model.double_quant=true"], "double_quant"),
        (["training.allow_cut_end_of_turn=true"], "overlong"),
        (["data.validation_fraction=0", "training.early_stopping_patience=2"], "early_stopping_patience"),
        (["data.validation=x.jsonl", "data.validation_fraction=0.2"], "validate on"),
        (["data.streaming=true"], "streaming"),
        (["model.device=cpu", "training.precision=fp16"], "fp16"),
        (["training.precision=bf16", "model.compute_dtype=float16"], "16-bit"),
        (["prompt.train_roles=[]"], "train_roles"),
        (["training.gradient_checkpointing=true", "model.activations_policy=keep"], "activations_policy is keep"),
        (["model.engine=reference", "model.weights_policy=stream"], "are the fast engine's"),
        (["model.engine=reference", "model.graphs=never"], "are the fast engine's"),
    ],
)
def test_contradictions(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(None, overrides)


@pytest.mark.parametrize("bad", ["nothing", "a.b.c", "=3", ".x=1", "model.name.x=1"])
def test_malformed_overrides(bad: str) -> None:
    with pytest.raises(ConfigError):
        load_config(None, [bad])


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "{}")
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(tmp_path / "rum.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "model: [1]\n", "a: b: c\n", "\x00"])
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_config(write(tmp_path, text))


def test_every_setting_is_described_and_listed_once() -> None:
    described = settings()
    assert [s.key for s in described if not s.meaning] == []
    assert sorted(s.key for s in described) == sorted(flatten(RunConfig()))
