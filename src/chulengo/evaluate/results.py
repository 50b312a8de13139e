"""A score that says what it is: definition, version, counts, interval and what every single item gave.

A number without its definition cannot be compared with next month's. The version string changes whenever the same
outputs could give another number; two scores are comparable when their versions are equal.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chulengo.errors import ChulengoError, DataError

RESULTS_FILE = "results.json"
RESULTS_FORMAT = "chulengo-results/1"


@dataclass(frozen=True, slots=True)
class Score:
    """One measured number.

    Attributes:
        name: such as `perplexity`.
        version: changes with the definition, e.g. `perplexity/1`.
        definition: one sentence that says exactly what is computed.
        value: the number, in its own unit (a share is 0 to 1).
        num_items: conversations it is taken over.
        interval: 95 % interval, or None where none is computed.
        details: further counts, by name.
        items: one dictionary an item. Of scores made of counts (see `evaluate.metrics.metric`): `id`, `group`, `value`
            (what the item alone would score, None where that is undefined) and `counts`.
        unit: share (0 to 1), points (0 to 100) or number.
        higher_is_better: None where neither is.
        columns: names of an item's counts; () for scores that are not made of counts.
        num_groups: groups (conversations) that the interval was drawn from.
        interval_method: wilson, bootstrap, or "" without an interval.
        combine: how summed counts become the value: `ratio`, or the name of the metric that does it.
        labels: the classes of a classification, which `combine` needs.
    """

    name: str
    version: str
    definition: str
    value: float
    num_items: int
    interval: tuple[float, float] | None = None
    details: dict[str, float] = field(default_factory=dict)
    items: tuple[dict[str, Any], ...] = ()
    unit: str = "number"
    higher_is_better: bool | None = None
    columns: tuple[str, ...] = ()
    num_groups: int = 0
    interval_method: str = ""
    combine: str = ""
    labels: tuple[str, ...] = ()

    def to_dict(self, *, with_items: bool = True) -> dict[str, Any]:
        """Returns the score as a JSON-able dictionary."""
        row: dict[str, Any] = {
            "name": self.name, "version": self.version, "definition": self.definition, "value": finite(self.value),
            "num_items": self.num_items,
            "interval_95": None if self.interval is None else list(self.interval),
            **({"details": self.details} if self.details else {}),
        }
        if self.columns:
            row |= {
                "unit": self.unit, "higher_is_better": self.higher_is_better, "columns": list(self.columns),
                "num_groups": self.num_groups, "interval_method": self.interval_method, "combine": self.combine,
                "labels": list(self.labels),
            }
        if with_items:
            row["items"] = list(self.items)
        return row


def score_from_dict(row: Mapping[str, Any]) -> Score:
    """Returns the score that `Score.to_dict` wrote.

    Raises:
        KeyError: the row is no such dictionary.
    """
    interval, value = row["interval_95"], row["value"]
    return Score(
        row["name"], row["version"], row["definition"], math.nan if value is None else float(value), row["num_items"],
        None if interval is None else (interval[0], interval[1]), dict(row.get("details", {})),
        tuple(row.get("items", ())), row.get("unit", "number"), row.get("higher_is_better"),
        tuple(row.get("columns", ())), row.get("num_groups", 0), row.get("interval_method", ""),
        row.get("combine", ""), tuple(row.get("labels", ())),
    )


def finite(value: float) -> float | None:
    """Returns the number, or None where it is undefined, which JSON cannot say otherwise."""
    return value if math.isfinite(value) else None


def wilson_interval(successes: float, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Returns the Wilson score interval of a share.

    Unlike the normal approximation it stays inside 0 to 1 and is right for shares near the ends, where a fine-tuned
    model's scores lie (Wilson 1927, "Probable inference, the law of succession, and statistical inference").

    Args:
        successes: how many of the trials; a half counts a tie.
        trials: 1 or more.
        z: quantile of the normal distribution; the default gives 95 %.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes in {trials} trials")
    share, spread = successes / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    # at the very ends the bound is exactly 0 or 1; rounding would leave 1e-17
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == trials else middle + half
    return low, high


def write_results(path: Path, results: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Writes the results as JSON; the file is whole or not there.

    Args:
        path: where.
        results: JSON-able.
        indent: None for one line, which is written 20 times as fast and is a third of the size.

    Raises:
        ChulengoError: the file cannot be written, or a text in it is none.
        ValueError: a number that JSON does not have.
    """
    text = json.dumps(results, ensure_ascii=False, indent=indent, allow_nan=False) + "\n"
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 60) : error.start]
        raise DataError(
            f"The results cannot be written to {path}: half of a surrogate pair (\\u{ord(text[error.start]):04x}) is "
            f"not a character; it stands after {near!r}.",
            next_step="mend that text in the data or the predictions",
        ) from error
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # it may not be there, or its folder may be a file
            unfinished.unlink()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise ChulengoError(
            f"The results cannot be written to {path}: {error.strerror or error}.",
            next_step="make room, then type the same again: answers that are written already are not made again" if full
            else "--out with a file in a folder that can be written to",
        ) from error


def read_results(path: Path) -> dict[str, Any]:
    """Returns the results of one evaluation of a task.

    Args:
        path: the folder that `--out` named, or the results file in it.

    Raises:
        DataError: there is none, or it is something else.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"There are no results at {path}: {error.strerror or error}.",
            allowed="the folder that --out named, once the evaluation has ended",
            next_step="chulengo eval --task TASK --data FILE --out DIR   (writes them)",
        ) from error
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}.", next_step="evaluate again into a new --out") from error
    if not isinstance(results, dict) or results.get("format") != RESULTS_FORMAT:
        found = results.get("format") if isinstance(results, dict) else None
        raise DataError(
            f"{file} holds no results of a task" + (f" that this version reads (format {found})." if found else "."),
            allowed=f"a file of the format {RESULTS_FORMAT}, as eval --task and score write it",
            next_step="chulengo eval --task TASK --data FILE --out DIR   (writes one)",
        )
    return results


def stored_scores(results: Mapping[str, Any], side: str) -> dict[str, Score]:
    """Returns one side's scores by name, from `read_results`."""
    return {row["name"]: score_from_dict(row) for row in results["scores"][side]}
