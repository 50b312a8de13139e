"""From settings to a short run: what may be searched, the configuration of a trial, and the trial itself.

A trial is `train.finetune` with another configuration, nothing more, so that its validation loss is, to the bit, the
one that `chulengo train --config OUT/best.yaml` reaches on the same machine. The base model is loaded for every trial:
taking an adapter off again leaves traces (a head that was trained in full stays in PEFT's model, autocast wrappers,
hooks of gradient checkpointing), and a trial that depends on its predecessors is no trial. The rendered rows, which do
not depend on the settings, are made once.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from chulengo.config import LoraConfig, RunConfig, TrainingConfig, load_config
from chulengo.config.load import flatten
from chulengo.errors import ConfigError
from chulengo.model.gpu_limit import give_back_memory

if TYPE_CHECKING:
    from chulengo.evaluate.search.space import Dimension
    from chulengo.train.finetune import RunResult
    from chulengo.train.inputs import Inputs

ROWS = "data.num_rows"
# they decide what the validation loss measures, which luck a run has, or only what is kept of it
NOT_SEARCHED = frozenset((
    "max_seq_tokens", "overlong", "allow_cut_end_of_turn", "log_every_steps", "eval_every_steps", "save_every_steps",
    "keep_checkpoints", "keep_best", "early_stopping_patience", "seed", "report_to",
))  # fmt: skip
NEVER = 10**9  # steps between checkpoints: a trial is short and begins again
Report = Callable[[int, int, float], None]


def searchable() -> dict[str, str]:
    """Returns the settings that may be searched, by key: "int", "float" or "other"."""
    kinds = {ROWS: "int"}
    for section, cls in (("lora", LoraConfig), ("training", TrainingConfig)):
        for name, hint in typing.get_type_hints(cls).items():
            if name not in NOT_SEARCHED:
                options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
                kinds[f"{section}.{name}"] = "int" if int in options else "float" if float in options else "other"
    return kinds


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """Returns the configuration with these settings by key; a name where a list of names is wanted becomes one."""
    for key, value in settings.items():
        section, _, name = key.partition(".")
        part: Any = getattr(config, section)
        fitted = (value,) if isinstance(getattr(part, name), tuple) and isinstance(value, str) else value
        replaced: Any = dataclasses.replace(part, **{name: fitted})
        config = dataclasses.replace(config, **{section: replaced})
    return config


def check_space(config: RunConfig, dimensions: Sequence[Dimension]) -> None:
    """Raises `ConfigError` when a value of the space is not allowed, or contradicts the configuration."""
    keys = {dimension.key for dimension in dimensions}
    for dimension in dimensions:
        for value in dimension.probes():
            load_config(None, [f"{dimension.key}={json.dumps(value)}"])
    winners = {"training.epochs": "training.max_steps", "training.warmup_ratio": "training.warmup_steps"}
    for searched, fixed in winners.items():
        if searched in keys and (flatten(config)[fixed] is not None or fixed in keys):
            raise ConfigError(
                f"{searched} is searched, but {fixed} says the same and wins.",
                next_step=f"--set {fixed}=null, or leave {searched} out of --space",
            )
    first = {dimension.key: dimension.probes()[0] for dimension in dimensions}
    load_config(None, overrides(with_settings(config, first), said=keys))


def overrides(config: RunConfig, said: Iterable[str] = ()) -> list[str]:
    """Returns the settings that differ from their defaults as `key=value`, and those of `said` in any case."""
    defaults = flatten(RunConfig())
    return [
        f"{key}={value if isinstance(value, str) and _is_plain(value) else json.dumps(value, ensure_ascii=False)}"
        for key, value in flatten(config).items() if (value != defaults[key] or key in said) and key != "out"
    ]


def recipe(config: RunConfig, comment: str) -> str:
    """Returns the settings that differ from their defaults as YAML, which `chulengo train --config` reads."""
    defaults, nested = flatten(RunConfig()), dict[str, dict[str, Any]]()
    for key, value in flatten(config).items():
        section, _, name = key.partition(".")
        if name and value != defaults[key]:
            nested.setdefault(section, {})[name] = value
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return head + str(yaml.safe_dump(nested, sort_keys=False, allow_unicode=True))


def fixed_split(config: RunConfig, inputs: Inputs, folder: Path) -> tuple[RunConfig, Inputs]:
    """Returns a configuration and its inputs in which the validation rows do not depend on `data.num_rows`.

    Where they are split off the training rows, both parts are written to `folder`, as they are after cleaning, and the
    configuration reads them there.

    Raises:
        ConfigError: the rows do not come back the same.
    """
    from chulengo.config import DataConfig
    from chulengo.data.selection import write_examples
    from chulengo.train.finetune import prepare_inputs

    assert inputs.validation is not None
    if config.data.validation is not None:
        return config, inputs
    parts = {"train": inputs.train, "validation": inputs.validation}
    for name, part in parts.items():
        write_examples(folder / f"{name}.jsonl", part.examples)
    data = DataConfig(
        train=str(folder / "train.jsonl"), validation=str(folder / "validation.jsonl"), seed=config.data.seed
    )
    prompt = dataclasses.replace(config.prompt, template=None)
    written = dataclasses.replace(config, data=data, prompt=prompt)
    again = prepare_inputs(written)
    same = again.validation is not None and all(
        part.fingerprint() == other.fingerprint()
        for part, other in zip(parts.values(), (again.train, again.validation), strict=True)
    )
    if not same:
        raise ConfigError(
            "The rows of this data set cannot be written and read back the same, which a search over sizes needs.",
            next_step="--set data.validation=FILE   (validation rows of their own)",
        )
    return written, again


def run_trial(
    config: RunConfig, inputs: Inputs, folder: Path, report: Report, *, num_points: int, keep_adapter: bool,
    message: Callable[[str], None], use: Callable[[RunResult], None] | None = None,
) -> float:
    """Returns the validation loss of one short run: the lowest of its points, or the last without `keep_best`.

    Args:
        config: of the trial.
        inputs: what it trains on.
        folder: its run folder; a run that was interrupted there before is removed.
        report: called with point (0: the base), step and loss; what it raises ends the run.
        num_points: evaluation points, evenly spread over the run.
        keep_adapter: leave the adapter and the last checkpoint there.
        message: called with sentences for the user.
        use: called with the finished run while its adapter, the best one, is still there.
    """
    from chulengo.train.finetune import finetune

    total, lowest = total_steps(config, inputs), config.training.keep_best
    config = _short_run(config, folder, eval_every=eval_every(total, num_points),
                        keep_best=lowest and (keep_adapter or use is not None))  # fmt: skip
    losses: list[float] = []

    def observe(row: Mapping[str, Any]) -> None:
        if row["kind"] == "validation":
            step = int(row["step"])
            losses.extend([float(row["loss"])] if step else [])
            report(min(num_points, step * num_points // total), step, float(row["loss"]))

    shutil.rmtree(folder, ignore_errors=True)
    # not behind a trial: while the exception of a pruned one is on its way, its frames hold the model
    give_back_memory()
    try:
        result = finetune(config, inputs=inputs, display=None, message=message, observe=observe)
        if use is not None:
            give_back_memory()
            use(result)
    finally:
        if not keep_adapter:
            for part in ("checkpoints", "adapter"):
                shutil.rmtree(folder / part, ignore_errors=True)
    return min(losses) if lowest else losses[-1]


def total_steps(config: RunConfig, inputs: Inputs) -> int:
    """Returns the optimiser steps of a run on one device."""
    from chulengo.data.batches import BatchPlan
    from chulengo.train.optimizer import num_steps

    training = config.training
    plan = BatchPlan(
        inputs.train.rows, packed=training.batching == "packed", max_seq_tokens=inputs.max_seq_tokens, pad_id=0,
        seed=training.seed,
    )
    per_epoch = -(-len(plan) // (training.batch_size * training.gradient_accumulation))
    return num_steps(steps_per_epoch=per_epoch, epochs=training.epochs, max_steps=training.max_steps)


def eval_every(total: int, num_points: int) -> int:
    """Returns the steps between validations: so many that one falls on every point, or soon after it.

    Where the points do not divide the steps there are a few validations more; the first behind a point counts for it.
    """
    return max(1, total // num_points)


def _short_run(config: RunConfig, folder: Path, *, eval_every: int, keep_best: bool) -> RunConfig:
    training = dataclasses.replace(
        config.training, eval_every_steps=eval_every, save_every_steps=NEVER, keep_checkpoints=1, keep_best=keep_best,
        report_to=(),
    )
    return dataclasses.replace(config, training=training, out=str(folder))


def _is_plain(text: str) -> bool:
    """Returns whether YAML reads the text as itself."""
    try:
        return bool(text) and yaml.safe_load(text) == text
    except yaml.YAMLError:
        return False
