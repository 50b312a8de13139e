"""Checkpoints that are whole or not there.

A checkpoint is written into a staging folder beside its place. When all files are there, a list of them with sizes and
sha256 goes into `complete.json`, everything is fsynced, and one rename puts the folder in its place. So a kill at any
moment leaves either the old state or the new one. What a rename cannot guard against (a disk that lies, a flipped bit,
a copy that broke off) the list finds: a checkpoint that does not match it is named and passed over for the one before.
Old checkpoints are removed only after the new one is in place; a full disk therefore never costs the last good one.

The cost: every byte of a checkpoint is hashed once when written and once when resumed, about a second a GB; adapters
and their optimiser states are some 100 MB for a 7B model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from chulengo.errors import TrainingError
from chulengo.train.whole_files import FULL, STAGING, open_to_readers, sha256_of, sync_folder

COMPLETE = "complete.json"
NAME = re.compile(r"checkpoint-(\d+)")


def write_checkpoint(
    folder: Path, step: int, write: Callable[[Path], None], *, keep: int, protect: Collection[int] = ()
) -> Path:
    """Returns the folder of the new checkpoint, complete and in place; removes those beyond `keep` after that.

    Args:
        folder: the run's `checkpoints` folder.
        step: optimiser steps done; the checkpoint is `checkpoint-<step>`.
        write: writes the files into the folder it is given.
        keep: how many of the newest to keep.
        protect: steps that are kept in any case (the best one).

    Raises:
        TrainingError: it could not be written (full disk, no permission); the checkpoints before are untouched.
    """
    target = folder / f"checkpoint-{step}"
    staging = folder / f"{STAGING}{step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_staging(folder)
        if defect(target) is None:
            return target  # a run interrupted right after a save; the state is the same
        staging.mkdir()
        write(staging)
        _seal(staging, step)
        open_to_readers(staging)
        if target.exists():
            shutil.rmtree(target)
        staging.replace(target)
        sync_folder(folder)
    except Exception as error:
        shutil.rmtree(staging, ignore_errors=True)
        problem = _write_problem(error, folder, target)
        if problem is None:
            raise
        raise problem from error
    _rotate(folder, keep, protect)
    return target


def newest_good(folder: Path, report: Callable[[str], None] = lambda _: None) -> Path | None:
    """Returns the newest checkpoint whose files are all as they were written, or None when there is none.

    Args:
        folder: the run's `checkpoints` folder.
        report: is told about each one that was passed over, and why.
    """
    for step in sorted(steps(folder), reverse=True):
        checkpoint = folder / f"checkpoint-{step}"
        reason = defect(checkpoint)
        if reason is None:
            return checkpoint
        report(f"{checkpoint.name} is damaged ({reason}); using the one before it.")
    return None


def steps(folder: Path) -> list[int]:
    """Returns the steps of all checkpoints in a folder, sorted, good or not."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for p in folder.iterdir() if (m := NAME.fullmatch(p.name)) and p.is_dir())


def defect(checkpoint: Path) -> str | None:
    """Returns what is wrong with a checkpoint, or None when every file is as it was written."""
    try:
        listed = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"no {COMPLETE}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"unreadable {COMPLETE}"
    for name, (size, digest) in expected.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes of {size:,}"
        if sha256_of(file) != digest:
            return f"{name} was changed"
    return None


def check_same_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises `TrainingError` naming every setting that is not what the run was started with."""
    plain = json.loads(json.dumps(now))
    changed = [key for key in sorted(saved.keys() | plain.keys()) if saved.get(key) != plain.get(key)]
    if changed:
        lines = [f"{key}: {_short(saved.get(key))} -> {_short(plain.get(key))}" for key in changed]
        raise TrainingError(
            f"This run was started with other settings, so going on would be another run: {'; '.join(lines)}.",
            next_step="resume with the settings in the run folder's config.yaml, or start a new run with --out",
        )


def _seal(staging: Path, step: int) -> None:
    files = {}
    for file in sorted(p for p in staging.rglob("*") if p.is_file()):
        files[file.relative_to(staging).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        _sync_file(file)
    complete = staging / COMPLETE
    complete.write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
    _sync_file(complete)
    for path in staging.rglob("*"):
        if path.is_dir():
            sync_folder(path)
    sync_folder(staging)


def _rotate(folder: Path, keep: int, protect: Collection[int]) -> None:
    kept = set(steps(folder)[-keep:]) | set(protect)
    for step in steps(folder):
        if step not in kept:
            # renamed first: a kill in mid-removal must not leave half a checkpoint under a checkpoint's name
            doomed = folder / f"{STAGING}old-{step}"
            (folder / f"checkpoint-{step}").replace(doomed)
            shutil.rmtree(doomed)


def _remove_staging(folder: Path) -> None:
    for path in folder.glob(f"{STAGING}*"):
        shutil.rmtree(path)


def _write_problem(error: Exception, folder: Path, target: Path) -> TrainingError | None:
    # torch and safetensors report a full disk as errors of their own, with the system's text in them at best
    left = shutil.disk_usage(folder).free if folder.is_dir() else 0
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    last = next((f"checkpoint-{s}" for s in reversed(steps(folder)) if folder / f"checkpoint-{s}" != target), None)
    kept = f"{folder / last} is untouched." if last else "There is no earlier checkpoint."
    writers_error = "file write failed" in text or "unexpected pos" in text or "PytorchStreamWriter" in text
    if number in FULL or "os error 28" in text or "os error 27" in text or "No space left" in text or writers_error:
        return TrainingError(
            f"The disk is full ({left / 2**20:,.0f} MB left): {target.name} could not be written. {kept}",
            next_step="free some space, then resume the run",
        )
    if isinstance(error, OSError):
        return TrainingError(f"{target} could not be written: {error.strerror or text}. {kept}")
    return None


def _sync_file(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
