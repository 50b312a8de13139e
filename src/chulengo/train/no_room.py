"""A step that ran out of memory, and what to type then."""

from __future__ import annotations

import shlex

from chulengo.errors import DoesNotFitError


class NoRoomInStepError(DoesNotFitError):
    """No memory for a step; `steps_taken` were taken before it, by this process."""

    def __init__(self, given: str, *, steps_taken: int, next_step: str) -> None:
        """Adds how many steps were taken."""
        super().__init__(given, next_step=next_step)
        self.steps_taken = steps_taken


def step_advice(
    *, fast: bool, activations: str, retries: bool, processes: int, recomputes: bool, batch_size: int,
    gradient_accumulation: int, max_seq_tokens: int, resumed: str | None,
) -> str:  # fmt: skip
    """Returns what to type where a step has no room: nothing that is so already, or that contradicts what was asked.

    Args:
        fast: the fast engine trains.
        activations: its policy as it was asked for.
        retries: `model.retry_leaner`.
        processes: of the run.
        recomputes: `training.gradient_checkpointing`.
        batch_size: of a micro-batch.
        gradient_accumulation: micro-batches a step.
        max_seq_tokens: of a row.
        resumed: the folder of the run, where it is resumed: only what changes no number may differ then.
    """
    ways = []
    if fast and activations != "auto":
        ways.append("--set model.activations_policy=auto")
    if fast and not retries and processes == 1:
        ways.append("--set model.retry_leaner=true")
    if fast and processes > 1 and activations == "auto":
        ways.append("--set model.activations_policy=offload")
    if resumed is not None:
        command = f"chulengo train --resume {shlex.quote(resumed)}"
        return "; or: ".join([f"{command} {way}" for way in ways] or [f"make room on the device, then {command}"])
    if not fast and not recomputes:
        ways.append("--set training.gradient_checkpointing=true")
    if batch_size > 1:
        accumulation = gradient_accumulation * batch_size
        ways.append(f"--set training.batch_size=1 --set training.gradient_accumulation={accumulation}")
    if max_seq_tokens >= 2:
        ways.append(f"--set training.max_seq_tokens={max_seq_tokens // 2}")
    return "; or: ".join([*ways, "chulengo plan, which says what needs how much"])
