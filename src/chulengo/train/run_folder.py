"""Where a run's files lie, and who may write there.

A run folder belongs to one run for ever and to at most one writing process at a time. Two rules keep it so. First, a
new run only starts in a folder that does not exist or is empty; anything else is refused with the way out, because
mixing two runs' metrics or checkpoints cannot be undone. Second, the writer holds `flock` on `run.lock`. The kernel
drops that lock when the process ends however it ends, so a dead process never blocks a resume (a PID file would, after
a reboot or in a container where PIDs repeat). The lock file is removed by its holder; whoever locks a file that was
removed in between notices by comparing inodes and tries again.

A run that ends before its first step (a
target that the model lacks, no memory, Ctrl-C while weights load) leaves nothing behind, so that the same command can
be typed again.

Limits: `flock` on NFS needs NFSv4 or a lock daemon; two hosts on a file system without it are not kept apart.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chulengo.data.wording import counted
from chulengo.errors import TrainingError
from chulengo.train.whole_files import explained, write_bytes, write_folder, write_json, write_text

__all__ = [
    "RunPaths", "create_default_run", "create_run", "default_root", "explained", "has_begun", "hold_lock", "open_run",
    "refuse_used", "write_bytes", "write_folder", "write_json", "write_text",
]  # fmt: skip

RUN_FILES = ("config.yaml", "manifest.json", "ledger.json", "metrics.jsonl", "samples.jsonl")
RUN_SUBFOLDERS = ("plots", "checkpoints", "adapter")
HARMLESS = frozenset({"run.lock", ".gitkeep", ".gitignore", ".DS_Store", "lost+found"})  # never make a folder "used"


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The paths of one run folder. Making one touches no file."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration (YAML)."""
        return self.root / "config.yaml"

    @property
    def manifest(self) -> Path:
        """What the run was made of: hashes, versions, device, seeds."""
        return self.root / "manifest.json"

    @property
    def ledger(self) -> Path:
        """The supervision ledger."""
        return self.root / "ledger.json"

    @property
    def metrics(self) -> Path:
        """The metric rows, one JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Sample answers, one JSON object a line."""
        return self.root / "samples.jsonl"

    @property
    def plots(self) -> Path:
        """The folder of the pictures."""
        return self.root / "plots"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoint-<step> folders."""
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The finished adapter in PEFT's files."""
        return self.root / "adapter"

    @property
    def lock(self) -> Path:
        """Held by the writing process; absent when nobody writes."""
        return self.root / "run.lock"


@contextlib.contextmanager
def create_run(root: Path) -> Iterator[RunPaths]:
    """Gives the paths of a new run folder, locked for this process until the block ends.

    Args:
        root: the folder; made, with its parents, when missing.

    Raises:
        TrainingError: the folder holds a run or other files, is being written by another process, or cannot be made.
    """
    paths = RunPaths(Path(root))
    refuse_used(paths)  # before anything is made: a refused folder is left as it was
    with _new_run(paths, made=not paths.root.exists()):
        yield paths


@contextlib.contextmanager
def _new_run(paths: RunPaths, *, made: bool) -> Iterator[None]:
    withdrawn = False
    try:
        with explained(paths.root), hold_lock(paths, make_folder=True):
            refuse_used(paths)  # again under the lock: another process may have finished a run since
            for folder in (paths.plots, paths.checkpoints):
                folder.mkdir(exist_ok=True)
            try:
                yield
            except BaseException:
                withdrawn = not has_begun(paths)
                if withdrawn:
                    with _undisturbed():
                        _withdraw(paths)
                raise
    finally:
        if withdrawn and made:
            with contextlib.suppress(OSError):  # not empty: somebody else wrote into it
                paths.root.rmdir()


def has_begun(paths: RunPaths) -> bool:
    """Returns whether a run has anything to show beyond its description: metric rows, checkpoints or a saved batch."""
    return paths.metrics.exists() or any(paths.checkpoints.glob("checkpoint-*")) or any(paths.root.glob("bad_batch-*"))


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Holds off Ctrl-C: who presses it twice would get half a clean-up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _withdraw(paths: RunPaths) -> None:
    for file in (paths.config, paths.manifest, paths.ledger):
        file.unlink(missing_ok=True)
    shutil.rmtree(paths.checkpoints, ignore_errors=True)  # a staging folder at most
    with contextlib.suppress(OSError):
        paths.plots.rmdir()


@contextlib.contextmanager
def create_default_run(parent: Path, model: str, data: str) -> Iterator[RunPaths]:
    """Gives a new, locked run folder named `<model>-<data>-<n>` under `parent`, with the first free number."""
    while True:
        root = default_root(parent, model, data)
        with explained(parent):
            parent.mkdir(parents=True, exist_ok=True)
            try:
                root.mkdir()  # atomic: of two processes that saw the same free number, one goes on to the next
            except FileExistsError:
                continue
        paths = RunPaths(root)
        with _new_run(paths, made=True):
            yield paths
        return


