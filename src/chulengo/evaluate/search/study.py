"""The search itself: an Optuna study in one SQLite file, that goes on where it was left, trial for trial.

Which values. TPE, with a sampler made anew for each trial and seeded by (seed, ordinal of the trial). A sampler that is
kept draws from one stream of random numbers, and a resumed search would begin that stream again and repeat its first
trials; made anew, a search that was killed and resumed draws what the unbroken one draws.

When to give up on a trial. Each trial is scored at the same few *points* of its own course (a fifth, two fifths, …),
and compared with the others at the same point. Not at the same step: a run of four epochs still has a high learning
rate where a run of one epoch has annealed, so it would look worse than it ends.

What a killed process leaves. The trial that ran is marked failed, and its settings come first again; finished trials
stay. A trial whose process died `MAX_DEATHS` times (out of memory, usually) is not tried again. A trial that ends in an
error of its own (the loss is not finite, no room on the GPU) counts as pruned, so that TPE learns to stay away from it.

Limits. One process a study: the caller holds a lock on the folder. Several GPUs search faster by several studies.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chulengo.errors import ChulengoError, ConfigError, DoesNotFitError, TrainingError, require
from chulengo.evaluate.search.identity import check_same
from chulengo.evaluate.search.space import Dimension, short
from chulengo.train.interrupt import Interrupted

EXTRA = "train-extras"
NAME = "chulengo"
IDENTITY = "chulengo"
PRUNERS = ("median", "hyperband", "none")
STARTUP_TRIALS = 5  # complete ones before the median pruner may end any
FIRST_PRUNED_POINT = 2  # at the first, a short warm-up or a high rate still hides what a run is worth
RANDOM_TRIALS = 10  # before TPE models anything; Optuna's default
MAX_DEATHS = 2
MAX_FAILURES = 3  # in a row from the start: then it is not the settings

Report = Callable[[int, int, float], None]  # point (0: before the first), step, validation loss
RunTrial = Callable[[int, Mapping[str, Any], Report], float]


class TrialPruned(Exception):
    """Raised by a report to end a trial that is behind the others."""


class SearchStopped(TrainingError):
    """A search that was asked to stop; what is finished is in the study."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial as it is shown, plotted and written to `study.json`.

    Attributes:
        number: 0-based; a trial that was interrupted comes again under another number.
        params: its settings by key.
        value: the objective; None unless the trial was completed.
        state: complete, pruned, failed, interrupted or running.
        steps: (optimiser step, validation loss), the base's at step 0 first.
        points: validation loss by evaluation point, for the pruner.
        seconds: how long it took; None when unknown.
        failure: why it failed.
    """

    number: int
    params: Mapping[str, Any]
    value: float | None
    state: str
    steps: Sequence[tuple[int, float]] = ()
    points: Mapping[int, float] = field(default_factory=dict)
    seconds: float | None = None
    failure: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the trial as JSON."""
        return {
            "number": self.number, "params": dict(self.params), "value": self.value, "state": self.state,
            "steps": [[step, loss] for step, loss in self.steps], "seconds": self.seconds, "failure": self.failure,
        }


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """How a search goes.

    Attributes:
        dimensions: the space.
        num_trials: finished trials to reach, those before a resume included.
        pruner: one of PRUNERS.
        num_points: evaluation points of a trial.
        seed: of the sampler.
        first: settings of trial 0, what the configuration says; only those that the space holds are used.
    """

    dimensions: Sequence[Dimension]
    num_trials: int
    pruner: str
    num_points: int
    seed: int
    first: Mapping[str, Any]

    def first_text(self) -> str:
        """Returns what trial 0 is, in words: the configuration itself, or what of it the space does not hold."""
        outside = [f"{short(d.key)} {self.first.get(d.key)}" for d in self.dimensions if not self._holds(d)]
        if not outside:
            return "the configuration as it is"
        return f"not the configuration, which is outside the space: {', '.join(outside)}"

    def enqueued(self) -> dict[str, Any]:
        """Returns the settings of the configuration that the space holds, with which trial 0 is run."""
        return {d.key: self.first[d.key] for d in self.dimensions if self._holds(d)}

    def _holds(self, dimension: Dimension) -> bool:
        return dimension.holds(self.first.get(dimension.key))


def pruner_text(name: str, num_points: int) -> str:
    """Returns the rule by which trials are ended early, in words."""
    return {
        "median": f"median over {num_points} points: from {STARTUP_TRIALS} complete trials on, a trial whose best loss "
        f"so far is above the median of the complete ones at the same point, from point {FIRST_PRUNED_POINT} on, ends",
        "hyperband": f"hyperband over {num_points} points, reduction factor 3",
        "none": "none: every trial runs to its end",
    }[name]


