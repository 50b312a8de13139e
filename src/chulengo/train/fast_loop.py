"""The fast engine's training loop: packed micro-batches in, one update of a flat adapter a step out.

Not `transformers.Trainer`, which the reference engine keeps (loop.py). Its own work a step is small beside a 7B model's
and large beside a short one's, it wraps the model for mixed precision and data parallelism, which this engine does by
itself, and it asks the device for numbers several times a step. Here one step is

    for each micro-batch:   nll(batch), backward of nll / (targets of the whole step, all ranks)
    one sum over ranks of the flat gradient, and one of the loss and the wish to stop
    one look at the numbers: the norm and the losses; NaN ends the run before the update
    clip, update

and the only wait for the device is that look. The next step's batches are made on the host before it. How many targets
a step has, over all ranks, is known from the rows; nobody has to count or to ask.

The reference engine's loop is transformers' and shares only the choice of rows and `course.py` with this one, so that
the two check each other: tests/invariant/test_engines.py.

What a checkpoint needs. The order of rows is a function of (seed, epoch), the learning rate of the step, the dropout
masks of (seed, place of the micro-batch in the run, layer, map): none of them has a state, and no random state is used.
So a checkpoint is the adapter, the optimiser and `RunState`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from chulengo.data.batches import Batch, epoch_steps, micro_batches
from chulengo.errors import ModelError, TrainingError
from chulengo.model.fast import FastModel
from chulengo.model.load import import_bitsandbytes
from chulengo.model.packed_inputs import PackedInputs, pack_batch
from chulengo.train.course import Course, Due
from chulengo.train.guards import GradientReach, check_finite
from chulengo.train.job import REPORTED, Job, MetricRow, Optimisation, peak_bytes
from chulengo.train.optimizer import learning_rates, make_optimizer
from chulengo.train.ranks import Ranks
from chulengo.train.reports import Reports

OPTIMIZER_FILE = "optimizer.pt"
PRECISIONS = {torch.float32: "float32", torch.bfloat16: "bf16"}  # by the dtype of products


@dataclass(frozen=True, slots=True)
class _Step:
    """One rank's share of an optimiser step, ready to run, and the counts over all ranks."""

    batches: list[Batch]
    inputs: list[PackedInputs]
    targets: int
    tokens: int


