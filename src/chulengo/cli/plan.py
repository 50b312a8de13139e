"""Predicts a run's memory by part and its speed, from the model's config alone: whether it fits, and what would.

  chulengo plan --model nano --data nano-demo
  chulengo plan --config recipes/llama2_7b_guanaco_1gpu.yaml --device-memory 24GiB
  chulengo plan --model DIR --set training.max_seq_tokens=2048 --set training.gradient_checkpointing=true --json

Of a run that the fast engine covers, its policies are chosen here as `train` would choose them. Its speed is predicted
at rates measured on this machine's GPU, which takes a second, or, with --device-memory, at those of one H200.

Exit status 0 when it fits, 2 when it does not or when nothing is known of the model. No weight is read. Of an
architecture whose layers are not known the weights' headers give the least it takes, not whether it fits.
"""

from __future__ import annotations

import argparse
import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chulengo.cli.arguments import add_run_arguments, config_from
from chulengo.config.sizes import bytes_of
from chulengo.errors import ConfigError, DoesNotFitError, ModelError

if TYPE_CHECKING:
    from chulengo.config import RunConfig
    from chulengo.model.plan import DeviceMemory, Plan, TrainingMemory
    from chulengo.model.plan_fast import Policies
    from chulengo.model.plan_speed import DeviceRates, StepTime

LEAST_BYTES = 1 << 20  # of a planned device: below, somebody forgot the unit


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What the data says about a run.

    Attributes:
        rows: rows that are trained on.
        tokens: their tokens, one epoch.
        supervised_tokens: those of them that carry loss.
        longest_row: in tokens.
        steps: optimiser steps of the whole run.
        mean_tokens: of a row, or of a pack.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    longest_row: int
    steps: int
    mean_tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    add_run_arguments(parser)
    parser.add_argument("--device-memory", metavar="SIZE", help="plan for a GPU with this much free: 24GiB, 80GB")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


