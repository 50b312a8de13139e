"""The recipe: from a configuration to a scored adapter in a run folder. Reads top to bottom.

`prepare_inputs` is the half without weights (also behind `inspect` and `plan`); `finetune` is the other half. The base
model is scored at step 0, before the first update: a fresh LoRA adds exactly nothing, so this *is* the base, on the
same rows and by the same code as every later validation score.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chulengo.config import RunConfig, to_yaml
from chulengo.config.load import flatten
from chulengo.data.batches import mean_length, pad_token, row_length
from chulengo.data.load import LoadReport, load_examples, stream_examples
from chulengo.data.prompts import load_template
from chulengo.data.renderer import Renderer
from chulengo.data.selection import split_by_conversation
from chulengo.data.types import Example
from chulengo.errors import ChulengoError, DoesNotFitError
from chulengo.model.base_record import BaseRecord
from chulengo.model.folder import length_note, resolve_model, weight_files, weights_hash
from chulengo.train.adapter_folder import write_adapter_folder
from chulengo.train.description import add_to_manifest, check_same_run, write_description
from chulengo.train.inputs import (
    ExampleStream,
    Inputs,
    RowPolicy,
    RowSet,
    check_rows,
    data_source,
    open_renderer,
    render_all,
    render_stream,
    sequence_limit,
)
from chulengo.train.interrupt import libraries_loading
from chulengo.train.metrics import MetricsFile
from chulengo.train.no_room import NoRoomInStepError, step_advice
from chulengo.train.open_folder import opened_folder
from chulengo.train.ranks import Ranks, joined
from chulengo.train.reports import check_reports
from chulengo.train.resume import CHOSEN_ANEW, advise_resumed, decisive
from chulengo.train.run_folder import RunPaths, refuse_used
from chulengo.train.whole_files import explained, write_json

if TYPE_CHECKING:
    from chulengo.model.plan import Plan
    from chulengo.model.plan_policies import Wanted
    from chulengo.train.engine import EngineChoice
    from chulengo.train.progress import LiveProgress
    from chulengo.train.trainer import TrainOutcome


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run.

    Attributes:
        paths: where everything lies.
        inputs: what it was trained on.
        outcome: how training went.
        base_loss: validation loss of the base, nats a supervised token; None without validation rows.
        tuned_loss: the same for the weights that were kept.
        planned_peak_bytes: what the plan said of `outcome.peak_bytes`; None where the two cannot be compared: on a CPU,
            and for models whose layers the plan does not know.
    """

    paths: RunPaths
    inputs: Inputs
    outcome: TrainOutcome
    base_loss: float | None
    tuned_loss: float | None
    planned_peak_bytes: int | None = None


def prepare_inputs(config: RunConfig, *, split: bool = True, weights: bool = True) -> Inputs:
    """Returns tokenizer, renderer, rendered rows and their ledgers. Loads no weights and imports no torch.

    Args:
        config: the run.
        split: whether validation rows are split off (or read); False: all rows are in `train`.
        weights: whether the model's weights must be there too; a tokenizer is enough to look at data.

    Raises:
        ChulengoError: the model folder or the data cannot be used. Problems with rows are in the ledgers: see
            `data.ledger.check`.
    """
    model, data, prompt, training = config.model, config.data, config.prompt, config.training
    folder = resolve_model(model.name, revision=model.revision, offline=model.offline, weights=weights)
    model_config, tokenizer, renderer = open_renderer(
        folder, style=prompt.style, system=prompt.system, train_on=prompt.train_on,
        train_roles=prompt.train_roles, train_end_of_turn=prompt.train_end_of_turn,
    )
    wanted = training.max_seq_tokens or (None if model_config else tokenizer.model_max_tokens)
    limit = sequence_limit(wanted, model_config)
    policy = RowPolicy(limit, training.overlong, training.allow_cut_end_of_turn)
    if data.streaming:
        train = render_stream(_stream_examples(config), renderer, policy)
        held_out = read_examples(config, data.validation) if split and data.validation else None
        validation = render_all(*held_out, renderer, policy) if held_out else None
        return Inputs(folder, model_config, tokenizer, renderer, limit, train, validation)
    examples, report = read_examples(config, data.train, num_rows=data.num_rows)
    validation = None
    if split and data.validation is not None:
        validation = render_all(*read_examples(config, data.validation), renderer, policy)
    elif split and data.validation_fraction > 0:
        examples, apart = split_by_conversation(examples, data.validation_fraction, data.seed)
        validation = render_all(apart, report, renderer, policy) if apart else None
    train = render_all(examples, report, renderer, policy)
    return Inputs(folder, model_config, tokenizer, renderer, limit, train, validation)


