"""A score that says what it is: definition, version, counts, interval and what every single item gave.

A number without its definition cannot be compared with next month's. The version string changes whenever the same
outputs could give another number; two scores are comparable when their versions are equal.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chulengo.errors import ChulengoError


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
        items: one dictionary a conversation: its source and what it gave.
    """

    name: str
    version: str
    definition: str
    value: float
    num_items: int
    interval: tuple[float, float] | None = None
    details: dict[str, float] = field(default_factory=dict)
    items: tuple[dict[str, Any], ...] = ()

    def to_dict(self, *, with_items: bool = True) -> dict[str, Any]:
        """Returns the score as a JSON-able dictionary."""
        row: dict[str, Any] = {
            "name": self.name, "version": self.version, "definition": self.definition, "value": self.value,
            "num_items": self.num_items,
            "interval_95": None if self.interval is None else list(self.interval),
            **({"details": self.details} if self.details else {}),
        }
        if with_items:
            row["items"] = list(self.items)
        return row


def wilson_interval(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Returns the Wilson score interval of a share.

    Unlike the normal approximation it stays inside 0 to 1 and is right for shares near the ends, where a fine-tuned
    model's scores lie (Wilson 1927, "Probable inference, the law of succession, and statistical inference").

    Args:
        successes: how many of the trials.
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


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Writes the results as JSON; the file is whole or not there.

    Raises:
        ChulengoError: the file cannot be written.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(
            json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # it may not be there, or its folder may be a file
            unfinished.unlink()
        raise ChulengoError(
            f"The results cannot be written to {path}: {error.strerror or error}.",
            next_step="--out with a file in a folder that can be written to and has room",
        ) from error