@contextlib.contextmanager
def open_run(root: Path) -> Iterator[RunPaths]:
    """Gives the paths of an existing run folder, locked for this process, to resume it.

    Raises:
        TrainingError: there is no run in the folder, or another process is writing it.
    """
    paths = RunPaths(Path(root))
    if not paths.config.is_file():
        what = "does not exist" if not paths.root.exists() else "holds no run (no config.yaml)"
        raise TrainingError(
            f"{paths.root} {what}, so there is nothing to resume.",
            allowed="a folder that `chulengo train` wrote",
            next_step="ls runs, then chulengo train --resume runs/<name>",
        )
    with explained(paths.root), hold_lock(paths):
        yield paths


def default_root(parent: Path, model: str, data: str) -> Path:
    """Returns `parent/<model>-<data>-<n>` with the smallest number from 1 that no entry uses yet."""
    stem = f"{_short(model, 'model')}-{_short(data, 'data')}"
    number = 1
    while (parent / f"{stem}-{number}").exists():
        number += 1
    return parent / f"{stem}-{number}"


def refuse_used(paths: RunPaths) -> None:
    """Raises `TrainingError` unless the folder is missing or empty; says what it holds and how to go on."""
    root = paths.root
    if not root.exists():
        return
    if not root.is_dir():
        raise TrainingError(
            f"The output folder {root} is a file.", allowed="a folder that does not exist or is empty",
            next_step="choose another --out",
        )
    names = sorted(entry.name for entry in root.iterdir() if entry.name not in HARMLESS)
    used = [name for name in names if name not in RUN_SUBFOLDERS or any((root / name).iterdir())]
    if not used:
        return
    if any(name in RUN_FILES for name in used) or "checkpoints" in used:
        raise TrainingError(
            f"The output folder {root} holds another run: {_describe(paths)}.",
            allowed="a folder that does not exist or is empty",
            next_step=f"chulengo train --resume {root}   (goes on with that run), or choose another --out",
        )
    shown = ", ".join(used[:3]) + (f" and {len(used) - 3} more" if len(used) > 3 else "")
    raise TrainingError(
        f"The output folder {root} holds files that no run wrote: {shown}.",
        allowed="a folder that does not exist or is empty",
        next_step=f"choose another --out, such as {root / 'run-1'}",
    )


@contextlib.contextmanager
def hold_lock(paths: RunPaths, *, make_folder: bool = False) -> Iterator[None]:
    """Holds the folder's lock for the block; raises `TrainingError` at once when another process holds it."""
    if make_folder:
        try:
            paths.root.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # a place where no folder can be made, such as /proc
            raise PermissionError(errno.EPERM, "no folder can be made there", str(paths.root)) from error
    handle = _lock(paths)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):  # somebody deleted the folder while we ran
            paths.lock.unlink()
        os.close(handle)


def _lock(paths: RunPaths) -> int:
    """Returns an open file descriptor that holds the lock on the `run.lock` that is in the folder now."""
    while True:
        handle = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            inode = os.stat(paths.lock).st_ino
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise TrainingError(
                f"The run folder {paths.root} is being written right now by {holder}.",
                allowed="one process a run folder",
                next_step="wait for it to end, or choose another --out",
            ) from None
        except FileNotFoundError:
            inode = -1  # its holder removed it between our open and our lock
        except BaseException:
            os.close(handle)
            raise
        if inode == os.fstat(handle).st_ino:
            return handle
        os.close(handle)


def _describe(paths: RunPaths) -> str:
    """Returns what run a folder holds, from what can be read of it."""
    parts = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        manifest = json.loads(paths.manifest.read_text(encoding="utf-8"))
        started = manifest.get("started_utc")
        parts.append(f"started {started}" if started else "")
    with contextlib.suppress(OSError):
        steps = re.findall(r'"step":\s*(\d+)', paths.metrics.read_text(encoding="utf-8", errors="replace"))
        parts.append(f"{counted(max(map(int, steps)), 'step')} done" if steps else "no step done")
    with contextlib.suppress(OSError):
        saved = [int(p.name.rpartition("-")[2]) for p in paths.checkpoints.glob("checkpoint-[0-9]*")]
        parts.append(f"last checkpoint at step {max(saved)}" if saved else "no checkpoint")
    return ", ".join(part for part in parts if part) or "it cannot be read"


def _short(name: str, fallback: str) -> str:
    """Returns the last part of a path or Hub name, without endings, fit for a file name."""
    tail = name.rstrip("/").rpartition("/")[2]
    tail = re.sub(r"(\.(jsonl?|csv|parquet|txt|gz))+$", "", tail)
    return re.sub(r"[^A-Za-z0-9._]+", "-", tail).strip("-._")[:40].lower() or fallback