def held_out_rows(config: RunConfig, source: str, renderer: Renderer) -> RowSet | None:
    """Returns the validation rows that a run of this configuration splits off a source; None where it splits off none.

    Args:
        config: of the run, resolved.
        source: what it was trained on, as it is called now.
        renderer: of the run.
    """
    data, training = config.data, config.training
    if data.validation is not None or data.validation_fraction == 0 or data.streaming:
        return None
    examples, report = read_examples(config, source, num_rows=data.num_rows)
    apart = split_by_conversation(examples, data.validation_fraction, data.seed)[1]
    assert training.max_seq_tokens is not None  # it is resolved
    policy = RowPolicy(training.max_seq_tokens, training.overlong, training.allow_cut_end_of_turn)
    return render_all(apart, report, renderer, policy) if apart else None


def read_examples(config: RunConfig, source: str, *, num_rows: int | None = None) -> tuple[list[Example], LoadReport]:
    """Returns the conversations of one source, read as the configuration says, and the report of it.

    Answers that the data label as undesirable (KTO rows) are left out and counted: they are no examples to follow.
    """
    examples, report = load_examples(data_source(source), num_rows=num_rows, **_reading(config))
    kept = [example for example in examples if example.desirable is not False]
    if len(kept) < len(examples):
        dropped = report.dropped | {"labelled undesirable": len(examples) - len(kept)}
        report = dataclasses.replace(report, rows_kept=len(kept), dropped=dropped)
    return kept, report


def _stream_examples(config: RunConfig) -> ExampleStream:
    reports: list[LoadReport] = []
    examples = stream_examples(
        data_source(config.data.train), num_rows=config.data.num_rows, on_report=reports.append, **_reading(config)
    )
    return ExampleStream((e for e in examples if e.desirable is not False), lambda: reports[0])


def _reading(config: RunConfig) -> dict[str, Any]:
    data = config.data
    return {
        "format": data.format, "columns": data.columns, "hub_split": data.hub_split, "offline": config.model.offline,
        "template": load_template(config.prompt.template) if config.prompt.template else None,
        "cleaning": data.cleaning, "seed": data.seed, "drop_duplicates": data.drop_duplicates,
    }


def finetune(
    config: RunConfig,
    *,
    resume: bool = False,
    inputs: Inputs | None = None,
    display: LiveProgress | None = None,
    message: Callable[[str], None] = print,
    observe: Callable[[dict[str, Any]], None] | None = None,
) -> RunResult:
    """Runs one fine-tuning from data to a saved adapter, or goes on with one.

    Args:
        config: the run; with `resume`, the one in the run folder, its policies as they were asked for.
        resume: go on in `config.out` from its newest whole checkpoint.
        inputs: as `prepare_inputs(config)` returns them, when the caller has them already.
        display: shows progress; None: nothing is shown.
        message: called with sentences for the user.
        observe: called with each metric row once it is in the file; what it raises ends the run and passes through.

    Raises:
        ChulengoError: anything that the user can mend; what was saved before stays.
    """
    check_reports(config.training.report_to)
    inputs = inputs or prepare_inputs(config)
    if note := length_note(config.training.max_seq_tokens, dict(inputs.model_config)):
        message(note)
    check_rows(inputs)
    with libraries_loading(message):
        choice = engine_for(config, inputs)
        try:
            plan = _check_room(config, inputs, choice, message)
        except DoesNotFitError as error:
            if resume and config.out is not None:
                advise_resumed(error, config.out)
            raise
    where = {"model": config.model.name, "data": config.data.train}
    with joined() as ranks, opened_folder(config.out, resume=resume, ranks=ranks, **where) as paths:
        asked = {key: flatten(config)[key] for key in CHOSEN_ANEW}
        run = _Run(_resolved(config, inputs, choice, paths), inputs, choice, plan, paths, ranks, asked)
        say = message if ranks.first else _say_nothing
        if config.model.retry_leaner and ranks.world > 1 and choice.engine == "fast":
            say(f"model.retry_leaner does nothing in a run of {ranks.world} processes.")
        if resume:
            check_same_run(paths, inputs, settings=flatten(config), decisive=decisive)
        elif ranks.first:
            _describe(run)
        if resume and not any(paths.checkpoints.glob("checkpoint-*")):
            say("This run was ended before its first checkpoint; it begins again at step 0.")
            resume = False
        run, outcome = _train_or_leaner(run, resume=resume, display=display, message=say, observe=observe)
        rows = MetricsFile(paths.metrics).rows()
        base, tuned = _validation_losses(rows, outcome.kept_step)
        # a finished run that is resumed takes no step, and an interrupted one began in another process
        peaks = [int(row["peak_bytes"]) for row in rows if row.get("peak_bytes")]
        outcome = dataclasses.replace(outcome, peak_bytes=max([outcome.peak_bytes, *peaks]))
        if ranks.first:
            _plot(paths, rows, config)
            write_json(paths.root / "result.json", {
                "base_loss": base, "tuned_loss": tuned, "base_perplexity": _exp(base), "tuned_perplexity": _exp(tuned),
                "planned_peak_bytes": _planned_peak(run.plan), **dataclasses.asdict(outcome),
            })
    return RunResult(paths, inputs, outcome, base, tuned, _planned_peak(run.plan))


