"""Which rows of its data a run held out: what `eval --task` and `score` take by default, for the rest was trained on.

The run's configuration says which data it read and how it parted them, so its validation rows are found by parting
the data again; that they are the same rows is proved by the hash of them in the run's manifest. Data are compared by
the files that they are read from, so a folder that holds the training file among others is not new, and neither is one
file of a folder that was trained on, nor a copy under another name, which has the same bytes. Of other data all rows
are taken. The limit: of a copy that was written anew, or whose original is gone, nothing is known.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chulengo.errors import ChulengoError, DataError, ModelError, nearest

if TYPE_CHECKING:
    from chulengo.config import RunConfig
    from chulengo.evaluate.task_data import Choice
    from chulengo.evaluate.tasks import Task


def with_held_out(choice: Choice, task: Task, source: str, adapter: str) -> Choice:
    """Returns the choice with the rows that the adapter's run held out of the data, where they are what is meant.

    They are meant where no split is named and the task's own does not choose among the rows, and where the named one
    is a held-out part.

    Args:
        choice: what else is taken.
        task: names the splits.
        source: the data as given.
        adapter: a run folder, or the adapter in it.

    Raises:
        DataError: the run held out nothing of these data, or they have changed since.
        ModelError: there is no folder of this name.
    """
    from dataclasses import replace

    from chulengo.evaluate.task_data import chosen_split, split_files

    name, split = chosen_split(task, choice.split)
    if split.labels or split.without or (choice.split and not split.held_out):
        return choice
    files = split_files(source, name, split)
    whole = files == [source]
    run = _run_of(adapter)
    if run is None:
        if whole:
            print(f"note: {adapter} lies in no run, so which rows it was trained on is not known: they may be among "
                  "those that are scored", file=sys.stderr)
        return choice
    found = _held_out(run, source) if whole else None
    if found is None:
        found = _held_out_of_files(run, source, files)
    if found is None:
        return choice
    print(f"note: the {len(found):,} rows that {run} held out of {source} are scored, not those it was trained on "
          "(--split all takes every row)", file=sys.stderr)
    return replace(choice, held_out=found, held_out_by=str(run))


def note_trained_on(adapter: str | None, source: str) -> None:
    """Says so where a run was trained on these data, for a command that takes all of their rows."""
    run = _run_of(adapter) if adapter else None
    if run is not None and (_names(run, source)[0] or _shared_files(_config(run), [source])):
        print(f"note: {run} was trained on rows of {source}; with --task only those that it held out are scored",
              file=sys.stderr)


def _run_of(adapter: str) -> Path | None:
    """Returns the run folder of an adapter; None where it lies in none."""
    path = Path(adapter).expanduser()
    if not path.is_dir():
        siblings = [each.name for each in path.parent.iterdir() if each.is_dir()] if path.parent.is_dir() else []
        close = nearest(path.name, siblings)
        raise ModelError(f"There is no adapter folder {adapter!r}.", allowed="a run folder, or the adapter in one",
                         next_step=f"--adapter {path.parent / close}" if close else "ls runs")
    finished = (each for each in (path, path.parent) if (each / "adapter" / "adapter_config.json").is_file())
    return next((each for each in finished if (each / "config.yaml").is_file()), None)


def _held_out(run: Path, source: str) -> frozenset[str] | None:
    """Returns the sources of the rows that a run held out of its data; None where these are other data."""
    same, same_name, config = _names(run, source)
    if not same_name:
        return None
    if config.data.validation is None and _held_out_hash(run) is not None:
        try:
            found = _parted(run, config, source)
        except ChulengoError:
            if same:
                raise
            return None  # other data of that name, which cannot even be read as the run's were
        if found is None and same:
            raise DataError(
                f"{source} has changed since {run} was trained on it: which of its rows were held out is not known.",
                next_step="--data as it was, other data, or --split all (with the rows it was trained on)",
            )
        return found
    if not same:  # the same name in another folder
        return None
    raise _nothing_held_out(run, config, f"{source} and held out none of it")


def _held_out_of_files(run: Path, source: str, files: list[str]) -> frozenset[str] | None:
    """Returns the sources, as they are called now, of the held-out rows that lie in files that the run was trained on;
    None where it was trained on none of these files.
    """
    from chulengo.data.sources import file_of

    config = _config(run)
    shared = _shared_files(config, files)
    if not shared:
        return None
    named = ", ".join(dict.fromkeys(file.name for file in shared.values()))
    if config.data.validation is not None or _held_out_hash(run) is None:
        raise _nothing_held_out(run, config, f"{named} in {source} and held out none of it")
    apart = _parted(run, config, config.data.train)
    if apart is None:
        raise DataError(
            f"{source} holds rows that {run} was trained on ({named}), and {config.data.train} has changed since: "
            "which of its rows were held out is not known.",
            next_step="--data with rows that it has not seen, or --split all (with the rows it was trained on)",
        )
    now_called = {file: here for here, file in shared.items()}
    found = set()
    for row in apart:
        file = Path(file_of(row)).expanduser().resolve()
        if file in now_called:
            found.add(f"{now_called[file]}{row[len(file_of(row)):]}")
    if not found:
        raise _nothing_held_out(run, config, f"{named} in {source} and held out none of these rows")
    return frozenset(found)


def _nothing_held_out(run: Path, config: RunConfig, what: str) -> DataError:
    if config.data.validation is not None:
        return DataError(
            f"{run} was trained on {what}; it was validated on {config.data.validation}.",
            next_step=f"--data {config.data.validation}   (or --split all: the rows it was trained on)",
        )
    return DataError(
        f"{run} was trained on {what} (data.validation_fraction={config.data.validation_fraction:g}).",
        next_step="--data with rows that it has not seen   (or --split all: the rows it was trained on)",
    )


def _shared_files(config: RunConfig, files: list[str]) -> dict[Path, Path]:
    """Returns the files of these sources that the run was trained on, or copies of such: as called now -> resolved."""
    from chulengo.data.sources import files_of
    from chulengo.train.inputs import data_source
    from chulengo.train.whole_files import sha256_of

    trained_on = {file.resolve() for file in files_of(data_source(config.data.train))}
    by_size: dict[int, list[Path]] = {}
    for file in sorted(trained_on):
        by_size.setdefault(file.stat().st_size, []).append(file)
    hash_of = functools.cache(sha256_of)
    shared = {}
    for here in (file for each in files for file in files_of(data_source(each))):
        if here.resolve() in trained_on:
            shared[here] = here.resolve()
            continue
        alike = by_size.get(here.stat().st_size, [])
        same = (file for file in alike if hash_of(file) == hash_of(here))
        if (copy := next(same, None)) is not None:
            shared[here] = copy
    return shared


def _names(run: Path, source: str) -> tuple[bool, bool, RunConfig]:
    """Returns whether these are the data that a run names, whether their files have one name, and its configuration."""
    from chulengo.train.inputs import data_source

    config = _config(run)
    here, then = (Path(data_source(name)).expanduser() for name in (source, config.data.train))
    return here.resolve() == then.resolve(), here.name == then.name, config


def _config(run: Path) -> RunConfig:
    from chulengo.config import load_config

    return load_config(run / "config.yaml", saved=True)


def _parted(run: Path, config: RunConfig, source: str) -> frozenset[str] | None:
    """Returns the sources of the held-out rows; None where there are none, or others than in the run."""
    from chulengo.data.renderer import load_renderer
    from chulengo.data.tokenizer import load_tokenizer
    from chulengo.train.finetune import held_out_rows

    renderer = load_renderer(run / "adapter", load_tokenizer(run / "adapter"))
    rows = held_out_rows(config, source, renderer)
    if rows is None or rows.fingerprint() != _held_out_hash(run):
        return None
    return frozenset(example.source for example in rows.examples)


def _held_out_hash(run: Path) -> str | None:
    """Returns the hash of the validation rows that were split off in the run; None where there were none."""
    try:
        entries: dict[str, Any] = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
        found = entries["hashes"].get("validation")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{run}/manifest.json, which says what the run was trained on, cannot be read: {error!r:.200}.",
                        next_step="--split all, or other data") from error
    return None if found is None else str(found)
