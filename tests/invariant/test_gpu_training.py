"""Training on a CUDA device: every form of weights, precision and optimiser, packing, and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chulengo.model.adapter import attach_lora
from chulengo.model.load import load_base
from training_kit import assert_equal_tensors, make_llama, make_rows, make_t5, train, trained_tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"), num_attention_heads=2, num_key_value_heads=2)


ROWS, VALIDATION = make_rows(40), make_rows(6, seed=1)


def on_gpu(folder: Path, **changes: Any) -> Any:
    keys = ("quantization", "compute_dtype", "attention")
    base = load_base(folder, **{k: changes.pop(k) for k in keys if k in changes})
    assert next(base.parameters()).device.type == "cuda"
    return attach_lora(base, **{"rank": 4, "alpha": 8.0, "seed": 1, **changes})


@pytest.mark.parametrize(
    ("weights", "run"),
    [
        ({}, {}), ({}, {"batching": "packed"}), ({"attention": "eager"}, {"batching": "packed"}),
        ({"quantization": "fp4"}, {}), ({"quantization": "int8"}, {}), ({"quantization": "none"}, {}),
        ({"compute_dtype": "float16"}, {"precision": "fp16"}),
        ({"compute_dtype": "float32"}, {"precision": "float32"}), ({}, {"precision": "float32"}),
        ({}, {"optimizer": "paged_adamw_8bit"}), ({}, {"optimizer": "paged_adamw_32bit"}),
        ({}, {"optimizer": "adamw_8bit"}), ({}, {"gradient_checkpointing": True}), ({"dora": True}, {}),
        ({"quantization": "none", "train_head": True, "train_embeddings": True}, {}), ({"train_head": True}, {}),
    ],
    ids=str,
)
def test_each_form_trains(llama: Path, tmp_path: Path, weights: dict[str, Any], run: dict[str, Any]) -> None:
    model = on_gpu(llama, **weights)
    outcome, rows = train(model, tmp_path, ROWS, VALIDATION, epochs=3.0, **run)
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert outcome.peak_bytes < 2**30
    ids = torch.arange(3, 20, device="cuda")[None]
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()  # usable without autocast after training


def test_encoder_decoder(tmp_path: Path) -> None:
    model = on_gpu(make_t5(tmp_path / "t5"))
    _, rows = train(model, tmp_path, make_rows(16, encoder=True), make_rows(4, seed=2, encoder=True), epochs=6.0)
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.parametrize("run", [{}, {"batching": "packed", "optimizer": "paged_adamw_8bit"}], ids=str)
def test_resume_goes_on_where_it_was(llama: Path, tmp_path: Path, run: dict[str, Any]) -> None:
    straight = on_gpu(llama, dropout=0.1)
    train(straight, tmp_path / "a", ROWS, VALIDATION, save_every_steps=3, **run)

    class Crash(Exception):
        pass

    def crash(row: dict[str, Any]) -> None:
        if row["step"] >= 5:
            raise Crash

    with pytest.raises(Crash):
        train(on_gpu(llama, dropout=0.1), tmp_path / "b", ROWS, VALIDATION, save_every_steps=3, sinks=[crash], **run)
    model = on_gpu(llama, dropout=0.1)
    train(model, tmp_path / "b", ROWS, VALIDATION, save_every_steps=3, resume=True, **run)
    assert_equal_tensors(trained_tensors(model), trained_tensors(straight))
