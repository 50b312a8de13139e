"""The study: goes on where it was left, trial for trial; prunes; tells another search's file from its own."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from chulengo.errors import ConfigError, TrainingError
from chulengo.evaluate.search.space import dimension
from chulengo.evaluate.search.study import (
    FIRST_PRUNED_POINT,
    MAX_DEATHS,
    STARTUP_TRIALS,
    Report,
    SearchPlan,
    SearchStopped,
    Trial,
    best_of,
    num_finished,
    open_study,
    run_search,
    trials_of,
)

pytest.importorskip("optuna")

SPACE = (
    dimension("training.learning_rate", "1e-5..1e-1:log", "float"),
    dimension("lora.rank", "4,8,16", "int"),
    dimension("training.schedule", "linear,cosine", "other"),
)
FIRST = {"training.learning_rate": 1e-4, "lora.rank": 8, "training.schedule": "elsewhere"}
IDENTITY = {"format": "x", "space": {d.key: d.to_dict() for d in SPACE}, "config": {"a.b": 1}, "hashes": {"data": "1"}}


class Killed(BaseException):
    """What kill -9 leaves: no code of ours runs after it."""


def plan(num_trials: int, **changes: Any) -> SearchPlan:
    values = {"dimensions": SPACE, "pruner": "none", "num_points": 4, "seed": 3, "first": FIRST} | changes
    return SearchPlan(num_trials=num_trials, **values)


def bowl(number: int, settings: Mapping[str, Any], report: Report) -> float:
    """A loss with its lowest point at a learning rate of 1e-3 and rank 16, reached in two points."""
    value = (math.log10(settings["training.learning_rate"]) + 3) ** 2 + abs(settings["lora.rank"] - 16) / 16
    for point in (0, 2, 4):
        report(point, 10 * point, value + 4 - point)
    return value


def searched(path: Path, wanted: SearchPlan, run: Any = bowl) -> list[Trial]:
    return run_search(open_study(path, IDENTITY, wanted), wanted, run)


def finished(trials: list[Trial]) -> list[tuple[Any, ...]]:
    return [(dict(t.params), t.value, t.state) for t in trials if t.state in ("complete", "pruned", "failed")]


def ends_in(trial: int, how: BaseException) -> Any:
    """A run that ends in this way in the middle of one trial."""

    def run(number: int, settings: Mapping[str, Any], report: Report) -> float:
        if number == trial:
            report(1, 10, 9.0)
            raise how
        return bowl(number, settings, report)

    return run


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    """Twelve trials: the configuration, nine at random, two by TPE."""
    return searched(tmp_path_factory.mktemp("unbroken") / "study.db", plan(12))


def test_it_searches(unbroken: list[Trial]) -> None:
    assert [t.number for t in unbroken] == list(range(12))
    first = unbroken[0]
    assert (first.params["training.learning_rate"], first.params["lora.rank"]) == (1e-4, 8), "the configuration itself"
    assert first.steps == [(0, first.value + 4), (20, first.value + 2), (40, first.value)]
    assert dict(first.points) == {2: first.value + 2, 4: first.value}
    assert all(d.holds(t.params[d.key]) for t in unbroken for d in SPACE)
    assert len({t.params["training.learning_rate"] for t in unbroken}) == 12
    best = best_of(unbroken)
    assert best is not None
    assert best.value == min(t.value for t in unbroken if t.value is not None) < 1.0


def test_the_seed_decides(tmp_path: Path, unbroken: list[Trial]) -> None:
    assert finished(searched(tmp_path / "same.db", plan(3))) == finished(unbroken)[:3]
    other = finished(searched(tmp_path / "other.db", plan(3, seed=4)))
    assert other[0] != other[1] != finished(unbroken)[1]


@pytest.mark.parametrize("broken_at", [0, 11])
def test_killed_and_resumed_is_the_unbroken_search(tmp_path: Path, unbroken: list[Trial], broken_at: int) -> None:
    path = tmp_path / "study.db"
    with pytest.raises(Killed):
        searched(path, plan(12), ends_in(broken_at, Killed()))
    discarded: list[int] = []
    study = open_study(path, IDENTITY, plan(12))
    assert trials_of(study)[broken_at].state == "running"
    trials = run_search(study, plan(12), bowl, discard=discarded.append)
    assert discarded == [broken_at]
    assert trials[broken_at].state == "interrupted"
    assert len(trials) == 13
    assert finished(trials) == finished(unbroken)


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path, unbroken: list[Trial]) -> None:
    path = tmp_path / "study.db"
    with pytest.raises(SearchStopped, match=r"Stopped in trial 4, which begins again\. Finished trials kept: 4\."):
        searched(path, plan(12), ends_in(4, KeyboardInterrupt()))
    study = open_study(path, IDENTITY, plan(12))
    assert [t.state for t in trials_of(study)] == ["complete"] * 4 + ["interrupted"]
    assert num_finished(study) == 4
    assert finished(run_search(study, plan(6), bowl)) == finished(unbroken)[:6]


def test_a_trial_that_kills_its_process_is_given_up(tmp_path: Path) -> None:
    path, deadly = tmp_path / "study.db", FIRST["training.learning_rate"]

    def run(number: int, settings: Mapping[str, Any], report: Report) -> float:
        if settings["training.learning_rate"] == deadly:
            raise Killed
        return bowl(number, settings, report)

    for _ in range(MAX_DEATHS):
        with pytest.raises(Killed):
            searched(path, plan(4), run)
    trials = searched(path, plan(4), run)
    assert [t.state for t in trials] == ["interrupted"] * MAX_DEATHS + ["complete"] * 3
    assert len({t.params["training.learning_rate"] for t in trials}) == 4, "the same is not proposed again"


def test_the_pruner_ends_what_is_behind(tmp_path: Path) -> None:
    asked: list[int] = []

    def run(number: int, settings: Mapping[str, Any], report: Report) -> float:
        loss = 9.0 if number == STARTUP_TRIALS else 1.0 + number / 100
        for point in range(1, 5):
            asked.append(number)
            report(point, point, loss)
        return loss

    trials = searched(tmp_path / "study.db", plan(STARTUP_TRIALS + 1, pruner="median"), run)
    assert [t.state for t in trials] == ["complete"] * STARTUP_TRIALS + ["pruned"]
    assert asked.count(STARTUP_TRIALS) == FIRST_PRUNED_POINT
    assert trials[-1].value is None
    assert best_of(trials) == trials[0]
    kept = searched(tmp_path / "none.db", plan(STARTUP_TRIALS + 1), run)
    assert {t.state for t in kept} == {"complete"}


def test_hyperband_runs(tmp_path: Path) -> None:
    trials = searched(tmp_path / "study.db", plan(6, pruner="hyperband"))
    assert {t.state for t in trials} <= {"complete", "pruned"}
    assert len(trials) == 6


def test_a_trial_that_fails_costs_itself_only(tmp_path: Path) -> None:
    def run(number: int, settings: Mapping[str, Any], report: Report) -> float:
        if number == 1:
            raise TrainingError("The loss is nan at step 3; the run was stopped.")
        return bowl(number, settings, report)

    trials = searched(tmp_path / "study.db", plan(3), run)
    assert [t.state for t in trials] == ["complete", "failed", "complete"]
    assert trials[1].failure == "The loss is nan at step 3; the run was stopped."
    assert trials[1].value is None


def test_when_it_is_not_the_settings(tmp_path: Path) -> None:
    def nan(number: int, settings: Mapping[str, Any], report: Report) -> float:
        raise TrainingError("The loss is nan.")

    def full(number: int, settings: Mapping[str, Any], report: Report) -> float:
        raise TrainingError("No space left.") from OSError(28, "No space left")

    def impossible(number: int, settings: Mapping[str, Any], report: Report) -> float:
        raise ConfigError("No such module.")

    with pytest.raises(TrainingError, match=r"The first 3 trials all failed. The last one: The loss is nan\."):
        searched(tmp_path / "nan.db", plan(9), nan)
    for name, run in (("full", full), ("impossible", impossible)):
        with pytest.raises((TrainingError, ConfigError), match="No "):
            searched(tmp_path / f"{name}.db", plan(9), run)
        again = searched(tmp_path / f"{name}.db", plan(2))
        assert [t.state for t in again] == ["interrupted", "complete", "complete"], "the settings are tried again"
        assert again[1].params == again[0].params


def test_more_trials_go_on(tmp_path: Path, unbroken: list[Trial]) -> None:
    path = tmp_path / "study.db"
    searched(path, plan(5))
    assert finished(searched(path, plan(12))) == finished(unbroken)
    assert len(searched(path, plan(3))) == 12, "enough already: nothing is run"


def test_another_search_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    searched(path, plan(1))
    before = path.read_bytes()
    other = {
        **IDENTITY, "config": {"a.b": 2}, "hashes": {"data": "2"},
        "space": IDENTITY["space"] | {"lora.rank": {"choices": [4, 8]}},
    }  # fmt: skip
    with pytest.raises(ConfigError) as refused:
        open_study(path, other, plan(1))
    said = str(refused.value)
    assert "belongs to another search" in said
    assert [line.strip() for line in said.splitlines() if line.startswith("  - ")] == [
        "- lora.rank was 4,8,16, now 4,8", "- a.b was 1, now 2", "- the training rows changed",
    ]  # fmt: skip
    assert f"chulengo search --resume {tmp_path}" in said
    assert path.read_bytes() == before


def test_files_that_are_no_study_of_ours(tmp_path: Path) -> None:
    import optuna

    text, foreign, torn = tmp_path / "text.db", tmp_path / "foreign.db", tmp_path / "torn.db"
    text.write_text("hello, " * 50)
    with sqlite3.connect(foreign) as connection:
        connection.execute("create table users (name)")
    connection.close()
    searched(torn, plan(1))
    torn.write_bytes(torn.read_bytes()[:5000])
    optuna.create_study(storage=f"sqlite:///{tmp_path / 'else.db'}", study_name="somebody's")
    mine = optuna.create_study(storage=f"sqlite:///{tmp_path / 'same name.db'}", study_name="chulengo")
    mine.tell(mine.ask(), 1.0)
    for name, said in (("text.db", "is no study"), ("foreign.db", "is no study"), ("torn.db", "study"),
                       ("else.db", "holds other studies: somebody's"), ("same name.db", "not written by")):  # fmt: skip
        before = (tmp_path / name).read_bytes()
        with pytest.raises(ConfigError, match=said):
            open_study(tmp_path / name, IDENTITY, plan(1))
        assert (tmp_path / name).read_bytes() == before or name == "same name.db"


def test_any_path_will_do(tmp_path: Path) -> None:
    path = tmp_path / "a?b %20 {SCHEMA_VERSION} ü" / "study.db"
    path.parent.mkdir()
    searched(path, plan(1))
    assert path.is_file()
    assert len(searched(path, plan(2))) == 2


def test_a_process_killed_before_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.touch()
    assert [t.state for t in searched(path, plan(1))] == ["complete"]
