"""Scores of a model on held-out data; with an adapter, base and tuned beside each other, with their difference.

  chulengo eval --adapter runs/demo --task squad --data FILE --out runs/demo/results/squad
  chulengo eval --task list
  chulengo eval --task pubmedqa --split train --data FOLDER --write-chats train.jsonl
  chulengo eval --adapter runs/demo --data heldout.jsonl --exact-match
  chulengo eval --model FOLDER --data rows.parquet --num-rows 200 --json

With --task: everything that the task measures, with intervals; --out is a folder, and the same command goes on where
it was stopped. Without: perplexity, and with --exact-match the share of right answers; --out is a JSON file. --json and
--out also say what every single row gave. --write-chats writes a split with the task's own prompts, as training data.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chulengo.cli.arguments import add_run_arguments
from chulengo.cli.inference import add_session_arguments, memory_explained, session_config, session_from
from chulengo.cli.task_options import DEFAULT_DRAWS, DEFAULT_SEED, add_task_arguments
from chulengo.data.wording import counted, four_digits
from chulengo.errors import ConfigError

if TYPE_CHECKING:
    from chulengo.config import RunConfig
    from chulengo.data.renderer import RenderedRow
    from chulengo.data.types import Example
    from chulengo.evaluate.results import Score
    from chulengo.generate.settings import GenerationSettings
    from chulengo.model.session import Session

UNLIMITED = 1 << 30  # tokens: the limit of a model that has none


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `chulengo eval`."""
    add_run_arguments(parser)
    add_session_arguments(parser)
    parser.add_argument("--exact-match", action="store_true", help="also generate every last answer and compare it")
    parser.add_argument("--num-rows", type=int, metavar="N", help="a random subset of this many rows (data.seed)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="most rows at a time (default: 8)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N",
                        help="most tokens of a generated answer (default: the task's; 256 without one)")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    parser.add_argument("--out", metavar="DIR", help="a folder for results and answers (without --task: a JSON file)")
    add_task_arguments(parser, required=False)
    parser.add_argument("--side", choices=("base", "tuned", "both"), default="both",
                        help="which answers, where there is an adapter (default: both)")
    parser.add_argument("--write-chats", metavar="FILE",
                        help="write the split's conversations as training data (JSON lines), and stop")


def run(arguments: argparse.Namespace) -> int:
    """Runs `chulengo eval`; returns 0."""
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size is {arguments.batch_size}.", allowed="1 or more", next_step="--batch-size 8")
    if arguments.num_rows is not None:
        arguments.overrides = [*arguments.overrides, f"data.num_rows={arguments.num_rows}"]
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {arguments.max_new_tokens}.", allowed="1 or more",
                          next_step="--max-new-tokens 64")
    if arguments.task:
        from chulengo.cli.eval_task import run_task

        return run_task(arguments)
    return _run_taskless(arguments)


def _run_taskless(arguments: argparse.Namespace) -> int:
    for name, value in (("--compare-with", arguments.compare_with), ("--encoder", arguments.encoder),
                        ("--split", arguments.split), ("--write-chats", arguments.write_chats)):
        if value:
            raise ConfigError(f"{name} belongs to a task.", next_step="--task NAME   (chulengo eval --task list)")
    for name, value, default in (("--draws", arguments.draws, DEFAULT_DRAWS), ("--seed", arguments.seed, DEFAULT_SEED)):
        if value != default:
            raise ConfigError(f"{name} {value} belongs to a task: without one no interval is drawn.",
                              next_step="--task NAME   (chulengo eval --task list)")
    if arguments.side == "tuned" and not arguments.adapter:
        raise ConfigError("--side tuned needs an adapter.", next_step="--adapter RUN")
    config = session_config(arguments)
    data = config.data.train if arguments.data else config.data.validation or config.data.train
    if not data:
        raise ConfigError("No data to evaluate on.", next_step="--data FILE")
    from chulengo.cli.held_out import note_trained_on
    from chulengo.data.ledger import PART
    from chulengo.evaluate.exact_match import answerable
    from chulengo.generate.settings import GenerationSettings
    from chulengo.train.finetune import read_examples

    settings = GenerationSettings(max_new_tokens=arguments.max_new_tokens or 256)
    note_trained_on(arguments.adapter, data)
    examples, report = read_examples(config, data, num_rows=config.data.num_rows)
    session = session_from(arguments, config)
    rows, ledger = _rows(session, examples, config)
    kept = {row.source.split(PART)[0] for row in rows}
    if len(kept) < len(examples):
        print(f"note: {len(examples) - len(kept)} of {len(examples)} rows are too long and left out "
              f"(training.overlong={config.training.overlong})", file=sys.stderr)
    asked = answerable([e for e in examples if e.source in kept]) if arguments.exact_match else []
    scores: dict[str, list[Score]] = {side: [] for side in ("base", "tuned")
                                      if (side == "base" or session.has_adapter) and arguments.side in (side, "both")}
    per_item = bool(arguments.json or arguments.out)
    with memory_explained(f"--batch-size {max(1, arguments.batch_size // 2)}"):
        for side, found in scores.items():
            found.append(_perplexity(session, side, rows, arguments.batch_size, per_item=per_item))
        for side, found in scores.items():
            if asked:
                found.append(_exact_match(session, side, asked, settings, arguments.batch_size))
    results = {
        "data": data, "load_report": report.to_dict(), "ledger": ledger, "model": session.model_name,
        "adapter": None if session.adapter is None else str(session.adapter), "quantization": session.quantization,
        "style": session.renderer.style, "renderer": session.renderer.fingerprint(),
        "generation": settings.to_dict() if asked else None, "versions": _versions(),
        "scores": {side: [score.to_dict() for score in found] for side, found in scores.items()},
    }
    _show(results, scores, arguments)
    return 0


