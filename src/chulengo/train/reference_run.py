"""The reference engine as `run_training` uses it: transformers' trainer over a PEFT model.

The model is left as it was found, apart from its adapter: no autocast wrapper stays on it, its `use_cache` is its own,
and it ends in evaluation mode.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chulengo.data.batches import collate_packed
from chulengo.data.renderer import RenderedRow
from chulengo.errors import ConfigError
from chulengo.model.adapter import enable_gradient_checkpointing, restore_adapter, trainable_in_fp32
from chulengo.model.load import quiet_libraries
from chulengo.model.loss import base_model
from chulengo.train.job import Ended, Engine, Job, Optimisation
from chulengo.train.optimizer import OPTIMIZERS, resolve_precision


def reference_engine(
    model: Any, *, precision: str, batching: str, gradient_checkpointing: bool, report_to: Sequence[str]
) -> Engine:
    """Returns the reference engine over a PEFT model.

    Args:
        model: as `model.adapter.attach_lora` returns it.
        precision: of autocast: auto, float32, bf16 or fp16.
        batching: padded, group_by_length or packed.
        gradient_checkpointing: recompute activations.
        report_to: tensorboard and others.

    Raises:
        ConfigError: settings that this model or machine cannot have.
    """
    device = next(model.parameters()).device
    _check_device(device)
    resolved = resolve_precision(precision, device)
    flatten = getattr(model.config, "_attn_implementation", "").startswith("flash_attention")
    if batching == "packed":
        _check_packing(model, flatten)
    if gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return Engine(
        device=device, precision=resolved, flatten=flatten,
        num_trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        train=functools.partial(_train, model, resolved, tuple(report_to)),
        restore=functools.partial(restore_adapter, model),
    )


def training_arguments(device: torch.device, out: Path, **given: Any) -> Any:
    """Returns `transformers.TrainingArguments` that leave all decisions to us."""
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(out), use_cpu=device.type == "cpu", disable_tqdm=True, logging_nan_inf_filter=False,
        remove_unused_columns=False, eval_strategy="no", save_strategy="no", logging_strategy="no",
        ddp_find_unused_parameters=False, **given,
    )
    _ = arguments.device  # sets up devices, and `_n_gpu` with them
    # one process drives one GPU; with several in sight transformers would wrap the model in nn.DataParallel
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments


def _train(
    model: Any, precision: str, report_to: Sequence[str], job: Job, settings: Optimisation, checkpoint: Path | None
) -> Ended:
    with quiet_libraries(), _left_as_found(model, precision):
        # imports bitsandbytes: after `load_base`, which does so with care
        from chulengo.train.loop import ChulengoTrainer

        arguments = training_arguments(
            next(model.parameters()).device, job.out, bf16=precision == "bf16", fp16=precision == "fp16",
            per_device_train_batch_size=job.batch_size, gradient_accumulation_steps=job.accumulation,
            max_steps=settings.total_steps, learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.schedule, warmup_steps=settings.warmup_steps,
            weight_decay=settings.weight_decay, optim=OPTIMIZERS[settings.optimizer],
            adam_beta1=settings.adam_beta1, adam_beta2=settings.adam_beta2, adam_epsilon=settings.adam_epsilon,
            max_grad_norm=settings.max_grad_norm, seed=settings.seed, report_to=list(report_to),
            eval_on_start=job.validation is not None and checkpoint is None,
        )
        trainer = ChulengoTrainer(model, arguments, job)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        finally:
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            trainer.accelerator.free_memory()
        course = trainer.course
        return Ended(course.run, int(trainer.state.global_step), course.elapsed_s(), course.interrupted)


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
