"""Models and adapters that cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from command_kit import Capture, conversations, refused, write_lines


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a good model, in the working folder."""
    monkeypatch.chdir(tmp_path)
    write_lines(Path("talks.jsonl"), *conversations(6))
    return Path(shutil.copytree(tiny_model, "llama"))


def train(model: object) -> list[str]:
    return ["train", "--model", str(model), "--data", "talks.jsonl", "--out", "out"]


def change_config(model: Path, **values: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


def test_no_such_model(model: Path, capsys: Capture) -> None:
    said = refused(capsys, *train("lama"), unmade=Path("out"))
    assert "There is no model folder 'lama'." in said
    assert "nano, a folder with config.json and safetensors, or a Hub name" in said
    assert "--model llama" in said
    assert "--model llama" in refused(capsys, *train("llama/config.json"))


def test_a_hub_model_while_offline(model: Path, capsys: Capture) -> None:
    said = refused(capsys, *train("someone/some-llama"), "--offline", unmade=Path("out"))
    assert "someone/some-llama is a Hub name that is not in the local cache, and this run is offline" in said
    assert "hf download someone/some-llama" in said
    assert "someone/some-llama" in refused(capsys, "chat", "--model", "someone/some-llama", "--offline")


def test_no_weights(model: Path, capsys: Capture) -> None:
    (model / "model.safetensors").unlink()
    said = refused(capsys, *train(model), unmade=Path("out"))
    assert "llama has a config.json but no weights" in said
    assert "allowed: model.safetensors" in said
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04")
    said = refused(capsys, *train(model), unmade=Path("out"))
    assert "llama has weights as pickle only (pytorch_model.bin), which can run code when read" in said
    assert "allowed: safetensors" in said
    assert "save_pretrained" in said


def test_broken_files(model: Path, capsys: Capture) -> None:
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:5000])
    said = refused(capsys, *train(model), unmade=Path("out"))
    assert f"its header describes {len(weights):,} bytes, it has 5,000" in said
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert "a Git LFS pointer" in refused(capsys, *train(model))
    (model / "tokenizer.model").write_text("junk")
    (model / "model.safetensors").write_bytes(weights)
    assert "tokenizer.model is not a readable SentencePiece model" in refused(capsys, *train(model))
    (model / "tokenizer.model").unlink()
    assert "llama has no tokenizer" in refused(capsys, *train(model))
    (model / "config.json").write_text("{oops")
    assert "config.json is not valid JSON" in refused(capsys, *train(model))
    (model / "config.json").unlink()
    assert "llama has no config.json" in refused(capsys, *train(model))


def test_weights_of_another_shape(model: Path, capsys: Capture) -> None:
    change_config(model, hidden_size=128)
    said = refused(capsys, *train(model), unmade=Path("out"))
    assert "model.embed_tokens.weight in llama is (300, 64); the config says (300, 128)." in said
    said = refused(capsys, *train(model), "--engine", "reference", unmade=Path("out"))
    assert f"The weights of {model.resolve()} do not have the shapes that its config.json (llama) describes." in said


def test_an_unknown_architecture(model: Path, capsys: Capture) -> None:
    change_config(model, model_type="lllama")
    said = refused(capsys, *train(model), "--set", "prompt.style=plain", unmade=Path("out"))
    assert "the architecture 'lllama', which transformers does not know" in said


def test_code_of_a_model_is_never_run(model: Path, capsys: Capture) -> None:
    change_config(model, model_type="custom", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (model / "evil.py").write_text("raise SystemExit('the model ran its code')\n")
    said = refused(capsys, *train(model), "--set", "prompt.style=plain", unmade=Path("out"))
    assert "needs code that comes with the model, which is never run" in said


def test_adapters(model: Path, capsys: Capture) -> None:
    import tiny_models

    adapter = tiny_models.write_adapter(model, Path("tuned"))
    data = ["--data", "talks.jsonl", "--device", "cpu"]
    said = refused(capsys, *train(adapter))
    assert "tuned holds a PEFT adapter, not a model" in said
    assert "--model llama" in said
    assert "llama is a model, not an adapter" in refused(capsys, "eval", "--adapter", "llama", *data)
    assert "--adapter tuned" in refused(capsys, "eval", "--adapter", "tund", *data)
    Path("notes").mkdir()
    said = refused(capsys, "generate", "--adapter", "notes", "--prompt", "hi")
    assert "notes holds no adapter (no adapter_config.json)" in said
    assert "allowed: a run folder" in said
    (adapter / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in refused(capsys, "eval", "--adapter", "tuned", *data)
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/config.yaml").write_text("model: {}\n")
    assert "chulengo train --resume run" in refused(capsys, "eval", "--adapter", "run", *data)
    assert "run is the folder of a run, not a model" in refused(capsys, *train("run"))
