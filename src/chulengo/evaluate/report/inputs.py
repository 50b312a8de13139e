"""What a report is made from: the files of a run folder and of evaluations, read and checked.

A missing file makes a part of the report say "not measured"; a broken one is an error, because a report that leaves
out what it could not read looks like one of a run that had nothing there. Which run an evaluation belongs to is
checked too: scores of another adapter beside these loss curves would be a lie that nobody could see.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from chulengo.errors import ChulengoError, DataError, yaml_fault
from chulengo.evaluate.report.demo import as_results
from chulengo.evaluate.results import RESULTS_FILE, RESULTS_FORMAT
from chulengo.evaluate.task_scores import main_side
from chulengo.train.metrics import MetricsFile
from chulengo.train.run_folder import RunPaths

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """The files of one run folder; empty where the run did not write them.

    Attributes:
        folder: the run folder.
        config: every setting of config.yaml by its full name.
        manifest: manifest.json.
        ledger: ledger.json.
        outcome: result.json; empty while the run is not finished.
        metrics: the rows of metrics.jsonl.
        adapter: adapter/adapter_config.json.
        study: search/study.json.
        curve: search/curve.json, the sample-size curve.
    """

    folder: Path
    config: Json = field(default_factory=dict)
    manifest: Json = field(default_factory=dict)
    ledger: Json = field(default_factory=dict)
    outcome: Json = field(default_factory=dict)
    metrics: list[Json] = field(default_factory=list)
    adapter: Json = field(default_factory=dict)
    study: Json = field(default_factory=dict)
    curve: Json = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name


@dataclass(frozen=True, slots=True)
class Results:
    """One evaluation, as `chulengo eval --task` and `chulengo score` write it.

    Attributes:
        path: the file.
        content: the whole of it.
        sides: the names of what was compared, base first.
        scores: side -> its scores.
        comparisons: tuned against base, one a metric.
        examples: question, references and each side's answer.
        other: the evaluation that this one was compared with, where it is still as it was then.
    """

    path: Path
    content: Json
    sides: tuple[str, ...]
    scores: dict[str, list[Json]]
    comparisons: list[Json]
    examples: list[Json]
    other: Results | None = None

    @property
    def task(self) -> str:
        """What the evaluation is called."""
        return str(self.content.get("task") or self.path.parent.name)


def read_run(folder: Path) -> Run:
    """Returns what a run folder holds.

    Raises:
        ChulengoError: it is no run folder.
        DataError: a file in it is broken.
    """
    paths = RunPaths(Path(folder))
    if not paths.config.is_file():
        if not paths.root.exists():
            what = "does not exist"
        else:
            what = "holds no run (no config.yaml)" if paths.root.is_dir() else "is a file"
        if (paths.root / RESULTS_FILE).is_file():
            instead = f"chulengo report --results {paths.root} --out REPORT.html   (a report of that evaluation alone)"
        else:
            instead = "ls runs, then chulengo report runs/<name> --out REPORT.html"
        raise ChulengoError(
            f"{paths.root} {what}, so there is no run to report on.",
            allowed="a folder that `chulengo train` wrote", next_step=instead,
        )
    return Run(
        folder=paths.root, config=_read_config(paths.config), manifest=_read_object(paths.manifest),
        ledger=_read_object(paths.ledger), outcome=_read_object(paths.root / "result.json"),
        metrics=MetricsFile(paths.metrics).rows(), adapter=_read_object(paths.adapter / "adapter_config.json"),
        study=_read_object(paths.root / "search" / "study.json"),
        curve=_read_object(paths.root / "search" / "curve.json"),
    )


def read_results(path: Path) -> Results:
    """Returns one evaluation.

    Args:
        path: the folder that `chulengo eval --out` wrote, or the results.json in it.

    Raises:
        DataError: there is none, or it is broken.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"There are no results in {path}." if path.is_dir() else f"There is no {path}.",
            allowed=f"a folder with {RESULTS_FILE}, as `chulengo eval --task … --out` writes it",
            next_step="chulengo eval --adapter RUN --task TASK --data FILE --out DIR",
        )
    content = _read_object(file)
    fault = _fault(content)
    if fault:
        raise DataError(
            f"{file} is not a results file: {fault}.", allowed=f"JSON of the form {RESULTS_FORMAT}",
            next_step="chulengo eval --adapter RUN --task TASK --data FILE --out DIR   (writes one)",
        )
    found = _results(file, content)
    return replace(found, other=_compared_with(found))