@dataclass(frozen=True, slots=True)
class _Run:
    """One run, its folder there; `config` has every `auto` resolved, `asked` the policies as they were given."""

    config: RunConfig
    inputs: Inputs
    choice: EngineChoice
    plan: Plan
    paths: RunPaths
    ranks: Ranks
    asked: dict[str, str]


def engine_for(config: RunConfig, inputs: Inputs) -> EngineChoice:
    """Returns which engine trains this run, and its policies; from here on the process keeps to its limit of a GPU.

    Raises:
        ConfigError: the fast engine was asked for and does not cover the run, or the device cannot do what was asked.
    """
    from chulengo.config.sizes import bytes_of
    from chulengo.model.gpu_limit import limit_gpu_memory
    from chulengo.train.engine import SETTINGS, choose_engine

    # before anything looks at what is free
    limit_gpu_memory(config.model.device, bytes_of(config.model.gpu_memory_limit))
    choice = choose_engine(
        config.model.engine, inputs.model_config, policies=wanted_policies(config),
        lora=dataclasses.asdict(config.lora), longest_row=_longest_row(inputs),
        plan=plan_settings(config, _planned_tokens(config, inputs), mean_length([*map(row_length, inputs.train.rows)])),
        device=config.model.device,
    )
    if choice.engine == "fast":
        return choice
    given = {name: getattr(config.model, name) for name in (*SETTINGS, "retry_leaner")}
    unused = tuple(
        f"model.{name}={str(value).lower()}" for name, value in given.items() if value not in ("auto", False)
    )
    return dataclasses.replace(choice, unused=unused)


def check_out(config: RunConfig) -> None:
    """Raises `TrainingError` when the output folder is in use; asked before anything is read, since that takes time."""
    if config.out is not None:
        with explained(Path(config.out)):
            refuse_used(RunPaths(Path(config.out)))


def _say_nothing(_: str) -> None:
    """Stands for `message` on every rank but the first."""


def _resolved(config: RunConfig, inputs: Inputs, choice: EngineChoice, paths: RunPaths) -> RunConfig:
    """Returns the configuration with every `auto` that was decided replaced by what it stands for here."""
    model: dict[str, Any] = choice.settings()
    training: dict[str, Any] = {"max_seq_tokens": inputs.max_seq_tokens, "precision": choice.precision}
    return dataclasses.replace(
        config, out=str(paths.root), model=dataclasses.replace(config.model, **model),
        prompt=dataclasses.replace(config.prompt, style=inputs.renderer.style),
        training=dataclasses.replace(config.training, **training),
    )


def _check_room(config: RunConfig, inputs: Inputs, choice: EngineChoice, message: Callable[[str], None]) -> Plan:
    """Returns the run's plan, and says so when it is tight.

    Raises:
        DoesNotFitError: it says that the device has not the memory.
    """
    from chulengo.model.load import resolve_device
    from chulengo.model.plan import check_fits, stored_shapes

    if choice.found is not None:
        choice.check_room(say=message)
        return choice.found.plan
    return check_fits(
        inputs.model_config, device=resolve_device(config.model.device),
        stored=stored_shapes(weight_files(inputs.folder)), say=message,
        **plan_settings(config, _planned_tokens(config, inputs)),
    )


