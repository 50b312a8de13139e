"""The reference engine against the same training written by hand with plain peft, bitsandbytes and torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from chulengo.data.batches import BatchPlan, EpochBatches
from chulengo.data.renderer import RenderedRow
from chulengo.data.tokenizer import load_tokenizer
from chulengo.model.adapter import attach_lora
from chulengo.model.load import load_base
from training_kit import SETTINGS, train

RUN: dict[str, Any] = {
    "batch_size": 4, "gradient_accumulation": 2, "max_steps": 12, "learning_rate": 2e-3, "warmup_steps": 2,
    "max_seq_tokens": 256, "weight_decay": 0.01, "max_grad_norm": 0.5,
}


def alpaca_rows(data: Path, count: int) -> list[RenderedRow]:
    tokenizer = load_tokenizer(data / "stories260K")
    rows = []
    file = next((data / "alpaca").glob("*.json"))
    for i, record in enumerate(json.loads(file.read_text(encoding="utf-8"))):
        prompt = [1, *tokenizer.encode(record["instruction"])[0]]
        answer = [*tokenizer.encode(record["output"])[0], 2]
        if len(prompt) + len(answer) <= 256 and len(rows) < count:
            trained = [False] * len(prompt) + [True] * len(answer)
            rows.append(RenderedRow(ids=prompt + answer, trained=trained, source=f"alpaca#{i}"))
    return rows


def plain_losses(folder: Path, rows: list[RenderedRow], double_quant: bool) -> list[float]:
    """The loop as anybody would write it; only the choice of batches is shared."""
    quantizer = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        str(folder), quantization_config=quantizer, dtype=torch.float32, device_map={"": "cpu"}
    )
    torch.manual_seed(7)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    plan = BatchPlan(rows, packed=False, max_seq_tokens=256, pad_id=0, seed=SETTINGS["seed"])
    sampler = EpochBatches(plan.lengths, batch_size=4, accumulation=2, by_length=True, seed=SETTINGS["seed"])
    micro = [plan.collate(indices) for indices in sampler]
    losses = []
    for step in range(12):
        rate = step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 10))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate
        batches = micro[2 * step : 2 * step + 2]
        tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
        loss = 0.0
        for batch in batches:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            share = cross_entropy(
                logits[:, :-1].reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1),
                ignore_index=-100, reduction="sum",
            ) / tokens
            share.backward()
            loss += float(share.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


@pytest.mark.parametrize("double_quant", [True, False])
def test_losses_are_those_of_plain_peft_and_bitsandbytes(
    shared_data: Path, tmp_path: Path, double_quant: bool
) -> None:
    folder = shared_data / "stories260K"
    rows = alpaca_rows(shared_data, 96)
    assert len(rows) == 96
    expected = plain_losses(folder, rows, double_quant)
    base = load_base(folder, double_quant=double_quant, device="cpu")
    model = attach_lora(base, rank=8, alpha=16, seed=7)
    _, written = train(model, tmp_path, rows, **RUN)
    losses = [row["loss"] for row in written]
    difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    print(f"largest difference of 12 losses: {difference:.2e}; first {losses[0]:.4f}, last {losses[-1]:.4f}")
    assert difference < 1e-5
    assert losses[-1] < losses[0] - 0.3
