"""What always giving the same answer would score: the number that a classification has to beat.

A base that answers in sentences reads none of the labels and has an accuracy of 0 %; whatever a model has learnt, it is
better than that. Where 55 % of the answers are yes, an accuracy of 55 % says nothing: it takes no model to always say
yes. So every result of a classification also holds the comparison with the most frequent right answer given to every
item, made with the same metrics, items and draws as base against tuned.

The answer is the most frequent one among the very items that are scored, which is a little more than anybody could
know beforehand; being better than it is the stronger for that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from chulengo.evaluate.answer_reading import reader
from chulengo.evaluate.comparison import Comparison
from chulengo.evaluate.metrics.metric import Outcome
from chulengo.evaluate.metrics.registry import is_of_labels
from chulengo.evaluate.results import Score
from chulengo.evaluate.scoring import score_all
from chulengo.evaluate.task_scores import answer_metrics, compared
from chulengo.evaluate.tasks import Task


@dataclass(frozen=True, slots=True)
class OneAnswer:
    """The scores of one set of answers less those of one answer to everything.

    Attributes:
        answer: the label.
        comparisons: of every metric of labels that the task has; `base` is the one answer.
    """

    answer: str
    comparisons: tuple[Comparison, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns it as a JSON-able dictionary."""
        return {"answer": self.answer, "comparisons": [each.to_dict() for each in self.comparisons]}


def against_one_answer(
    task: Task, outcomes: Sequence[Outcome], scores: Sequence[Score], *, draws: int, seed: int
) -> OneAnswer | None:
    """Returns how scores compare with always giving the most frequent right answer; None for other tasks than labels.

    Args:
        task: names metrics and labels.
        outcomes: the scored items with their references.
        scores: of those items, with what each item counted.
        draws: how many resampled sets.
        seed: of the draws.
    """
    named = [name for name in task.answer_metrics if is_of_labels(name)]
    if not named or not outcomes:
        return None
    read = reader(task.read)
    counts = Counter(read(outcome.references[0]) for outcome in outcomes)
    answer = max(task.labels, key=lambda label: counts[label])  # of equally frequent ones the first in the task
    metrics, _ = answer_metrics(replace(task, metrics=tuple(named)))
    always = [replace(outcome, answer=answer, finish_reason="stop") for outcome in outcomes]
    theirs = score_all(metrics, always, draws=0, labels=task.labels)
    return OneAnswer(answer, tuple(compared(theirs, scores, draws=draws, seed=seed)))