@dataclass(frozen=True, slots=True)
class RunForecast:
    """Everything that is predicted of a run.

    Attributes:
        engine: fast or reference.
        reason: why not the fast one; None when it is, or when the reference engine was asked for.
        plan: of the memory.
        policies: of the fast engine; None for the reference engine.
        step: time of a full micro-batch; None where no rates are known.
        run_seconds: of the whole training without validation; None without data or rates.
        rates: of the device; None: the speed is not predicted.
        fits: whether the memory suffices; None where only the least it takes is known, and that does.
        change: the smallest change with which it does.
        assumed: what is not known of a device that is not there, in words; None: of this machine's everything is.
    """

    engine: str
    reason: str | None
    plan: Plan
    policies: Policies | None
    step: StepTime | None
    run_seconds: float | None
    rates: DeviceRates | None
    fits: bool | None
    change: tuple[tuple[str, ...], Plan] | None
    assumed: str | None = None


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan; raises `DoesNotFitError` after it when the run does not fit."""
    from chulengo.model.folder import read_config, resolve_model, weight_files
    from chulengo.model.plan import advice, does_not_fit, stored_shapes

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
    forecast = _forecast(config, model_config, settings, device, facts, stored, planned=given is not None)
    if arguments.json:
        print(json.dumps(_as_json(config, forecast, device, settings, facts), indent=2))
    else:
        _print(config, forecast, device, settings, facts)
    if forecast.fits is False:
        raise DoesNotFitError(does_not_fit(forecast.plan, device), next_step=advice(forecast.change))
    if not forecast.plan.num_parameters:
        raise _nothing_known(config, model_config, forecast.plan)
    return 0


def _nothing_known(config: RunConfig, model_config: dict[str, Any], plan: Plan) -> ModelError:
    from pathlib import Path

    from chulengo.model.plan_shapes import FAMILY, read_shape

    name = config.model.name
    said = f"Whether this run fits cannot be said: {plan.reason}, and there are no weights whose sizes could be read."
    if read_shape(model_config) is not None:
        return ModelError(said, next_step="--set lora.targets=all-linear")
    folder = Path(name).expanduser()
    fetch = "" if folder.is_dir() else f"hf download {name} --local-dir {folder.name}, then: "
    return ModelError(
        said, allowed=f"a config.json alone of {', '.join(FAMILY)}; of others the *.safetensors beside it",
        next_step=f"{fetch}chulengo plan --model {name if folder.is_dir() else folder.name}"
        f"{'   (with its *.safetensors in that folder)' if folder.is_dir() else ''}",
    )  # fmt: skip


def _forecast(
    config: RunConfig, model_config: dict[str, Any], settings: TrainingMemory, device: DeviceMemory,
    facts: DataFacts | None, stored: Any, *, planned: bool,
) -> RunForecast:
    from chulengo.model.plan import needed_bytes, predict_memory, smallest_change
    from chulengo.model.plan_policies import plan_run, smallest_run_change
    from chulengo.model.plan_shapes import read_shape
    from chulengo.model.policy_checks import check_policies
    from chulengo.train.finetune import wanted_policies

    reason = _why_not_fast(config, model_config, settings, device, facts, planned=planned)
    assumed = functools.partial(_assumed, settings, device) if planned else lambda *_: None
    if config.model.engine == "reference" or reason is not None:
        plan = predict_memory(model_config, settings, stored=stored)
        enough = needed_bytes(plan) <= device.free_bytes
        change = None if enough else smallest_change(model_config, settings, device.free_bytes)
        fits = None if enough and not plan.predicted else enough
        return RunForecast("reference", reason, plan, None, None, None, None, fits, change, assumed(plan, None))
    wanted, shape = wanted_policies(config), read_shape(model_config)
    assert shape is not None, "the fast engine covers nothing else"
    check_policies(wanted, shape, device)
    found = plan_run(model_config, settings, device, wanted)
    enough = needed_bytes(found.plan) <= device.free_bytes
    change = None if enough else smallest_run_change(model_config, settings, device, wanted)
    rates = _rates(config, device, planned=planned)
    step, seconds = _times(model_config, settings, found.policies, rates, facts)
    assumption = assumed(found.plan, found.policies)
    return RunForecast("fast", None, found.plan, found.policies, step, seconds, rates, enough, change, assumption)


def _assumed(settings: TrainingMemory, device: DeviceMemory, plan: Plan, policies: Policies | None) -> str | None:
    """Returns what a plan takes for granted of a GPU of which only the memory is known, in one line."""
    if device.kind != "cuda":
        return None
    has = ["bfloat16"] if settings.compute_dtype == "bfloat16" else []
    if policies is not None and policies.fp8:
        has.append("products in FP8")
    least = "8.9" if len(has) > 1 else "8.0"
    said = [f"a GPU that has {' and '.join(has)} (compute capability {least} and above)"] if has else []
    if plan.host_bytes:
        said.append("room in the host's memory for what goes there, which was not looked at")
    return f"assumed: {', and '.join(said)}" if said else None


def _why_not_fast(
    config: RunConfig, model_config: dict[str, Any], settings: TrainingMemory, device: DeviceMemory,
    facts: DataFacts | None, *, planned: bool,
) -> str | None:
    """Returns why the fast engine does not cover this run, or None; also None when nobody asked.

    Raises:
        ConfigError: it was insisted on.
    """
    if config.model.engine == "reference":
        return None
    from dataclasses import asdict

    from chulengo.train.coverage import check_insisted, why_not_covered
    from chulengo.train.finetune import plan_settings

    reason = why_not_covered(
        model_config, lora=asdict(config.lora), longest_row=facts.longest_row if facts else settings.row_tokens,
        plan=plan_settings(config, settings.row_tokens), kind=device.kind, has_bf16=device.has_bf16,
        weights_policy=config.model.weights_policy,
    )
    if reason is None and device.kind == "cuda" and not planned:
        from chulengo.kernels import ops

        backend, why = ops.choose("cuda")
        reason = None if backend == "fused" else f"Its kernels do not run here: {why}."
    if reason is not None:
        check_insisted(config.model.engine, config.model.weights_policy, reason)
    return reason


def _rates(config: RunConfig, device: DeviceMemory, *, planned: bool) -> DeviceRates | None:
    from chulengo.model.plan_speed import H200

    if device.kind != "cuda":
        return None
    if planned:
        return H200
    from chulengo.model.load import resolve_device
    from chulengo.train.bench import measured_rates

    return measured_rates(resolve_device(config.model.device))


def _times(
    model_config: dict[str, Any], settings: TrainingMemory, policies: Policies, rates: DeviceRates | None,
    facts: DataFacts | None,
) -> tuple[StepTime | None, float | None]:
    """Returns the time of a full micro-batch, and of the run, whose micro-batches have the mean tokens of the data."""
    from chulengo.model.plan_shapes import read_shape
    from chulengo.model.plan_speed import predict_step, run_seconds

    shape = read_shape(model_config)
    if rates is None or shape is None:
        return None, None
    step = predict_step(shape, settings, policies, rates)
    if facts is None:
        return step, None
    return step, run_seconds(
        shape, settings, policies, rates, mean_tokens=facts.mean_tokens,
        micro_batches=facts.steps * settings.gradient_accumulation,
    )  # fmt: skip


def parse_size(text: str) -> int:
    """Returns the bytes that a size such as 24GiB, 80GB, 512M or 24000000000 says; G alone is GiB.

    Raises:
        ConfigError: it is no size, or so small that its unit is missing.
    """
    size = bytes_of(text)
    if size is None:
        raise ConfigError(
            f"--device-memory {text!r} is no size.", allowed="a number with GiB, GB, MiB or MB",
            next_step="--device-memory 24GiB",
        )
    if size < LEAST_BYTES:
        number = text.strip().rstrip("Bb").strip()
        raise ConfigError(
            f"--device-memory {text!r} is {size:,} bytes.", allowed="a number with GiB, GB, MiB or MB",
            next_step=f"--device-memory {number if number.isdecimal() else 24}GiB",
        )
    return size


def _device(config: RunConfig, given: int | None) -> DeviceMemory:
    from chulengo.model.plan import DeviceMemory, device_memory

    limit = bytes_of(config.model.gpu_memory_limit)
    if given is None:
        from chulengo.model.gpu_limit import limit_gpu_memory

        limit_gpu_memory(config.model.device, limit)
        return device_memory(config.model.device)
    kind = "cpu" if config.model.device == "cpu" else "cuda"
    given = given if limit is None else min(given, limit)
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
    return training_memory(device=device, **plan_settings(config, tokens, facts.mean_tokens if facts else None))


def _data_facts(config: RunConfig) -> DataFacts:
    """Returns what the rendered rows say. The ledger's problems are left to `inspect` and `train`."""
    from chulengo.data.batches import EpochBatches, mean_length, pack_rows, row_length
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
    return DataFacts(
        len(lengths), ledger.num_tokens, ledger.num_supervised_tokens, max(lengths, default=0), steps,
        mean_length(units),
    )


