"""Predicts a run's peak memory by part, from the model's config alone, and says whether it fits and what would.

  chulengo plan --model nano --data nano-demo
  chulengo plan --config recipes/llama2_7b_guanaco_1gpu.yaml --device-memory 24GiB
  chulengo plan --model DIR --set training.max_seq_tokens=2048 --set training.gradient_checkpointing=true --json

Exit status 0 when it fits, 2 when it does not. No weight is read.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chulengo.cli.arguments import add_run_arguments, config_from
from chulengo.errors import ConfigError, DoesNotFitError

if TYPE_CHECKING:
    from chulengo.config import RunConfig
    from chulengo.model.plan import DeviceMemory, Plan, TrainingMemory

UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
         "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What the data says about a run.

    Attributes:
        rows: rows that are trained on.
        tokens: their tokens, one epoch.
        supervised_tokens: those of them that carry loss.
        longest_row: in tokens.
        steps: optimiser steps of the whole run.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    longest_row: int
    steps: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    add_run_arguments(parser)
    parser.add_argument("--device-memory", metavar="SIZE", help="plan for a GPU with this much free: 24GiB, 80GB")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan; raises `DoesNotFitError` after it when the run does not fit."""
    from chulengo.model.folder import read_config, resolve_model, weight_files
    from chulengo.model.plan import advice, does_not_fit, needed_bytes, predict_memory, smallest_change, stored_shapes

    given = None if arguments.device_memory is None else parse_size(arguments.device_memory)
    config = config_from(arguments)
    # of a Hub model the config is enough: nobody downloads 13 GB to learn that they do not fit
    folder = resolve_model(
        config.model.name, revision=config.model.revision, offline=config.model.offline, weights=False
    )
    model_config = read_config(folder)
    stored = stored_shapes(weight_files(folder)) if any(folder.glob("*.safetensors")) else None
    facts = _data_facts(config) if config.data.train else None
    device = _device(config, given)
    settings = _settings(config, model_config, device, facts)
    plan = predict_memory(model_config, settings, stored=stored)
    fits = needed_bytes(plan) <= device.free_bytes
    change = None if fits else smallest_change(model_config, settings, device.free_bytes)
    if arguments.json:
        print(json.dumps(_as_json(config, plan, device, settings, facts, fits, change), indent=2))
    else:
        _print(config, plan, device, settings, facts, fits)
    if not fits:
        raise DoesNotFitError(does_not_fit(plan, device), next_step=advice(change))
    return 0


def parse_size(text: str) -> int:
    """Returns the bytes that a size such as 24GiB, 80GB, 512M or 1000000 says; G alone is GiB.

    Raises:
        ConfigError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match.group(2).upper() not in UNITS or float(match.group(1)) <= 0:
        raise ConfigError(
            f"--device-memory {text!r} is no size.", allowed="a number with GiB, GB, MiB or MB",
            next_step="--device-memory 24GiB",
        )
    return int(float(match.group(1)) * UNITS[match.group(2).upper()])


def _device(config: RunConfig, given: int | None) -> DeviceMemory:
    from chulengo.model.plan import DeviceMemory, device_memory

    if given is None:
        return device_memory(config.model.device)
    kind = "cpu" if config.model.device == "cpu" else "cuda"
    return DeviceMemory("the planned device", kind, given, given)


def _settings(
    config: RunConfig, model_config: dict[str, Any], device: DeviceMemory, facts: DataFacts | None
) -> TrainingMemory:
    from chulengo.model.folder import usual_tokens
    from chulengo.model.plan import training_memory
    from chulengo.train.finetune import plan_settings

    limit = config.training.max_seq_tokens or usual_tokens(model_config)
    if limit is None and facts is None:
        raise ConfigError(
            "The model's config does not say how long its sequences may be.",
            next_step="--set training.max_seq_tokens=2048, or give --data",
        )
    # packs are full; padded rows are as long as the longest of the data
    full = facts is None or config.training.batching == "packed"
    longest = facts.longest_row if facts else limit
    assert longest is not None, "no limit and no data was refused above"
    tokens = limit if full and limit is not None else min(limit or longest, longest)
    return training_memory(device=device, **plan_settings(config, tokens))


def _data_facts(config: RunConfig) -> DataFacts:
    """Returns what the rendered rows say. The ledger's problems are left to `inspect` and `train`."""
    from chulengo.data.batches import EpochBatches, pack_rows, row_length
    from chulengo.train.finetune import prepare_inputs
    from chulengo.train.optimizer import num_steps

    inputs = prepare_inputs(config, weights=False)
    training, ledger = config.training, inputs.train.ledger
    lengths = [row_length(row) for row in inputs.train.rows]
    units = lengths
    if training.batching == "packed":
        packs = pack_rows(lengths, max_seq_tokens=inputs.max_seq_tokens, seed=training.seed)
        units = [sum(lengths[i] for i in pack) for pack in packs]
    batches = EpochBatches(
        units, batch_size=training.batch_size, accumulation=training.gradient_accumulation,
        by_length=training.batching == "group_by_length", seed=training.seed,
    )
    steps = num_steps(
        steps_per_epoch=batches.steps_per_epoch, epochs=training.epochs, max_steps=training.max_steps
    )
    return DataFacts(len(lengths), ledger.num_tokens, ledger.num_supervised_tokens, max(lengths, default=0), steps)


