"""Flan-T5 through the same commands: a tiny random one with an untied head, and T5's own tied form."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_tokenizers import unigram_json

from command_kit import Capture, conversation, done, refused, write_lines

ROWS = [conversation(f"Where live llamas {i}?", f"In the Andes {i}.") for i in range(12)]


def write_t5(folder: Path, *, untied: bool) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    if untied:
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = 0.1 * torch.randn(128, 64)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    saved = json.loads((folder / "config.json").read_text())
    saved.pop("n_positions", None)
    saved["tie_word_embeddings"] = not untied
    (folder / "config.json").write_text(json.dumps(saved))
    (folder / "tokenizer.json").write_text(unigram_json())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>"}))
    return folder


@pytest.fixture(scope="module")
def flan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("models") / "flan-t5-tiny", untied=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "talks.jsonl", *ROWS)


def train(capsys: Capture, model: Path, data: Path, out: Path, *settings: str) -> str:
    usual = ["training.epochs=2", "training.learning_rate=5e-3", "model.quantization=none", *settings]
    more = [word for setting in usual for word in ("--set", setting)]
    return "".join(done(capsys, "train", "--model", model, "--data", data, "--out", out, *more))


def test_every_command(
    flan: Path, data: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, _ = done(capsys, "inspect", "--model", flan, "--data", data, "--rows", "1")
    assert "encoder:" in seen
    assert "limit:  t5 has no longest row" in seen
    planned, _ = done(capsys, "plan", "--model", flan, "--data", data, "--device-memory", "8GiB")
    assert "fits" in planned
    assert "fits" in done(capsys, "plan", "--model", flan, "--device-memory", "8GiB")[0]
    run = tmp_path / "run"
    said = train(capsys, flan, data, run)
    assert re.search(r"t5 has no longest row .* Taken: 512 tokens", said)
    assert json.loads((run / "ledger.json").read_text())["train"]["max_seq_tokens"] == 512
    short = ("--json", "--max-new-tokens", "8")
    scored, _ = done(capsys, "eval", "--adapter", run, "--data", data, "--exact-match", *short)
    assert json.loads(scored)
    made, _ = done(capsys, "generate", "--adapter", run, "--prompt", "Where?", "--both", *short)
    assert json.loads(made.splitlines()[0])
    monkeypatch.setattr("sys.stdin", io.StringIO("Where live llamas?\n/quit\n"))
    done(capsys, "chat", "--adapter", run, "--max-new-tokens", "8")


def test_rows_longer_than_in_pretraining(flan: Path, tmp_path: Path, capsys: Capture) -> None:
    config = json.loads((flan / "config.json").read_text())
    model = write_t5(tmp_path / "t5", untied=True)
    (model / "config.json").write_text(json.dumps({**config, "n_positions": 16}))
    data = write_lines(tmp_path / "long.jsonl", *(conversation("live " * (20 + i), "the") for i in range(12)))
    message = refused(capsys, "train", "--model", model, "--data", data, "--out", tmp_path / "no")
    assert "16 tokens" in message
    train(capsys, model, data, tmp_path / "run", "training.max_seq_tokens=64")
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert ledger["train"]["lengths"]["max"] > 16


def test_a_model_of_which_nothing_is_known(flan: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    model = write_t5(tmp_path / "other", untied=True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    message = refused(capsys, "train", "--model", model, "--data", data, "--out", tmp_path / "no")
    assert "states no context length" in message


@pytest.mark.parametrize("untied", [True, False], ids=["flan", "t5"])
def test_head_and_embeddings(untied: bool, data: Path, tmp_path: Path, capsys: Capture) -> None:
    model = write_t5(tmp_path / "base", untied=untied)
    run = tmp_path / "run"
    said = train(capsys, model, data, run, "lora.train_head=true", "lora.train_embeddings=true")
    one = "shared = encoder.embed_tokens = decoder.embed_tokens"
    assert f"Trained in full: {one}{' (' if untied else ' = lm_head ('}" in said
    result = json.loads((run / "result.json").read_text())
    scored, _ = done(capsys, "eval", "--adapter", run, "--data", data, "--json")
    assert json.loads(scored)
    assert result["tuned_loss"] < result["base_loss"]

    ids = torch.arange(3, 9)[None]
    base = transformers_model(model)
    plain = peft.PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    from chulengo.model.session import open_session

    session = open_session(None, str(run), device="cpu")
    with torch.no_grad(), session.side("tuned") as ours:
        assert torch.equal(plain(input_ids=ids, decoder_input_ids=ids).logits,
                           ours(input_ids=ids, decoder_input_ids=ids).logits)
    merged = plain.merge_and_unload()
    assert torch.equal(merged.encoder.embed_tokens.weight, merged.decoder.embed_tokens.weight)
    assert torch.equal(merged.encoder.embed_tokens.weight, merged.lm_head.weight) != untied


def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM.from_pretrained(str(folder))
