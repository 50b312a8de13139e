"""`chulengo search` over hyper-parameters: the trials of one study, and what is written and printed of them."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chulengo.cli.search_folder import (
    Folder,
    identity_of,
    keep_request,
    searched_inputs,
    title_of,
    validation_rows,
    with_way_on,
)
from chulengo.cli.search_trials import (
    ROWS,
    check_space,
    eval_every,
    fixed_split,
    overrides,
    recipe,
    run_trial,
    searchable,
    total_steps,
    with_settings,
)
from chulengo.config import RunConfig
from chulengo.config.load import flatten
from chulengo.errors import ChulengoError, ConfigError

if TYPE_CHECKING:
    from chulengo.evaluate.search.progress import SearchProgress
    from chulengo.evaluate.search.space import Dimension
    from chulengo.evaluate.search.study import SearchPlan, Trial
    from chulengo.train.inputs import Inputs



def search(config: RunConfig, options: dict[str, Any], folder: Folder) -> None:
    """Runs the trials that are missing, then writes and prints the best."""
    from chulengo.evaluate.search.progress import search_progress
    from chulengo.evaluate.search.study import SearchPlan, best_of, open_study, pruner_text, run_search, trials_of

    inputs = searched_inputs(config)
    dimensions = _dimensions(config, options, num_rows=len(inputs.train.examples) or inputs.train.report.rows_kept)
    check_space(config, dimensions)
    searches_rows = any(dimension.key == ROWS for dimension in dimensions)
    plan = SearchPlan(dimensions, options["trials"], options["pruner"], options["points"], options["seed"],
                      first=flatten(config))  # fmt: skip
    identity = identity_of(config, inputs, skip=[d.key for d in dimensions]) | {
        "objective": "validation loss, lowest of the points" if config.training.keep_best else "validation loss, last",
        "space": {d.key: d.to_dict() for d in dimensions}, "pruner": plan.pruner, "seed": plan.seed,
        "points": plan.num_points,
    }
    study = open_study(folder.record, json.loads(json.dumps(identity)), plan)
    options["space"] = {d.key: list(d.choices) or {"low": d.low, "high": d.high, "log": d.log} for d in dimensions}
    keep_request(folder, config, options)
    varied = fixed_split(config, inputs, folder.data) if searches_rows else (config, inputs)
    with search_progress(plan.num_points) as shown:
        shown.line(f"search in {folder.root}: TPE (seed {plan.seed}) to {plan.num_trials} trials, "
                   f"{len(validation_rows(inputs))} validation rows")  # fmt: skip
        shown.line(f"pruner: {pruner_text(plan.pruner, plan.num_points)}")
        for dimension in dimensions:
            shown.line(f"  {dimension.key} = {dimension.text()}")
        runner = _Trials(*varied, folder, plan, options["keep_adapters"], shown)
        for known in trials_of(study):
            shown.trial(known)
        try:
            trials = run_search(
                study, plan, runner.run, on_report=shown.report, discard=runner.discard,
                on_start=lambda trial: shown.start(f"trial {trial.number}"),
                on_end=lambda trial: runner.ended(trial, trials_of(study)),
            )
        except ChulengoError as error:
            _write_study(folder, plan, trials_of(study), config)
            raise with_way_on(error, folder) from error
    _write_study(folder, plan, trials, config)
    best = best_of(trials)
    if best is None:
        raise ChulengoError(f"None of {len(trials)} trials was completed.",
                            next_step="a narrower --space, in another --out")  # fmt: skip
    _show_best(folder, trials, best, *varied, plan)


@dataclass(frozen=True, slots=True)
class _Trials:
    """Runs the trials of one search."""

    config: RunConfig
    inputs: Inputs
    folder: Folder
    plan: SearchPlan
    keep_adapters: bool
    shown: SearchProgress

    def run(self, number: int, settings: Mapping[str, Any], report: Any) -> float:
        """Returns the value of one trial."""
        from chulengo.train.finetune import prepare_inputs

        config = with_settings(self.config, settings)
        inputs = prepare_inputs(config) if ROWS in settings else self.inputs
        return run_trial(
            config, inputs, self._place(number), report, num_points=self.plan.num_points,
            keep_adapter=self.keep_adapters, message=self.shown.message,
        )

    def discard(self, number: int) -> None:
        """Removes what an interrupted trial left."""
        shutil.rmtree(self._place(number), ignore_errors=True)

    def ended(self, trial: Trial, trials: Sequence[Trial]) -> None:
        """Prints a trial's line and writes study.json anew."""
        self.shown.trial(trial, self.plan.first_text() if trial.number == 0 else "")
        _write_json(self.folder, self.plan, trials)

    def _place(self, number: int) -> Path:
        return self.folder.runs / f"{number:04d}"


