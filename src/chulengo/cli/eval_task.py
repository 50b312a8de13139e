"""`chulengo eval --task`: base and tuned on the same items, from the data to the table and the results file.

First the model's part, losses and answers, then the scores. The model is gone by then: an encoder that scores answers
has the device for itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chulengo.cli.inference import memory_explained, session_config, session_from
from chulengo.cli.task_options import (
    check_task_arguments,
    counting_versions,
    encoder_from,
    note_slow_metric,
    other_results,
    read_data,
    results_path,
    task_list,
)
from chulengo.errors import ChulengoError, ConfigError

if TYPE_CHECKING:
    from chulengo.config import RunConfig
    from chulengo.evaluate.metrics.metric import Metric
    from chulengo.evaluate.predictions import RowsFile
    from chulengo.evaluate.results import Score
    from chulengo.evaluate.task_data import TaskData
    from chulengo.evaluate.task_run import Counted, Seconds
    from chulengo.evaluate.task_scores import Side
    from chulengo.evaluate.tasks import Task
    from chulengo.generate.settings import GenerationSettings

SIDES = ("base", "tuned", "both")


@dataclass(frozen=True, slots=True)
class _ModelsPart:
    """What the model gave and what is to be said about it, by side; nothing here refers to it."""

    about: dict[str, dict[str, Any]]
    renderer: str
    answers: dict[str, list[dict[str, Any]]]
    losses: dict[str, Counted]


def run_task(arguments: argparse.Namespace) -> int:
    """Runs `chulengo eval --task`; returns 0."""
    if arguments.task == "list":
        print(task_list())
        return 0
    from chulengo.evaluate.task_run import Seconds
    from chulengo.evaluate.task_scores import answer_metrics
    from chulengo.evaluate.tasks import load_task
    from chulengo.model.gpu_limit import give_back_memory

    check_task_arguments(arguments)
    if arguments.side == "tuned" and not arguments.adapter:
        raise ConfigError("--side tuned needs an adapter.", next_step="--adapter RUN")
    seconds = Seconds()
    task = load_task(arguments.task)
    if arguments.write_chats:
        return _write_chats(task, arguments)
    path = results_path(arguments.out)
    if path is not None:
        seconds.go_on(path)
    # a wrong encoder shows before an hour of answers
    metrics = answer_metrics(task, encoder=encoder_from(arguments, task))
    if path is None:
        print("note: without --out an evaluation that is interrupted starts again", file=sys.stderr)
    config = session_config(arguments)
    other = other_results(arguments, task)
    with seconds.measure("data"):
        data = read_data(task, config, arguments, prompts=True)
    note_slow_metric(task, data.items)
    settings = _settings(task, arguments)
    try:
        part = _models_part(task, data, settings, config, path, seconds, arguments)
        give_back_memory()
        sides = {name: _side(name, task, data, part, metrics, seconds, arguments) for name in part.about}
    except KeyboardInterrupt:
        if path is None:
            raise
        raise ChulengoError(
            "Stopped. What was finished is kept.", next_step="type the same again: the evaluation goes on"
        ) from None
    results = _results(task, data, sides, settings, part.renderer, other, seconds, arguments)
    if path is not None:
        from chulengo.evaluate.results import write_results

        write_results(path, results, indent=None)
        print(f"written to {path}", file=sys.stderr)
    _show(task, sides, results, seconds, arguments)
    return 0


def _write_chats(task: Task, arguments: argparse.Namespace) -> int:
    """Writes what the model is to say beside the very prompt that the task asks with, so that training sees no other.
    """
    from chulengo.data.selection import write_examples

    file = Path(arguments.write_chats)
    if file.exists():
        raise ConfigError(f"{file} is there already.", next_step="--write-chats with another file")
    data = read_data(task, session_config(arguments), arguments, prompts=True)
    if not data.talks:
        raise ConfigError(f"The task {task.name} has questions without answers, which nothing can be trained on.",
                          next_step="--task with another one   (chulengo eval --task list)")
    written = write_examples(file, (talk.example for talk in data.talks))
    print(f"{file}: {written:,} conversations of {data.facts['source']}"
          + (f", split {data.facts['split']}" if data.facts["split"] else ""), file=sys.stderr)
    return 0


def _settings(task: Task, arguments: argparse.Namespace) -> GenerationSettings:
    from chulengo.generate.settings import GenerationSettings

    return GenerationSettings(max_new_tokens=arguments.max_new_tokens or task.max_new_tokens)


def _models_part(
    task: Task, data: TaskData, settings: GenerationSettings, config: RunConfig, path: Path | None, seconds: Seconds,
    arguments: argparse.Namespace,
) -> _ModelsPart:
    """Loads the model, and returns its losses and answers; it is held here and nowhere else."""
    from chulengo.evaluate.task_run import Overlong, count_losses, generate_answers, model_settings, prompts_hash

    with seconds.measure("load_model"):
        session = session_from(arguments, config)
    names = ["base"] if not session.has_adapter else ["base", "tuned"] if arguments.side == "both" else [arguments.side]
    training = config.training
    overlong = Overlong(training.max_seq_tokens, training.overlong, training.allow_cut_end_of_turn)
    batch_size = arguments.batch_size
    common = {name: {"task": task.name, "items": prompts_hash(data.items), **model_settings(session, name)}
              for name in names}
    losses: dict[str, Counted] = {}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with memory_explained(f"--batch-size {max(1, batch_size // 2)}"):
        for name in names if task.loss_metrics else ():
            file = _file(path, f"losses-{name}.jsonl", {**common[name], "data": data.facts["hash"],
                                                        "window": [task.window, task.stride, task.bos]})
            losses[name] = count_losses(session, name, task, data, batch_size=batch_size, overlong=overlong,
                                        file=file, seconds=seconds)
        for name in names if task.answer_metrics else ():
            file = _file(path, f"predictions-{name}.jsonl", {**common[name], **settings.to_dict()})
            answers[name] = generate_answers(session, name, task, data.items, settings, batch_size=batch_size,
                                             file=file, seconds=seconds)
    about = {name: {"model": session.model_name, "adapter": str(session.adapter) if name == "tuned" else None,
                    "quantization": session.quantization, "style": session.renderer.style} for name in names}
    return _ModelsPart(about, session.renderer.fingerprint(), answers, losses)


def _file(path: Path | None, name: str, settings: dict[str, Any]) -> RowsFile | None:
    from chulengo.evaluate.predictions import RowsFile

    return None if path is None else RowsFile(path.with_name(name), settings)


def _side(
    name: str, task: Task, data: TaskData, part: _ModelsPart, metrics: tuple[list[Metric], dict[str, str]],
    seconds: Seconds, arguments: argparse.Namespace,
) -> Side:
    from chulengo.evaluate.scoring import score_all, score_counts
    from chulengo.evaluate.task_scores import Side, in_task_order, outcomes_of

    scores: list[Score] = []
    answers, losses = part.answers[name], part.losses.get(name)
    outcomes, unread = outcomes_of(task, data.items if answers else (), said := [
        (row["answer"], row["finish_reason"]) for row in answers
    ])
    draws, seed = arguments.draws, arguments.seed
    if losses is not None:
        scores += score_counts(losses.metrics, losses.ids, losses.groups, losses.counts, draws=draws, seed=seed)
    if outcomes:
        if any(row["finish_reason"] == "context" and not row["num_tokens"] for row in answers):
            full = [row["id"] for row in answers if row["finish_reason"] == "context" and not row["num_tokens"]]
            print(f"note: {len(full)} of {len(answers)} prompts do not fit the model's context and have no answer: "
                  f"{', '.join(full[:5])}", file=sys.stderr)
        with seconds.measure("metrics"):
            scores += score_all(metrics[0], outcomes, draws=draws, seed=seed, labels=task.labels)
    return Side(part.about[name], tuple(said), outcomes, unread, (), in_task_order(task, scores), metrics[1])


def _results(
    task: Task, data: TaskData, sides: dict[str, Side], settings: GenerationSettings, renderer: str,
    other: tuple[str, list[Any]] | None, seconds: Seconds, arguments: argparse.Namespace,
) -> dict[str, Any]:
    from chulengo.evaluate.one_answer import against_one_answer
    from chulengo.evaluate.task_scores import compared, results_of
    from chulengo.train.manifest import masked, versions

    draws, seed = arguments.draws, arguments.seed
    comparisons = []
    if len(sides) == 2:
        with seconds.measure("comparisons"):
            comparisons = compared(sides["base"].scores, sides["tuned"].scores, draws=draws, seed=seed)
    compared_with = None
    mine = sides.get("tuned") or sides["base"]
    one_answer = against_one_answer(task, mine.outcomes, mine.scores, draws=draws, seed=seed)
    if other is not None:
        found = compared(other[1], mine.scores, draws=draws, seed=seed)
        compared_with = {"results": arguments.compare_with, "side": other[0],
                         "comparisons": [comparison.to_dict() for comparison in found]}
    return results_of(
        task, data.items, data.facts, sides,
        settings={**settings.to_dict(), "batch_size": arguments.batch_size, "draws": draws, "draws_seed": seed,
                  "renderer": renderer},
        versions={**versions(), **counting_versions()}, seconds=seconds.summary(),
        command=masked(arguments.command), comparisons=comparisons, compared_with=compared_with,
        one_answer=one_answer.to_dict() if one_answer else None,
    )


def _show(
    task: Task, sides: dict[str, Side], results: dict[str, Any], seconds: Seconds, arguments: argparse.Namespace
) -> None:
    from chulengo.cli.score_view import comparisons_from, item_lines, one_side, show_one_answer, show_table, two_sides

    if arguments.json:
        print(json.dumps(results, ensure_ascii=False, allow_nan=False))
        return
    not_computed = results["not_computed"]
    comparisons = comparisons_from(results["comparisons"])
    if comparisons:
        show_table(two_sides(("base", "tuned"), comparisons, task.headline, not_computed))
    else:
        show_table(one_side(next(iter(sides.values())).scores, task.headline, not_computed))
    print("\n".join(item_lines(comparisons, task.headline)), end="\n" if comparisons else "")
    if "compared_with" in results:
        print(f"\nagainst {arguments.compare_with}:")
        others = comparisons_from(results["compared_with"]["comparisons"])
        show_table(two_sides(("theirs", "these"), others, task.headline, {}))
        print("\n".join(item_lines(others, task.headline)))
    show_one_answer(results.get("one_answer"), "tuned" if "tuned" in sides else "base")
    total, share = (results["seconds"][key] for key in ("total", "harness_share"))
    took = f"{seconds.now():.1f} s, {total:.1f} s with earlier runs" if seconds.before else f"{total:.1f} s"
    print(took + ("" if share is None else f", {share:.1%} of it outside the model"), file=sys.stderr)
