"""Classification by generation: accuracy, precision, recall and F1 of the labels read from answers.

An answer from which no label can be read is counted under a predicted class of its own, `unreadable`. It is never
dropped: a model that answers one question in ten well and mumbles nine times has an accuracy of 10 %, not of 100 %.

Macro-F1 is the plain mean of F1 over the labels that occur among the gold labels of the items it is taken over. So
`unreadable`, and a label that is predicted but never right, lower the recall of the labels they are put in place of
and do not enter the mean as classes with F1 0; scikit-learn's default would let one mumbled answer cost a third of the
score. It is `f1_score(gold, read, labels=<gold labels>, average="macro", zero_division=0)`.

What no count defines is NaN, not 0: the precision of a label that is never predicted, the recall of one that never
occurs. The gold label is read from the reference by the same rule as the answer, and must be readable.

Limit: macro and weighted F1 count a confusion matrix, labels x (labels + 1) numbers an item; that is meant for tens
of labels, not thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from chulengo.errors import ConfigError, DataError
from chulengo.evaluate.metrics.metric import Counts, Metric, Outcome, ratio
from chulengo.evaluate.metrics.references import references_of

UNREADABLE = "unreadable"
LABEL_PARTS = ("precision", "recall", "f1")
LABEL_COLUMNS = ("both", "predicted", "gold")
Reader = Callable[[str], str | None]

_READING = "labels are read from answers by the task's rule; an unreadable answer is wrong and a class of its own"


def exact_reader(labels: Sequence[str]) -> Reader:
    """Returns the reader that knows a label only when it is the whole answer, without regard to case."""
    known = {label.strip().casefold(): label for label in labels}
    return lambda text: known.get(text.strip().casefold())


def accuracy(labels: Sequence[str], read_label: Reader | None = None) -> Metric:
    """Returns the share of answers from which the gold label is read."""
    read = _checked_reader("accuracy", labels, read_label)

    def count(outcomes: Sequence[Outcome]) -> Counts:
        gold, predicted = _label_indices("accuracy", outcomes, labels, read)
        right, unreadable = gold == predicted, predicted == len(labels)
        return np.stack([right, np.ones(len(gold)), unreadable], axis=1).astype(np.float64)

    return Metric(
        "accuracy", "accuracy/1", f"Share of answers from which the gold label is read; {_READING}.", "share", True,
        ("correct", "items", UNREADABLE), count, ratio,
    )


def macro_f1(labels: Sequence[str], read_label: Reader | None = None) -> Metric:
    """Returns the plain mean of F1 over the labels that occur in the gold labels."""

    def combine(counts: Counts) -> NDArray[np.float64]:
        f1, gold = _f1_and_gold(counts, len(labels))
        return _weighted_mean(f1, (gold > 0).astype(np.float64))

    return _of_matrix(
        "macro_f1", "Plain mean of F1 over the labels that occur among the gold labels", labels, read_label, combine
    )


def weighted_f1(labels: Sequence[str], read_label: Reader | None = None) -> Metric:
    """Returns the mean of F1 over labels, weighted by how often each is the gold label."""

    def combine(counts: Counts) -> NDArray[np.float64]:
        return _weighted_mean(*_f1_and_gold(counts, len(labels)))

    return _of_matrix(
        "weighted_f1", "Mean of F1 over labels, weighted by how often each is the gold label", labels, read_label,
        combine,
    )


def of_label(part: str, label: str, labels: Sequence[str], read_label: Reader | None = None) -> Metric:
    """Returns precision, recall or F1 of one label.

    Args:
        part: one of `LABEL_PARTS`.
        label: one of `labels`.
        labels: every label of the task.
        read_label: how an answer is read; None: see `exact_reader`.

    Raises:
        ConfigError: `label` is none of the labels, or the labels cannot be used.
    """
    name = f"{part}:{label}"
    read = _checked_reader(name, labels, read_label)
    if label not in labels:
        raise ConfigError(f"The metric '{name}' asks for a label that the task has not.", allowed=", ".join(labels))
    own = list(labels).index(label)

    def count(outcomes: Sequence[Outcome]) -> Counts:
        gold, predicted = _label_indices(name, outcomes, labels, read)
        is_gold, is_predicted = gold == own, predicted == own
        return np.stack([is_gold & is_predicted, is_predicted, is_gold], axis=1).astype(np.float64)

    def combine(counts: Counts) -> NDArray[np.float64]:
        both, predicted, gold = counts[..., 0], counts[..., 1], counts[..., 2]
        if part == "f1":  # 2 P R / (P + R) with P = both / predicted and R = both / gold
            return ratio(np.stack([2 * both, predicted + gold], axis=-1))
        return ratio(np.stack([both, predicted if part == "precision" else gold], axis=-1))

    what = {
        "precision": f"Share of the answers read as '{label}' whose gold label it is",
        "recall": f"Share of the items with gold label '{label}' whose answer is read so",
        "f1": f"Harmonic mean of precision and recall of '{label}'",
    }[part]
    return Metric(
        name, f"{name}/1", f"{what}; {_READING}.", "share", True, LABEL_COLUMNS, count, combine
    )


def is_right(counts: Counts) -> NDArray[np.bool_]:
    """Returns which items [n, 3] of `of_label` are right as far as its label goes: given where it is due, only there.
    """
    right: NDArray[np.bool_] = counts[..., 1] == counts[..., 2]
    return right


def _of_matrix(
    name: str, what: str, labels: Sequence[str], read_label: Reader | None,
    combine: Callable[[Counts], NDArray[np.float64]],
) -> Metric:
    """Returns a metric whose counts are the confusion matrix, gold by row, `unreadable` as the last column."""
    read = _checked_reader(name, labels, read_label)
    width = len(labels) + 1

    def count(outcomes: Sequence[Outcome]) -> Counts:
        gold, predicted = _label_indices(name, outcomes, labels, read)
        counts = np.zeros((len(gold), len(labels) * width))
        counts[np.arange(len(gold)), gold * width + predicted] = 1.0
        return counts

    columns = tuple(f"{gold}>{predicted}" for gold in labels for predicted in (*labels, UNREADABLE))
    return Metric(
        name, f"{name}/1 labels:{','.join(labels)}", f"{what} ({', '.join(labels)}); {_READING}.", "share", True,
        columns, count, combine,
    )


def _f1_and_gold(counts: Counts, num_labels: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns F1 [..., labels], 0 where nothing defines it, and the number of gold items [..., labels]."""
    matrix = counts.reshape(*counts.shape[:-1], num_labels, num_labels + 1)
    both = np.diagonal(matrix, axis1=-2, axis2=-1)
    gold, predicted = matrix.sum(axis=-1), matrix[..., :num_labels].sum(axis=-2)
    # 2 P R / (P + R) with P = both / predicted and R = both / gold
    f1 = np.divide(2 * both, gold + predicted, out=np.zeros_like(gold), where=gold + predicted > 0)
    return f1, gold


