"""The recipe: from a configuration to a scored adapter in a run folder. Reads top to bottom.

`prepare_inputs` is the half without weights (also behind `inspect` and `plan`); `finetune` is the other half. The base
model is scored at step 0, before the first update: a fresh LoRA adds exactly nothing, so this *is* the base, on the
same rows and by the same code as every later validation score.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chulengo.config import RunConfig, to_yaml
from chulengo.config.load import flatten
from chulengo.data.batches import pad_token, row_length
from chulengo.data.load import LoadReport, load_examples, stream_examples
from chulengo.data.prompts import load_template
from chulengo.data.renderer import save_renderer
from chulengo.data.selection import split_by_conversation
from chulengo.data.types import Example
from chulengo.errors import ChulengoError, TrainingError
from chulengo.model.base_record import BaseRecord, save_base_record
from chulengo.model.folder import resolve_model, weight_files, weights_hash
from chulengo.train.inputs import (
    ExampleStream,
    Inputs,
    RowPolicy,
    check_rows,
    data_source,
    open_renderer,
    render_all,
    render_stream,
    sequence_limit,
)
from chulengo.train.metrics import MetricsFile
from chulengo.train.run_folder import (
    RESUME,
    RunPaths,
    create_default_run,
    create_run,
    explained,
    has_begun,
    open_run,
    refuse_used,
    write_folder,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from chulengo.train.progress import LiveProgress
    from chulengo.train.trainer import TrainOutcome

DEFAULT_RUNS = Path("runs")
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "spiece.model", "vocab.json", "merges.txt", "chat_template.jinja",
)
# may differ when a run is resumed: none of it changes a number in the adapter (threads: in the last bits at most)
FREE_SETTINGS = frozenset((
    "out", "model.offline", "training.report_to", "training.keep_checkpoints", "training.save_every_steps",
    "training.log_every_steps", "model.cpu_threads",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run.

    Attributes:
        paths: where everything lies.
        inputs: what it was trained on.
        outcome: how training went.
        base_loss: validation loss of the base, nats a supervised token; None without validation rows.
        tuned_loss: the same for the weights that were kept.
    """

    paths: RunPaths
    inputs: Inputs
    outcome: TrainOutcome
    base_loss: float | None
    tuned_loss: float | None


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
) -> RunResult:
    """Runs one fine-tuning from data to a saved adapter, or goes on with one.

    Args:
        config: the run; with `resume`, the one in the run folder.
        resume: go on in `config.out` from its newest whole checkpoint.
        inputs: as `prepare_inputs(config)` returns them, when the caller has them already.
        display: shows progress; None: nothing is shown.
        message: called with sentences for the user.

    Raises:
        ChulengoError: anything that the user can mend; what was saved before stays.
    """
    inputs = inputs or prepare_inputs(config)
    check_rows(inputs)
    _check_room(config, inputs)
    with _run_folder(config, resume) as paths, _way_back(paths):
        if resume:
            _check_same_run(config, inputs, paths)
        else:
            config = _resolved(config, inputs, paths)
            _write_description(config, inputs, paths)
        if resume and not any(paths.checkpoints.glob("checkpoint-*")):
            message("This run was ended before its first checkpoint; it begins again at step 0.")
            resume = False
        outcome = _train(config, inputs, paths, resume=resume, display=display, message=message)
        rows = MetricsFile(paths.metrics).rows()
        _plot(paths, rows, config)
        base, tuned = _validation_losses(rows, outcome.kept_step)
        write_json(paths.root / "result.json", {
            "base_loss": base, "tuned_loss": tuned, "base_perplexity": _exp(base), "tuned_perplexity": _exp(tuned),
            **dataclasses.asdict(outcome),
        })
    return RunResult(paths, inputs, outcome, base, tuned)


def check_out(config: RunConfig) -> None:
    """Raises `TrainingError` when the output folder is in use; asked before anything is read, since that takes time."""
    if config.out is not None:
        with explained(Path(config.out)):
            refuse_used(RunPaths(Path(config.out)))


