"""Speed and memory of a training step here: fast engine, reference engine, and the limit of this machine.

  chulengo bench train                                            on the embedded model
  chulengo bench train --model FOLDER --batch-size 4 --seq-tokens 2048 --out rows.jsonl

The fast engine runs with the policies that the plan chooses, as `chulengo train` does, unless options say others. The
engines take the same weights and tokens, and their first losses must agree before a time is shown. The limit is the
time of the step's matrix products, head and attention alone. Rows are appended to --out, one JSON object a line.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chulengo.errors import ConfigError, DoesNotFitError

if TYPE_CHECKING:
    from chulengo.train.bench import StepSettings, StepTimes
    from chulengo.train.engine import EngineChoice

ENGINES = ("fast", "reference")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `chulengo bench`."""
    parser.add_argument("what", choices=("train",), help="what to measure: a training step")
    parser.add_argument("--model", default="nano", help="a folder or Hub name (default: nano)")
    parser.add_argument("--engines", default=",".join(ENGINES), metavar="A,B", help="of: fast, reference")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="sequences a step (default: 4)")
    parser.add_argument("--seq-tokens", type=int, metavar="N",
                        help="tokens of each sequence (default: 2048, or the model's context)")
    parser.add_argument("--rank", type=int, default=16, metavar="R", help="of LoRA on all linear maps (default: 16)")
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--weights", choices=("auto", "stream", "resident", "fp8", "stream-fp8", "resident-fp8"),
                        default="auto", help="of the fast engine (default: auto, the plan's choice; never FP8)")
    parser.add_argument("--activations", default="auto",
                        choices=("auto", "keep", "selective", "full", "offload", "offload-attention"),
                        help="of the fast engine (default: auto, the plan's choice); all but keep also turn on "
                        "gradient checkpointing in the reference engine, auto only where it has no room without")
    parser.add_argument("--embeddings", choices=("auto", "device", "host"), default="auto",
                        help="where the fast engine has their table (default: auto, the plan's choice)")
    parser.add_argument("--graphs", choices=("auto", "always", "never"), default="auto",
                        help="steps of the fast engine as CUDA graphs (default: auto, the plan's choice)")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="timed steps (default: 6)")
    parser.add_argument("--warm-up", type=int, default=3, metavar="N", help="steps before those (default: 3)")
    parser.add_argument("--no-limit", action="store_true", help="do not measure the machine's limit")
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON object")
    parser.add_argument("--out", metavar="FILE", help="append the rows to this file")


def run(arguments: argparse.Namespace) -> int:
    """Runs `chulengo bench`; returns 0."""
    engines = tuple(dict.fromkeys(arguments.engines.split(",")))
    for name, least in (("batch_size", 1), ("rank", 1), ("steps", 1), ("warm_up", 0)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}.", allowed=f"{least} or more")
    if not set(engines) <= set(ENGINES):
        raise ConfigError(f"--engines is {arguments.engines!r}.", allowed=", ".join(ENGINES))
    if arguments.out:
        _check_out(Path(arguments.out))
    from chulengo.model.folder import read_config, resolve_model
    from chulengo.model.gpu_limit import give_back_memory
    from chulengo.model.plan_shapes import read_shape
    from chulengo.train import bench

    folder = resolve_model(arguments.model)
    config = read_config(folder)
    settings, choice = _planned(arguments, config, fast="fast" in engines)
    times: dict[str, StepTimes] = {}
    for engine in engines:
        print(f"{engine} engine: {_how(engine, settings)}{settings.warm_up} + {settings.steps} steps of "
              f"{settings.batch_size} x {settings.seq_tokens} tokens", file=sys.stderr)
        measure = bench.time_fast if engine == "fast" else bench.time_reference
        times[engine] = _measured(engine, functools.partial(measure, folder, choice, settings))
        give_back_memory()
    bench.check_same_loss(times, settings)
    shape, limit = read_shape(config), None
    if shape is not None and not arguments.no_limit:
        print("limit: products, head and attention alone", file=sys.stderr)
        limit = bench.limit_seconds(shape, settings)
    rows = _rows(arguments, settings, times, limit)
    if arguments.out:
        with Path(arguments.out).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    _show(arguments, rows)
    return 0


def _check_out(file: Path) -> None:
    """Raises `ConfigError` where no row could be appended; asked before minutes of measuring."""
    was_there = file.exists()
    try:
        file.open("a", encoding="utf-8").close()
    except OSError as error:
        raise ConfigError(
            f"--out {file} cannot be written: {error.strerror}.", allowed="a file in a folder that is there",
            next_step=f"mkdir -p {shlex.quote(str(file.parent))}, or another --out",
        ) from error
    if not was_there:
        file.unlink()