def _as_json(
    config: RunConfig, plan: Plan, device: DeviceMemory, settings: TrainingMemory, facts: DataFacts | None,
    fits: bool, change: tuple[tuple[str, ...], Plan] | None,
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "model": config.model.name, "fits": fits, "device": asdict(device), "plan": plan.to_dict(),
        "settings": asdict(settings), "data": asdict(facts) if facts else None,
        "smallest_change": list(change[0]) if change else None,
    }  # fmt: skip


def _print(
    config: RunConfig, plan: Plan, device: DeviceMemory, settings: TrainingMemory, facts: DataFacts | None, fits: bool
) -> None:
    from rich.console import Console

    from chulengo.model.plan import gib, needed_bytes

    console = Console(highlight=False)
    adapter = f", {plan.num_trainable:,} trained ({plan.num_trainable / plan.num_parameters:.2%})"
    size = f"{plan.num_parameters:,} parameters{adapter if plan.predicted else ''}"
    console.print(f"{config.model.name}: {size}", markup=False, soft_wrap=True)
    if plan.predicted:
        rows = f"{settings.batch_size} x {settings.row_tokens:,} tokens x {settings.gradient_accumulation}"
        how = f"{settings.quantization} weights, {settings.compute_dtype}, {rows}, rank {settings.rank}"
        console.print(f"{how}, {settings.optimizer}{', recompute' if settings.gradient_checkpointing else ''}")
    else:
        console.print(f"Cannot predict: {plan.reason}. This is the least it takes: the weights alone.", style="yellow")
    if facts:
        seen = f"{facts.steps:,} steps; one epoch: {facts.rows:,} rows, {facts.tokens:,} tokens"
        longest = f"longest row {facts.longest_row:,}"
        console.print(f"{seen} ({facts.supervised_tokens:,} with loss), {longest}", soft_wrap=True)
    console.print(_table(plan))
    for note in plan.notes:
        console.print(note, style="dim", soft_wrap=True)
    need = f"needs {gib(needed_bytes(plan))}, {device.name} has {gib(device.free_bytes)} free"
    verdict = "[green]fits[/]" if fits else "[red]does not fit[/]"
    tight = fits and plan.device_bytes > device.free_bytes
    slack = " (tight: the allocator will have to give back its slack)" if tight else ""
    console.print(f"{need}: {verdict}, {needed_bytes(plan) / max(1, device.free_bytes):.0%}{slack}", soft_wrap=True)


def _table(plan: Plan) -> Any:
    from rich.table import Table

    from chulengo.model.plan import gib

    table = Table(show_edge=False, pad_edge=False)
    table.add_column("part")
    for moment in plan.moments:
        peak = moment == plan.moment
        heading = f"{moment} (peak)" if peak and len(plan.moments) > 1 else moment
        table.add_column(heading, justify="right", style="bold" if peak else "dim", no_wrap=True)
    for name in dict.fromkeys(part for parts in plan.moments.values() for part in parts):
        table.add_row(name, *(gib(parts[name]) if name in parts else "" for parts in plan.moments.values()))
    table.add_section()
    table.add_row("tensors at once", *(gib(sum(parts.values())) for parts in plan.moments.values()))
    for name, size in plan.beside.items():
        table.add_row(f"+ {name}", *(gib(size) if moment == plan.moment else "" for moment in plan.moments))
    return table
