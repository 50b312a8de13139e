"""`run_training`: rows in, a trained adapter out, through either engine.

Resolves what is left open (precision, steps, warm-up), refuses what cannot be, and runs the loop of the model's engine
under a signal handler: transformers' trainer for a PEFT model (reference_run.py), our own for a `FastModel`
(fast_run.py). What a run writes, and what its settings mean, is the same for both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chulengo.data.batches import BatchPlan
from chulengo.data.renderer import RenderedRow
from chulengo.errors import TrainingError
from chulengo.model.fast import FastModel
from chulengo.model.plan import gib
from chulengo.train.checkpoint import check_same_settings, defect, newest_good
from chulengo.train.course import read_run_state
from chulengo.train.fast_run import fast_engine
from chulengo.train.interrupt import Interrupted, stop_requests
from chulengo.train.job import SETTINGS, Engine, Job, Optimisation, RunState, Sink, peak_bytes
from chulengo.train.no_room import NoRoomInStepError
from chulengo.train.optimizer import check_optimizer, num_steps, num_warmup_steps
from chulengo.train.ranks import own_ranks
from chulengo.train.reference_run import reference_engine
from chulengo.train.reports import check_reports

__all__ = ["Interrupted", "RunShape", "TrainOutcome", "run_training"]

NO_ROOM = "a smaller batch_size with more gradient_accumulation, or shorter rows"


@dataclass(frozen=True, slots=True)
class RunShape:
    """What is known before the first step.

    Attributes:
        total_steps: optimiser steps of the whole run.
        first_step: steps done before, by the run that is resumed; else 0.
        steps_per_epoch: optimiser steps of one epoch.
        warmup_steps: steps over which the learning rate rises.
        precision: float32, bf16 or fp16, resolved.
        packing_efficiency: share of the packs' places that hold a token; None when not packed.
        trainable_parameters: numbers that are trained.
    """

    total_steps: int
    first_step: int
    steps_per_epoch: int
    warmup_steps: int
    precision: str
    packing_efficiency: float | None
    trainable_parameters: int


@dataclass(frozen=True, slots=True)
class TrainOutcome:
    """How a run ended.

    Attributes:
        steps: optimiser steps done, those before a resume included.
        train_loss: of the last logged row.
        best_step: the step with the lowest validation loss, None without validation.
        best_loss: that loss.
        kept_step: the step whose weights the model now has.
        last_validation_loss: at the last evaluation.
        stopped_early: patience ran out before the last step.
        seconds: of training, evaluation and saving, those before a resume included.
        tokens: seen in training.
        peak_bytes: see `loop.peak_bytes`.
        shape: see `RunShape`.
    """

    steps: int
    train_loss: float | None
    best_step: int | None
    best_loss: float | None
    kept_step: int
    last_validation_loss: float | None
    stopped_early: bool
    seconds: float
    tokens: int
    peak_bytes: int
    shape: RunShape


def run_training(
    model: Any, train_rows: Sequence[RenderedRow], validation_rows: Sequence[RenderedRow], *, out: Path, pad_id: int,
    max_seq_tokens: int, batching: str, batch_size: int, gradient_accumulation: int, epochs: float,
    max_steps: int | None, learning_rate: float, schedule: str, warmup_ratio: float, warmup_steps: int | None,
    weight_decay: float, optimizer: str, adam_beta1: float, adam_beta2: float, adam_epsilon: float,
    max_grad_norm: float, precision: str, gradient_checkpointing: bool, log_every_steps: int,
    eval_every_steps: int | None, save_every_steps: int | None, keep_checkpoints: int,
    early_stopping_patience: int | None, keep_best: bool, seed: int, report_to: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None, resume: bool = False, sinks: Sequence[Sink] = (),
    planned_bytes: int | None = None, no_room: str = NO_ROOM, on_start: Callable[[RunShape], None] = lambda _: None,
    message: Callable[[str], None] = lambda _: None,
) -> TrainOutcome:
    """Returns how the run went; the model's adapter is the trained one (the best one with `keep_best`).

    Args:
        model: as `model.adapter.attach_lora` returns it, or a `FastModel` with a trainable adapter.
        train_rows: rendered rows, none longer than `max_seq_tokens`.
        validation_rows: the same, may be empty.
        out: the run folder; checkpoints go to `checkpoints/` in it.
        pad_id: see `data.batches.pad_token`.
        settings: what must be the same when the run is resumed, beside these arguments: JSON values by name.
        resume: go on from the newest good checkpoint in `out`.
        sinks: called with each metric row, on rank 0.
        planned_bytes: peak memory that the plan gives, for the error that says there is no room.
        no_room: what that error says to type next.
        on_start: called once, when the number of steps is known.
        message: called with sentences for the user.

    The rest is as in `config.schema.TrainingConfig`.

    Raises:
        Interrupted: SIGINT or SIGTERM; the state is saved.
        TrainingError: nothing to resume, other settings than before, a full disk, numbers that are not finite.
        ConfigError: settings that this model or machine cannot have.
        NoRoomInStepError: no room on the GPU.
    """
    given = {k: v for k, v in locals().items() if k not in NOT_SETTINGS}
    check_reports(report_to)
    if isinstance(model, FastModel):
        engine = fast_engine(model, precision=precision, report_to=report_to)
    else:
        engine = reference_engine(
            model, precision=precision, batching=batching, gradient_checkpointing=gradient_checkpointing,
            report_to=report_to,
        )
    if note := check_optimizer(optimizer, engine.device):
        message(note)
    plans = _plans(train_rows, validation_rows, engine, batching, max_seq_tokens, pad_id, seed)
    given |= {"rows.train": _rows_hash(train_rows), "rows.validation": _rows_hash(validation_rows)}
    world = own_ranks().world
    saved_settings = {"ranks": world, **given, **(settings or {})}
    checkpoint = _checkpoint_to_resume(out, saved_settings, message) if resume else None
    per_epoch = -(-len(plans[0]) // (batch_size * gradient_accumulation * world))
    total = num_steps(steps_per_epoch=per_epoch, epochs=epochs, max_steps=max_steps)
    warmup = num_warmup_steps(total=total, schedule=schedule, warmup_ratio=warmup_ratio, warmup_steps=warmup_steps)
    shape = RunShape(
        total, _step_of(checkpoint), per_epoch, warmup, engine.precision, plans[0].efficiency, engine.num_trainable
    )
    with stop_requests(message) as stop:
        job = Job(
            train=plans[0], validation=plans[1], batch_size=batch_size, accumulation=gradient_accumulation,
            by_length=batching == "group_by_length", log_every=log_every_steps, eval_every=eval_every_steps,
            save_every=save_every_steps, keep_checkpoints=keep_checkpoints, keep_best=keep_best,
            patience=early_stopping_patience, out=out, settings=saved_settings, sinks=sinks, stop=stop,
        )
        optimisation = Optimisation(
            total_steps=total, learning_rate=learning_rate, schedule=schedule, warmup_steps=warmup,
            weight_decay=weight_decay, optimizer=optimizer, adam_beta1=adam_beta1, adam_beta2=adam_beta2,
            adam_epsilon=adam_epsilon, max_grad_norm=max_grad_norm, seed=seed,
        )
        on_start(shape)
        return _train(engine, job, optimisation, checkpoint, shape, planned_bytes, no_room)


NOT_SETTINGS = frozenset((
    "model", "train_rows", "validation_rows", "out", "settings", "resume", "sinks", "planned_bytes", "no_room",
    "on_start", "message", "report_to", "keep_checkpoints", "save_every_steps", "log_every_steps",
))  # what may differ when a run is resumed: none of it changes a number in the adapter


def _train(
    engine: Engine, job: Job, settings: Optimisation, checkpoint: Path | None, shape: RunShape,
    planned_bytes: int | None, no_room: str,
) -> TrainOutcome:
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    if checkpoint is not None:
        before = read_run_state(checkpoint)
        if before.stopped_early or shape.first_step >= shape.total_steps:
            engine.restore(checkpoint)
            return _finished(engine, job, before, shape.first_step, before.elapsed_s, shape)
    try:
        ended = engine.train(job, settings, checkpoint)
    except torch.OutOfMemoryError as error:
        planned = "" if planned_bytes is None else f", {gib(planned_bytes)} were planned"
        raise NoRoomInStepError(
            f"{engine.device} has no room for a step of this run: {gib(peak_bytes(engine.device))} were in use at "
            f"most{planned}.",
            steps_taken=job.steps.taken, next_step=no_room,
        ) from error
    if ended.interrupted:
        raise Interrupted(ended.step, newest_good(job.out / "checkpoints"))
    return _finished(engine, job, ended.run, ended.step, ended.seconds, shape)


def _finished(
    engine: Engine, job: Job, run: RunState, step: int, seconds: float, shape: RunShape
) -> TrainOutcome:
    kept = step
    if job.keep_best and run.best_step is not None and run.best_step != step:
        best = job.out / "checkpoints" / f"checkpoint-{run.best_step}"
        reason = defect(best)
        if reason is not None:
            raise TrainingError(f"The best checkpoint, {best}, is damaged: {reason}.", next_step="keep_best=false")
        engine.restore(best)
        kept = run.best_step
    return TrainOutcome(
        steps=step, train_loss=run.last_train_loss, best_step=run.best_step, best_loss=run.best_loss, kept_step=kept,
        last_validation_loss=run.last_validation_loss, stopped_early=run.stopped_early, seconds=seconds,
        tokens=run.tokens, peak_bytes=peak_bytes(engine.device), shape=shape,
    )


def _plans(
    train: Sequence[RenderedRow], validation: Sequence[RenderedRow], engine: Engine, batching: str,
    max_seq_tokens: int, pad_id: int, seed: int,
) -> tuple[BatchPlan, BatchPlan | None]:
    if not train:
        raise TrainingError("There are no rows to train on.")

    def plan(rows: Sequence[RenderedRow]) -> BatchPlan:
        return BatchPlan(
            rows, packed=batching == "packed", max_seq_tokens=max_seq_tokens, pad_id=pad_id, seed=seed,
            flatten=engine.flatten,
        )

    return plan(train), plan(validation) if validation else None


def _checkpoint_to_resume(out: Path, settings: Mapping[str, Any], message: Callable[[str], None]) -> Path:
    checkpoint = newest_good(out / "checkpoints", message)
    if checkpoint is None:
        raise TrainingError(
            f"{out} has no whole checkpoint to resume from.", next_step="start the run anew with another --out"
        )
    check_same_settings(json.loads((checkpoint / SETTINGS).read_text(encoding="utf-8")), settings)
    return checkpoint


def _step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint is not None else 0


def _rows_hash(rows: Sequence[RenderedRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for part in (row.ids, row.trained, row.encoder_ids or []):
            digest.update(len(part).to_bytes(8, "little") + np.asarray(part, dtype=np.int64).tobytes())
    return digest.hexdigest()
