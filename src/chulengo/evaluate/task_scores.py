"""Answers of a task to scores, comparisons and the results file: the part that needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chulengo.errors import DataError
from chulengo.evaluate.answer_reading import reader
from chulengo.evaluate.comparison import Comparison, compare_all
from chulengo.evaluate.metrics.metric import Metric, Outcome
from chulengo.evaluate.predictions import MISSING
from chulengo.evaluate.results import RESULTS_FORMAT, Score, stored_scores
from chulengo.evaluate.task_items import Item
from chulengo.evaluate.tasks import Task

NO_ENCODER = "no encoder (--encoder FOLDER)"
NO_MODEL = "needs the model (chulengo eval)"


@dataclass(frozen=True, slots=True)
class Side:
    """One set of answers, scored.

    Attributes:
        about: where the answers are from: model and adapter, or the file of predictions.
        answers: (text, finish reason) of each item, as generated.
        outcomes: the items with the answers that were read from the texts.
        unread: ids in whose text no answer was found.
        missing: ids that have no prediction.
        scores: in the order of the task's metrics.
        not_computed: metric -> why it was not.
    """

    about: dict[str, Any]
    answers: tuple[tuple[str, str], ...]
    outcomes: tuple[Outcome, ...]
    unread: tuple[str, ...]
    missing: tuple[str, ...]
    scores: tuple[Score, ...]
    not_computed: dict[str, str]


def outcomes_of(
    task: Task, items: Sequence[Item], answers: Sequence[tuple[str, str]]
) -> tuple[tuple[Outcome, ...], tuple[str, ...]]:
    """Returns the items with their answers as the task reads them, and the ids in whose text it found none.

    Labels are read by the metrics themselves, which count an unread answer as a class of its own. A continuation of
    plain text is compared over as many words as the reference has: where to stop is not what is asked.
    """
    read = reader(task.read)
    is_label = task.read.rule == "label"
    made, unread = [], []
    for item, (text, finish) in zip(items, answers, strict=True):
        found = read(text)
        if found is None and finish != MISSING:
            unread.append(item.id)
        answer = text if is_label else found or ""
        if task.kind == "text" and item.references:
            answer = _first_words(answer, len(item.references[0].split()))
        made.append(Outcome(item.id, item.group, item.question, item.references, answer, finish))
    return tuple(made), tuple(unread)


def _first_words(text: str, number: int) -> str:
    words = text.split(maxsplit=number)
    return text if len(words) <= number else text[: len(text) - len(words[-1])].rstrip()


def answer_metrics(
    task: Task, *, encoder: Path | None = None, batch_size: int = 32
) -> tuple[list[Metric], dict[str, str]]:
    """Returns the metrics of a task's answers, and which of them cannot be computed here and why.

    Args:
        task: names the metrics.
        encoder: folder of the text encoder for BERTScore.
        batch_size: texts that the encoder takes at once.

    Raises:
        ConfigError: a metric that there is not, or labels that it cannot use.
        ModelError: the encoder's folder holds no encoder.
        MissingPackageError: the package that counts is not installed.
    """
    from chulengo.evaluate.metrics.registry import MetricOptions, make_metric

    read_label = reader(task.read) if task.read.rule == "label" else None
    options = MetricOptions(labels=task.labels, read_label=read_label, encoder=encoder, batch_size=batch_size)
    metrics, not_computed = [], {}
    for name in task.answer_metrics:
        if name.startswith("bertscore_") and encoder is None:
            not_computed[name] = NO_ENCODER
        else:
            metrics.append(make_metric(name, options))
    return metrics, not_computed


def in_task_order(task: Task, scores: Sequence[Score]) -> tuple[Score, ...]:
    """Returns the scores in the order in which the task names them, the headline first."""
    place = {name: number for number, name in enumerate(task.metrics)}
    return tuple(sorted(scores, key=lambda score: (score.name != task.headline, place[score.name])))


def compared(
    base: Sequence[Score], tuned: Sequence[Score], *, draws: int, seed: int
) -> list[Comparison]:
    """Returns the comparison of every metric that both sides have."""
    others = {score.name: score for score in tuned}
    pairs = [(score, others[score.name]) for score in base if score.name in others]
    return compare_all(pairs, draws=draws, seed=seed)


def main_side(results: Mapping[str, Any]) -> str:
    """Returns the side of stored results that another evaluation is compared with: the tuned one where there is one."""
    sides = list(results["scores"])
    return next((side for side in ("tuned", "answers") if side in sides), sides[-1])


def stored_side(results: Mapping[str, Any], task: str, where: str) -> tuple[str, list[Score]]:
    """Returns the name and the scores of the main side of stored results of the same task.

    Raises:
        DataError: they are of another task.
    """
    if results.get("task") != task:
        raise DataError(f"{where} holds results of the task {results.get('task')}, not of {task}.",
                        next_step="name results of the same task")
    side = main_side(results)
    return side, list(stored_scores(results, side).values())


def results_of(
    task: Task, items: Sequence[Item], data: Mapping[str, Any], sides: Mapping[str, Side], *,
    settings: Mapping[str, Any], versions: Mapping[str, Any], seconds: Mapping[str, Any],
    command: Sequence[str], comparisons: Sequence[Comparison] = (), compared_with: Mapping[str, Any] | None = None,
    one_answer: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the content of a results file.

    Args:
        task: the task.
        items: its items.
        data: where the items came from; see `task_data.TaskData.facts`.
        sides: base and tuned, or whatever was scored.
        settings: how answers were generated.
        versions: of the packages.
        seconds: where the time went.
        command: what was typed, without secrets.
        comparisons: tuned less base.
        compared_with: comparisons with the results of another evaluation, and where those are.
        one_answer: the comparison with always giving one answer; see `one_answer`.
    """
    return {
        "format": RESULTS_FORMAT, "task": task.name, "headline": task.headline, "description": task.description,
        "data": dict(data), "sides": {name: side.about for name, side in sides.items()}, "settings": dict(settings),
        "versions": dict(versions), "seconds": dict(seconds), "command": list(command),
        "not_computed": {name: why for side in sides.values() for name, why in side.not_computed.items()},
        "unread": {name: list(side.unread) for name, side in sides.items()},
        "missing": {name: list(side.missing) for name, side in sides.items()},
        "scores": {name: [score.to_dict() for score in side.scores] for name, side in sides.items()},
        "comparisons": [comparison.to_dict() for comparison in comparisons],
        **({"compared_with": dict(compared_with)} if compared_with else {}),
        **({"one_answer": dict(one_answer)} if one_answer else {}),
        "examples": _examples(items, sides),
    }


def _examples(items: Sequence[Item], sides: Mapping[str, Side]) -> list[dict[str, Any]]:
    made = []
    for number, item in enumerate(items):
        answers = {}
        for name, side in sides.items():
            if not side.answers:
                continue
            text, finish = side.answers[number]
            answers[name] = {"text": text, "finish_reason": finish}
            if side.outcomes[number].answer != text.strip():
                answers[name]["read"] = side.outcomes[number].answer
        if answers:
            made.append({"id": item.id, "group": item.group, "question": item.question,
                         "references": list(item.references), "answers": answers})
    return made
