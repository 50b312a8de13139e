"""What an adapter of the fast engine is, but for its values; checked without loading anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from chulengo.errors import ConfigError, nearest
from chulengo.model.plan_shapes import LINEAR_NAMES

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What an adapter is, but for its values. `targets` are names among the seven linear maps."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def lora_settings(
    *, rank: int, alpha: float, dropout: float, targets: Sequence[str], rslora: bool, dora: bool = False,
    train_head: bool = False, train_embeddings: bool = False,
) -> LoraSettings:
    """Returns checked settings.

    Raises:
        ConfigError: a value that is out of range, or that the fast engine does not have.
    """
    for name, wanted in (("train_head", train_head), ("train_embeddings", train_embeddings)):
        if wanted:
            raise ConfigError(
                f"lora.{name} is true, which the fast engine does not have.", allowed="false",
                next_step="--set model.engine=reference",
            )
    if rank < 1:
        raise ConfigError(f"lora.rank is {rank}.", allowed="1 and above")
    if not 0 <= dropout < 1:
        raise ConfigError(f"lora.dropout is {dropout}.", allowed="0 up to, not including, 1")
    if dora and dropout:
        raise ConfigError(
            f"lora.dora is true with lora.dropout {dropout}, which the fast engine does not have together.",
            allowed="lora.dora with lora.dropout 0", next_step="--set model.engine=reference",
        )
    if tuple(targets) == (ALL_LINEAR,):
        return LoraSettings(rank, alpha, dropout, LINEAR_NAMES, rslora, dora)
    unknown = [name for name in targets if name not in LINEAR_NAMES]
    if unknown or not targets:
        close = nearest(unknown[0], LINEAR_NAMES) if unknown else None
        raise ConfigError(
            f"lora.targets is {list(targets)}.", allowed=f"[{ALL_LINEAR}] alone, or among {', '.join(LINEAR_NAMES)}",
            next_step=f"lora.targets=[{close or ALL_LINEAR}]",
        )
    chosen = tuple(name for name in LINEAR_NAMES if name in targets)
    return LoraSettings(rank, alpha, dropout, chosen, rslora, dora)