def _planned(
    arguments: argparse.Namespace, config: dict[str, Any], *, fast: bool
) -> tuple[StepSettings, EngineChoice]:
    from chulengo.model.folder import context_tokens
    from chulengo.model.load import resolve_device, resolve_dtype
    from chulengo.model.plan_policies import Wanted
    from chulengo.train import bench

    device = resolve_device(arguments.device)
    context = context_tokens(config) or 2048
    seq_tokens = arguments.seq_tokens or min(2048, context)
    if not 2 <= seq_tokens <= context:
        raise ConfigError(f"--seq-tokens is {seq_tokens}.", allowed=f"2 to {context}, the model's context")
    dtype = resolve_dtype(arguments.dtype, device)
    choice, recompute = bench.plan_bench(
        config, Wanted(arguments.weights, arguments.activations, arguments.embeddings, arguments.graphs),
        batch_size=arguments.batch_size, seq_tokens=seq_tokens, rank=arguments.rank,
        quantization=arguments.quantization, dtype=dtype, device=device, fast=fast,
    )
    policies = None if choice.found is None else choice.found.policies
    settings = bench.StepSettings(
        device, arguments.batch_size, seq_tokens, arguments.rank, arguments.quantization, dtype, policies, recompute,
        arguments.steps, arguments.warm_up,
    )
    return settings, choice


def _how(engine: str, settings: StepSettings) -> str:
    if engine == "fast" and settings.policies is not None:
        return f"{settings.policies.describe()}; "
    return "gradient checkpointing; " if settings.recompute else ""


def _measured(engine: str, measure: Callable[[], StepTimes]) -> StepTimes:
    import torch

    try:
        return measure()
    except torch.OutOfMemoryError as error:
        raise DoesNotFitError(
            f"The {engine} engine has no room for this step.",
            next_step="a smaller --batch-size or --seq-tokens, --activations full, or fewer --engines",
        ) from error


def _rows(
    arguments: argparse.Namespace, settings: StepSettings, times: dict[str, StepTimes], limit: dict[str, float] | None
) -> list[dict[str, Any]]:
    from chulengo.train.manifest import cpu_model, devices, versions

    tokens = settings.batch_size * settings.seq_tokens
    shared = {
        "model": arguments.model, "batch_size": settings.batch_size, "seq_tokens": settings.seq_tokens,
        "rank": settings.rank, "quantization": settings.quantization, "dtype": str(settings.dtype)[6:],
        "time": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(),
        "devices": devices() if settings.device.type == "cuda" else [{"name": cpu_model()}],
    }  # fmt: skip
    rows = []
    for engine, found in times.items():
        policies: dict[str, Any] = {"gradient_checkpointing": str(settings.recompute).lower()}
        if engine == "fast" and settings.policies is not None:
            policies = settings.policies.to_dict()
            counts = policies["activations"]
            policies["activations"] = counts if len(counts) > 1 else next(iter(counts))
        rows.append({
            "engine": engine, **policies, "tokens_per_s": tokens / found.quantile(0.5),
            "step_s": {"p20": found.quantile(0.2), "p50": found.quantile(0.5), "p80": found.quantile(0.8)},
            "peak_bytes": found.peak_bytes, "first_loss": found.first_loss, **shared,
        })  # fmt: skip
    if limit is not None:
        rows.append({"engine": "limit", "tokens_per_s": tokens / sum(limit.values()), "parts_s": limit, **shared})
    return rows


def _show(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return
    limit = next((row["tokens_per_s"] for row in rows if row["engine"] == "limit"), None)
    print(f"{'engine':10} {'tokens/s':>10} {'step ms (p20 to p80)':>26} {'peak GiB':>9} {'of the limit':>13}")
    for row in rows:
        step = row.get("step_s")
        took = f"{1e3 * step['p50']:,.0f} ({1e3 * step['p20']:,.0f} to {1e3 * step['p80']:,.0f})" if step else ""
        peak = f"{row['peak_bytes'] / 2**30:.2f}" if row.get("peak_bytes") else ""
        share = f"{row['tokens_per_s'] / limit:.0%}" if limit else ""
        print(f"{row['engine']:10} {row['tokens_per_s']:>10,.0f} {took:>26} {peak:>9} {share:>13}")
    by_name = {row["engine"]: row["tokens_per_s"] for row in rows}
    if {"fast", "reference"} <= by_name.keys():
        print(f"fast over reference: {by_name['fast'] / by_name['reference']:.2f} x")
