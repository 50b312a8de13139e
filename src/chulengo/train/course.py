"""The course of a run, the same for both engines: what is due after a step, what is written, what is best, when to end.

The loops (`loop.py` for the reference engine, `fast_loop.py` for the fast one) do the arithmetic and tell this what
came out; everything that a run remembers beside its weights and its optimiser is in `RunState`.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chulengo.errors import TrainingError
from chulengo.train.checkpoint import write_checkpoint
from chulengo.train.job import RUN_STATE, SETTINGS, Job, MetricRow, RunState
from chulengo.train.ranks import Ranks


@dataclass(slots=True)
class Due:
    """What is to be done after a step."""

    log: bool = False
    evaluate: bool = False
    save: bool = False
    stop: bool = False


class Course:
    """One run's progress through its steps."""

    def __init__(self, job: Job, *, total_steps: int, steps_per_epoch: int, ranks: Ranks) -> None:
        """Begins at step 0; `resume` goes on elsewhere."""
        self.job, self.ranks = job, ranks
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.run = RunState()
        self.interrupted = False
        self._started = time.perf_counter()

    def resume(self, checkpoint: Path) -> None:
        """Takes back what a checkpoint remembers."""
        self.run = read_run_state(checkpoint)

    def elapsed_s(self) -> float:
        """Returns the seconds of this run so far, those before a resume included."""
        return self.run.elapsed_s + time.perf_counter() - self._started

    def due(self, step: int, *, asked_to_stop: bool) -> Due:
        """Returns what is to be done after a step.

        Args:
            step: the step that was just taken, 1-based.
            asked_to_stop: somebody asked any rank to stop.
        """
        job, last = self.job, step >= self.total_steps
        epoch_end = step % self.steps_per_epoch == 0
        due = Due(log=last or step % job.log_every == 0, stop=last)
        if job.validation is not None:
            due.evaluate = last or (step % job.eval_every == 0 if job.eval_every else epoch_end)
        due.save = last or (step % job.save_every == 0 if job.save_every else epoch_end)
        if asked_to_stop and not last:
            self.interrupted = due.save = due.stop = True
        return due

    def add_step(self, *, nll: float, targets: int, tokens: int, seconds: float) -> None:
        """Adds one step to the window of the next training row; `nll` is its summed loss over all ranks."""
        self.job.steps.taken += 1
        run = self.run
        run.window_nll += nll
        run.window_targets += targets
        run.window_tokens += tokens
        run.tokens += tokens
        run.window_steps += 1
        run.window_s += seconds

    def train_row(
        self, *, step: int, epoch: float, learning_rate: float, grad_norm: float, peak_bytes: int
    ) -> MetricRow:
        """Sends the training row of the steps since the last one, and returns it."""
        run = self.run
        seconds = max(run.window_s, 1e-9)
        run.last_train_loss = run.window_nll / max(run.window_targets, 1)
        row = {
            "kind": "train", "step": step, "epoch": epoch, "loss": run.last_train_loss,
            "learning_rate": learning_rate, "grad_norm": grad_norm, "tokens": run.window_tokens,
            "supervised_tokens": run.window_targets, "tokens_per_s": run.window_tokens / seconds,
            "step_s": seconds / max(run.window_steps, 1), "peak_bytes": peak_bytes, "elapsed_s": self.elapsed_s(),
        }
        run.window_nll = run.window_s = 0.0
        run.window_targets = run.window_tokens = run.window_steps = 0
        self._send(row)
        return row

    def validation_row(self, *, step: int, epoch: float, nll: float, tokens: int, seconds: float) -> MetricRow:
        """Sends the row of one evaluation, and returns it.

        Raises:
            TrainingError: the loss is not finite.
        """
        loss = nll / max(tokens, 1)
        if not math.isfinite(loss):
            raise TrainingError(
                f"The validation loss is {loss} at step {step}; the run was stopped.",
                next_step="start a new run with a lower training.learning_rate" if step
                else "check the model's weights, and model.compute_dtype: nothing was trained yet",
            )
        row = {
            "kind": "validation", "step": step, "epoch": epoch, "loss": loss, "perplexity": math.exp(min(loss, 700.0)),
            "supervised_tokens": tokens, "seconds": seconds,
        }
        self._send(row)
        return row

    def judge(self, loss: float, step: int, due: Due) -> None:
        """Notes whether this is the best validation loss, and adds to `due` what follows from it.

        The row of step 0 scores the base: it is to be beaten, not to be kept.
        """
        run, job = self.run, self.job
        if step == 0:
            return
        run.last_validation_loss = loss
        if run.best_loss is None or loss < run.best_loss:
            run.best_loss, run.best_step, run.evaluations_without_gain = loss, step, 0
            due.save = due.save or job.keep_best
            return
        run.evaluations_without_gain += 1
        if job.patience is not None and run.evaluations_without_gain >= job.patience:
            run.stopped_early = step < self.total_steps
            due.stop = due.save = True

    def save(self, step: int, write: Any) -> None:
        """Writes a checkpoint on rank 0; raises on every rank when that fails.

        Args:
            step: steps done.
            write: writes the engine's files into the folder that it is given.
        """
        problem: TrainingError | None = None
        if self.ranks.first:
            protect = [self.run.best_step] if self.job.keep_best and self.run.best_step is not None else []
            try:
                write_checkpoint(
                    self.job.out / "checkpoints", step, lambda folder: self._write(folder, write),
                    keep=self.job.keep_checkpoints, protect=protect,
                )
            except TrainingError as error:
                problem = error
        self.ranks.share_problem(problem, "write the checkpoint")

    def _write(self, folder: Path, write: Any) -> None:
        write(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's form for a model card, with every field empty
        state = asdict(self.run) | {"elapsed_s": self.elapsed_s()}
        (folder / RUN_STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        (folder / SETTINGS).write_text(json.dumps(dict(self.job.settings), indent=1), encoding="utf-8")

    def _send(self, row: MetricRow) -> None:
        if self.ranks.first:
            for sink in self.job.sinks:
                sink(row)


def read_run_state(checkpoint: Path) -> RunState:
    """Returns what a checkpoint remembers of its run."""
    return RunState(**json.loads((checkpoint / RUN_STATE).read_text(encoding="utf-8")))
