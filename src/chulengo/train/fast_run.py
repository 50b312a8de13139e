"""The fast engine as `run_training` uses it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from chulengo.errors import ConfigError
from chulengo.model.fast import FastModel
from chulengo.train.fast_loop import PRECISIONS, FastLoop, restore_fast
from chulengo.train.job import Ended, Engine, Job, Optimisation
from chulengo.train.optimizer import resolve_precision
from chulengo.train.ranks import joined
from chulengo.train.reference_run import training_arguments
from chulengo.train.reports import Reports


def fast_engine(model: FastModel, *, precision: str, report_to: Sequence[str]) -> Engine:
    """Returns the fast engine over its model.

    Args:
        model: with a trainable adapter.
        precision: auto, or the one that the model's compute dtype is; there is no autocast here.
        report_to: tensorboard and others.

    Raises:
        ConfigError: another precision than the model's, or one that needs a loss scaler.
    """
    dtype = model.dtype
    own = PRECISIONS.get(dtype)
    wanted = own if precision == "auto" else resolve_precision(precision, model.device)
    if own is None or wanted != own:
        raise ConfigError(
            f"The fast engine computes in {str(dtype).removeprefix('torch.')}, and training.precision is {precision}.",
            allowed="float32 or bfloat16, the same for both",
            next_step="--set training.precision=auto, or --set model.engine=reference",
        )
    return Engine(
        device=model.device, precision=own, flatten=True,
        num_trainable=sum(p.numel() for p in model.trainable_parameters()),
        train=functools.partial(_train, model, tuple(report_to)), restore=functools.partial(restore_fast, model),
    )


def _train(
    model: FastModel, report_to: Sequence[str], job: Job, settings: Optimisation, checkpoint: Path | None
) -> Ended:
    with joined() as ranks:
        arguments = None
        if report_to:
            arguments = training_arguments(
                model.device, job.out, report_to=list(report_to), max_steps=settings.total_steps,
                learning_rate=settings.learning_rate,
            )
        reports = Reports(arguments, first=ranks.first)
        loop = FastLoop(model, job, settings, ranks=ranks, reports=reports)
        if checkpoint is not None:
            loop.resume(checkpoint, int(checkpoint.name.rpartition("-")[2]))
        try:
            loop.train()
        finally:
            reports.end()
        return Ended(loop.course.run, loop.step, loop.course.elapsed_s(), loop.course.interrupted)