def _as_json(
    config: RunConfig, forecast: RunForecast, device: DeviceMemory, settings: TrainingMemory, facts: DataFacts | None
) -> dict[str, Any]:
    from dataclasses import asdict

    step, rates, policies = forecast.step, forecast.rates, forecast.policies
    return {
        "model": config.model.name, "fits": forecast.fits, "engine": forecast.engine, "reason": forecast.reason,
        "policies": policies.to_dict() if policies else None, "device": asdict(device), "assumed": forecast.assumed,
        "plan": forecast.plan.to_dict(), "settings": asdict(settings), "data": asdict(facts) if facts else None,
        "step": step.to_dict() if step else None, "run_seconds": forecast.run_seconds,
        "rates": asdict(rates) if rates else None,
        "smallest_change": list(forecast.change[0]) if forecast.change else None,
    }  # fmt: skip


def _print(
    config: RunConfig, forecast: RunForecast, device: DeviceMemory, settings: TrainingMemory, facts: DataFacts | None
) -> None:
    from rich.console import Console

    from chulengo.model.plan import room_line

    plan = forecast.plan
    console = Console(highlight=False)
    share = plan.num_trainable / max(1, plan.num_parameters)
    adapter = f", {plan.num_trainable:,} trained ({share:.2%})"
    count = f"{plan.num_parameters:,}" if plan.num_parameters else "an unknown number of"
    size = f"{count} parameters{adapter if plan.predicted else ''}"
    console.print(f"{config.model.name}: {size}", markup=False, soft_wrap=True)
    if plan.predicted:
        rows = f"{settings.batch_size} x {settings.row_tokens:,} tokens x {settings.gradient_accumulation}"
        held = "unquantised" if settings.quantization == "none" else settings.quantization
        how = f"{held} weights, {settings.compute_dtype}, {rows}, rank {settings.rank}"
        console.print(f"{how}, {settings.optimizer}{', recompute' if settings.gradient_checkpointing else ''}")
    else:
        least = " This is the least it takes: the weights alone." if plan.num_parameters else ""
        console.print(f"Cannot predict: {plan.reason}.{least}", style="yellow", markup=False, soft_wrap=True)
    if not plan.num_parameters:
        return
    console.print(_engine_line(forecast), markup=False, soft_wrap=True)
    if facts:
        seen = f"{facts.steps:,} steps; one epoch: {facts.rows:,} rows, {facts.tokens:,} tokens"
        longest = f"longest row {facts.longest_row:,}"
        console.print(f"{seen} ({facts.supervised_tokens:,} with loss), {longest}", soft_wrap=True)
    console.print(_table(plan))
    for note in (*plan.notes, *([forecast.assumed] if forecast.assumed else [])):
        console.print(note, style="dim", soft_wrap=True)
    verdict = {True: "[green]fits[/]", False: "[red]does not fit[/]", None: "cannot say whether it fits"}[forecast.fits]
    console.print(room_line(plan, device, verdict), soft_wrap=True)
    for line in _speed_lines(forecast, settings, facts):
        console.print(line, soft_wrap=True)


