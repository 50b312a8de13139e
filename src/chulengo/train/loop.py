"""The reference engine's training loop: a thin subclass of `transformers.Trainer`.

What stays transformers': the loop itself, accumulation, clipping, optimisers, schedules, mixed precision, several
processes, the reports to TensorBoard and others. What is ours, and why:

- the loss: summed over the supervised tokens and divided once by their number in the whole accumulated, all-rank batch
  (`get_batch_samples` counts, `compute_loss` divides). DDP averages gradients over ranks, hence the factor `world`;
- evaluation: summed loss by summed tokens over every validation row; nothing is kept, averaged by batch, or dropped;
- the order of rows (data/batches.py), checkpoints (checkpoint.py), what stops a run (guards.py);
- what is written: rows to sinks instead of prints and bars.

Two versions. transformers 5.17 decides from `model_accepts_loss_kwargs` whether to divide the loss by the number of
micro-steps, 5.23 from `loss_is_scaled_for_ga`; both are set, and a test of 1 x 8 against 8 x 1 holds them to it.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_callback import DefaultFlowCallback, PrinterCallback, ProgressCallback, TrainerControl

from chulengo.data.batches import Batch, EpochBatches
from chulengo.errors import TrainingError
from chulengo.model.adapter import restore_adapter, save_adapter
from chulengo.model.loss import supervised_nll
from chulengo.train.checkpoint import write_checkpoint
from chulengo.train.guards import GradientReach, check_finite
from chulengo.train.job import RUN_STATE, SETTINGS, Job, MetricRow, RunState, peak_bytes

if TYPE_CHECKING:
    from transformers import TrainingArguments

@dataclass(slots=True)
class _Step:
    batches: list[Batch]
    targets: int
    tokens: int
    started: float
    nlls: list[Tensor] = field(default_factory=list)


class ChulengoTrainer(transformers.Trainer):  # type: ignore[misc]  # the package is untyped
    """`transformers.Trainer` with the loss, evaluation, order and checkpoints described at the top of this file."""

    loss_is_scaled_for_ga = True
    control: TrainerControl

    def __init__(self, model: nn.Module, args: TrainingArguments, job: Job) -> None:
        self.job = job
        self.run = RunState()
        self.interrupted = False
        self._grad_norm = 0.0
        self._step = _Step([], 0, 0, 0.0)
        self.batches = EpochBatches(
            job.train.lengths, batch_size=job.batch_size, accumulation=job.accumulation, by_length=job.by_length,
            seed=args.seed, rank=args.process_index, world=args.world_size,
        )
        self.reach = GradientReach(model)
        super().__init__(model=model, args=args, train_dataset=job.train, callbacks=[_Rhythm(self)])
        for callback in (DefaultFlowCallback, PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.model_accepts_loss_kwargs = True
        self._started = time.perf_counter()

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns the loader of this rank's micro-batches."""
        # its own generator: a loader without one draws a seed from the global state at each epoch
        dataset: Any = self.job.train
        return DataLoader(
            dataset, batch_sampler=self.batches, collate_fn=self.job.train.collate,
            generator=torch.Generator().manual_seed(0),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """Returns the micro-batches of one step and the number of targets in them, over all ranks."""
        started = time.perf_counter()
        batches = list(itertools.islice(epoch_iterator, num_batches))
        counts = torch.tensor([[b["num_targets"], b["num_tokens"]] for b in batches], dtype=torch.int64).sum(0)
        targets, tokens = (int(n) for n in self._sum_over_ranks(counts.to(device)).tolist())
        self._step = _Step(batches, targets, tokens, started)
        return batches, torch.tensor(max(targets, 1), device=device)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns this micro-batch's share of the step's token mean."""
        nll, _ = supervised_nll(model, inputs)
        self._step.nlls.append(nll.detach())
        loss = nll * (self.args.world_size / (1 if num_items_in_batch is None else num_items_in_batch))
        return (loss, None) if return_outputs else loss

    def floating_point_ops(self, inputs: Batch) -> int:
        """Returns 0: transformers' estimate walks over all parameters at every micro-batch."""
        return 0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._grad_norm = float(norm)
        return norm

    # ---- one step ----

    def before_optimizer(self) -> None:
        """Checks the step's numbers and adds them to the window of the next logged row."""
        nlls = torch.stack(self._step.nlls)
        local = nlls.tolist()
        total = float(self._sum_over_ranks(nlls.double().sum()))
        check_finite(
            local, self._grad_norm, step=self.state.global_step + 1, batches=self._step.batches,
            folder=self.job.out, loss_scale=self._loss_scale(),
        )
        self.reach.look(self.state.global_step + 1)
        run = self.run
        run.window_nll += total
        run.window_targets += self._step.targets
        run.window_tokens += self._step.tokens
        run.tokens += self._step.tokens

    def after_optimizer(self) -> None:
        """Notes the time, and whether the parameters moved."""
        if not self.accelerator.optimizer_step_was_skipped:
            self.reach.moved(float(self.optimizer.param_groups[0]["lr"]))
        self.run.window_steps += 1
        self.run.window_s += time.perf_counter() - self._step.started

    def flow(self, control: TrainerControl) -> None:
        """Decides after each step what is to be done: log, evaluate, save, stop."""
        job, step = self.job, self.state.global_step
        last = step >= self.state.max_steps
        epoch_end = step % self.batches.steps_per_epoch == 0
        control.should_log = last or step % job.log_every == 0
        if job.validation is not None:
            control.should_evaluate = last or (step % job.eval_every == 0 if job.eval_every else epoch_end)
        control.should_save = last or (step % job.save_every == 0 if job.save_every else epoch_end)
        control.should_training_stop = last
        if self._any_rank_stopped() and not last:
            self.interrupted = control.should_save = control.should_training_stop = True

    # ---- what is said ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Sends a training row to the sinks, and the same numbers to the reports."""
        if "loss" in logs and "learning_rate" in logs:
            row = self._train_row(logs)
            self._send(row)
            kept = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "step_s")
            logs = {key: row[key] for key in kept}
        super().log(logs, start_time)
        self.state.log_history.clear()  # metrics.jsonl is the record; this one would be rewritten in every checkpoint

    def _train_row(self, logs: dict[str, float]) -> MetricRow:
        run = self.run
        seconds = max(run.window_s, 1e-9)
        run.last_train_loss = run.window_nll / max(run.window_targets, 1)
        row = {
            "kind": "train", "step": self.state.global_step, "epoch": self.state.epoch, "loss": run.last_train_loss,
            "learning_rate": logs["learning_rate"], "grad_norm": self._grad_norm, "tokens": run.window_tokens,
            "supervised_tokens": run.window_targets, "tokens_per_s": run.window_tokens / seconds,
            "step_s": seconds / max(run.window_steps, 1), "peak_bytes": peak_bytes(self.args.device),
            "elapsed_s": self.elapsed_s(),
        }
        run.window_nll = run.window_s = 0.0
        run.window_targets = run.window_tokens = run.window_steps = 0
        return row

    def _send(self, row: MetricRow) -> None:
        if self.args.process_index == 0:
            for sink in self.job.sinks:
                sink(row)

    def elapsed_s(self) -> float:
        """Returns the seconds of this run so far, those before a resume included."""
        return self.run.elapsed_s + time.perf_counter() - self._started

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Returns loss and perplexity over all validation tokens, and decides on best and early stopping."""
        assert self.job.validation is not None
        started = time.perf_counter()
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        shares = self.job.validation.validation_batches(
            self.job.batch_size, rank=self.args.process_index, world=self.args.world_size
        )
        with torch.no_grad():
            for batch in shares:
                nll, count = supervised_nll(self.model, self._prepare_inputs(batch))
                sums += torch.stack([nll.double(), torch.tensor(count, dtype=torch.float64, device=nll.device)])
        total, tokens = self._sum_over_ranks(sums).tolist()
        loss = total / max(tokens, 1.0)
        if not math.isfinite(loss):
            step = self.state.global_step
            raise TrainingError(
                f"The validation loss is {loss} at step {step}; the run was stopped.",
                next_step="start a new run with a lower training.learning_rate" if step
                else "check the model's weights, and model.compute_dtype: nothing was trained yet",
            )
        perplexity = math.exp(min(loss, 700.0))
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": perplexity}
        self._send({
            "kind": "validation", "step": self.state.global_step, "epoch": self.state.epoch, "loss": loss,
            "perplexity": perplexity, "supervised_tokens": int(tokens), "seconds": time.perf_counter() - started,
        })
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.state.global_step > 0:  # the row of step 0 scores the base: it is to be beaten, not to be kept
            self._judge(loss)
        return metrics

    def _judge(self, loss: float) -> None:
        run, job = self.run, self.job
        run.last_validation_loss = loss
        if run.best_loss is None or loss < run.best_loss:
            run.best_loss, run.best_step, run.evaluations_without_gain = loss, self.state.global_step, 0
            self.control.should_save = self.control.should_save or job.keep_best
            return
        run.evaluations_without_gain += 1
        if job.patience is not None and run.evaluations_without_gain >= job.patience:
            run.stopped_early = self.state.global_step < self.state.max_steps
            self.control.should_training_stop = self.control.should_save = True

    # ---- checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        rng_files = self._rng_files()
        problem: TrainingError | None = None
        if self.args.should_save:
            protect = [self.run.best_step] if self.job.keep_best and self.run.best_step is not None else []
            try:
                write_checkpoint(
                    self.job.out / "checkpoints", self.state.global_step,
                    lambda folder: self._write_state(folder, rng_files), keep=self.job.keep_checkpoints,
                    protect=protect,
                )
            except TrainingError as error:
                problem = error
        if self.args.world_size > 1:
            shared = [problem is not None]
            torch.distributed.broadcast_object_list(shared, src=0)
            if shared[0] and problem is None:
                problem = TrainingError("Rank 0 could not write the checkpoint.")
        if problem is not None:
            raise problem

    def _write_state(self, folder: Path, rng_files: dict[str, bytes]) -> None:
        save_adapter(self.model, folder)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        for name, content in rng_files.items():
            (folder / name).write_bytes(content)
        self.state.save_to_json(str(folder / "trainer_state.json"))
        state = asdict(self.run) | {"elapsed_s": self.elapsed_s()}
        (folder / RUN_STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        (folder / SETTINGS).write_text(json.dumps(dict(self.job.settings), indent=1), encoding="utf-8")

    def _rng_files(self) -> dict[str, bytes]:
        # every rank has a random state of its own; rank 0 writes them all, so that a checkpoint is sealed once
        with tempfile.TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            own = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
        if self.args.world_size == 1:
            return own
        gathered: list[dict[str, bytes]] = [{} for _ in range(self.args.world_size)]
        torch.distributed.all_gather_object(gathered, own)
        return {name: content for files in gathered for name, content in files.items()}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        restore_adapter(self.model, folder)
        self.run = RunState(**json.loads((folder / RUN_STATE).read_text(encoding="utf-8")))

    # ---- several ranks ----

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        if self.args.world_size > 1:
            torch.distributed.all_reduce(value)
        return value

    def _any_rank_stopped(self) -> bool:
        if self.args.world_size == 1:
            return self.job.stop.asked
        return bool(self._sum_over_ranks(torch.tensor(int(self.job.stop.asked), device=self.args.device)) > 0)

    def _loss_scale(self) -> float | None:
        scaler = getattr(self.accelerator, "scaler", None)
        return None if scaler is None else float(scaler.get_scale())


class _Rhythm(transformers.TrainerCallback):  # type: ignore[misc]
    """Hands transformers' events to the trainer; in place of `DefaultFlowCallback`."""

    def __init__(self, trainer: ChulengoTrainer) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.batches.set_epoch(state.global_step // self._trainer.batches.steps_per_epoch)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.before_optimizer()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.after_optimizer()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.flow(control)
