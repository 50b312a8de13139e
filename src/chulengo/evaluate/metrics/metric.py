"""A metric: what it counts of every item, and how summed counts become the number.

Every metric of this package is a function of sums over items: a mean is (sum of values, number), BLEU is clipped
n-gram matches and lengths, macro-F1 a confusion matrix, perplexity (summed loss, tokens). A metric is therefore two
functions: `count` gives each item a row of numbers, `combine` turns a sum of rows into the score. That makes the
corpus score, the score of any subset, and the score of ten thousand resampled corpora (one matrix product with the
resampling weights) the same computation, with nothing special-cased; and results stored with their counts can be
compared later without any text. The alternative, an opaque function of all texts, costs a BLEU run for every draw.

The limit: a metric that is no function of sums (a median, a rank) does not fit; none is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]
Unit = Literal["share", "points", "number"]  # 0 to 1, shown in percent | 0 to 100 | anything else


@dataclass(frozen=True, slots=True)
class Outcome:
    """One item and the answer it got.

    Attributes:
        id: unique in its set.
        group: the conversation it belongs to; resampling draws groups, since turns of one conversation are alike.
        question: the text before the answer.
        references: every accepted answer; () where the data have none.
        answer: what was generated, as it is; "" is an answer.
        finish_reason: stop, length, context, missing (no prediction), or "" where nobody knows.
        fields: further columns of the item that a metric may need, by name.
    """

    id: str
    group: str
    question: str
    references: tuple[str, ...]
    answer: str
    finish_reason: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: as results store it, such as `bleu`.
        version: changes whenever the same answers could give another number, such as `bleu/1`; it holds the version of
            the library that counts, where one does.
        definition: one or two sentences that say exactly what is computed.
        unit: how the number is to be read.
        higher_is_better: None where neither is (a length).
        columns: a name for each count.
        count: items to counts [n, len(columns)], float64.
        combine: summed counts [..., len(columns)] to scores [...]; NaN where the sum defines none.
    """

    name: str
    version: str
    definition: str
    unit: Unit
    higher_is_better: bool | None
    columns: tuple[str, ...]
    count: Callable[[Sequence[Outcome]], Counts]
    combine: Callable[[Counts], NDArray[np.float64]]


def mean_of(
    name: str, version: str, definition: str, value: Callable[[Outcome], float], *, unit: Unit = "share",
    higher_is_better: bool | None = True,
) -> Metric:
    """Returns the metric that is the mean over items of a value of each; NaN values are items it does not apply to."""

    def count(outcomes: Sequence[Outcome]) -> Counts:
        values = np.array([value(outcome) for outcome in outcomes], dtype=np.float64)
        applies = ~np.isnan(values)
        return np.stack([np.where(applies, values, 0.0), applies.astype(np.float64)], axis=1)

    return Metric(name, version, definition, unit, higher_is_better, ("sum", "items"), count, ratio)


def ratio(counts: Counts) -> NDArray[np.float64]:
    """Returns the first count over the second, NaN where that is 0."""
    above, below = counts[..., 0], counts[..., 1]
    divided: NDArray[np.float64] = np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)
    return divided