@contextmanager
def _way_back(paths: RunPaths) -> Iterator[None]:
    """Names the exact command in errors that end a run which can go on."""
    command = f"chulengo train --resume {shlex.quote(str(paths.root))}"
    try:
        with explained(paths.root):
            yield
    except ChulengoError as error:
        if error.next_step is not None and RESUME in error.next_step:
            error.advise(error.next_step.replace(RESUME, command if has_begun(paths) else "type the same again"))
        raise
    except KeyboardInterrupt:
        if not has_begun(paths):
            raise
        last = any(paths.checkpoints.glob("checkpoint-*"))
        where = "its last checkpoint" if last else "step 0, since nothing was saved yet"
        raise TrainingError(f"Stopped at once. The run goes on from {where}.", next_step=command) from None


@contextmanager
def _run_folder(config: RunConfig, resume: bool) -> Iterator[RunPaths]:
    if resume:
        if config.out is None:
            raise TrainingError("Nothing says which run to resume.", next_step="chulengo train --resume runs/<name>")
        opened = open_run(Path(config.out))
    elif config.out is None:
        opened = create_default_run(DEFAULT_RUNS, config.model.name, config.data.train)
    else:
        opened = create_run(Path(config.out))
    with opened as paths:
        yield paths


def _resolved(config: RunConfig, inputs: Inputs, paths: RunPaths) -> RunConfig:
    """Returns the configuration with every `auto` that decides a number replaced by what it stands for here."""
    from chulengo.model.load import resolve_device, resolve_dtype
    from chulengo.train.optimizer import resolve_precision

    device = resolve_device(config.model.device)
    dtype = str(resolve_dtype(config.model.compute_dtype, device)).removeprefix("torch.")
    return dataclasses.replace(
        config,
        out=str(paths.root),
        model=dataclasses.replace(config.model, compute_dtype=dtype),  # type: ignore[arg-type]
        prompt=dataclasses.replace(config.prompt, style=inputs.renderer.style),
        training=dataclasses.replace(
            config.training,
            max_seq_tokens=inputs.max_seq_tokens,
            precision=resolve_precision(config.training.precision, device),  # type: ignore[arg-type]
        ),
    )


def _check_room(config: RunConfig, inputs: Inputs) -> None:
    """Raises `DoesNotFitError` when the plan says that the run needs more memory than the device has."""
    from chulengo.model.load import resolve_device
    from chulengo.model.plan import check_fits, stored_shapes

    longest = inputs.max_seq_tokens  # a pack is full; a padded batch is as long as its longest row
    if config.training.batching != "packed":
        longest = min(longest, max(map(row_length, inputs.train.rows)))
    check_fits(
        inputs.model_config, device=resolve_device(config.model.device),
        stored=stored_shapes(weight_files(inputs.folder)), **plan_settings(config, longest),
    )


def plan_settings(config: RunConfig, max_seq_tokens: int) -> dict[str, Any]:
    """Returns the part of a configuration that decides memory, as `model.plan` takes it."""
    model, lora, training = config.model, config.lora, config.training
    return {
        "quantization": model.quantization, "double_quant": model.double_quant, "compute_dtype": model.compute_dtype,
        "attention": model.attention, "rank": lora.rank, "targets": lora.targets, "dora": lora.dora,
        "train_head": lora.train_head, "train_embeddings": lora.train_embeddings,
        "batch_size": training.batch_size, "max_seq_tokens": max_seq_tokens, "optimizer": training.optimizer,
        "gradient_checkpointing": training.gradient_checkpointing, "precision": training.precision,
        "dropout": lora.dropout, "gradient_accumulation": training.gradient_accumulation,
        "batching": training.batching,
    }


def _write_description(config: RunConfig, inputs: Inputs, paths: RunPaths) -> None:
    from chulengo.train.manifest import manifest

    text = to_yaml(config)
    validation = inputs.validation
    write_json(paths.ledger, {
        "train": inputs.train.ledger.to_dict(), "load": inputs.train.report.to_dict(),
        "validation": validation.ledger.to_dict() if validation else None,
    })
    hashes = _hashes(inputs) | {"config": hashlib.sha256(text.encode()).hexdigest()}
    seeds = {"training": config.training.seed, "data": config.data.seed}
    write_json(paths.manifest, manifest(hashes=hashes, seeds=seeds, extra={"config": flatten(config)}))
    write_text(paths.config, text)  # last: a folder with a config.yaml is a run


def _hashes(inputs: Inputs) -> dict[str, str]:
    hashes = {
        "model": weights_hash(inputs.folder), "renderer": inputs.renderer.fingerprint(),
        "data": inputs.train.fingerprint(),
    }  # fmt: skip
    return hashes if inputs.validation is None else hashes | {"validation": inputs.validation.fingerprint()}


