"""How the next token is chosen: the settings, what they may be, and the seed of each item."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from chulengo.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """Settings of one generation; the default is greedy.

    The order of application is that of `transformers`: repetition penalty, temperature, top-k, top-p.

    Attributes:
        max_new_tokens: most tokens of an answer (1 or more), the end-of-turn token included.
        temperature: divisor of the logits; 0 is greedy (the likeliest token, no randomness).
        top_p: keep the smallest set of likeliest tokens whose probability reaches this (0 < p <= 1; 1: off).
        top_k: keep this many likeliest tokens (0: off).
        repetition_penalty: divides positive and multiplies negative logits of tokens already in the context
            (arXiv 1909.05858, section 4.1; 1: off).
        seed: where the random numbers start (0 or more); see `item_seed`.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `ConfigError` that lists every value that is not allowed."""
        problems = [
            f"{name} is {value}, allowed: {allowed}" for name, value, allowed, good in self._rules() if not good
        ]
        if problems:
            raise ConfigError("Generation settings: " + "; ".join(problems) + ".")

    def _rules(self) -> list[tuple[str, float, str, bool]]:
        heat, penalty = self.temperature, self.repetition_penalty
        return [
            ("max_new_tokens", self.max_new_tokens, "1 or more", self.max_new_tokens >= 1),
            ("temperature", heat, "0 (greedy) or more", math.isfinite(heat) and heat >= 0),
            ("top_p", self.top_p, "above 0, at most 1", 0 < self.top_p <= 1),
            ("top_k", self.top_k, "0 (off) or more", self.top_k >= 0),
            ("repetition_penalty", penalty, "above 0", math.isfinite(penalty) and penalty > 0),
            ("seed", self.seed, "0 or more", self.seed >= 0),
        ]

    def to_dict(self) -> dict[str, int | float]:
        """Returns the settings as a JSON-able dictionary."""
        return asdict(self)

    def describe(self) -> str:
        """Returns one line that says what differs from greedy and the length limit."""
        if self.temperature == 0:
            parts = ["greedy"]
        else:
            parts = [f"temperature {self.temperature:g}"]
            if self.top_p < 1:
                parts.append(f"top-p {self.top_p:g}")
            if self.top_k:
                parts.append(f"top-k {self.top_k}")
            parts.append(f"seed {self.seed}")
        if self.repetition_penalty != 1:
            parts.append(f"repetition penalty {self.repetition_penalty:g}")
        parts.append(f"at most {self.max_new_tokens} tokens")
        return ", ".join(parts)


def with_setting(settings: GenerationSettings, name: str, text: str) -> GenerationSettings:
    """Returns the settings with one of them changed, as `/set temperature 0.7` in the chat asks.

    Raises:
        ConfigError: unknown name, or a value that cannot be read or is not allowed.
    """
    key = name.strip().lower().replace("-", "_")
    known: dict[str, Any] = {field.name: field.type for field in fields(settings)}
    if key not in known:
        close = nearest(key, known)
        raise ConfigError(
            f"There is no setting '{name}'.",
            allowed=", ".join(known),
            next_step=f"/set {close} {text}".rstrip() if close else None,
        )
    try:
        value: Any = int(text) if known[key] == "int" else float(text)
    except ValueError as error:
        kind = "a whole number" if known[key] == "int" else "a number"
        raise ConfigError(f"'{text}' is not {kind}, which {key} needs.") from error
    return replace(settings, **{key: value})


def item_seed(seed: int, index: int) -> int:
    """Returns the seed of item `index` (0-based place in the input) of a generation with `seed`.

    Item 0 has `seed` itself, so that an item's recorded seed gives the same answer when its prompt is asked alone.
    Every other item has 48 bits of sha256 over both numbers: seeds that are neighbours share no item's numbers.
    """
    if index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:6], "big")
