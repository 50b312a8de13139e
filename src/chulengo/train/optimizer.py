"""Which optimiser, schedule and precision a run has, in transformers' words."""

from __future__ import annotations

import math

import torch

from chulengo.errors import ConfigError

OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
}
SCHEDULES = ("constant", "linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt")


def optimizer_name(optimizer: str, device: torch.device) -> tuple[str, str | None]:
    """Returns transformers' name of an optimiser, and what is to be said about it on this device (or None).

    bitsandbytes has its 8- and 32-bit optimisers on CPUs too. Paging moves optimiser state from GPU to host memory
    when the GPU is full; on a CPU there is nothing to page and the same arithmetic runs unpaged.

    Raises:
        ConfigError: the name is unknown.
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"training.optimizer is {optimizer!r}.", allowed=", ".join(OPTIMIZERS))
    paged_on_cpu = optimizer.startswith("paged_") and device.type == "cpu"
    note = f"{optimizer} on a CPU: nothing to page, the same optimiser runs unpaged." if paged_on_cpu else None
    return OPTIMIZERS[optimizer], note


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