def _engine_line(forecast: RunForecast) -> str:
    if forecast.policies is not None:
        return f"fast engine: {forecast.policies.describe()}"
    return f"reference engine{f': {forecast.reason}' if forecast.reason else ''}"


def _speed_lines(forecast: RunForecast, settings: TrainingMemory, facts: DataFacts | None) -> list[str]:
    step, rates = forecast.step, forecast.rates
    if step is None or rates is None:
        where = "of the reference engine" if forecast.policies is None else "on a CPU"
        return [f"speed: not predicted {where}"]
    parts = ", ".join(f"{name} {1e3 * seconds:,.0f}" for name, seconds in step.parts.items() if seconds >= 5e-4)
    lines = [
        f"speed: {step.tokens_per_s:,.0f} tokens/s in full micro-batches of {step.tokens:,} tokens, {rates.source}",
        f"their {1e3 * step.seconds:,.0f} ms: {parts}",
    ]
    if facts is not None and forecast.run_seconds is not None:
        usual = settings.batch_size * facts.mean_tokens
        speed = facts.steps * settings.gradient_accumulation * usual / max(forecast.run_seconds, 1e-9)
        lines.append(
            f"the run: about {_duration(forecast.run_seconds)} for {facts.steps:,} steps in micro-batches of "
            f"{settings.batch_size} x {facts.mean_tokens:,} tokens on average, {speed:,.0f} tokens/s, without "
            "validation and saving"
        )
    return lines


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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
