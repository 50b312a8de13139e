"""Scores of answers that exist already; needs no model.

  chulengo score --task squad --data dev-v1.1.json --predictions answers.json --json
  chulengo score --task pubmedqa --data FOLDER --predictions answers.jsonl --out results/pubmedqa
  chulengo score --task list

--predictions takes {id: text} as SQuAD has it, rows with id and answer (jsonl, json, csv), and what `eval` and
`generate` write. A row of data without an id has its number, from 1. With --json the scores stand at the top level on
a scale of 0 to 100, with their intervals under `scores`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chulengo.cli.task_options import (
    add_task_arguments,
    check_task_arguments,
    counting_versions,
    encoder_from,
    note_slow_metric,
    other_results,
    read_data,
    results_path,
    task_list,
    without_collector,
)
from chulengo.data.wording import counted

if TYPE_CHECKING:
    from chulengo.evaluate.comparison import Comparison
    from chulengo.evaluate.metrics.metric import Metric
    from chulengo.evaluate.one_answer import OneAnswer
    from chulengo.evaluate.task_data import TaskData
    from chulengo.evaluate.task_scores import Side
    from chulengo.evaluate.tasks import Task

SIDE = "answers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `chulengo score`."""
    add_task_arguments(parser, required=True)
    parser.add_argument("--data", metavar="D", help="a file, a folder, or a Hub data set name")
    parser.add_argument("--predictions", metavar="P", help="the answers: a JSON, JSON lines or csv file")
    parser.add_argument("--adapter", metavar="A",
                        help="the run whose held-out rows of these data are meant, as in eval; it is not loaded")
    parser.add_argument("--missing", choices=("error", "wrong"), default="error",
                        help="items without a prediction: an error (default), or scored as wrong")
    parser.add_argument("--num-rows", type=int, metavar="N", help="a random subset of this many rows (data.seed)")
    parser.add_argument("--out", metavar="DIR", help="write results.json here")
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON object")
    parser.add_argument("--config", metavar="FILE", help="a recipe: how its data are read (format, columns, cleaning)")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides",
                        help="one setting, e.g. --set data.columns.answer=reply (repeatable)")
    parser.add_argument("--offline", action="store_true", help="never use the network, not even for Hub names")
    parser.set_defaults(model=None)


def run(arguments: argparse.Namespace) -> int:
    """Runs `chulengo score`; returns 0."""
    if arguments.task == "list":
        print(task_list())
        return 0
    with without_collector():
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from chulengo.cli.arguments import config_from
    from chulengo.errors import ConfigError
    from chulengo.evaluate.one_answer import against_one_answer
    from chulengo.evaluate.task_scores import answer_metrics
    from chulengo.evaluate.tasks import load_task

    check_task_arguments(arguments)
    started = time.perf_counter()
    task = load_task(arguments.task)
    if not arguments.predictions:
        raise ConfigError("No predictions to score.", next_step="--predictions FILE")
    if not task.answer_metrics:
        raise ConfigError(f"The task {task.name} has no metric of answers.", next_step="chulengo eval --task …")
    path = results_path(arguments.out)
    if arguments.num_rows is not None:
        arguments.overrides = [*arguments.overrides, f"data.num_rows={arguments.num_rows}"]
    config = config_from(_without_out(arguments))
    other = other_results(arguments, task)
    metrics = answer_metrics(task, encoder=encoder_from(arguments, task))
    data = read_data(task, config, arguments, prompts=False)
    note_slow_metric(task, data.items)
    with_items = path is not None or other is not None or bool(task.labels)
    side = _score(task, data, metrics, arguments, with_items=with_items)
    one_answer = against_one_answer(task, side.outcomes, side.scores, draws=arguments.draws, seed=arguments.seed)
    comparisons = _compared(other, side, arguments)
    seconds = {"total": time.perf_counter() - started}
    if path is not None:
        _write(path, task, data, side, comparisons, one_answer, seconds, arguments)
    _show(task, data, side, comparisons, one_answer, arguments)
    return 0


def _without_out(arguments: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(arguments), "out": None})  # theirs is a folder of results, not a run


def _score(
    task: Task, data: TaskData, metrics: tuple[list[Metric], dict[str, str]], arguments: argparse.Namespace, *,
    with_items: bool,
) -> Side:
    from chulengo.evaluate.predictions import match_predictions, read_predictions
    from chulengo.evaluate.scoring import score_all
    from chulengo.evaluate.task_scores import NO_MODEL, Side, in_task_order, outcomes_of

    answers, missing = match_predictions(
        [item.id for item in data.items], _of_kept_rows(read_predictions(Path(arguments.predictions)), task, data,
                                                        offline=arguments.offline),
        missing_is_wrong=arguments.missing == "wrong", source=arguments.predictions,
    )
    outcomes, unread = outcomes_of(task, data.items, answers)
    scores = score_all(
        metrics[0], outcomes, draws=arguments.draws, seed=arguments.seed, labels=task.labels, with_items=with_items
    )
    not_computed = metrics[1] | dict.fromkeys(task.loss_metrics, NO_MODEL)
    return Side({"predictions": arguments.predictions}, tuple(answers), outcomes, unread, tuple(missing),
                in_task_order(task, scores), not_computed)


