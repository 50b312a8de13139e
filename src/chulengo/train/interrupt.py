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
def libraries_loading(report: Callable[[str], None]) -> Iterator[None]:
    """Holds SIGINT and SIGTERM back while the block imports and loads, and raises `KeyboardInterrupt` at its end.

    Some libraries catch whatever their optional imports raise, a `KeyboardInterrupt` too, and go on.
    """
    with stop_requests(report, what="stopping once what is being loaded is loaded") as stop:
        yield
    if stop.asked:
        raise KeyboardInterrupt


@contextlib.contextmanager
def stop_requests(
    report: Callable[[str], None], *, what: str = "finishing this step and saving"
) -> Iterator[StopRequest]:
    """Gives a flag that SIGINT and SIGTERM set while the block runs; the second SIGINT raises `KeyboardInterrupt`.

    Handlers are a matter of the main thread; in any other the flag is never set by a signal.
    """
    request = StopRequest()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True
        report(f"{signal.Signals(number).name}: {what}; once more stops at once.")

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
