"""What the benchmarks that run whole commands share: a limit of time for each, and rows with their circumstances."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHULENGO = [sys.executable, "-m", "chulengo"]
KEPT_CHARACTERS = 6000


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: exit status; None when its time was up.
        seconds: wall time.
        out: standard output.
        errors: the end of the error stream.
    """

    status: int | None
    seconds: float
    out: str
    errors: str

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with status 0."""
        return self.status == 0

    def why(self) -> str:
        """Returns the last lines of what it said, for a row about a failure."""
        said = (self.errors or self.out).strip().splitlines()
        return "time was up" if self.status is None else " / ".join(line.strip() for line in said[-6:])[-800:]


def guarded(command: list[str], seconds: float) -> Ended:
    """Runs a command in a process group of its own, which is ended with all its children when its time is up."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, text=True, start_new_session=True)
        try:
            status: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        texts = []
        for stream in (out, errors):
            stream.seek(0)
            texts.append(stream.read())
    return Ended(status, round(time.perf_counter() - started, 1), texts[0], texts[1][-KEPT_CHARACTERS:])


def settings(**values: object) -> list[str]:
    """Returns `--set` words; two underscores stand for the point: lora__rank=16."""
    words = []
    for key, value in values.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        words += ["--set", f"{key.replace('__', '.')}={text}"]
    return words


def append(row: dict[str, Any], file: Path) -> None:
    """Adds a row to a JSONL file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Returns the rows of a JSONL file, of none if it is not there."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def circumstances(generator: str) -> dict[str, Any]:
    """Returns what a recorded number has to carry."""
    from chulengo.train.manifest import own_git_state, versions

    git, names = own_git_state(), [name for name, _ in gpus()]
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    found = {name: version for name, version in versions().items() if version is not None}
    return {"generator": generator, "commit": git["commit"] if git else None, "gpus": names, "when": when,
            "versions": found}  # fmt: skip


def gpus() -> list[tuple[str, int]]:
    """Returns name and used bytes of every GPU, as nvidia-smi says; none where there is no such command."""
    command = ["nvidia-smi", "--query-gpu=name,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.rsplit(",", 1) for line in done.stdout.splitlines() if "," in line]
    return [(name.strip(), int(used) << 20) for name, used in rows if used.strip().isdigit()]


@contextlib.contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Gives a list whose one number is, after the block, the most that GPU 0 had in use beyond before, in bytes.

    Everything a process takes is in it, CUDA's context too; looked at four times a second, so short peaks escape.
    The list is empty where nvidia-smi is not there.
    """
    most: list[int] = []
    before, done = gpus(), threading.Event()

    def watch() -> None:
        while not done.wait(0.25):
            used = gpus()
            if used:
                most[:] = [max([used[0][1] - before[0][1], *most])]

    watcher = threading.Thread(target=watch, daemon=True)
    if before:
        watcher.start()
    try:
        yield most
    finally:
        done.set()
        if before:
            watcher.join()


def metric_rows(run: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics.jsonl."""
    return read_rows(run / "metrics.jsonl")