def _planned_peak(plan: Plan) -> int | None:
    return plan.peak_bytes if plan.predicted and plan.device == "cuda" else None


def wanted_policies(config: RunConfig) -> Wanted:
    """Returns what a configuration says of the fast engine's policies."""
    from chulengo.model.plan_policies import Wanted

    model = config.model
    return Wanted(model.weights_policy, model.activations_policy, model.embeddings_policy, model.graphs)


def _longest_row(inputs: Inputs) -> int:
    sets = [inputs.train] if inputs.validation is None else [inputs.train, inputs.validation]
    return max(row_length(row) for rows in sets for row in rows.rows)


def _planned_tokens(config: RunConfig, inputs: Inputs) -> int:
    # a pack is full; a padded batch is as long as its longest row
    packed = config.training.batching == "packed"
    return inputs.max_seq_tokens if packed else min(inputs.max_seq_tokens, max(map(row_length, inputs.train.rows)))


def plan_settings(config: RunConfig, max_seq_tokens: int, mean_tokens: int | None = None) -> dict[str, Any]:
    """Returns the part of a configuration that decides memory and policies, as `model.plan` takes it.

    Args:
        config: of the run.
        max_seq_tokens: of the longest row.
        mean_tokens: of a row; None: not known. Packs are full whatever it is.
    """
    model, lora, training = config.model, config.lora, config.training
    return {
        "quantization": model.quantization, "double_quant": model.double_quant, "compute_dtype": model.compute_dtype,
        "attention": model.attention, "rank": lora.rank, "targets": lora.targets, "dora": lora.dora,
        "train_head": lora.train_head, "train_embeddings": lora.train_embeddings,
        "batch_size": training.batch_size, "max_seq_tokens": max_seq_tokens, "optimizer": training.optimizer,
        "gradient_checkpointing": training.gradient_checkpointing, "precision": training.precision,
        "dropout": lora.dropout, "gradient_accumulation": training.gradient_accumulation,
        "batching": training.batching, "mean_tokens": None if training.batching == "packed" else mean_tokens,
    }


def _describe(run: _Run) -> None:
    seeds = {"training": run.config.training.seed, "data": run.config.data.seed}
    write_description(
        run.paths, run.inputs, text=to_yaml(run.config), settings=flatten(run.config), seeds=seeds, asked=run.asked
    )


def _train_or_leaner(
    run: _Run, *, resume: bool, message: Callable[[str], None], **shown: Any
) -> tuple[_Run, TrainOutcome]:
    """Trains; where the first step runs out of memory, and `model.retry_leaner` allows it, again with leaner ones.

    The first of this process: a resumed run goes on from its checkpoint, since policies change no number.
    Returns the run as it was trained, since its policies are its own then.
    """
    from chulengo.model.gpu_limit import give_back_memory

    while True:
        try:
            return run, _train(run, resume=resume, message=message, **shown)
        except DoesNotFitError as error:
            begun = isinstance(error, NoRoomInStepError) and error.steps_taken > 0
            may = run.config.model.retry_leaner and run.ranks.world == 1 and not begun
            leaner = run.choice.leaner() if may else None
            if leaner is None or leaner.found is None:
                raise
            again = "Going on" if resume else "Beginning again"
            message(f"{error.given} {again}, {leaner.found.policies.describe()}.")
        give_back_memory()
        config = _resolved(run.config, run.inputs, leaner, run.paths)
        run = dataclasses.replace(run, config=config, choice=leaner, plan=leaner.found.plan)
        if not resume:
            _describe(run)


