"""QLoRA fine-tuning: reads the data, shows the ledger, trains, scores before and after, saves everything.

  chulengo train --model nano --data conversations.jsonl
  chulengo train --config recipes/llama2_7b_guanaco_1gpu.yaml
  chulengo train --resume runs/nano-conversations-1
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from chulengo.cli.arguments import add_run_arguments, config_from
from chulengo.config import RunConfig, load_config
from chulengo.config.load import flatten
from chulengo.data.wording import counted, four_digits
from chulengo.errors import ConfigError
from chulengo.train.resume import FREE_SETTINGS, asked_policies

PLAN_TOLERANCE = 1.05

if TYPE_CHECKING:
    from chulengo.train.finetune import RunResult
    from chulengo.train.inputs import Inputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    add_run_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="the run folder (default: runs/<model>-<data>-<n>)")
    parser.add_argument(
        "--engine", choices=("auto", "fast", "reference"), help="what trains: --set model.engine, in short"
    )
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder, to the bit; "
                        "policies that were left to the plan are chosen anew")
    parser.add_argument("--dry-run", action="store_true", help="check everything that needs no weights, then stop")
    parser.add_argument("--help-config", action="store_true", help="list every setting, its default and meaning")


def run(arguments: argparse.Namespace) -> int:
    """Trains, or goes on training."""
    if arguments.help_config:
        from chulengo.config.describe import as_text

        print(as_text())
        return 0
    config = _config(arguments)
    from chulengo.train.finetune import check_out, engine_for, prepare_inputs
    from chulengo.train.inputs import check_rows
    from chulengo.train.ranks import own_ranks
    from chulengo.train.reports import check_reports

    first = own_ranks().first  # of several processes one speaks, and makes the folder
    check_reports(config.training.report_to)
    if arguments.resume is None and first:
        check_out(config)
    inputs = prepare_inputs(config)
    if first:
        print_data(inputs)
    check_rows(inputs)
    if arguments.dry_run:
        choice = engine_for(config, inputs)
        said = " ".join(sentence for sentence in (choice.reason, choice.without_effect()) if sentence)
        why = f" ({said})" if said else ""
        print(f"Dry run: the data and the configuration are fine for the {choice.engine} engine{why}; "
              "nothing was trained.")
        return 0
    result = train(config, inputs, resume=arguments.resume is not None)
    if first:
        print_result(result)
    return 0


def print_data(inputs: Inputs) -> None:
    """Prints what was read, how it is rendered, and the supervision ledger."""
    from rich.console import Console

    from chulengo.cli.ledger_view import ledger_table, long_row_lines

    console = Console(highlight=False, markup=False)
    report, ledger = inputs.train.report, inputs.train.ledger
    counts = f"{report.rows_kept:,} of {report.rows_read:,} rows"
    held_out = f", {len(inputs.validation.rows):,} rows held out" if inputs.validation is not None else ""
    say = functools.partial(console.print, soft_wrap=True)
    say(f"data:  {report.source}: {report.format}, {counts}{held_out}")
    if report.dropped:
        say("left out: " + ", ".join(f"{step} {count:,}" for step, count in report.dropped.items()))
    say(f"style: {inputs.renderer.style} ({inputs.renderer.style_reason})")
    console.print(ledger_table(ledger))
    if ledger.long_rows:
        say("\n".join([f"rows over {ledger.max_seq_tokens:,} tokens", *long_row_lines(ledger)]))


def train(config: RunConfig, inputs: Inputs, *, resume: bool) -> RunResult:
    """Returns the finished run; says how to go on when it is interrupted.

    Raises:
        ChulengoError: see `train.finetune.finetune`.
    """
    from chulengo.train.finetune import finetune
    from chulengo.train.progress import LiveProgress

    return finetune(config, resume=resume, inputs=inputs, display=LiveProgress())


def print_result(result: RunResult) -> None:
    """Prints scores before and after, where things lie, and what to type next."""
    import math

    outcome = result.outcome
    print()
    if result.base_loss is not None and result.tuned_loss is not None:
        base, tuned = math.exp(min(result.base_loss, 700)), math.exp(min(result.tuned_loss, 700))
        print(f"Validation perplexity: {four_digits(base)} before, {four_digits(tuned)} after")
    kept = f", weights of step {outcome.kept_step} kept" if outcome.kept_step != outcome.steps else ""
    early = ", stopped early" if outcome.stopped_early else ""
    print(f"{counted(outcome.steps, 'step')} in {outcome.seconds:.0f} s{early}{kept}.")
    if result.planned_peak_bytes is not None:
        print(memory_line(outcome.peak_bytes, result.planned_peak_bytes))
    folder = shlex.quote(str(result.paths.root))
    print(f"Adapter: {result.paths.adapter}   Loss plot: {result.paths.plots / 'loss.png'}")
    print(f"Next: chulengo chat --adapter {folder}   or: chulengo eval --adapter {folder} --data D --exact-match")


def memory_line(measured: int, planned: int) -> str:
    """Returns the sentence by which a wrong plan is seen: it should hold, and rows are rarely all full."""
    from chulengo.model.plan import gib

    beyond = ": the plan was too low, please report it" if measured > PLAN_TOLERANCE * planned else ""
    return f"Peak memory: {gib(measured)} measured, {gib(planned)} planned for full rows{beyond}."


def _config(arguments: argparse.Namespace) -> RunConfig:
    if arguments.resume is None:
        if arguments.engine:
            arguments.overrides = [f"model.engine={arguments.engine}", *arguments.overrides]
        return config_from(arguments)
    told = [f"--{name}" for name in ("model", "data", "config", "out", "engine") if getattr(arguments, name)]
    may_differ = FREE_SETTINGS - {"out"}
    told += ["--set"] if any(each.partition("=")[0].strip() not in may_differ for each in arguments.overrides) else []
    if told:
        raise ConfigError(
            f"--resume goes on with a run as it was configured, so {', '.join(told)} cannot be given with it.",
            allowed=f"--set of what changes no number: {', '.join(sorted(may_differ))}",
            next_step=f"chulengo train --resume {shlex.quote(arguments.resume)}",
        )
    file = Path(arguments.resume) / "config.yaml"
    if not file.is_file():
        raise ConfigError(
            f"{arguments.resume} holds no run (no config.yaml).",
            allowed="a folder that `chulengo train` wrote",
            next_step="ls runs",
        )
    asked = asked_policies(file.parent, flatten(load_config(file, saved=True)))
    overrides = [*(f"{key}={value}" for key, value in asked.items()), *arguments.overrides]
    return dataclasses.replace(load_config(file, overrides, saved=True), out=arguments.resume)
