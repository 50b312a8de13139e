"""Items and resampled sums for the tests of metrics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from chulengo.evaluate.metrics.metric import Metric, Outcome

# one of everything that breaks scorers: other scripts, accents composed and not, emoji, nothing, spaces, punctuation
ODD_TEXTS = (
    "", " ", "\n", "a", "The", "the an a", "...", "¿", "«»", "Привет, мир!", "Ёлка — это ёлка.", "naïve café",
    "cafe\u0301", "Straße", "STRASSE", "İstanbul", "你好，世界。", "東京タワー", "नमस्ते दुनिया", "👍",
    "👍🏽 ok", "a\u00a0b", "x\u200by", "tab\tand\nline",
    "It's 3,000.5%", "the-cat", "A/B", "à la carte", "an\u2009apple", "_under_score_", "ﬁn", "½ cup", "H₂O",
    "\u0000", "<unk>",
)


def outcomes(
    answers: Sequence[str], references: Sequence[Sequence[str]], finish: str = "stop"
) -> list[Outcome]:
    """Returns an item for each answer."""
    return [
        Outcome(str(i), str(i), "q", tuple(own), answer, finish)
        for i, (answer, own) in enumerate(zip(answers, references, strict=True))
    ]


def value(metric: Metric, items: Sequence[Outcome]) -> float:
    """Returns the metric of all items."""
    return float(metric.combine(metric.count(items).sum(axis=0)))


def item_values(metric: Metric, items: Sequence[Outcome]) -> list[float]:
    """Returns the metric of each item."""
    return [float(score) for score in metric.combine(metric.count(items))]


def resample(num_items: int, draws: int, seed: int = 0) -> NDArray[np.int64]:
    """Returns the indices of resampled items, [draws, num_items]."""
    return np.random.default_rng(seed).integers(0, num_items, size=(draws, num_items))
