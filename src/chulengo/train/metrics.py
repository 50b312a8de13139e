"""The metric rows of a run: `metrics.jsonl`, append-only, one JSON object a line. The truth that plots are made from.

Each row is one `write` of one whole line, so a process that is killed leaves at most its last line torn. Reading
skips a torn last line; the next append cuts it off first. A broken line anywhere else is no accident of ours and is
an error. JSON has no NaN and no infinity, yet those are the rows that matter most when a run diverges: they are
stored as the strings "NaN", "Infinity" and "-Infinity" and come back as floats.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chulengo.errors import TrainingError
from chulengo.train.whole_files import FULL, RESUME, write_bytes

Row = dict[str, Any]
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsFile:
    """One `metrics.jsonl`, held open for appending from the first append on."""

    def __init__(self, path: Path) -> None:
        """Makes no file; `path` comes to be with the first row."""
        self.path = Path(path)
        self._handle: int | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one row; it is in the operating system's hands when this returns (a killed process loses nothing).

        Raises:
            TrainingError: no space left on the disk.
        """
        line = (json.dumps(_stored(row), ensure_ascii=False, allow_nan=False) + "\n").encode()
        try:
            if self._handle is None:
                self._repair()
                self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            while line:
                line = line[os.write(self._handle, line) :]
        except OSError as error:
            self.close()  # the next append repairs a half-written line first
            if error.errno in FULL:
                raise TrainingError(
                    f"No space left on the disk of {self.path}; the last checkpoint is intact.",
                    next_step=f"free some space, then {RESUME}",
                ) from error
            raise

    def rows(self) -> list[Row]:
        """Returns all rows in file order; a torn last line is left out.

        Raises:
            TrainingError: a line other than the last is not a JSON object.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        complete, torn = lines[:-1], lines[-1]
        rows = []
        for number, line in enumerate(complete, 1):
            if line.strip():
                rows.append(_read(line, self.path, number))
        if torn.strip() and _parses(torn):  # whole, only its newline is missing
            rows.append(_read(torn, self.path, len(lines)))
        return rows

    def truncate_after(self, step: int) -> int:
        """Drops the rows of later steps, atomically, and returns how many: what a resume does again is not kept twice.

        Args:
            step: the step of the checkpoint that the run goes on from; rows of this step stay.
        """
        self.close()
        rows = self.rows()
        kept = [row for row in rows if row.get("step", 0) <= step]
        if self.path.exists():
            text = "".join(json.dumps(_stored(row), ensure_ascii=False) + "\n" for row in kept)
            write_bytes(self.path, text.encode())
        return len(rows) - len(kept)

    def sync(self) -> None:
        """Makes all rows so far outlive a power cut; called with each checkpoint."""
        if self._handle is not None:
            os.fsync(self._handle)

    def close(self) -> None:
        """Closes the file; a later append opens it again."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _repair(self) -> None:
        """Ends the file at a whole line: completes a whole last line, cuts off a torn one."""
        if not self.path.exists():
            return
        with self.path.open("rb+") as stream:
            content = stream.read()
            if not content or content.endswith(b"\n"):
                return
            start = content.rfind(b"\n") + 1
            if _parses(content[start:]):
                stream.write(b"\n")
            else:
                stream.truncate(start)


def smoothed(values: Iterable[float], decay: float = 0.9) -> list[float]:
    """Returns the exponential moving average, corrected for its start; values that are not finite change nothing.

    Plain expression: mean_t = sum_i decay**(t-i) x_i / sum_i decay**(t-i), so the first mean is the first value
    (an uncorrected average would start near its initial value and draw a slope that is not in the data).
    """
    means: list[float] = []
    total = weight = 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1.0
        means.append(total / weight if weight else math.nan)
    return means


def _stored(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): _stored(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_stored(item) for item in value]
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return value


def _parses(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:  # also what is no UTF-8
        return False


def _read(line: bytes, path: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TrainingError(
            f"{path}, line {number} is not JSON: {error}.",
            allowed="one JSON object a line; only the last line may be torn",
            next_step=f"sed -i '{number}d' {path}   (drops the broken row)",
        ) from error
    if not isinstance(row, dict):
        raise TrainingError(f"{path}, line {number} is not a JSON object: {line[:60]!r}.",
                            allowed="one JSON object a line")
    restored: Row = _restored(row)
    return restored