def _compared_with(results: Results) -> Results | None:
    """Returns the evaluation that these results were compared with; None where it is gone, or holds other scores now.
    """
    said = results.content.get("compared_with")
    if not isinstance(said, dict) or not isinstance(said.get("results"), str):
        return None
    named = Path(said["results"])
    beside = results.path.parent.parent / (named.parent.name if named.name == RESULTS_FILE else named.name)
    for place in (named, beside):
        file = place / RESULTS_FILE if place.is_dir() else place
        try:
            content = _read_object(file)
        except DataError:
            continue
        if not content or _fault(content):
            continue
        other = _results(file, content)
        values = {score["name"]: score.get("value") for score in other.scores[main_side(content)]}
        compared = [row for row in said.get("comparisons") or [] if isinstance(row, dict)]
        if compared and all(values.get(row.get("name")) == row.get("base") for row in compared):
            return other
    return None


def _results(file: Path, content: Json) -> Results:
    scores: dict[str, list[Json]] = content["scores"]
    sides = tuple(sorted(scores, key=lambda side: {"base": 0, "tuned": 1}.get(side, 2)))
    return Results(file, content, sides, scores, content.get("comparisons") or [], content.get("examples") or [])


def results_in(run: Run) -> list[Results]:
    """Returns the evaluations that lie in the run folder: results/ and its subfolders, by name.

    `chulengo demo` leaves its own scores and answers instead; they are read as one evaluation.
    """
    folder = run.folder / "results"
    found = [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]
    results = [read_results(path) for path in found if (path / RESULTS_FILE).is_file()]
    own = run.folder / "scores.json"
    if not results and own.is_file():
        content = as_results(_read_object(own), run.config.get("data.validation") or run.config.get("data.train"))
        return [] if content is None else [_results(own, content)]
    return results


def check_same_run(run: Run, results: Results) -> None:
    """Raises `DataError` when the results are of another adapter than this run's."""
    sides = results.content.get("sides") or {}
    adapters = [side["adapter"] for side in sides.values() if isinstance(side, dict) and side.get("adapter")]
    if not adapters or any(_is_of(run, str(adapter)) for adapter in adapters):
        return
    raise DataError(
        f"{results.path} holds results of another run: they were made with the adapter {adapters[-1]}.",
        allowed=f"results of {run.folder}",
        next_step=f"chulengo eval --adapter {run.folder} --task {results.task} --data FILE --out DIR",
    )


def _is_of(run: Run, adapter: str) -> bool:
    """Returns whether an adapter's path is this run's: the same place, or a place of that name that moved here."""
    own = {run.folder.resolve(), RunPaths(run.folder.resolve()).adapter}
    named = Path(adapter)
    if named.resolve() in own:
        return True
    last = named.parent.name if named.name == "adapter" else named.name
    return not named.exists() and last == run.name


def _read_object(path: Path) -> Json:
    """Returns the JSON object in a file; {} where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.", next_step=f"ls -l {path}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is broken: {error}.", allowed="one JSON object",
            next_step=f"make it again, or delete it: the report then says what is missing (rm {path})",
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}.", allowed="one JSON object",
                        next_step=f"rm {path}   (the report then says what is missing)")
    return content


def _read_config(path: Path) -> Json:
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is broken: {yaml_fault(error)}.", allowed="the YAML that `chulengo train` wrote",
                        next_step="restore it from a copy; manifest.json lists the same settings") from error
    if not isinstance(sections, dict):
        raise DataError(f"{path} holds no settings.", allowed="the YAML that `chulengo train` wrote",
                        next_step="restore it from a copy; manifest.json lists the same settings")
    flat: Json = {}
    for name, value in sections.items():
        inner = value.items() if isinstance(value, dict) else ()
        flat |= {f"{name}.{key}": item for key, item in inner} if inner else {str(name): value}
    return flat


def _fault(content: Json) -> str | None:
    """Returns why a results file cannot be used, or None."""
    if content.get("format") != RESULTS_FORMAT:
        given = content.get("format")
        return f"it says format {given!r}" if given else "it does not say its format"
    scores = content.get("scores")
    if not isinstance(scores, dict) or not scores:
        return "it has no scores"
    for side, found in scores.items():
        if not _are_objects(found) or not all(isinstance(score.get("name"), str) for score in found):
            return f"scores.{side} is not a list of scores with a name each"
    for part in ("comparisons", "examples"):
        if not _are_objects(content.get(part) or []):
            return f"{part} is not a list of objects"
    if not all(isinstance(row.get("name"), str) for row in content.get("comparisons") or []):
        return "a comparison has no name"
    if not isinstance(content.get("sides") or {}, dict):
        return "sides is not an object"
    return None


def _are_objects(rows: Any) -> bool:
    return isinstance(rows, Sequence) and not isinstance(rows, str) and all(isinstance(row, dict) for row in rows)