def _weighted_mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    return ratio(np.stack([(values * weights).sum(axis=-1), weights.sum(axis=-1)], axis=-1))


def _label_indices(
    name: str, outcomes: Sequence[Outcome], labels: Sequence[str], read: Reader
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the gold and the predicted label of each item as indices; `len(labels)` is unreadable."""
    index = {label: position for position, label in enumerate(labels)}
    unreadable = len(labels)

    def read_index(text: str) -> int:
        label = read(text)
        if label is not None and label not in index:
            raise ConfigError(
                f"The task reads the label '{label}' from an answer, and has no such label.", allowed=", ".join(labels)
            )
        return unreadable if label is None else index[label]

    gold, predicted = [], []
    for outcome, references in zip(outcomes, references_of(outcomes, name), strict=True):
        found = {read_index(reference) for reference in references}
        if len(found) != 1 or unreadable in found:
            raise DataError(
                f"The reference of item {outcome.id} is no single label: {' | '.join(references)[:200]!r}.",
                allowed=", ".join(labels),
                next_step="mend that row, or the labels of the task",
            )
        gold.append(found.pop())
        predicted.append(unreadable if outcome.finish_reason == "missing" else read_index(outcome.answer))
    return np.array(gold, dtype=np.int64), np.array(predicted, dtype=np.int64)


def _checked_reader(name: str, labels: Sequence[str], read_label: Reader | None) -> Reader:
    """Returns the reader to use, after a look at the labels.

    Raises:
        ConfigError: fewer than two labels, two that differ only by case, or one that is called `unreadable`.
    """
    folded = {label.strip().casefold() for label in labels}
    if len(labels) < 2 or len(folded) < len(labels) or UNREADABLE in folded:
        raise ConfigError(
            f"The metric '{name}' cannot be computed over the labels [{', '.join(labels)}].",
            allowed=f"two or more different labels, none of them '{UNREADABLE}'",
            next_step="list them in the task: labels: [yes, no]",
        )
    return read_label or exact_reader(labels)
