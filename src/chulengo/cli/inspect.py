"""Data as the model will see it: tokens, loss mask, supervision ledger.

  chulengo inspect --model M --data D                      three rows, coloured, and the ledger over all rows
  chulengo inspect --model M --data D --rows 100 --json    for programs
  chulengo inspect --model M --data D --template t.yaml    the same, through your own prompt template
  chulengo inspect --data D --num-rows 1000 --write s.jsonl    a random, cleaned subset as a new data set

Needs the model's tokenizer only, no weights. Problems that would stop training are shown as warnings.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chulengo.cli.arguments import add_run_arguments, config_from
from chulengo.data.wording import counted
from chulengo.errors import ConfigError, RenderError

if TYPE_CHECKING:
    from rich.text import Text

    from chulengo.data.renderer import RenderedRow, Renderer
    from chulengo.data.types import Example
    from chulengo.train.inputs import Inputs, RowSet

NUM_NAMED = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `inspect`."""
    add_run_arguments(parser)
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows shown, in the data's order (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--template", metavar="FILE", help="prompt template (YAML: system, user, answer)")
    parser.add_argument("--num-rows", type=int, metavar="N", help="take a random subset of N rows")
    parser.add_argument("--seed", type=int, metavar="S", help="seed of the subset")
    parser.add_argument("--write", metavar="FILE", help="write the selected, cleaned conversations as JSON lines")
    parser.add_argument("--formats", action="store_true", help="list the data formats and exit")
    parser.add_argument("--cleaning", action="store_true", help="list the cleaning steps and exit")


def run(args: argparse.Namespace) -> int:
    """Shows data and ledger; returns 0."""
    if args.formats or args.cleaning:
        _print_lists(formats=args.formats, cleaning=args.cleaning)
        return 0
    if args.rows < 0:
        raise ConfigError(f"--rows is {args.rows}.", allowed="0 or more")
    sugar = {"prompt.template": args.template, "data.num_rows": args.num_rows, "data.seed": args.seed}
    # JSON strings and numbers are YAML too
    args.overrides = [*(f"{key}={json.dumps(v)}" for key, v in sugar.items() if v is not None), *args.overrides]
    from chulengo.model.folder import length_note
    from chulengo.train.finetune import prepare_inputs

    config = config_from(args)
    seen = prepare_inputs(config, split=False, weights=False)
    if args.write:
        _write(args.write, seen.train, quiet=args.json)
        if not args.json and args.rows == 0:
            return 0
    if not seen.train.rows and seen.train.refused:
        refused = seen.train.refused
        raise RenderError(f"None of {counted(len(refused), 'row')} can be rendered in the style "
                          f"{seen.renderer.style}. The first: {refused[0]}")
    if args.json:
        print(json.dumps(_as_json(seen, args.rows), ensure_ascii=False))
    else:
        _print(seen, args.rows, length_note(config.training.max_seq_tokens, dict(seen.model_config)))
    return 0


def _write(name: str, rows: RowSet, *, quiet: bool) -> None:
    from chulengo.data.selection import write_examples

    if not rows.examples:
        raise ConfigError("--write needs the conversations themselves, which data.streaming does not keep.",
                          next_step="--num-rows N without data.streaming: the subset is drawn in one pass")
    path = Path(name)
    if path.exists():
        raise ConfigError(f"--write {name}: that file exists already, and nothing is overwritten.",
                          next_step="another name, or remove it first")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError(f"--write {name}: only JSON lines are written.", allowed="names in .jsonl or .jsonl.gz",
                          next_step=f"--write {path.with_suffix('.jsonl')}")
    count = write_examples(path, rows.examples)
    if not quiet:
        subset = f" ({rows.report.subset})" if rows.report.subset else ""
        print(f"wrote {counted(count, 'conversation')} to {name}{subset}")


def _shown(seen: Inputs, num_rows: int) -> list[tuple[RenderedRow, Example]]:
    """Returns the first used rows with the conversations they were made of."""
    from chulengo.data.ledger import PART

    by_source = {example.source: example for example in seen.train.examples}
    rows = [(row, row.source.split(PART)[0]) for row in seen.train.rows[:num_rows]]
    return [(row, by_source[source]) for row, source in rows if source in by_source]


def _spelled(renderer: Renderer, row: RenderedRow, example: Example) -> tuple[list[str], list[str] | None]:
    if row.source != example.source:  # a window of a raw text: only its tokens know where it begins
        return [renderer.tokenizer.piece(token).replace("\u2581", " ") for token in row.ids], None
    return renderer.spell(example)


