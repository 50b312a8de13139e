"""Small models, rows and runs for the tests of the training side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from chulengo.data.renderer import RenderedRow
from chulengo.model.adapter import attach_lora
from chulengo.model.fast import load_fast
from chulengo.model.load import load_base
from chulengo.train.trainer import TrainOutcome, run_training

VOCAB = 512

SETTINGS: dict[str, Any] = {
    "pad_id": 0, "max_seq_tokens": 64, "batching": "group_by_length", "batch_size": 2, "gradient_accumulation": 2,
    "epochs": 2.0, "max_steps": None, "learning_rate": 5e-3, "schedule": "cosine", "warmup_ratio": 0.1,
    "warmup_steps": None, "weight_decay": 0.0, "optimizer": "adamw", "adam_beta1": 0.9, "adam_beta2": 0.999,
    "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "precision": "auto", "gradient_checkpointing": False,
    "log_every_steps": 1, "eval_every_steps": None, "save_every_steps": None, "keep_checkpoints": 2,
    "early_stopping_patience": None, "keep_best": True, "seed": 3,
}


def make_llama(folder: Path, *, tied: bool = False, **changes: Any) -> Path:
    """Writes a random Llama of 2 layers and returns its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    values = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 128, "initializer_range": 0.2,
        "tie_word_embeddings": tied, **changes,
    }
    LlamaForCausalLM(LlamaConfig(**values)).save_pretrained(folder)
    return folder


def make_t5(folder: Path, *, untied: bool = False) -> Path:
    """Writes a random T5 and returns its folder; `untied`: with a head of its own, as Flan-T5 has it."""
    from safetensors.torch import load_file, save_file
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    if untied:
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = 0.1 * torch.randn(VOCAB, 64)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_rows(count: int, *, seed: int = 0, longest: int = 40, encoder: bool = False) -> list[RenderedRow]:
    """Returns random rows of different lengths, the first tokens of each without loss."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        length = int(rng.integers(6, longest))
        prompt = 0 if encoder else int(rng.integers(1, 5))
        rows.append(
            RenderedRow(
                ids=rng.integers(3, VOCAB, length).tolist(), trained=[j >= prompt for j in range(length)],
                source=f"rows.jsonl:{i + 1}", turn_ends=[length],
                encoder_ids=rng.integers(3, VOCAB, int(rng.integers(4, 20))).tolist() if encoder else None,
            )
        )
    return rows


def make_model(
    folder: Path, *, engine: str = "reference", quantization: str = "nf4", compute_dtype: str = "auto", **lora: Any
) -> Any:
    """Returns the folder's model of an engine with an adapter."""
    settings = {"rank": 4, "alpha": 8.0, "seed": 1, **lora}
    if engine == "fast":
        model = load_fast(
            folder, quantization=quantization, compute_dtype=compute_dtype, device="cpu", weights="resident"
        )
        model.attach_lora(**settings)
        return model
    base = load_base(folder, quantization=quantization, compute_dtype=compute_dtype, device="cpu")
    return attach_lora(base, **settings)


def train(
    model: Any, out: Path, rows: list[RenderedRow], validation: list[RenderedRow] | None = None, **changes: Any
) -> tuple[TrainOutcome, list[dict[str, Any]]]:
    """Returns the outcome of a run and the metric rows it wrote."""
    written: list[dict[str, Any]] = []
    sinks = [written.append, *changes.pop("sinks", [])]
    outcome = run_training(model, rows, validation or [], out=out, **{**SETTINGS, **changes}, sinks=sinks)
    return outcome, written


def trained_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Returns copies of all trainable tensors."""
    return {name: p.detach().clone() for name, p in dict(model.named_parameters()).items() if p.requires_grad}


def assert_equal_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Fails unless both have the same tensors, bit for bit."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different
