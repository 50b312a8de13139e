"""What stops a run that has gone wrong: numbers that are not finite, and parameters that nothing reaches.

Not finite. After each backward pass the step's losses and the gradient norm are looked at, before the optimiser uses
them. A NaN or infinity ends the run with the step, the rows and a file of the batch. Averaging it away, as others do,
trains on. The one exception is fp16: its loss scaler finds the largest scale by overflowing, so an infinite gradient
norm with finite losses is part of its work as long as there is scale left to give up.

Reached. Each trainable tensor must get a gradient, or it is not being trained: a frozen path, a detached input, a wrong
target. When can that be judged? LoRA starts with B = 0, so A has an exactly zero gradient until B has moved, and with
warm-up the first learning rate is 0, so B has not moved after step 1 either. Hence two rules. A tensor that has no
gradient at all (None) after a backward pass is out of the graph: error at once. A tensor whose gradient was zero at
every step so far is an error once PATIENCE optimiser steps with a learning rate above 0 have been taken: A needs one
such step, the others are for parts that a batch may happen not to touch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chulengo.data.wording import counted
from chulengo.errors import TrainingError
from chulengo.train.ranks import Ranks

PATIENCE = 3  # optimiser steps with a learning rate above 0


class GradientReach:
    """Watches until every trainable tensor has had a gradient that is not zero; after that it costs nothing."""

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self._waiting = {name: p for name, p in named.items() if p.requires_grad}
        self._moves = 0

    def look(self, step: int) -> None:
        """Looks at the gradients of one optimiser step, before it is taken.

        Raises:
            TrainingError: tensors have no gradient, or had only zeros for too long; they are named.
        """
        if not self._waiting:
            return
        absent = [name for name, p in self._waiting.items() if p.grad is None]
        if absent:
            raise _unreached(absent, f"no gradient at step {step}")
        largest = torch.stack([_peak(p.grad) for p in self._waiting.values() if p.grad is not None]).tolist()
        self._waiting = {n: p for (n, p), g in zip(self._waiting.items(), largest, strict=True) if g == 0.0}
        if self._waiting and self._moves >= PATIENCE:
            raise _unreached(list(self._waiting), f"a gradient of exactly zero in all {counted(step, 'step')}")

    def moved(self, learning_rate: float) -> None:
        """Notes that the optimiser took a step with this learning rate."""
        self._moves += learning_rate > 0


def check_finite(
    losses: Sequence[float], grad_norm: float, *, step: int, batches: Sequence[dict[str, Any]], folder: Path,
    precision: str, ranks: Ranks, loss_scale: float | None = None,
) -> None:
    """Raises `TrainingError` when a micro-batch's loss, or the gradient norm, is NaN or infinite.

    Args:
        losses: summed loss of each micro-batch of this rank.
        grad_norm: of the whole step.
        step: the step about to be taken, 1-based.
        batches: this rank's micro-batches, as collated.
        folder: where the batch is saved, as `bad_batch-step<step>/`, of several ranks `…-rank<rank>/`.
        precision: float32, bf16 or fp16.
        ranks: the processes of this run.
        loss_scale: the fp16 loss scale, None without one.
    """
    bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
    if not bad and (math.isfinite(grad_norm) or (loss_scale is not None and loss_scale > 1.0)):
        return
    what = "The loss is" if bad else "The gradient norm is"
    value = losses[bad[0]] if bad else grad_norm
    chosen = [batches[i] for i in bad] if bad else list(batches)
    sources = [source for batch in chosen for source in batch["sources"]]
    of_rank = f"-rank{ranks.rank}" if ranks.world > 1 else ""  # each has a batch of its own
    saved = _save_batch(chosen, folder / f"bad_batch-step{step}{of_rank}", losses, grad_norm, sources)
    rows = ", ".join(sources[:8]) + (" ..." if len(sources) > 8 else "")
    base = " Nothing was trained before it, so this is the base model's own." if step == 1 else ""
    raise TrainingError(
        f"{what} {value} at step {step}; the run was stopped and the model not updated.{base} Rows: {rows}. "
        f"The batch is saved in {saved}.",
        next_step=_way_on(step, precision),
    )


def _way_on(step: int, precision: str) -> str:
    """Returns what may help, and nothing that is so already."""
    wider = "" if precision == "float32" else "--set training.precision=float32"
    if step == 1:
        weights = "copy or download the model's weights again"
        return f"{weights}; or, if numbers are too large for {precision}: a new run with {wider}" if wider else weights
    lower = "a lower training.learning_rate"
    return f"look at those rows; then a new run, with {lower}{f' or {wider}' if wider else ''}"


def _peak(grad: Tensor) -> Tensor:
    return grad.detach().abs().max().float()


def _unreached(names: list[str], what: str) -> TrainingError:
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return TrainingError(
        f"{len(names)} trainable tensor(s) are not being trained, they had {what}: {listed}.",
        next_step="leave those modules out of lora.targets, or report this model",
    )


def _save_batch(
    batches: list[dict[str, Any]], folder: Path, losses: Sequence[float], grad_norm: float, sources: list[str]
) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"micro{i}.{key}": value.detach().cpu().contiguous()
        for i, batch in enumerate(batches) for key, value in batch.items() if isinstance(value, Tensor)
    }
    save_file(tensors, str(folder / "batch.safetensors"))
    info = {"losses": [str(x) for x in losses], "grad_norm": str(grad_norm), "rows": sources}
    (folder / "batch.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
    return folder
