"""What one run is told to do, what it remembers, and what it says: the values the training loop works with."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from chulengo.data.batches import BatchPlan
from chulengo.train.interrupt import StopRequest

MetricRow = dict[str, Any]
Sink = Callable[[MetricRow], None]
RUN_STATE, SETTINGS = "run_state.json", "settings.json"
REPORTED = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "step_s")  # of a training row, to TensorBoard etc.


@dataclass(slots=True)
class StepCount:
    """Optimiser steps that this process has taken."""

    taken: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """What one run does: its data, its rhythm, and where things go."""

    train: BatchPlan
    validation: BatchPlan | None
    batch_size: int
    accumulation: int
    by_length: bool
    log_every: int
    eval_every: int | None  # None: at the end of each epoch
    save_every: int | None  # the same
    keep_checkpoints: int
    keep_best: bool
    patience: int | None
    out: Path
    settings: Mapping[str, Any]
    sinks: Sequence[Sink]
    stop: StopRequest
    steps: StepCount = field(default_factory=StepCount)


@dataclass(frozen=True, slots=True)
class Optimisation:
    """How the adapter is changed, every `auto` resolved; names as in `config.schema.TrainingConfig`."""

    total_steps: int
    learning_rate: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    optimizer: str
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    seed: int


@dataclass(slots=True)
class RunState:
    """What a run remembers beyond its weights and its optimiser; saved in every checkpoint."""

    best_loss: float | None = None
    best_step: int | None = None
    last_validation_loss: float | None = None
    last_train_loss: float | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    elapsed_s: float = 0.0
    tokens: int = 0
    # sums since the last logged row, so that a row means the same after a resume
    window_nll: float = 0.0
    window_targets: int = 0
    window_tokens: int = 0
    window_steps: int = 0
    window_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a loop ended: what it remembers, at which step, after how long, and whether somebody asked it to stop."""

    run: RunState
    step: int
    seconds: float
    interrupted: bool


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine with its model, as `run_training` uses it.

    Attributes:
        device: where it trains.
        precision: float32, bf16 or fp16, resolved.
        flatten: the rows of a packed batch go behind each other in one row.
        num_trainable: numbers that are trained.
        train: goes from a checkpoint (None: the beginning) to the end.
        restore: puts the adapter of a checkpoint into the model.
    """

    device: torch.device
    precision: str
    flatten: bool
    num_trainable: int
    train: Callable[[Job, Optimisation, Path | None], Ended]
    restore: Callable[[Path], None]


def peak_bytes(device: torch.device) -> int:
    """Returns the most memory so far: allocated by torch on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
