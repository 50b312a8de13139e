"""What `eval --task` and `score` share: the options that name a task, and how data and settings are read for it."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chulengo.errors import ConfigError

if TYPE_CHECKING:
    from chulengo.config import RunConfig
    from chulengo.evaluate.task_data import Choice, TaskData
    from chulengo.evaluate.task_items import Item
    from chulengo.evaluate.tasks import Task

DEFAULT_DRAWS, DEFAULT_SEED = 10_000, 0
COUNTING_PACKAGES = ("numpy", "sacrebleu", "rouge-score", "scikit-learn")


def add_task_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Adds --task, --split, --encoder, --compare-with, --draws and --seed."""
    parser.add_argument("--task", metavar="T", required=required,
                        help="a built-in task, a YAML file, or list (shows the built-in ones)")
    parser.add_argument("--split", metavar="S",
                        help="which of the task's splits; all: every row (default: the task's; of the data that the "
                             "adapter was trained on, the rows that its run held out)")
    parser.add_argument("--encoder", metavar="FOLDER", help="text encoder for BERTScore; without one it is left out")
    parser.add_argument("--compare-with", metavar="RESULTS", help="results of another evaluation, on the same items")
    parser.add_argument("--draws", type=int, default=DEFAULT_DRAWS, metavar="N",
                        help="resampled sets behind an interval (default: 10000)")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, metavar="N", help="of the draws (default: 0)")


def check_task_arguments(arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for numbers that are not allowed."""
    if arguments.draws < 0:
        raise ConfigError(f"--draws is {arguments.draws}.", allowed="0 (no bootstrap intervals) or more",
                          next_step="--draws 10000")
    if arguments.seed < 0:
        raise ConfigError(f"--seed is {arguments.seed}.", allowed="0 or more", next_step="--seed 0")


def task_list() -> str:
    """Returns the built-in tasks, a line each, with the folder that holds their files."""
    from chulengo.evaluate.tasks import TASK_FILES, builtin_tasks, load_task

    tasks = [load_task(name) for name in builtin_tasks()]
    width = max(len(task.name) for task in tasks)
    lines = [f"{task.name:<{width}}  {task.description}  (headline: {task.headline or 'none'})" for task in tasks]
    return "\n".join([*lines, "", f"files to copy from: {TASK_FILES}"])


def choice_from(config: RunConfig, arguments: argparse.Namespace) -> Choice:
    """Returns what of the data is taken, as the options and the configuration say."""
    from chulengo.data.prompts import load_template
    from chulengo.evaluate.task_data import Choice

    data = config.data
    return Choice(
        split=arguments.split, format=None if data.format == "auto" else data.format, columns=data.columns,
        template=load_template(config.prompt.template) if config.prompt.template else None, cleaning=data.cleaning,
        num_rows=data.num_rows, seed=data.seed, offline=config.model.offline,
    )


def read_data(task: Task, config: RunConfig, arguments: argparse.Namespace, *, prompts: bool) -> TaskData:
    """Returns the items of the task; of the data that an adapter was trained on, those that its run held out.

    Raises:
        ConfigError: no data were named.
        DataError: see `task_data.read_task_data` and `held_out.with_held_out`.
    """
    from chulengo.cli.held_out import with_held_out
    from chulengo.evaluate.task_data import read_task_data
    from chulengo.train.inputs import data_source

    if not arguments.data:
        raise ConfigError(f"No data for the task {task.name}.", next_step="--data FILE")
    source, choice = data_source(arguments.data), choice_from(config, arguments)
    if arguments.adapter:
        choice = with_held_out(choice, task, source, arguments.adapter)
    data = read_task_data(task, source, choice, prompts=prompts)
    asked, found = data.facts["num_rows"], data.facts["rows"]
    if asked is not None and found < asked:
        cleaned = " after cleaning" if data.facts["cleaning"] else ""
        print(f"note: {asked:,} rows are asked for; there are {found:,}{cleaned}, and all are taken", file=sys.stderr)
    return data


def encoder_from(arguments: argparse.Namespace, task: Task) -> Path | None:
    """Returns the encoder's folder; says so where the task has no use for it.

    Raises:
        ModelError: the folder holds no encoder.
    """
    if not arguments.encoder:
        return None
    from chulengo.evaluate.metrics.bertscore import check_encoder

    folder = Path(arguments.encoder)
    check_encoder(folder)
    if not any(name.startswith("bertscore_") for name in task.answer_metrics):
        print(f"note: the task {task.name} has no BERTScore, so --encoder changes nothing", file=sys.stderr)
    return folder


def note_slow_metric(task: Task, items: Sequence[Item]) -> None:
    """Says how long TER may take, where that is over a minute; no built-in task has it."""
    from chulengo.evaluate.metrics.overlap import ter_seconds

    if "ter" not in task.answer_metrics:
        return
    seconds = sum(ter_seconds(len(item.references[0].split())) for item in items if item.references)
    if seconds > 60:
        print(f"note: ter may take {seconds / 60:,.0f} minutes for these {len(items):,} answers; a task without it "
              "is scored at once", file=sys.stderr)


def counting_versions() -> dict[str, str | None]:
    """Returns the versions of this package and of those that count, None where one is not installed."""
    import chulengo

    found: dict[str, str | None] = {"chulengo": chulengo.__version__}
    for name in COUNTING_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@contextmanager
def without_collector() -> Iterator[None]:
    """Switches the garbage collector off for a block that makes millions of small objects, none of them in a cycle.

    Reading 100,000 SQuAD questions takes 1.1 s so, and 4.2 s with the collector walking over all of them again and
    again.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def results_path(out: str | None) -> Path | None:
    """Returns the results file in the folder that --out names.

    Raises:
        ConfigError: it is a file.
    """
    from chulengo.evaluate.results import RESULTS_FILE

    if out is None:
        return None
    folder = Path(out)
    if folder.is_file() or folder.suffix == ".json":
        raise ConfigError(f"--out {out} is a file; the results of a task are a folder.",
                          next_step=f"--out {folder.with_suffix('') if folder.suffix else str(folder) + '-results'}")
    return folder / RESULTS_FILE


def other_results(arguments: argparse.Namespace, task: Task) -> tuple[str, list[Any]] | None:
    """Returns side and scores of the results that --compare-with names, read before anything expensive is done."""
    from chulengo.evaluate.results import read_results
    from chulengo.evaluate.task_scores import stored_side

    if not arguments.compare_with:
        return None
    return stored_side(read_results(Path(arguments.compare_with)), task.name, arguments.compare_with)
