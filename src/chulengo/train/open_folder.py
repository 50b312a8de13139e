"""A run folder, opened for a new run or for one that goes on, by one process or by many; and the way back into it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chulengo.errors import ChulengoError, TrainingError
from chulengo.train.ranks import Ranks
from chulengo.train.run_folder import RunPaths, create_default_run, create_run, has_begun, open_run
from chulengo.train.whole_files import RESUME, explained

DEFAULT_RUNS = Path("runs")


@contextmanager
def opened_folder(out: str | None, *, resume: bool, model: str, data: str, ranks: Ranks) -> Iterator[RunPaths]:
    """Gives the run's folder; rank 0 makes and locks it, and tells the others which it is.

    Args:
        out: the folder; None: one is named after model and data.
        resume: the folder holds the run.
        model: its name.
        data: its name.
        ranks: the processes of this run.

    Raises:
        TrainingError: the folder cannot be used. Errors inside the block that end a run which can go on name the
            exact command.
    """
    if not ranks.first:
        root = ranks.share(None)
        if root is None:
            raise TrainingError("Rank 0 could not open the run folder; its own message says why.")
        with _way_back(RunPaths(Path(root))):
            yield RunPaths(Path(root))
        return
    shared = False
    try:
        with _own_folder(out, resume, model, data) as paths, _way_back(paths):
            ranks.share(str(paths.root))
            shared = True
            yield paths
    finally:
        if not shared:
            ranks.share(None)


@contextmanager
def _own_folder(out: str | None, resume: bool, model: str, data: str) -> Iterator[RunPaths]:
    if resume:
        if out is None:
            raise TrainingError("Nothing says which run to resume.", next_step="chulengo train --resume runs/<name>")
        opened = open_run(Path(out))
    elif out is None:
        opened = create_default_run(DEFAULT_RUNS, model, data)
    else:
        opened = create_run(Path(out))
    with opened as paths:
        yield paths


@contextmanager
def _way_back(paths: RunPaths) -> Iterator[None]:
    """Names the exact command in errors that end a run which can go on."""
    command = f"chulengo train --resume {shlex.quote(str(paths.root))}"
    try:
        with explained(paths.root):
            yield
    except ChulengoError as error:
        if error.next_step is not None and RESUME in error.next_step:
            error.advise(error.next_step.replace(RESUME, command if has_begun(paths) else "type the same again"))
        raise
    except KeyboardInterrupt:
        if not has_begun(paths):
            raise
        last = any(paths.checkpoints.glob("checkpoint-*"))
        where = "its last checkpoint" if last else "step 0, since nothing was saved yet"
        raise TrainingError(f"Stopped at once. The run goes on from {where}.", next_step=command) from None
