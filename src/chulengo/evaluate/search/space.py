"""What a search may change: a dimension a setting, read from `key=low..high[:log]`, `key=a,b,c` or a YAML file.

The space is data: it is written into the study and into `study.json` as it was understood, and a study with another
space is another study. Settings that decide *what the validation loss is a loss of* (which rows, which tokens carry
loss, how long a row may be) cannot be searched: their trials would not be comparable, and the smallest loss would go to
whoever left the hard tokens out. `cli.search` says which settings those are and hands in the others by name and kind.

The default ranges are centred on the configuration's own values, because a good learning rate differs by a factor of
20 between a model of 4 million and one of 7 billion parameters; a range in absolute numbers would miss one of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from chulengo.errors import ConfigError, nearest, yaml_fault

# short name -> setting; the first six are searched unless --space says otherwise
NAMED = {
    "learning_rate": "training.learning_rate", "rank": "lora.rank", "alpha": "lora.alpha", "dropout": "lora.dropout",
    "schedule": "training.schedule", "epochs": "training.epochs", "rows": "data.num_rows",
}  # fmt: skip
DEFAULT = "default"
ROWS = NAMED["rows"]
HELP = "chulengo search --help   (the forms of --space)"
FORMS = "key=low..high, key=low..high:log, key=a,b,c, a name alone (its default range), `default`, or a YAML file"
_RANGE = re.compile(r"\s*(?P<low>\S+?)\s*\.\.\s*(?P<high>[^\s:]+)\s*(?P<log>:\s*log)?\s*")


@dataclass(frozen=True, slots=True)
class Dimension:
    """One setting and the values it may take: a range, or choices.

    Attributes:
        key: the setting, such as `lora.rank`.
        low: smallest value of a range; None for choices.
        high: largest value of a range, itself included; None for choices.
        integer: whether a range holds whole numbers only.
        log: whether a range is searched by ratios instead of differences.
        choices: the values, when there is no range.
    """

    key: str
    low: float | None = None
    high: float | None = None
    integer: bool = False
    log: bool = False
    choices: tuple[Any, ...] = ()

    def holds(self, value: Any) -> bool:
        """Returns whether the value is one of this dimension's."""
        if self.choices:
            return value in self.choices
        assert self.low is not None
        assert self.high is not None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high and (not self.integer or int(value) == value)

    def probes(self) -> tuple[Any, ...]:
        """Returns the values that show whether all are allowed: both ends of a range, or every choice."""
        return self.choices or (self.low, self.high)

    def to_dict(self) -> dict[str, Any]:
        """Returns the values as JSON: {"choices": [...]} or {"low", "high", "log", "integer"}."""
        if self.choices:
            return {"choices": list(self.choices)}
        return {"low": self.low, "high": self.high, "log": self.log, "integer": self.integer}

    def text(self) -> str:
        """Returns the values in the form in which they can be typed."""
        if self.choices:
            return ",".join(str(choice) for choice in self.choices)
        return f"{self.low!r}..{self.high!r}{':log' if self.log else ''}"


def short(key: str) -> str:
    """Returns the short name of a setting where it has one, else its last part."""
    return next((name for name, full in NAMED.items() if full == key), key.rpartition(".")[2])


def default_specs(settings: Mapping[str, Any], num_rows: int) -> dict[str, str]:
    """Returns the default values of every named setting, as they could be typed.

    Args:
        settings: the configuration by key; the ranges are centred on it.
        num_rows: rows that there are to train on.
    """
    rate, epochs = settings[NAMED["learning_rate"]], settings[NAMED["epochs"]]

    def around(key: str, *values: Any) -> str:
        return ",".join(str(value) for value in sorted({*values, settings[NAMED[key]]}))

    return {
        "learning_rate": f"{rate / 10:g}..{rate * 10:g}:log",
        "rank": around("rank", 4, 8, 16, 32, 64),
        "alpha": around("alpha", 8.0, 16.0, 32.0, 64.0),
        "dropout": around("dropout", 0.0, 0.05, 0.1),
        "schedule": around("schedule", "linear", "cosine", "constant_with_warmup"),
        "epochs": ",".join(f"{epochs * factor:g}" for factor in (0.5, 1, 2)),
        "rows": f"{max(1, num_rows // 8)}..{num_rows}:log",
    }


def read_space(words: Sequence[str], kinds: Mapping[str, str], defaults: Mapping[str, str]) -> list[Dimension]:
    """Returns the dimensions that the words describe, in their order; a later word about a setting wins.

    Args:
        words: see `FORMS`; none: the default space without `rows`.
        kinds: the settings that may be searched: "int", "float" or "other" by key.
        defaults: see `default_specs`.

    Raises:
        ConfigError: a word that is no dimension, an unknown or a fixed setting, values that are not of its kind.
    """
    specs: dict[str, Any] = {}
    for word in words or [DEFAULT]:
        for key, spec in _entries(word, defaults):
            specs[_known(key, kinds)] = spec
    found = []
    for key, spec in specs.items():
        if spec is None and short(key) not in defaults:
            raise ConfigError(f"{key} has no default range.", allowed=FORMS, next_step=f"--space {key}=low..high")
        found.append(dimension(key, defaults[short(key)] if spec is None else spec, kinds[key]))
    return found