def _of_kept_rows(
    predictions: dict[str, tuple[str, str]], task: Task, data: TaskData, *, offline: bool
) -> dict[str, tuple[str, str]]:
    """Returns the predictions without those of rows that cleaning dropped, which were made before and do no harm.

    Where only a part of the rows is taken, a row that is not there need not have been dropped: nothing is left out.
    """
    from chulengo.data.sources import read_records
    from chulengo.evaluate.task_data import chosen_split

    facts, known = data.facts, {item.id for item in data.items}
    split = chosen_split(task, facts["split"])[1]
    partly = facts["num_rows"] is not None or facts["held_out_by"] or split.held_out or split.labels or split.without
    unknown = [key for key in predictions if key not in known]
    if not unknown or not facts["cleaning"] or partly:
        return predictions
    rows = (row.fields.get(task.id) for file in facts["files"]
            for row in read_records(file, hub_split=split.hub, offline=offline))
    ids = {str(number) if own is None else str(own) for number, own in enumerate(rows, 1)}
    dropped = {key: None for key in unknown if key in ids or (task.turns == "each" and key.rpartition("/")[0] in ids)}
    if dropped:
        shown = ", ".join([*dropped][:5]) + (", …" if len(dropped) > 5 else "")
        print(f"note: {counted(len(dropped), 'prediction')} not scored, of rows that data.cleaning="
              f"[{', '.join(facts['cleaning'])}] leaves out: {shown}", file=sys.stderr)
    return {key: answer for key, answer in predictions.items() if key not in dropped}


def _compared(
    other: tuple[str, list[Any]] | None, side: Side, arguments: argparse.Namespace
) -> list[Comparison]:
    from chulengo.evaluate.task_scores import compared

    return [] if other is None else compared(other[1], side.scores, draws=arguments.draws, seed=arguments.seed)


def _write(
    path: Path, task: Task, data: TaskData, side: Side, comparisons: list[Comparison], one_answer: OneAnswer | None,
    seconds: dict[str, float], arguments: argparse.Namespace,
) -> None:
    from chulengo.evaluate.results import write_results
    from chulengo.evaluate.task_scores import results_of
    from chulengo.train.manifest import masked

    other = {"results": arguments.compare_with, "comparisons": [c.to_dict() for c in comparisons]}
    results = results_of(
        task, data.items, data.facts, {SIDE: side},
        settings={"missing": arguments.missing, "draws": arguments.draws, "seed": arguments.seed},
        versions=counting_versions(), seconds=seconds, command=masked(arguments.command),
        compared_with=other if comparisons else None, one_answer=one_answer.to_dict() if one_answer else None,
    )
    write_results(path, results, indent=None)
    print(f"written to {path}", file=sys.stderr)


def _show(
    task: Task, data: TaskData, side: Side, comparisons: list[Comparison], one_answer: OneAnswer | None,
    arguments: argparse.Namespace,
) -> None:
    from chulengo.cli.score_view import hundreds, item_lines, one_side, show_one_answer, show_table, two_sides

    for word, ids in (("have no prediction and are scored as wrong", side.missing),
                      ("hold no answer that could be read", side.unread)):
        if ids:
            shown = ", ".join(ids[:5]) + (", …" if len(ids) > 5 else "")
            print(f"note: {len(ids)} of {len(data.items)} items {word}: {shown}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({
            **hundreds(side.scores), "task": task.name, "headline": task.headline, "num_items": len(data.items),
            "missing": len(side.missing), "unread": len(side.unread), "not_computed": side.not_computed,
            "data": data.facts, "versions": counting_versions(),
            "scores": [score.to_dict(with_items=False) for score in side.scores],
            "comparisons": [comparison.to_dict() for comparison in comparisons],
            **({"one_answer": one_answer.to_dict()} if one_answer else {}),
        }, ensure_ascii=False, allow_nan=False))
        return
    if comparisons:
        show_table(two_sides((arguments.compare_with, "these"), comparisons, task.headline, side.not_computed))
        print("\n".join(item_lines(comparisons, task.headline)))
    else:
        show_table(one_side(side.scores, task.headline, side.not_computed))
    show_one_answer(one_answer.to_dict() if one_answer else None, "these")