def _train(
    run: _Run, *, resume: bool, display: LiveProgress | None, message: Callable[[str], None],
    observe: Callable[[dict[str, Any]], None] | None,
) -> TrainOutcome:
    config, inputs, paths = run.config, run.inputs, run.paths
    # libraries import more of themselves here, and some of those imports swallow a KeyboardInterrupt
    with libraries_loading(message):
        from chulengo.train.trainer import RunShape, run_training

        model = _load(run, message)
    metrics = MetricsFile(paths.metrics)
    shown = display if run.ranks.first else None

    def started(shape: RunShape) -> None:
        if run.ranks.first:
            metrics.truncate_after(shape.first_step if resume else -1)
        if shown is not None:
            shown.start(shape.total_steps, first_step=shape.first_step, title=f"{config.model.name} · {paths.root}")

    options = dataclasses.asdict(config.training) | {"max_seq_tokens": inputs.max_seq_tokens}
    del options["overlong"], options["allow_cut_end_of_turn"]
    deciding = decisive(flatten(config))
    settings = {
        section: {key.partition(".")[2]: value for key, value in deciding.items() if key.startswith(f"{section}.")}
        for section in ("model", "lora")
    }
    try:
        outcome = run_training(
            model, inputs.train.rows, inputs.validation.rows if inputs.validation else [], out=paths.root,
            pad_id=pad_token(inputs.tokenizer.pad_id, inputs.tokenizer.eos_id), settings=settings, resume=resume,
            sinks=[metrics.append, *([shown.update] if shown is not None else []), *([observe] if observe else [])],
            planned_bytes=_planned_peak(run.plan), on_start=started, no_room=_step_advice(run, resume=resume),
            message=shown.message if shown is not None else message, **options,
        )
    except ChulengoError:
        with suppress(ChulengoError, OSError):  # the first error is the one to tell
            if run.ranks.first:
                _plot(paths, metrics.rows(), config)  # what was measured until then is worth seeing
        raise
    finally:
        metrics.close()
        if shown is not None:
            shown.stop()
    if run.ranks.first:
        _write_adapter(model, run)
    return outcome


def _step_advice(run: _Run, *, resume: bool) -> str:
    model, training = run.config.model, run.config.training
    return step_advice(
        fast=run.choice.engine == "fast", activations=run.asked["model.activations_policy"],
        retries=model.retry_leaner, processes=run.ranks.world, recomputes=training.gradient_checkpointing,
        batch_size=training.batch_size, gradient_accumulation=training.gradient_accumulation,
        max_seq_tokens=run.inputs.max_seq_tokens, resumed=str(run.paths.root) if resume else None,
    )


def _load(run: _Run, message: Callable[[str], None]) -> Any:
    """Returns the model of the chosen engine with a fresh adapter, and says what it is."""
    from chulengo.train.engine import describe_engine, load_model

    config, inputs = run.config, run.inputs
    model, facts = load_model(
        run.choice, inputs.folder, lora=dataclasses.asdict(config.lora), seed=config.training.seed,
        quantization=config.model.quantization, double_quant=config.model.double_quant, device=config.model.device,
        attention=config.model.attention, cpu_threads=config.model.cpu_threads, longest_row=_longest_row(inputs),
        name=_base_name(config, inputs), vocab_size=inputs.tokenizer.vocab_size,
    )
    message(describe_engine(facts))
    if run.ranks.first:
        add_to_manifest(run.paths, "engine", facts)
    return model


def _base_name(config: RunConfig, inputs: Inputs) -> str:
    """Returns what PEFT's files call the base: a Hub name, or a folder by its whole path, so that neither the working
    folder nor a stranger's repository called `nano` decides what is loaded."""
    name = config.model.name
    return str(inputs.folder.resolve()) if name == "nano" or Path(name).expanduser().is_dir() else name


def _write_adapter(model: Any, run: _Run) -> None:
    from chulengo.train.engine import adapter_writer

    base, folder = run.config.model, run.inputs.folder
    record = BaseRecord(base.name, base.revision, base.quantization, base.double_quant, weights_hash(folder))
    write_adapter_folder(
        run.paths.adapter, adapter_writer(model), base=record, base_folder=folder, renderer=run.inputs.renderer
    )


def _plot(paths: RunPaths, rows: list[dict[str, Any]], config: RunConfig) -> None:
    from chulengo.train.plots import plot_losses

    if rows:
        title = f"{config.model.name} on {Path(config.data.train).name}"
        plot_losses(rows, paths.plots / "loss.png", paths.plots / "loss.svg", title=title)


def _validation_losses(rows: list[dict[str, Any]], kept_step: int) -> tuple[float | None, float | None]:
    losses = {row["step"]: float(row["loss"]) for row in rows if row["kind"] == "validation"}
    return losses.get(0), losses.get(kept_step)


def _exp(loss: float | None) -> float | None:
    return math.exp(min(loss, 700.0)) if loss is not None else None
