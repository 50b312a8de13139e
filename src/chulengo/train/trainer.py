"""`run_training`: rows in, a trained adapter out, through the reference engine.

Resolves what is left open (precision, steps, warm-up), refuses what cannot be, runs `ChulengoTrainer` under a signal
handler, and leaves the model as it was found apart from its adapter: no autocast wrapper, its own `use_cache`, in
evaluation mode.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from chulengo.data.batches import BatchPlan, collate_packed
from chulengo.data.renderer import RenderedRow
from chulengo.errors import ConfigError, DoesNotFitError, MissingPackageError, TrainingError
from chulengo.model.adapter import enable_gradient_checkpointing, restore_adapter, trainable_in_fp32
from chulengo.model.load import quiet_libraries
from chulengo.model.loss import base_model
from chulengo.train.checkpoint import check_same_settings, defect, newest_good
from chulengo.train.interrupt import Interrupted, stop_requests
from chulengo.train.job import RUN_STATE, SETTINGS, Job, RunState, Sink, peak_bytes
from chulengo.train.optimizer import num_steps, num_warmup_steps, optimizer_name, resolve_precision

if TYPE_CHECKING:
    from chulengo.train.loop import ChulengoTrainer

__all__ = ["Interrupted", "RunShape", "TrainOutcome", "run_training"]


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
    on_start: Callable[[RunShape], None] = lambda _: None, message: Callable[[str], None] = lambda _: None,
) -> TrainOutcome:
    """Returns how the run went; the model's adapter is the trained one (the best one with `keep_best`).

    Args:
        model: as `model.adapter.attach_lora` returns it.
        train_rows: rendered rows, none longer than `max_seq_tokens`.
        validation_rows: the same, may be empty.
        out: the run folder; checkpoints go to `checkpoints/` in it.
        pad_id: see `data.batches.pad_token`.
        settings: what must be the same when the run is resumed, beside these arguments: JSON values by name.
        resume: go on from the newest good checkpoint in `out`.
        sinks: called with each metric row, on rank 0.
        on_start: called once, when the number of steps is known.
        message: called with sentences for the user.

    The rest is as in `config.schema.TrainingConfig`.

    Raises:
        Interrupted: SIGINT or SIGTERM; the state is saved.
        TrainingError: nothing to resume, other settings than before, a full disk, numbers that are not finite.
        ConfigError: settings that this model or machine cannot have.
        DoesNotFitError: no room on the GPU.
    """
    given = {k: v for k, v in locals().items() if k not in NOT_SETTINGS}
    device = next(model.parameters()).device
    _check_device(device)
    resolved = resolve_precision(precision, device)
    optimizer_id, note = optimizer_name(optimizer, device)
    if note:
        message(note)
    plans = _plans(model, train_rows, validation_rows, batching, max_seq_tokens, pad_id, seed)
    given |= {"rows.train": _rows_hash(train_rows), "rows.validation": _rows_hash(validation_rows)}
    world = int(os.environ.get("WORLD_SIZE", "1"))
    saved_settings = {"ranks": world, **given, **(settings or {})}
    checkpoint = _checkpoint_to_resume(out, saved_settings, message) if resume else None
    per_epoch = -(-len(plans[0]) // (batch_size * gradient_accumulation * world))
    total = num_steps(steps_per_epoch=per_epoch, epochs=epochs, max_steps=max_steps)
    warmup = num_warmup_steps(total=total, schedule=schedule, warmup_ratio=warmup_ratio, warmup_steps=warmup_steps)
    if gradient_checkpointing:
        enable_gradient_checkpointing(model)
    shape = RunShape(
        total, _step_of(checkpoint), per_epoch, warmup, resolved, plans[0].efficiency,
        sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    with stop_requests(message) as stop, quiet_libraries(), _left_as_found(model, resolved):
        job = Job(
            train=plans[0], validation=plans[1], batch_size=batch_size, accumulation=gradient_accumulation,
            by_length=batching == "group_by_length", log_every=log_every_steps, eval_every=eval_every_steps,
            save_every=save_every_steps, keep_checkpoints=keep_checkpoints, keep_best=keep_best,
            patience=early_stopping_patience, out=out, settings=saved_settings, sinks=sinks, stop=stop,
        )
        arguments = _arguments(
            device, resolved, output_dir=str(out), per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation, max_steps=total, learning_rate=learning_rate,
            lr_scheduler_type=schedule, warmup_steps=warmup, weight_decay=weight_decay, optim=optimizer_id,
            adam_beta1=adam_beta1, adam_beta2=adam_beta2, adam_epsilon=adam_epsilon, max_grad_norm=max_grad_norm,
            seed=seed, report_to=list(report_to), eval_on_start=plans[1] is not None and checkpoint is None,
        )
        on_start(shape)
        return _train(model, arguments, job, checkpoint, shape)


NOT_SETTINGS = frozenset((
    "model", "train_rows", "validation_rows", "out", "settings", "resume", "sinks", "on_start", "message", "report_to",
    "keep_checkpoints", "save_every_steps", "log_every_steps",
))  # what may differ when a run is resumed: none of it changes a number in the adapter


def _train(model: Any, arguments: Any, job: Job, checkpoint: Path | None, shape: RunShape) -> TrainOutcome:
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = RunState()
    if checkpoint is not None:
        before = RunState(**json.loads((checkpoint / RUN_STATE).read_text(encoding="utf-8")))
    if before.stopped_early or (checkpoint is not None and shape.first_step >= shape.total_steps):
        assert checkpoint is not None
        restore_adapter(model, checkpoint)
        return _finished(model, job, before, shape.first_step, before.elapsed_s, shape)
    trainer = _trainer(model, arguments, job)
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    except torch.OutOfMemoryError as error:
        raise DoesNotFitError(
            f"{device} has no room for a step of this run (step {trainer.state.global_step + 1}).",
            next_step="training.batch_size=1 with more training.gradient_accumulation, "
            "training.gradient_checkpointing=true, a smaller training.max_seq_tokens, or: chulengo plan",
        ) from error
    finally:
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        trainer.accelerator.free_memory()
    if trainer.interrupted:
        raise Interrupted(trainer.state.global_step, newest_good(job.out / "checkpoints"))
    seconds = before.elapsed_s + time.perf_counter() - started
    return _finished(model, job, trainer.run, trainer.state.global_step, seconds, shape)


def _trainer(model: Any, arguments: Any, job: Job) -> ChulengoTrainer:
    from chulengo.train.loop import ChulengoTrainer  # imports bitsandbytes: after `load_base`, which does it with care

    try:
        return ChulengoTrainer(model, arguments, job)
    except (RuntimeError, ImportError) as error:
        # what transformers raises for a report whose package is not installed
        if "requires" in str(error) and arguments.report_to:
            raise MissingPackageError(
                f"training.report_to: {str(error).splitlines()[0]}",
                next_step=f"pip install {' '.join(arguments.report_to)}",
            ) from error
        raise


def _finished(
    model: Any, job: Job, run: RunState, step: int, seconds: float, shape: RunShape
) -> TrainOutcome:
    kept = step
    if job.keep_best and run.best_step is not None and run.best_step != step:
        best = job.out / "checkpoints" / f"checkpoint-{run.best_step}"
        reason = defect(best)
        if reason is not None:
            raise TrainingError(f"The best checkpoint, {best}, is damaged: {reason}.", next_step="keep_best=false")
        restore_adapter(model, best)
        kept = run.best_step
    return TrainOutcome(
        steps=step, train_loss=run.last_train_loss, best_step=run.best_step, best_loss=run.best_loss, kept_step=kept,
        last_validation_loss=run.last_validation_loss, stopped_early=run.stopped_early, seconds=seconds,
        tokens=run.tokens, peak_bytes=peak_bytes(next(model.parameters()).device), shape=shape,
    )


def _arguments(device: torch.device, precision: str, **given: Any) -> Any:
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        use_cpu=device.type == "cpu", bf16=precision == "bf16", fp16=precision == "fp16", disable_tqdm=True,
        logging_nan_inf_filter=False, remove_unused_columns=False, eval_strategy="no", save_strategy="no",
        logging_strategy="no", ddp_find_unused_parameters=False, **given,
    )
    _ = arguments.device  # sets up devices, and `_n_gpu` with them
    # one process drives one GPU; with several in sight transformers would wrap the model in nn.DataParallel
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments


def _plans(
    model: Any, train: Sequence[RenderedRow], validation: Sequence[RenderedRow], batching: str, max_seq_tokens: int,
    pad_id: int, seed: int,
) -> tuple[BatchPlan, BatchPlan | None]:
    if not train:
        raise TrainingError("There are no rows to train on.")
    packed = batching == "packed"
    attention = getattr(model.config, "_attn_implementation", "")
    flatten = attention.startswith("flash_attention")
    if packed:
        _check_packing(model, flatten)

    def plan(rows: Sequence[RenderedRow]) -> BatchPlan:
        return BatchPlan(
            rows, packed=packed, max_seq_tokens=max_seq_tokens, pad_id=pad_id, seed=seed, flatten=flatten
        )

    return plan(train), plan(validation) if validation else None


def _check_packing(model: Any, flatten: bool) -> None:
    """Raises `ConfigError` unless this model, as it is, keeps packed rows apart.

    Most architectures of transformers derive a block-diagonal mask from restarting positions; some ignore positions.
    So it is tried: a row behind another must give the logits it gives behind a different one, and those it gives alone.
    The first comparison has equal shapes and must be exact up to rounding; the second has other shapes, so that
    rounding may differ more. LLM.int8() is refused outright: it picks its outlier columns over all tokens of a call, so
    rows that share a call change each other (seen on an H200).
    """
    if getattr(base_model(model), "is_loaded_in_8bit", False):
        raise ConfigError(
            "int8 weights cannot be packed exactly: LLM.int8() lets the rows of a pack change each other.",
            next_step="training.batching=group_by_length, or model.quantization=nf4",
        )
    refuse = ConfigError(
        f"{type(base_model(model)).__name__} cannot be packed exactly: rows in one pack see each other.",
        next_step="training.batching=group_by_length",
    )
    if getattr(base_model(model).config, "is_encoder_decoder", False):
        raise ConfigError(
            "Encoder-decoder models cannot be packed.", next_step="training.batching=group_by_length"
        )
    device = next(model.parameters()).device
    top = min(int(base_model(model).config.get_text_config().vocab_size), 200)
    rng = np.random.default_rng(0)
    first, other, row = (rng.integers(1, top, size=7).tolist() for _ in range(3))

    def logits(*rows: list[int]) -> torch.Tensor:
        pack = [RenderedRow(ids=ids, trained=[True] * len(ids), source="probe") for ids in rows]
        batch = collate_packed([pack], pad_id=0, flatten=flatten)
        inputs = {k: batch[k].to(device) for k in ("input_ids", "position_ids")}
        out: torch.Tensor = model(**inputs, use_cache=False).logits[0, -len(row) :].float()
        return out

    was_training = model.training
    model.eval()
    with torch.no_grad():
        behind, behind_other, alone = logits(first, row), logits(other, row), logits(row)
    model.train(was_training)
    scale = float(alone.abs().max())
    narrow = alone.dtype != torch.float32 or any(p.dtype != torch.float32 for p in model.parameters())
    leak, shift = float((behind - behind_other).abs().max()), float((behind - alone).abs().max())
    if leak > 1e-4 * scale or shift > (0.1 if narrow else 1e-3) * scale:
        raise refuse


def _check_device(device: torch.device) -> None:
    expected = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda" and (device.index or 0) != expected:
        raise ConfigError(
            f"Training runs on the first GPU that the process sees, not on {device}.",
            next_step=f"CUDA_VISIBLE_DEVICES={device.index} chulengo train ... --set model.device=cuda",
        )


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


@contextlib.contextmanager
def _left_as_found(model: Any, precision: str) -> Iterator[None]:
    config = base_model(model).config
    use_cache = getattr(config, "use_cache", None)
    with contextlib.ExitStack() as stack:
        if precision != "float32":  # without autocast a fp32 head could not take 16-bit activations
            stack.enter_context(trainable_in_fp32(model))
        try:
            yield
        finally:
            if use_cache is not None:
                config.use_cache = use_cache
            model.eval()