def open_study(path: Path, identity: Mapping[str, Any], plan: SearchPlan) -> Any:
    """Returns the `optuna.Study` in the file, a new one when there is none, ready to go on.

    Raises:
        ConfigError: the file is no study, or that of another search.
        MissingPackageError: Optuna is not installed.
    """
    optuna = require("optuna", EXTRA)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _check_file(path)
    try:
        storage = optuna.storages.RDBStorage(
            "sqlite:///study.db",  # replaced by `creator`, which takes any path; a URL would trip over ? and %
            engine_kwargs={"creator": lambda: sqlite3.connect(path, timeout=30, check_same_thread=False)},
        )
        study = optuna.create_study(
            storage=storage, study_name=NAME, direction="minimize", load_if_exists=True,
            pruner=_pruner(plan.pruner, plan.num_points), sampler=optuna.samplers.RandomSampler(seed=0),
        )
        known = study.user_attrs.get(IDENTITY)
        if known is None and not study.trials:  # new, or killed before its first line
            study.set_user_attr(IDENTITY, dict(identity))
            if first := plan.enqueued():
                study.enqueue_trial(first)
            known = identity
    except (RuntimeError, sqlite3.Error, _database_error()) as error:
        raise ConfigError(
            f"{path} cannot be read as a study: {str(error).splitlines()[0]}",
            next_step=f"move {path} away, and the search begins anew",
        ) from error
    check_same(path, known, identity, "search")
    return study


def run_search(
    study: Any, plan: SearchPlan, run_trial: RunTrial, *, on_start: Callable[[Trial], None] = lambda _: None,
    on_report: Callable[[int, int, float], None] = lambda *_: None, on_end: Callable[[Trial], None] = lambda _: None,
    discard: Callable[[int], None] = lambda _: None,
) -> list[Trial]:
    """Returns all trials once `plan.num_trials` are finished.

    Args:
        study: as `open_study` returns it.
        plan: the same.
        run_trial: runs one trial and returns its value; it gets number, settings and a report function that it calls
            at each validation and that raises `TrialPruned`, which it lets pass.
        on_start: called with each trial before it runs.
        on_report: called with point, step and loss.
        on_end: called with each trial that ended.
        discard: called with the number of a trial that was interrupted and begins again.

    Raises:
        SearchStopped: Ctrl-C or SIGTERM; the running trial comes first when the search goes on.
        ChulengoError: something that would fail in every trial.
    """
    optuna = require("optuna", EXTRA)
    for stale in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        _release(study, stale, died=True)
        discard(stale.number)
    distributions = {each.key: _distribution(each) for each in plan.dimensions}
    trial = None
    try:
        while (ordinal := num_finished(study)) < plan.num_trials:
            study.sampler = optuna.samplers.TPESampler(seed=_trial_seed(plan.seed, ordinal),
                                                       n_startup_trials=RANDOM_TRIALS)
            trial = study.ask(distributions)
            on_start(_record(_frozen(study, trial.number)))
            _run_one(study, plan, trial, run_trial, on_report)
            ended, trial = trial.number, None
            on_end(_record(_frozen(study, ended)))
            _check_hopeless(trials_of(study))
    except (KeyboardInterrupt, ChulengoError) as error:
        running = _frozen(study, trial.number) if trial is not None else None
        if running is not None and running.state.is_finished():
            running = None
        if running is not None:
            _release(study, running, died=False)
            discard(running.number)
        if not asked_to_stop(error):
            raise
        where = f" in trial {running.number}, which begins again" if running is not None else ""
        raise SearchStopped(f"Stopped{where}. Finished trials kept: {num_finished(study)}.") from None
    return trials_of(study)


def trials_of(study: Any) -> list[Trial]:
    """Returns every trial that was begun, by number."""
    return [_record(each) for each in study.get_trials(deepcopy=False) if each.state.name != "WAITING"]


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """Returns the complete trial with the lowest value, the earliest of equals; None without one."""
    complete = [each for each in trials if each.state == "complete" and each.value is not None]
    return min(complete, key=lambda each: (each.value, each.number), default=None)


def num_finished(study: Any) -> int:
    """Returns how many trials need not be run any more: complete, pruned, failed, or given up after `MAX_DEATHS`."""
    repeated = _repeated(study)
    return sum(
        each.state.name in ("COMPLETE", "PRUNED")
        or (each.state.name == "FAIL" and bool(each.params) and each.number not in repeated)
        for each in study.get_trials(deepcopy=False)
    )


