"""Which optimiser, schedule and precision a run has: in transformers' words, and made here for the fast engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from chulengo.errors import ConfigError
from chulengo.model.load import import_bitsandbytes
from chulengo.train.job import Optimisation

OPTIMIZERS = {  # ours: transformers'
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
}
LAST_RATE = 1e-7  # where the polynomial schedule ends
SCHEDULES = ("constant", "linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt")


def check_optimizer(optimizer: str, device: torch.device) -> str | None:
    """Returns what is to be said about an optimiser on this device, or None.

    bitsandbytes has its 8- and 32-bit optimisers on CPUs too. Paging moves optimiser state from GPU to host memory
    when the GPU is full; on a CPU there is nothing to page and the same arithmetic runs unpaged.

    Raises:
        ConfigError: the name is unknown.
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"training.optimizer is {optimizer!r}.", allowed=", ".join(OPTIMIZERS))
    if optimizer.startswith("paged_") and device.type == "cpu":
        return f"{optimizer} on a CPU: nothing to page, the same optimiser runs unpaged."
    return None


def num_steps(*, steps_per_epoch: int, epochs: float, max_steps: int | None) -> int:
    """Returns the optimiser steps of a run; a part of a step counts as one."""
    # 1e-9: 0.1 * 30 is 3.0000000000000004
    return max_steps if max_steps is not None else max(1, math.ceil(epochs * steps_per_epoch - 1e-9))


def num_warmup_steps(*, total: int, schedule: str, warmup_ratio: float, warmup_steps: int | None) -> int:
    """Returns the steps over which the learning rate rises from 0; the constant schedule has none.

    Raises:
        ConfigError: the schedule is unknown.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"training.schedule is {schedule!r}.", allowed=", ".join(SCHEDULES))
    if schedule == "constant":
        return 0
    # of a run of one step none is left to warm up in: the rate of step 1 of a warm-up is 0
    return warmup_steps if warmup_steps is not None else min(math.ceil(warmup_ratio * total - 1e-9), total - 1)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Returns float32, bf16 or fp16: what `auto` means on this device, or the given one when the device can do it.

    Raises:
        ConfigError: it cannot.
    """
    on_gpu = device.type == "cuda"
    has_bf16 = not on_gpu or torch.cuda.get_device_capability(device)[0] >= 8
    if precision == "auto":
        return ("bf16" if has_bf16 else "fp16") if on_gpu else "float32"
    if precision == "fp16" and not on_gpu:
        raise ConfigError(
            "training.precision is fp16, which needs a GPU (the loss scaler has no CPU form).",
            next_step="training.precision=float32 or bf16",
        )
    if precision == "bf16" and not has_bf16:
        raise ConfigError("This GPU has no bfloat16.", next_step="training.precision=fp16")
    if precision not in ("float32", "bf16", "fp16"):
        raise ConfigError(f"training.precision is {precision!r}.", allowed="auto, float32, bf16, fp16")
    return precision


def make_optimizer(parameter: nn.Parameter, settings: Optimisation) -> torch.optim.Optimizer:
    """Returns the optimiser of one tensor that holds all that is trained.

    AdamW treats every number alone, so this is the reference engine's update. 8-bit states share scales over blocks of
    256 numbers, and of tensors below 4,096 numbers bitsandbytes keeps them in 32 bits: in one tensor there is no such
    exception, and a block may span two factors unless their sizes are whole blocks, as they are from rank 1 on where
    widths are multiples of 256.
    """
    shared: dict[str, Any] = {
        "lr": settings.learning_rate, "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon, "weight_decay": settings.weight_decay,
    }  # fmt: skip
    if settings.optimizer == "adamw":
        # fused: one kernel, and no host wait for the step counter; a CPU gains nothing from it
        return torch.optim.AdamW([parameter], **shared, fused=parameter.is_cuda)
    import_bitsandbytes()
    import bitsandbytes as bnb

    made: torch.optim.Optimizer = bnb.optim.AdamW(
        [parameter], **shared, optim_bits=8 if settings.optimizer.endswith("8bit") else 32,
        is_paged=settings.optimizer.startswith("paged_") and parameter.is_cuda,
    )  # fmt: skip
    return made


def learning_rates(settings: Optimisation) -> Callable[[int], float]:
    """Returns the function from steps done to the rate of the next step, as transformers has it for each schedule.

    Written out, not called there: importing transformers' optimisers takes 3.7 s of CPU time, bitsandbytes with them.
    """
    rate, total, warmup, name = settings.learning_rate, settings.total_steps, settings.warmup_steps, settings.schedule

    def factor(done: int) -> float:
        if name == "inverse_sqrt":
            timescale = warmup or 10_000
            return done / max(1, warmup) if done < warmup else 1.0 / math.sqrt((done + timescale - warmup) / timescale)
        if name != "constant" and done < warmup:
            return done / max(1.0, warmup)
        if name == "linear":
            return max(0.0, (total - done) / max(1, total - warmup))
        if name == "cosine":
            progress = (done - warmup) / max(1, total - warmup)
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))
        if name == "polynomial":  # of power 1, down to 1e-7
            if done > total:
                return LAST_RATE / rate
            left = 1 - (done - warmup) / (total - warmup)
            return ((rate - LAST_RATE) * left + LAST_RATE) / rate
        return 1.0  # constant, constant_with_warmup

    return lambda done: rate * factor(done)
