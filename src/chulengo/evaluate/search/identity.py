"""What makes a search *this* search, and how another one is recognised.

A study file outlives the command that made it. Trials of another space, other rows, another base configuration or
another objective are not comparable with the ones asked for now, and a sampler that learns from a mixture learns
nonsense. So the study carries its identity, and a file with another one is refused, naming what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chulengo.errors import ConfigError

WORDS = {
    "format": "the form of the file", "objective": "the objective", "space": "the search space",
    "config": "the base configuration", "hashes": "the inputs", "pruner": "the pruner",
    "points": "the number of evaluation points", "seed": "the sampler's seed", "exact_match": "exact match",
    "equal": "what is equal for all sizes", "largest": "the largest size, which says how long all run",
}  # fmt: skip
HASHES = {"model": "the model's weights", "renderer": "tokenizer or renderer", "data": "the training rows",
          "validation": "the validation rows"}  # fmt: skip


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns one sentence for each part in which two identities differ."""
    found = []
    for key in [*WORDS, *sorted((before.keys() | now.keys()) - WORDS.keys())]:
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key == "hashes" and isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [f"{what} changed" for name, what in HASHES.items() if old.get(name) != new.get(name)]
        elif isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [
                f"{name} was {_shown(old.get(name))}, now {_shown(new.get(name))}"
                for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)
            ]
        else:
            found.append(f"{WORDS.get(key, key)} was {_shown(old)}, now {_shown(new)}")
    return found


def check_same(file: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any], what: str) -> None:
    """Raises `ConfigError` unless the file's identity is the one of the search that is asked for.

    Args:
        file: where `before` was read.
        before: the identity in the file; None: it has none, so it is not ours.
        now: the identity that is asked for.
        what: "search" or "curve".
    """
    if before is None:
        raise ConfigError(f"{file} was not written by `chulengo search`.", next_step="choose another --out")
    changed = differences(before, now)
    if changed:
        listing = "\n".join(f"  - {line}" for line in changed)
        raise ConfigError(
            f"{file} belongs to another {what}:\n{listing}",
            allowed="the same command again, or with more trials, sizes or repeats",
            next_step=f"choose another --out, or go on with that one: chulengo search --resume {file.parent}",
        )


def _shown(value: Any) -> str:
    if value is None:
        return "absent"
    if isinstance(value, Mapping):
        if "choices" in value:
            return ",".join(map(str, value["choices"]))
        if "low" in value:
            return f"{value['low']}..{value['high']}{':log' if value.get('log') else ''}"
    return repr(value)
