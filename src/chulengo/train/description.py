"""What a run folder says of its run (config.yaml, manifest.json, ledger.json), and whether a resume is the same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from chulengo.errors import TrainingError
from chulengo.model.folder import weights_hash
from chulengo.train.inputs import Inputs
from chulengo.train.manifest import manifest
from chulengo.train.run_folder import RunPaths
from chulengo.train.whole_files import write_json, write_text


def write_description(
    paths: RunPaths, inputs: Inputs, *, text: str, settings: Mapping[str, Any], seeds: Mapping[str, int],
    asked: Mapping[str, str],
) -> None:
    """Writes ledger, manifest and configuration of a run that is about to start.

    Args:
        paths: of the run folder.
        inputs: what is trained on.
        text: the resolved configuration as YAML.
        settings: the same as `section.key` names and values.
        seeds: by name.
        asked: policies as they were given, by `section.key`; in `settings` they are resolved.
    """
    validation = inputs.validation
    write_json(paths.ledger, {
        "train": inputs.train.ledger.to_dict(), "load": inputs.train.report.to_dict(),
        "validation": validation.ledger.to_dict() if validation else None,
    })
    hashes = _hashes(inputs) | {"config": hashlib.sha256(text.encode()).hexdigest()}
    extra = {"config": dict(settings), "asked": dict(asked)}
    write_json(paths.manifest, manifest(hashes=hashes, seeds=seeds, extra=extra))
    write_text(paths.config, text)  # last: a folder with a config.yaml is a run


def add_to_manifest(paths: RunPaths, name: str, value: Any) -> None:
    """Adds an entry that is only known once weights are loaded."""
    entries = json.loads(paths.manifest.read_text(encoding="utf-8"))
    write_json(paths.manifest, entries | {name: value})


def check_same_run(
    paths: RunPaths, inputs: Inputs, *, settings: Mapping[str, Any],
    decisive: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> None:
    """Raises `TrainingError` naming every setting, or else every input, that is not what the run was started with.

    Args:
        paths: of the run folder.
        inputs: as they are now.
        settings: as they are now, by `section.key`.
        decisive: which of them must not differ.
    """
    try:
        started = json.loads(paths.manifest.read_text(encoding="utf-8"))
        before, hashes = dict(started["config"]), dict(started["hashes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{paths.manifest}, which says what the run was started with, cannot be read: {error}.",
            next_step="start a new run with another --out",
        ) from error
    is_now, was = decisive(settings), decisive(before)
    keys = sorted(key for key in is_now.keys() | was.keys() if is_now.get(key) != was.get(key))
    changed = [f"{key} was {before.get(key)!r}, now {settings.get(key)!r}" for key in keys]
    if changed:
        raise TrainingError(
            f"{paths.config} was edited after the run was started, so going on would be another run:"
            + "".join(f"\n  - {line}" for line in changed),
            allowed=f"edits of {', '.join(sorted(settings.keys() - is_now.keys()))}",
            next_step=f"put them back, or start a new run: chulengo train --config {paths.config} --out NEW",
        )
    names = {"model": "the model's weights", "renderer": "tokenizer or renderer", "data": "the training rows",
             "validation": "the validation rows"}  # fmt: skip
    same = _hashes(inputs)
    other = [names[key] for key in names if same.get(key) != hashes.get(key)]
    if other:
        raise TrainingError(
            f"The run {paths.root} was started with other inputs; changed since: {', '.join(other)}.",
            next_step="put them back, or start a new run with another --out",
        )


def _hashes(inputs: Inputs) -> dict[str, str]:
    hashes = {
        "model": weights_hash(inputs.folder), "renderer": inputs.renderer.fingerprint(),
        "data": inputs.train.fingerprint(),
    }  # fmt: skip
    return hashes if inputs.validation is None else hashes | {"validation": inputs.validation.fingerprint()}
