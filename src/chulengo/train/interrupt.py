"""Ctrl-C and SIGTERM: the step is finished, the state saved; a second one ends the run at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from chulengo.errors import TrainingError


class Interrupted(TrainingError):
    """A run that was asked to stop and saved its state.

    Attributes:
        step: optimiser steps done.
        checkpoint: where the state is.
    """

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        self.step, self.checkpoint = step, checkpoint
        super().__init__(f"Stopped after step {step}; the state is saved in {checkpoint}.", next_step="resume the run")


class StopRequest:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self.asked = False


@contextlib.contextmanager
def stop_requests(report: Callable[[str], None]) -> Iterator[StopRequest]:
    """Gives a flag that SIGINT and SIGTERM set while the block runs; the second SIGINT raises `KeyboardInterrupt`.

    Handlers are a matter of the main thread; in any other the flag is never set by a signal.
    """
    request = StopRequest()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True
        report(f"{signal.Signals(number).name}: finishing this step and saving; once more stops at once.")

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