class FastLoop:
    """Trains one `FastModel`."""

    def __init__(
        self, model: FastModel, job: Job, settings: Optimisation, *, ranks: Ranks, reports: Reports
    ) -> None:
        """Makes optimiser and schedule; nothing is trained yet."""
        self.model, self.job, self.settings, self.ranks, self.reports = model, job, settings, ranks, reports
        self.step, self.grad_norm, self._asked = 0, 0.0, False
        self._step_rows = job.batch_size * job.accumulation * ranks.world
        self.steps_per_epoch = -(-len(job.train) // self._step_rows)
        self.course = Course(
            job, total_steps=settings.total_steps, steps_per_epoch=self.steps_per_epoch, ranks=ranks
        )
        (self.parameter,) = model.trainable_parameters()  # one tensor, of which the factors are parts
        self.optimizer = make_optimizer(self.parameter, settings)
        self._rate = learning_rates(settings)
        self._reach = GradientReach(model.named_parameters())
        self._targets = _targets(job)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self._stale = True  # the adapter has changed since the matrices were last written

    def train(self) -> None:
        """Runs to the last step, an early stop, or a request to stop; `course` says which."""
        try:
            if self.step == 0 and self.job.validation is not None:
                self._evaluate(Due())
            self.model.train()
            upcoming: _Step | None = self._prepared(self.step)
            while upcoming is not None:
                upcoming = self._take(upcoming)
                if self._after_step().stop:
                    break
        finally:
            self.model.train(False)
            self.model.clear_gradients()

    def resume(self, checkpoint: Path, step: int) -> None:
        """Goes on from a checkpoint."""
        restore_fast(self.model, checkpoint)
        saved = torch.load(checkpoint / OPTIMIZER_FILE, weights_only=True, map_location=self.model.device)
        if saved.get("order") != self.model.trainable_names():
            raise ModelError(
                f"{checkpoint / OPTIMIZER_FILE} has another order of the adapter's tensors: another version wrote it.",
                next_step="resume with that version, or train anew, in another folder",
            )
        self.optimizer.load_state_dict(saved["optimizer"])
        self.course.resume(checkpoint)
        self.step, self._stale = step, True

    def _prepared(self, step: int) -> _Step:
        """Returns this rank's micro-batches of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, epoch_steps(
                self.job.train.lengths, step_rows=self._step_rows, by_length=self.job.by_length,
                seed=self.settings.seed, epoch=epoch,
            )
        units = self._epoch[1][place]
        own = micro_batches(
            [units], batch_size=self.job.batch_size, rank=self.ranks.rank, world=self.ranks.world
        )
        # a rank that an epoch's last step has no rows for adds nothing to the sum
        batches = [self.job.train.collate(indices) for indices in own if indices[0] >= 0]
        return _Step(
            batches, [pack_batch(batch) for batch in batches],
            sum(self._targets[unit] for unit in units), sum(self.job.train.lengths[unit] for unit in units),
        )

    def _take(self, current: _Step) -> _Step | None:
        """Takes one step, and returns the next one, prepared while the device was busy."""
        started = time.perf_counter()
        nlls = self._backward(current)
        upcoming = self._prepared(self.step + 1) if self.step + 1 < self.settings.total_steps else None
        total = self._look(current, nlls)
        rate = self._rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._reach.moved(rate)
        self._stale = True
        self.step += 1
        self.course.add_step(
            nll=total, targets=current.targets, tokens=current.tokens, seconds=time.perf_counter() - started
        )
        return upcoming

    def _backward(self, current: _Step) -> list[Tensor]:
        """Makes the gradients of a step's micro-batches, and returns their summed losses."""
        # dropped, not zeroed: a graph's own gradients then become the step's (160 MB less on Llama 2 7B, rank 16)
        self.model.clear_gradients()
        nlls = []
        for place, inputs in enumerate(current.inputs):
            if inputs.num_targets == 0:
                continue
            # the place in the whole run: a resumed one, and every rank, gets dropout masks of its own
            self.model.micro_step = (self.step * self.job.accumulation + place) * self.ranks.world + self.ranks.rank
            nll = self._nll(inputs)
            (nll / max(current.targets, 1)).backward()  # type: ignore[no-untyped-call]
            nlls.append(nll.detach())
        return nlls

    def _look(self, current: _Step, nlls: list[Tensor]) -> float:
        """Sums over the ranks, checks the numbers, clips; returns the step's summed loss.

        Raises:
            TrainingError: a number that is not finite, or a tensor that no gradient reaches.
        """
        self.model.zero_gradients()  # where this rank has no rows: it still has its part in the sum
        gradient = self.parameter.grad
        assert gradient is not None
        own = torch.stack(nlls).double() if nlls else gradient.new_zeros(0, dtype=torch.float64)
        if self.ranks.world > 1:
            self.ranks.sum(gradient)
        shared = self.ranks.sum(torch.stack([own.sum(), own.new_tensor(float(self.job.stop.asked))]))
        norm = torch.linalg.vector_norm(gradient)
        found: list[float] = torch.cat([norm[None], shared, own]).tolist()  # the one wait for the device
        self.grad_norm, total, self._asked, losses = found[0], found[1], found[2] > 0, found[3:]
        self._check_finite(current, losses, total)
        self._reach.look(self.step + 1)
        if self.settings.max_grad_norm > 0:  # as torch.nn.utils.clip_grad_norm_
            gradient.mul_((self.settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return total

    def _check_finite(self, current: _Step, losses: list[float], total: float) -> None:
        fine_here = all(map(math.isfinite, losses))
        if fine_here and (not math.isfinite(total) or (not math.isfinite(self.grad_norm) and not self.ranks.first)):
            raise TrainingError(
                f"Another rank's numbers are not finite at step {self.step + 1}; the run was stopped.",
                next_step="read that rank's message, which names the rows",
            )
        check_finite(
            losses, self.grad_norm, step=self.step + 1, batches=current.batches, folder=self.job.out,
            precision=PRECISIONS[self.model.dtype], ranks=self.ranks,
        )

    def _after_step(self) -> Due:
        """Logs, evaluates and saves what is due; returns that."""
        asked = self._asked if self.ranks.world > 1 else self.job.stop.asked
        due = self.course.due(self.step, asked_to_stop=asked)
        if due.log:
            row = self.course.train_row(
                step=self.step, epoch=self._epochs(), learning_rate=self._rate(self.step - 1),
                grad_norm=self.grad_norm, peak_bytes=peak_bytes(self.model.device),
            )
            self.reports.log({name: row[name] for name in REPORTED}, self.step, row["epoch"])
        if due.evaluate:
            self._evaluate(due)
        if due.save:
            self.course.save(self.step, self._write)
        return due

    def _evaluate(self, due: Due) -> None:
        """Scores all validation rows, and adds to `due` what follows."""
        assert self.job.validation is not None
        started = time.perf_counter()
        self.model.train(False)
        sums = torch.zeros(2, dtype=torch.float64, device=self.model.device)
        with torch.no_grad():
            for batch in self.job.validation.validation_batches(
                self.job.batch_size, rank=self.ranks.rank, world=self.ranks.world
            ):
                inputs = pack_batch(batch)
                if inputs.num_targets:
                    sums[0] += self._nll(inputs).double()
                    sums[1] += inputs.num_targets
        self.model.train()
        nll, tokens = self.ranks.sum(sums).tolist()
        row: MetricRow = self.course.validation_row(
            step=self.step, epoch=self._epochs(), nll=nll, tokens=int(tokens), seconds=time.perf_counter() - started
        )
        self.reports.log({f"eval_{name}": row[name] for name in ("loss", "perplexity")}, self.step, row["epoch"])
        self.course.judge(row["loss"], self.step, due)

    def _nll(self, inputs: PackedInputs) -> Tensor:
        nll, _ = self.model.nll(inputs, refold=self._stale)
        self._stale = False
        return nll

    def _epochs(self) -> float:
        return self.step / self.steps_per_epoch

    def _write(self, folder: Path) -> None:
        import_bitsandbytes(required=False)  # with care, before peft does it, which writes the adapter's settings
        self.model.save_adapter(folder)
        # opened here: given a path, torch keeps the file of a failed write open, and its space taken, for a while
        with (folder / OPTIMIZER_FILE).open("wb") as stream:
            state = {"order": self.model.trainable_names(), "optimizer": self.optimizer.state_dict()}
            torch.save(state, stream)


def restore_fast(model: FastModel, folder: Path) -> None:
    """Puts the adapter of a checkpoint back into the model that wrote it, bit for bit, in place.

    Raises:
        ModelError: the file's tensors are not those of this adapter.
    """
    from safetensors.torch import load_file

    named, stored = model.named_parameters(), load_file(str(folder / "adapter_model.safetensors"))
    different = sorted(
        name for name in named.keys() | stored.keys()
        if name not in named or name not in stored or named[name].shape != stored[name].shape
    )  # fmt: skip
    if different:
        raise ModelError(
            f"{folder} holds another adapter: {len(different)} tensors differ, such as {different[0]}.",
            next_step="resume with the model and the lora settings the run was started with",
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(stored[name])


def _targets(job: Job) -> list[int]:
    """Returns how many tokens of each unit (row or pack) carry loss; the first token of a row never does."""
    rows = [sum(row.trained[1:]) for row in job.train.rows]
    return rows if job.train.packs is None else [sum(rows[i] for i in pack) for pack in job.train.packs]