def _rows(session: Session, examples: list[Example], config: RunConfig) -> tuple[list[RenderedRow], dict[str, Any]]:
    from chulengo.data.ledger import check, settle

    limit = config.training.max_seq_tokens or session.context or UNLIMITED
    rows, ledger = settle(
        [session.renderer.render(example) for example in examples], max_seq_tokens=limit,
        overlong=config.training.overlong, allow_cut_end_of_turn=config.training.allow_cut_end_of_turn,
    )
    check(ledger)
    return rows, ledger.to_dict()


def _perplexity(session: Session, side: str, rows: list[RenderedRow], batch_size: int, *, per_item: bool) -> Score:
    from chulengo.data.batches import pad_token
    from chulengo.evaluate.perplexity import perplexity

    print(f"perplexity, {side}: {counted(len(rows), 'row')}", file=sys.stderr)
    pad = pad_token(session.tokenizer.pad_id, session.tokenizer.eos_id)
    with session.side(side) as model:
        return perplexity(model, rows, pad_id=pad, batch_size=batch_size, per_item=per_item)


def _exact_match(
    session: Session, side: str, examples: list[Example], settings: GenerationSettings, batch_size: int
) -> Score:
    from chulengo.evaluate.exact_match import exact_match, question_of
    from chulengo.generate.engine import answer_all

    print(f"exact match, {side}: {counted(len(examples), 'answer')}", file=sys.stderr)
    with session.side(side) as model:
        answers = answer_all(model, session.renderer, [question_of(e) for e in examples], settings, batch_size)
    return exact_match(examples, answers)


def _versions() -> dict[str, str | None]:
    from chulengo import __version__
    from chulengo.train.manifest import versions

    return {"chulengo": __version__, **versions()}


def _show(results: dict[str, Any], scores: dict[str, list[Score]], arguments: argparse.Namespace) -> None:
    from chulengo.evaluate.results import write_results

    if arguments.out:
        write_results(Path(arguments.out), results)
    if arguments.json:
        print(json.dumps(results, ensure_ascii=False, allow_nan=False))
        return
    table = [["score", *scores, "over"]]
    for place, first in enumerate(next(iter(scores.values()))):
        over = counted(first.num_items, "row")
        if "supervised_tokens" in first.details:
            over += f", {first.details['supervised_tokens']:,} tokens"
        table.append([first.version, *(cell(found[place]) for found in scores.values()), over])
    if sys.stdout.isatty():
        _rich_table(table)
    else:
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        for row in table:
            print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    if arguments.out:
        print(f"written to {arguments.out}", file=sys.stderr)


def cell(score: Score) -> str:
    """Returns a score as a table shows it: a share as a percentage with its interval, anything else as a number."""
    if score.interval is None:
        return four_digits(score.value)
    low, high = score.interval
    return f"{score.value:.1%} ({low:.1%} to {high:.1%})"


def _rich_table(table: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(*table[0])
    for row in table[1:]:
        shown.add_row(*row)
    Console().print(shown)
