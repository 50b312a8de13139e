"""TensorBoard and others: whether their packages are here, and the numbers of a run sent to them.

transformers has a callback for each, which its own trainer calls. The fast engine's loop calls the same callbacks, so
that a run looks the same there whatever trained it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from chulengo.errors import MissingPackageError

# report -> modules of which one must be there, and what pip calls the first
PACKAGES = {
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"), "trackio": (("trackio",), "trackio"),
    "mlflow": (("mlflow",), "mlflow"), "wandb": (("wandb",), "wandb"),
}  # fmt: skip


def check_reports(names: Sequence[str]) -> None:
    """Raises `MissingPackageError` when a report's package is not installed; imports none of them."""
    missing = [
        PACKAGES[name][1] for name in names
        if name in PACKAGES and not any(importlib.util.find_spec(module) for module in PACKAGES[name][0])
    ]  # fmt: skip
    if missing:
        raise MissingPackageError(
            f"training.report_to needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            "installed.",
            next_step=f"pip install {' '.join(missing)}, or --set training.report_to=[]",
        )


class Reports:
    """Sends numbers to the reports of a run; to none, when there is none."""

    def __init__(self, arguments: Any = None, *, first: bool = True) -> None:
        """Connects to the reports.

        Args:
            arguments: `transformers.TrainingArguments` with `report_to`; None: no reports.
            first: whether this is the process that reports.
        """
        self._handler: Any = None
        if arguments is None or not arguments.report_to or not first:
            return
        from transformers.integrations import get_reporting_integration_callbacks
        from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

        self._arguments = arguments
        self._state = TrainerState(is_world_process_zero=True, is_local_process_zero=True)
        self._state.max_steps = arguments.max_steps
        self._control = TrainerControl()
        callbacks = get_reporting_integration_callbacks(arguments.report_to)
        self._handler = CallbackHandler(callbacks, None, None, None, None)
        self._handler.on_train_begin(arguments, self._state, self._control)

    def log(self, numbers: Mapping[str, float], step: int, epoch: float) -> None:
        """Sends the numbers of one row."""
        if self._handler is None:
            return
        self._state.global_step, self._state.epoch = step, epoch
        self._handler.on_log(self._arguments, self._state, self._control, dict(numbers))

    def end(self) -> None:
        """Closes the reports."""
        if self._handler is not None:
            self._handler.on_train_end(self._arguments, self._state, self._control)
            self._handler = None
