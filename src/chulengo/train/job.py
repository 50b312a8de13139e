"""What one run is told to do, what it remembers, and what it says: the values the training loop works with."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chulengo.data.batches import BatchPlan
from chulengo.train.interrupt import StopRequest

MetricRow = dict[str, Any]
Sink = Callable[[MetricRow], None]
RUN_STATE, SETTINGS = "run_state.json", "settings.json"


@dataclass(frozen=True, slots=True)
class Job:
    """What one run does, beyond `TrainingArguments`: its data, its rhythm, and where things go."""

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


@dataclass(slots=True)
class RunState:
    """What a run remembers beyond transformers' own state; saved in every checkpoint."""

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


def peak_bytes(device: torch.device) -> int:
    """Returns the most memory so far: allocated by torch on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