def _dimensions(config: RunConfig, options: Mapping[str, Any], *, num_rows: int) -> list[Dimension]:
    from chulengo.evaluate.search.space import default_specs, dimension, read_space

    space, kinds = options["space"], searchable()
    if isinstance(space, Mapping):  # of a search that goes on
        found = [dimension(key, spec, kinds[key]) for key, spec in space.items()]
    else:
        defaults = default_specs(flatten(config), num_rows)
        if config.training.max_steps is not None:
            del defaults["epochs"]  # there is nothing to vary: max_steps says how long to train
        found = read_space(space or [], kinds, defaults)
    for each in found:
        most = each.high if each.key == ROWS and not each.choices else max(each.choices, default=0)
        if each.key == ROWS and most is not None and most > num_rows:
            raise ConfigError(f"{ROWS} up to {most:,} is searched; there are {num_rows:,} rows to train on.",
                              next_step=f"--space rows={max(1, num_rows // 8)}..{num_rows}:log")  # fmt: skip
    return found


def _write_json(folder: Folder, plan: SearchPlan, trials: Sequence[Trial]) -> None:
    from chulengo.evaluate.search.study import best_of, pruner_text
    from chulengo.train.run_folder import write_json

    best = best_of(trials)
    write_json(folder.root / "study.json", {
        "format": "chulengo-study/1", "metric": "validation loss", "unit": "nats a token", "sampler": "TPE",
        "seed": plan.seed, "pruner": pruner_text(plan.pruner, plan.num_points), "points": plan.num_points,
        "space": {d.key: d.to_dict() for d in plan.dimensions}, "trials": [trial.to_dict() for trial in trials],
        "best": None if best is None else {"number": best.number, "params": dict(best.params), "value": best.value},
    })  # fmt: skip


def _write_study(folder: Folder, plan: SearchPlan, trials: Sequence[Trial], config: RunConfig) -> None:
    from chulengo.evaluate.search.plots import plot_search

    _write_json(folder, plan, trials)
    if trials:
        plot_search(trials, plan.dimensions, *folder.plots(), title=title_of(config))


def _show_best(
    folder: Folder, trials: Sequence[Trial], best: Trial, config: RunConfig, inputs: Inputs, plan: SearchPlan
) -> None:
    from chulengo.evaluate.search.progress import counts_text, print_table, trial_table
    from chulengo.train.finetune import prepare_inputs
    from chulengo.train.run_folder import write_text

    chosen = with_settings(config, best.params)
    rows = prepare_inputs(chosen) if ROWS in best.params else inputs
    every = eval_every(total_steps(chosen, rows), plan.num_points)
    chosen = with_settings(chosen, {"training.eval_every_steps": every})  # the same points, so the same step is kept
    file = folder.root / "best.yaml"
    complete = sum(trial.state == "complete" for trial in trials)
    of = f"{complete} complete trial{'s' if complete > 1 else ''}"
    of += f" (of {len(trials)})" if complete < len(trials) else ""
    write_text(file, recipe(chosen, f"The best of {of}: number {best.number}, validation loss "
                                    f"{best.value:.6g}.\n  chulengo train --config {shlex.quote(str(file))}"))
    print()
    print_table(trial_table(trials))
    print(f"\n{counts_text(trials)}")
    print("The best of many looks better than it is: score it on rows that no trial saw (chulengo eval).")
    print(f"Plot: {folder.plots()[0]}   every trial: {folder.root / 'study.json'}")
    words = "".join(f" --set {shlex.quote(word)}" for word in overrides(chosen))
    print(f"\nNext: chulengo train --config {shlex.quote(str(file))}\nwhich is the same as\n  chulengo train{words}")
