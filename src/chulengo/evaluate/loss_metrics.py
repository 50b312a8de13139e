"""The metrics of a model's loss, in the form of all others: counts of each item, and what combines them.

They need the model, so they have no `count` over answers: `perplexity.row_losses` and `continuation.window_losses`
count. Everything after that (intervals, comparisons, tables) is the same as for metrics of answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from chulengo.evaluate.metrics.metric import Counts, Metric, Outcome, ratio

LOSS_METRICS = ("perplexity", "next_token_accuracy", "bits_per_byte")


def exponential(counts: Counts) -> NDArray[np.float64]:
    """Returns exp(nats / tokens); infinite beyond what fp64 holds, NaN where there is no token."""
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(ratio(counts)))


def bits(counts: Counts) -> NDArray[np.float64]:
    """Returns nats / bytes as bits."""
    return np.asarray(ratio(counts) / math.log(2))


LOSS_COMBINES: dict[str, Callable[[Counts], NDArray[np.float64]]] = {"perplexity": exponential, "bits_per_byte": bits}


def perplexity_metric(version: str, definition: str) -> Metric:
    """Returns perplexity over counts of (nats, tokens)."""
    return Metric("perplexity", version, definition, "number", False, ("nats", "tokens"), _needs_model, exponential)


def next_token_metric(version: str, definition: str) -> Metric:
    """Returns next-token accuracy over counts of (tokens that were the likeliest one, tokens)."""
    columns = ("likeliest", "tokens")
    return Metric("next_token_accuracy", version, definition, "share", True, columns, _needs_model, ratio)


def bits_per_byte_metric(version: str, definition: str) -> Metric:
    """Returns bits per byte over counts of (nats, bytes)."""
    return Metric("bits_per_byte", version, definition, "number", False, ("nats", "bytes"), _needs_model, bits)


def _needs_model(outcomes: Sequence[Outcome]) -> Counts:
    raise AssertionError("a metric of the loss is counted from the model's losses, not from answers")