def dimension(key: str, spec: Any, kind: str) -> Dimension:
    """Returns one dimension.

    Args:
        key: the setting.
        spec: "low..high", "low..high:log", "a,b,c", a list, or {"low", "high", "log"}.
        kind: "int", "float" or "other".

    Raises:
        ConfigError: the values cannot be read, are of another kind, or are fewer than two.
    """
    if isinstance(spec, Mapping):
        return _range(key, spec.get("low"), spec.get("high"), bool(spec.get("log")), kind, unknown=set(spec) - {
            "low", "high", "log"})  # fmt: skip
    if isinstance(spec, str) and (match := _RANGE.fullmatch(spec)):
        return _range(key, match["low"], match["high"], match["log"] is not None, kind)
    parts = spec if isinstance(spec, Sequence) and not isinstance(spec, str) else str(spec).split(",")
    choices = tuple(_value(key, part, kind) for part in parts)
    if len(set(choices)) < 2 or len(set(choices)) < len(choices):
        what = "twice the same value" if len(set(choices)) < len(choices) else "only one value"
        raise ConfigError(
            f"The search space of {key}, {spec!r}, has {what}.", allowed=FORMS,
            next_step=f"--set {key}={choices[0]}   (fixes it)",
        )
    return Dimension(key, choices=choices)


def _entries(word: str, defaults: Mapping[str, str]) -> Iterable[tuple[str, Any]]:
    key, equals, spec = word.partition("=")
    if equals:
        return [(key.strip(), spec.strip())]
    if word.endswith((".yaml", ".yml")) or Path(word).is_file():
        return _read_file(Path(word))
    names = [name.strip() for name in word.split(",")]
    return [
        (each, None) for name in names for each in ([n for n in defaults if n != "rows"] if name == DEFAULT else [name])
    ]


def _read_file(file: Path) -> Iterable[tuple[str, Any]]:
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"The space file {file} cannot be read: {reason}.", next_step=f"ls {file.parent}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {yaml_fault(error)}.", next_step="mend that line") from error
    if not isinstance(loaded, dict) or not loaded:
        raise ConfigError(
            f"The space file {file} holds no settings.",
            allowed="lines such as `learning_rate: 1e-5..1e-3:log` and `lora.rank: [8, 16, 32]`", next_step=HELP,
        )
    return [(str(key), spec) for key, spec in loaded.items()]


def _known(key: str, kinds: Mapping[str, str]) -> str:
    full = NAMED.get(key, key)
    if full in kinds:
        return full
    close = nearest(key, [*NAMED, *kinds])
    raise ConfigError(
        f"{key!r} is no setting that can be searched.",
        allowed=", ".join([*NAMED, *sorted(set(kinds) - set(NAMED.values()))]),
        next_step=f"--space {close}=…" if close else HELP,
    )


def _range(key: str, low: Any, high: Any, log: bool, kind: str, unknown: Iterable[Any] = ()) -> Dimension:
    given = f"{low}..{high}{':log' if log else ''}"
    if kind == "other":
        raise ConfigError(f"{key} is no number, so it has no range {given}.", next_step=f"--space {key}=a,b,c")
    extra = ", ".join(map(str, unknown))
    if extra or low is None or high is None:
        raise ConfigError(f"The search space of {key} has {'unknown ' + extra if extra else 'no low or no high'}.",
                          allowed="low, high, log", next_step=HELP)
    first, last = _value(key, low, kind), _value(key, high, kind)
    if not (math.isfinite(first) and math.isfinite(last) and first < last):
        raise ConfigError(f"The search space of {key}, {given}, does not rise.", allowed=f"{key}=low..high",
                          next_step=f"--space {key}={high}..{low}" if first > last else HELP)
    if log and first <= 0:
        raise ConfigError(f"The search space of {key}, {given}, starts at {first}, which has no logarithm.",
                          next_step=f"--space {key}={given.removesuffix(':log')}")
    return Dimension(key, low=first, high=last, integer=kind == "int", log=log)


def _value(key: str, given: Any, kind: str) -> Any:
    if kind == "other":
        try:
            value = yaml.safe_load(given) if isinstance(given, str) else given
        except yaml.YAMLError:
            value = given
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ConfigError(f"{given!r} is no single value for {key}.", allowed="a text, a number, true, false or null",
                          next_step=HELP)  # fmt: skip
    try:
        number = float(given)
        if kind == "float":
            return number
        if int(number) == number:
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{given!r} is no {'whole number' if kind == 'int' else 'number'}, which {key} is.",
                      allowed=FORMS, next_step=HELP)
