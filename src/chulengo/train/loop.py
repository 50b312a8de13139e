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
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_callback import DefaultFlowCallback, PrinterCallback, ProgressCallback, TrainerControl

from chulengo.data.batches import Batch, EpochBatches
from chulengo.model.adapter import restore_adapter, save_adapter
from chulengo.model.loss import supervised_nll
from chulengo.train.course import Course, Due
from chulengo.train.guards import GradientReach, check_finite
from chulengo.train.job import REPORTED, Job, peak_bytes
from chulengo.train.ranks import Ranks

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(slots=True)
class _Step:
    batches: list[Batch]
    targets: int
    tokens: int
    started: float
    nlls: list[Tensor] = field(default_factory=list)
    nll: float = 0.0  # their sum over all ranks


class ChulengoTrainer(transformers.Trainer):  # type: ignore[misc]  # the package is untyped
    """`transformers.Trainer` with the loss, evaluation, order and checkpoints described at the top of this file."""

    loss_is_scaled_for_ga = True
    control: TrainerControl

    def __init__(self, model: nn.Module, args: TrainingArguments, job: Job) -> None:
        self.job = job
        self.ranks = Ranks(args.process_index, args.world_size)
        self._grad_norm = 0.0
        self._step = _Step([], 0, 0, 0.0)
        self.batches = EpochBatches(
            job.train.lengths, batch_size=job.batch_size, accumulation=job.accumulation, by_length=job.by_length,
            seed=args.seed, rank=args.process_index, world=args.world_size,
        )
        self.reach = GradientReach(dict(model.named_parameters()))
        super().__init__(model=model, args=args, train_dataset=job.train, callbacks=[_Rhythm(self)])
        for callback in (DefaultFlowCallback, PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.model_accepts_loss_kwargs = True
        self.course = Course(
            job, total_steps=args.max_steps, steps_per_epoch=self.batches.steps_per_epoch, ranks=self.ranks
        )

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
        targets, tokens = (int(n) for n in self.ranks.sum(counts.to(device)).tolist())
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
        """Checks the step's numbers before the optimiser uses them."""
        nlls = torch.stack(self._step.nlls)
        local = nlls.tolist()
        self._step.nll = float(self.ranks.sum(nlls.double().sum()))
        check_finite(
            local, self._grad_norm, step=self.state.global_step + 1, batches=self._step.batches,
            folder=self.job.out, precision=self._precision(), ranks=self.ranks, loss_scale=self._loss_scale(),
        )
        self.reach.look(self.state.global_step + 1)

    def after_optimizer(self) -> None:
        """Adds the step to the next training row, and notes whether the parameters moved."""
        if not self.accelerator.optimizer_step_was_skipped:
            self.reach.moved(float(self.optimizer.param_groups[0]["lr"]))
        step = self._step
        self.course.add_step(
            nll=step.nll, targets=step.targets, tokens=step.tokens, seconds=time.perf_counter() - step.started
        )

    def flow(self, control: TrainerControl) -> None:
        """Says what is to be done after a step, in transformers' words."""
        due = self.course.due(self.state.global_step, asked_to_stop=self._any_rank_stopped())
        control.should_log, control.should_evaluate = due.log, due.evaluate
        control.should_save, control.should_training_stop = due.save, due.stop

    # ---- what is said ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Sends a training row to the sinks, and the same numbers to the reports."""
        if "loss" in logs and "learning_rate" in logs:
            row = self.course.train_row(
                step=self.state.global_step, epoch=self.state.epoch, learning_rate=logs["learning_rate"],
                grad_norm=self._grad_norm, peak_bytes=peak_bytes(self.args.device),
            )
            logs = {key: row[key] for key in REPORTED}
        super().log(logs, start_time)
        self.state.log_history.clear()  # metrics.jsonl is the record; this one would be rewritten in every checkpoint

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
        total, tokens = self.ranks.sum(sums).tolist()
        step = self.state.global_step
        row = self.course.validation_row(
            step=step, epoch=self.state.epoch, nll=total, tokens=int(tokens), seconds=time.perf_counter() - started
        )
        metrics = {f"{metric_key_prefix}_{name}": row[name] for name in ("loss", "perplexity")}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        due = Due(save=self.control.should_save, stop=self.control.should_training_stop)
        self.course.judge(row["loss"], step, due)
        self.control.should_save, self.control.should_training_stop = due.save, due.stop
        return metrics

    # ---- checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        rng_files = self._rng_files()
        self.course.save(self.state.global_step, lambda folder: self._write_state(folder, rng_files))

    def _write_state(self, folder: Path, rng_files: dict[str, bytes]) -> None:
        save_adapter(self.model, folder)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        for name, content in rng_files.items():
            (folder / name).write_bytes(content)
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _rng_files(self) -> dict[str, bytes]:
        # every rank has a random state of its own; rank 0 writes them all, so that a checkpoint is sealed once
        with tempfile.TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            own = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
        return {name: content for files in self.ranks.gather(own) for name, content in files.items()}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        restore_adapter(self.model, folder)
        self.course.resume(folder)

    # ---- several ranks ----

    def _any_rank_stopped(self) -> bool:
        if self.args.world_size == 1:
            return self.job.stop.asked
        return bool(self.ranks.sum(torch.tensor(int(self.job.stop.asked), device=self.args.device)) > 0)

    def _precision(self) -> str:
        return "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "float32"

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