def _check_same_run(config: RunConfig, inputs: Inputs, paths: RunPaths) -> None:
    """Raises `TrainingError` naming every setting, or else every input, that is not what the run was started with."""
    try:
        started = json.loads(paths.manifest.read_text(encoding="utf-8"))
        before, hashes = dict(started["config"]), dict(started["hashes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{paths.manifest}, which says what the run was started with, cannot be read: {error}.",
            next_step="start a new run with another --out",
        ) from error
    now = flatten(config)
    keys = [key for key in now.keys() | before.keys() if key not in FREE_SETTINGS and now.get(key) != before.get(key)]
    changed = [f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in sorted(keys)]
    if changed:
        raise TrainingError(
            f"{paths.config} was edited after the run was started, so going on would be another run:"
            + "".join(f"\n  - {line}" for line in changed),
            allowed=f"edits of {', '.join(sorted(FREE_SETTINGS))}",
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


def _train(
    config: RunConfig, inputs: Inputs, paths: RunPaths, *, resume: bool, display: LiveProgress | None,
    message: Callable[[str], None],
) -> TrainOutcome:
    from chulengo.model.adapter import attach_lora
    from chulengo.model.load import load_base, use_threads
    from chulengo.train.interrupt import stop_requests
    from chulengo.train.trainer import RunShape, run_training

    training = config.training
    use_threads(config.model.cpu_threads)
    # libraries import more of themselves here, and some of those imports swallow a KeyboardInterrupt
    with stop_requests(message) as stop:
        model = load_base(
            inputs.folder, quantization=config.model.quantization, double_quant=config.model.double_quant,
            compute_dtype=config.model.compute_dtype, device=config.model.device, attention=config.model.attention,
            name=_base_name(config, inputs), vocab_size=inputs.tokenizer.vocab_size,
        )
        model = attach_lora(model, **dataclasses.asdict(config.lora), seed=training.seed)
    if stop.asked:
        raise KeyboardInterrupt
    metrics = MetricsFile(paths.metrics)

    def started(shape: RunShape) -> None:
        metrics.truncate_after(shape.first_step if resume else -1)
        if display is not None:
            display.start(shape.total_steps, first_step=shape.first_step, title=f"{config.model.name} · {paths.root}")

    options = dataclasses.asdict(training) | {"max_seq_tokens": inputs.max_seq_tokens}
    del options["overlong"], options["allow_cut_end_of_turn"]
    settings = {"model": dataclasses.asdict(config.model), "lora": dataclasses.asdict(config.lora)}
    settings["model"] = {k: v for k, v in settings["model"].items() if k not in ("offline", "cpu_threads")}
    try:
        outcome = run_training(
            model, inputs.train.rows, inputs.validation.rows if inputs.validation else [], out=paths.root,
            pad_id=pad_token(inputs.tokenizer.pad_id, inputs.tokenizer.eos_id), settings=settings, resume=resume,
            sinks=[metrics.append, *([display.update] if display is not None else [])],
            on_start=started, message=display.message if display is not None else message, **options,
        )
    except ChulengoError:
        with suppress(ChulengoError, OSError):  # the first error is the one to tell
            _plot(paths, metrics.rows(), config)  # what was measured until then is worth seeing
        raise
    finally:
        metrics.close()
        if display is not None:
            display.stop()
    write_folder(paths.adapter, lambda folder: _write_adapter(model, config, inputs, folder))
    return outcome


def _base_name(config: RunConfig, inputs: Inputs) -> str:
    """Returns what PEFT's files call the base: a Hub name, or a folder by its whole path, so that neither the working
    folder nor a stranger's repository called `nano` decides what is loaded."""
    name = config.model.name
    return str(inputs.folder.resolve()) if name == "nano" or Path(name).expanduser().is_dir() else name


def _write_adapter(model: Any, config: RunConfig, inputs: Inputs, folder: Path) -> None:
    from chulengo.model.adapter import save_adapter

    save_adapter(model, folder)
    save_renderer(inputs.renderer, folder)
    base = config.model
    save_base_record(
        BaseRecord(base.name, base.revision, base.quantization, base.double_quant, weights_hash(inputs.folder)), folder
    )
    for name in TOKENIZER_FILES:
        if (inputs.folder / name).is_file():
            shutil.copyfile(inputs.folder / name, folder / name)


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
