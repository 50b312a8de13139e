"""The pretraining loop of the embedded model: plain PyTorch over packed rows, one process, one device."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import nano_corpus


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        num_steps: Optimiser steps; 0 means as many as fit into `max_seconds`, from the speed of the first 30.
        max_seconds: Wall-clock limit of the loop; the learning rate reaches its end by then in any case.
        batch_rows: Packed rows a step.
        peak_lr: Learning rate after the warm-up; it ends at 2 % of it, on a cosine.
        prompt_weight: Weight of a prompt token's loss, where an answer token weighs 1.
    """

    num_steps: int
    max_seconds: float
    batch_rows: int
    peak_lr: float = 3e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    prompt_weight: float = 0.15


@dataclass
class Progress:
    """What the loop did."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)


def unpack(rows_BT: Tensor, prompt_weight: float) -> dict[str, Tensor]:
    """Returns the model's inputs for packed rows, and the labels and weights of their next tokens.

    Every document sees only itself: positions restart at its first token and the attention mask is
    block-diagonal and causal (bool, shape (B, 1, T, T)).
    """
    entries_BT = rows_BT.to(torch.int32)
    ids_BT = (entries_BT & nano_corpus.ID_MASK).long()
    is_start_BT = (entries_BT & nano_corpus.START_BIT) != 0
    is_answer_BT = (entries_BT & nano_corpus.ANSWER_BIT) != 0
    num_tokens = ids_BT.shape[1]
    index_T = torch.arange(num_tokens, device=ids_BT.device)
    start_BT = torch.where(is_start_BT, index_T, 0).cummax(dim=1).values
    same_BTT = start_BT[:, :, None] == start_BT[:, None, :]
    causal_TT = index_T[:, None] >= index_T[None, :]
    weights_BT = torch.where(is_answer_BT, 1.0, prompt_weight) * (ids_BT != 0) * ~is_start_BT
    return {
        "input_ids": ids_BT,
        "position_ids": index_T - start_BT,
        "attention_mask": (same_BTT & causal_TT)[:, None],
        "labels": ids_BT[:, 1:],
        "weights": weights_BT[:, 1:],
    }


def weighted_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the weighted sum of the next-token losses and the sum of the weights (fp32 scalars)."""
    logits_BTV = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
    ).logits[:, :-1]
    losses = F.cross_entropy(
        logits_BTV.reshape(-1, logits_BTV.shape[-1]).float(), batch["labels"].reshape(-1), reduction="none"
    )
    weights = batch["weights"].reshape(-1)
    return (losses * weights).sum(), weights.sum()


def learning_rate(progress: float, step: int, schedule: Schedule) -> float:
    """Returns the learning rate after `progress` (0 to 1) of the run."""
    warm = min(1.0, (step + 1) / schedule.warmup_steps)
    return schedule.peak_lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def _optimizer(model: Any, schedule: Schedule, device: torch.device) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-9, fused=device.type == "cuda")


def _report(progress: Progress, num_steps: int, seconds: float) -> None:
    step, loss = progress.losses[-1]
    speed = progress.tokens / seconds / 1e3
    print(f"step {step}/{num_steps or '?'} loss {loss:.4f} {speed:.0f}k tok/s {seconds:.0f} s", flush=True)


def pretrain(model: Any, rows: np.ndarray, schedule: Schedule, seed: int, device: torch.device) -> Progress:
    """Trains `model` in place on `rows` (uint16, (num_rows, row_tokens)), shuffled anew in every epoch."""
    corpus = torch.from_numpy(rows.view(np.int16)).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(model, schedule, device)
    num_steps, started, progress = schedule.num_steps, time.monotonic(), Progress()
    order, cursor, mark = torch.randperm(len(corpus), generator=generator), 0, 0.0
    batch_rows = min(schedule.batch_rows, len(corpus))
    while True:
        elapsed = time.monotonic() - started
        if progress.steps == 10:
            mark = elapsed
        if num_steps == 0 and progress.steps == 40:
            num_steps = 40 + int((schedule.max_seconds - elapsed) / (elapsed - mark) * 30 * 0.98)
        fraction = max(progress.steps / num_steps if num_steps else 0.0, elapsed / schedule.max_seconds)
        if fraction >= 1:
            break
        if cursor + batch_rows > len(order):
            order, cursor = torch.randperm(len(corpus), generator=generator), 0
        chosen = order[cursor : cursor + batch_rows].to(device)
        cursor += batch_rows
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(fraction, progress.steps, schedule)
        batch = unpack(corpus[chosen], schedule.prompt_weight)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            total, weight = weighted_loss(model, batch)
        loss = total / weight
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.steps += 1
        progress.tokens += batch_rows * rows.shape[1]
        if progress.steps <= 40 or progress.steps % 100 == 0:
            value = loss.item()  # waits for the device, so that the first steps are timed truly
            if not math.isfinite(value):
                raise RuntimeError(f"loss is {value} at step {progress.steps}")
            if progress.steps % 10 == 0:
                progress.losses.append((progress.steps, round(value, 4)))
                _report(progress, num_steps, time.monotonic() - started)
    progress.losses.append((progress.steps, round(loss.item(), 4)))
    progress.seconds = time.monotonic() - started
    return progress
