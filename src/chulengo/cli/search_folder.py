"""The folder of a search: where its files lie, what it is a search of, and what is needed to go on with it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from chulengo.config import RunConfig, to_yaml
from chulengo.config.load import flatten
from chulengo.errors import ChulengoError, ConfigError

if TYPE_CHECKING:
    from chulengo.train.inputs import Inputs


@dataclass(frozen=True, slots=True)
class Folder:
    """Where the files of one search or one curve lie; a folder may hold one of each."""

    root: Path
    kind: str

    @property
    def record(self) -> Path:
        """What is finished: the study, or the curve's runs."""
        return self.root / ("study.db" if self.kind == "search" else "curve.jsonl")

    @property
    def options(self) -> Path:
        """The options, to go on with."""
        return self.root / f"{self.kind}.yaml"

    @property
    def base(self) -> Path:
        """The configuration that is varied."""
        return self.root / f"{self.kind}-base.yaml"

    @property
    def runs(self) -> Path:
        """The folder of the runs' folders."""
        return self.root / ("trials" if self.kind == "search" else "sizes")

    @property
    def data(self) -> Path:
        """Rows that were split off, when sizes are varied."""
        return self.root / f"{self.kind}-data"

    def plots(self) -> tuple[Path, Path]:
        """Returns where the picture goes, as PNG and as SVG."""
        return self.root / "plots" / f"{self.kind}.png", self.root / "plots" / f"{self.kind}.svg"


def keep_request(folder: Folder, config: RunConfig, options: Mapping[str, Any]) -> None:
    """Writes options and configuration, so that `--resume` needs no more than the folder."""
    from chulengo.train.run_folder import write_text

    write_text(folder.options, yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True))
    write_text(folder.base, to_yaml(config))


def searched_inputs(config: RunConfig) -> Inputs:
    """Returns the rows; raises when they have problems, or when there are none to validate on."""
    from chulengo.train.finetune import prepare_inputs
    from chulengo.train.inputs import check_rows

    inputs = prepare_inputs(config)
    check_rows(inputs)
    if not validation_rows(inputs):
        raise ConfigError("A search needs validation rows, and there are none.",
                          next_step="--set data.validation_fraction=0.1, or --set data.validation=FILE")
    return inputs


def validation_rows(inputs: Inputs) -> Sequence[Any]:
    """Returns the rendered validation rows, none when there are none."""
    return inputs.validation.rows if inputs.validation is not None else ()


def identity_of(config: RunConfig, inputs: Inputs, skip: Sequence[str] = ()) -> dict[str, Any]:
    """Returns what makes this search this one; the names of data files are not part of it, their rows are."""
    from chulengo.model.folder import weights_hash
    from chulengo.train.resume import decisive

    assert inputs.validation is not None
    left_out = {*skip, "data.train", "data.validation", "training.eval_every_steps"}
    return {
        "format": "chulengo-search/1",
        "config": {key: value for key, value in decisive(flatten(config)).items() if key not in left_out},
        "hashes": {
            "model": weights_hash(inputs.folder), "renderer": inputs.renderer.fingerprint(),
            "data": inputs.train.fingerprint(), "validation": inputs.validation.fingerprint(),
        },
    }  # fmt: skip


def with_way_on(error: ChulengoError, folder: Folder) -> ChulengoError:
    """Returns the error; one that says that the search was stopped names the command that goes on."""
    from chulengo.evaluate.search.study import SearchStopped

    if isinstance(error, SearchStopped):
        sizes = " --sample-sizes all" if folder.kind == "curve" and (folder.root / "search.yaml").exists() else ""
        error.advise(f"chulengo search --resume {shlex.quote(str(folder.root))}{sizes}")
    return error


def title_of(config: RunConfig) -> str:
    """Returns what is searched, in a few words."""
    return f"{config.model.name} on {Path(config.data.train).name}"