def _run_one(
    study: Any, plan: SearchPlan, trial: Any, run_trial: RunTrial, on_report: Callable[[int, int, float], None]
) -> None:
    pruned = require("optuna", EXTRA).trial.TrialState.PRUNED
    steps: list[list[float]] = []
    reported = [0]

    def report(point: int, step: int, loss: float) -> None:
        steps.append([step, loss])
        trial.set_user_attr("steps", steps)
        on_report(point, step, loss)
        if point > reported[-1]:
            reported.append(point)
            trial.report(loss, point)
            # never at the last point: nothing is saved by it, and the value would be lost
            if point < plan.num_points and trial.should_prune():
                raise TrialPruned

    try:
        value = run_trial(trial.number, trial.params, report)
    except TrialPruned:
        study.tell(trial, state=pruned)
    except (TrainingError, DoesNotFitError) as error:
        # a full disk or a stop says nothing about these settings
        if asked_to_stop(error) or isinstance(error.__cause__, OSError):
            raise
        trial.set_user_attr("failure", error.given)
        study.tell(trial, state=pruned)
    else:
        study.tell(trial, value)


def _release(study: Any, trial: Any, *, died: bool) -> None:
    """Marks a running trial failed and puts its settings first in the queue, unless its process died too often.

    In this order, so that a process killed in between does it again, and the settings are queued once.
    """
    fail = require("optuna", EXTRA).trial.TrialState.FAIL
    deaths = trial.user_attrs.get("deaths", 0) + died
    settings = trial.params or trial.system_attrs.get("fixed_params")
    if deaths < MAX_DEATHS and settings and trial.number not in _repeated(study):
        study.enqueue_trial(dict(settings), user_attrs={"deaths": deaths, "instead_of": trial.number})
    study.tell(trial.number, state=fail)


def _repeated(study: Any) -> set[int]:
    """Returns the numbers of the interrupted trials whose settings were queued again."""
    return {each.user_attrs["instead_of"] for each in study.get_trials(deepcopy=False)
            if "instead_of" in each.user_attrs}  # fmt: skip


def _check_hopeless(trials: Sequence[Trial]) -> None:
    begun = [each for each in trials if each.state != "interrupted"]
    if len(begun) == MAX_FAILURES and all(each.state == "failed" for each in begun):
        raise TrainingError(
            f"The first {MAX_FAILURES} trials all failed. The last one: {begun[-1].failure}",
            next_step="try the configuration by itself: chulengo train, with the same options",
        )


def asked_to_stop(error: BaseException) -> bool:
    """Returns whether somebody asked for it: a signal, also one that `train.finetune` reported in its own words."""
    return isinstance(error, KeyboardInterrupt | Interrupted) or isinstance(error.__context__, KeyboardInterrupt)


def _frozen(study: Any, number: int) -> Any:
    return study.get_trials(deepcopy=False)[number]


def _record(frozen: Any) -> Trial:
    failure = frozen.user_attrs.get("failure")
    state = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "interrupted"}.get(frozen.state.name, "running")
    took = frozen.duration
    return Trial(
        number=frozen.number, params=dict(frozen.params), state="failed" if failure else state, failure=failure,
        value=frozen.value if state == "complete" else None,
        steps=[(int(step), float(loss)) for step, loss in frozen.user_attrs.get("steps", [])],
        points=dict(frozen.intermediate_values), seconds=took.total_seconds() if took is not None else None,
    )


def _distribution(dimension: Dimension) -> Any:
    distributions = require("optuna", EXTRA).distributions
    if dimension.choices:
        return distributions.CategoricalDistribution(dimension.choices)
    kind = distributions.IntDistribution if dimension.integer else distributions.FloatDistribution
    return kind(dimension.low, dimension.high, log=dimension.log)


def _pruner(name: str, num_points: int) -> Any:
    pruners = require("optuna", EXTRA).pruners
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS, n_warmup_steps=FIRST_PRUNED_POINT)
    if name == "hyperband":
        return pruners.HyperbandPruner(min_resource=1, max_resource=num_points, reduction_factor=3)
    return pruners.NopPruner()


def _trial_seed(seed: int, ordinal: int) -> int:
    return (seed * 1_000_003 + ordinal) % 2**32


def _check_file(path: Path) -> None:
    """Raises `ConfigError` when the file is there and is no Optuna study; nothing is written into a stranger's file."""
    if not path.exists() or path.stat().st_size == 0:
        return
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            names = {row[0] for row in connection.execute("select name from sqlite_master where type = 'table'")}
            studies = [row[0] for row in connection.execute("select study_name from studies")] if names else []
    except sqlite3.Error as error:
        raise ConfigError(
            f"{path} is no study: {error}.", allowed="the study.db of a search, or none",
            next_step=f"move {path} away, or choose another --out",
        ) from error
    if studies not in ([], [NAME]):
        raise ConfigError(
            f"{path} holds other studies: {', '.join(studies[:5])}.", next_step="choose another --out",
        )


def _database_error() -> type[Exception]:
    error: type[Exception] = require("sqlalchemy.exc", EXTRA).SQLAlchemyError
    return error