def _as_json(seen: Inputs, num_rows: int) -> dict[str, Any]:
    rows = []
    for row, example in _shown(seen, num_rows):
        spelled, encoder = _spelled(seen.renderer, row, example)
        entry: dict[str, Any] = {
            "ids": row.ids,
            "trained": [int(flag) for flag in row.trained],
            "text": "".join(spelled[: len(row.ids)]),  # a shortened row is a beginning of the whole
            "source": row.source,
        }
        if row.encoder_ids is not None and encoder is not None:
            entry |= {"encoder_ids": row.encoder_ids, "encoder_text": "".join(encoder)}
        rows.append(entry)
    return {
        "rows": rows,
        "ledger": seen.train.ledger.to_dict() | {"refused_rows": list(seen.train.refused)},
        "style": {"name": seen.renderer.style, "reason": seen.renderer.style_reason},
        "data": seen.train.report.to_dict(),
    }


def _print(seen: Inputs, num_rows: int, note: str | None) -> None:
    from rich.console import Console

    from chulengo.cli.ledger_view import ledger_table, length_bars, long_row_lines, script_counts

    ledger = seen.train.ledger
    console = Console(file=sys.stdout, highlight=False, markup=False)
    in_colour = console.is_terminal and not console.no_color
    # soft wrap: the terminal breaks lines, so that copied text and pipes keep theirs
    say = functools.partial(console.print, soft_wrap=True)
    legend = "trained on green, context on grey, control tokens bold" if in_colour else "⟦trained⟧, │ between tokens"
    limit = [f"limit:  {note}"] if note else []
    say("\n".join([*_head(seen), *limit, f"tokens: {legend}; ␣ space, ⏎ line break"]))
    for row, example in _shown(seen, num_rows):
        say(f"\n{row.source}  {counted(len(row.ids), 'token')}, {sum(row.trained):,} trained")
        for part in drawn(seen.renderer, row, example, in_colour=in_colour):
            say(part)
    say()
    console.print(ledger_table(ledger))
    say("\n".join(["row lengths in tokens", *length_bars(seen.train.lengths, ledger.max_seq_tokens)]))
    if ledger.long_rows:
        say("\n".join([f"rows over {ledger.max_seq_tokens:,} tokens", *long_row_lines(ledger)]))
    scripts = script_counts(seen.train.examples)
    say("scripts (by most letters of a row): " + ", ".join(f"{s} {n:,}" for s, n in scripts.items()))
    for group in ledger.duplicates[:NUM_NAMED]:
        say("same tokens: " + ", ".join(group[:NUM_NAMED]))
    for problem in ledger.problems:
        say(f"\nWARNING, training would stop here: {problem}", style="yellow" if in_colour else None)


def drawn(renderer: Renderer, row: RenderedRow, example: Example, *, in_colour: bool) -> list[Text]:
    """Returns a row's tokens to print: one text, or one for the encoder and one for the decoder."""
    from rich.text import Text

    from chulengo.cli.token_view import coloured, marked

    controls = set(renderer.tokenizer.control_tokens.values())
    spelled, encoder = _spelled(renderer, row, example)
    parts = [("", row.ids, row.trained, spelled)]
    if row.encoder_ids is not None and encoder is not None:
        context = [False] * len(row.encoder_ids)
        parts = [("encoder: ", row.encoder_ids, context, encoder), ("decoder: ", row.ids, row.trained, spelled)]
    if in_colour:
        return [Text(label) + coloured(ids, trained, texts, controls) for label, ids, trained, texts in parts]
    return [Text(label + marked(ids, trained, texts, controls)) for label, ids, trained, texts in parts]


def _head(seen: Inputs) -> list[str]:
    report = seen.train.report
    reasons = Counter(report.reasons.values())
    lines = [
        f"style:  {seen.renderer.style} ({seen.renderer.style_reason})",
        f"data:   {report.source}: {report.rows_kept:,} of {counted(report.rows_read, 'row')}",
        f"format: {report.format} ({'; '.join(reasons)})",
    ]
    counts = {"dropped": report.dropped, "changed": report.changed}
    lines += [f"{what}: " + ", ".join(f"{step} {n:,}" for step, n in steps.items())
              for what, steps in counts.items() if steps]
    return lines + ([f"subset: {report.subset}"] if report.subset else [])


def _print_lists(*, formats: bool, cleaning: bool) -> None:
    from chulengo.data.cleaning import STEPS
    from chulengo.data.formats import FORMATS

    if formats:
        width = max(map(len, FORMATS))
        print("formats (--set data.format=NAME; found by themselves unless named)")
        print("\n".join(f"  {name:<{width}}  {entry.signature}" for name, entry in FORMATS.items()))
    if cleaning:
        names = [f"{step.name}:N" if step.parameter else step.name for step in STEPS.values()]
        width = max(map(len, names))
        print("cleaning steps (--set data.cleaning=[NAME,NAME:N]; in the order given)")
        print("\n".join(f"  {name:<{width}}  {step.description}"
                        for name, step in zip(names, STEPS.values(), strict=True)))
