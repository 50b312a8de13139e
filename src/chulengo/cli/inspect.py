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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chulengo.cli.arguments import add_run_arguments, config_from
from chulengo.errors import ConfigError, RenderError

if TYPE_CHECKING:
    from rich.text import Text

    from chulengo.config import RunConfig
    from chulengo.data.ledger import Ledger
    from chulengo.data.load import LoadReport
    from chulengo.data.renderer import RenderedRow, Renderer
    from chulengo.data.types import Example

NUM_NAMED = 10


@dataclass(frozen=True, slots=True)
class _Seen:
    """What there is to show; `examples` are those of `rows`, in the same order."""

    renderer: Renderer
    report: LoadReport
    examples: Sequence[Example]
    rows: Sequence[RenderedRow]
    lengths: Sequence[int]
    ledger: Ledger
    refused: Sequence[str]


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
    config = config_from(args)
    examples, report = _read(config)
    if args.write:
        _write(args.write, examples, quiet=args.json)
        if not args.json and args.rows == 0:
            return 0
    seen = _render(config, examples, report)
    if args.json:
        print(json.dumps(_as_json(seen, args.rows), ensure_ascii=False))
    else:
        _print(seen, args.rows)
    return 0


def _read(config: RunConfig) -> tuple[list[Example], LoadReport]:
    from chulengo.data.load import load_examples
    from chulengo.data.prompts import load_template
    from chulengo.train.inputs import data_source

    data = config.data
    template = None if config.prompt.template is None else load_template(config.prompt.template)
    return load_examples(
        data_source(data.train), format=data.format, columns=data.columns, hub_split=data.hub_split,
        offline=config.model.offline, template=template, cleaning=data.cleaning, num_rows=data.num_rows,
        seed=data.seed, drop_duplicates=data.drop_duplicates,
    )


def _write(name: str, examples: Sequence[Example], *, quiet: bool) -> None:
    from chulengo.data.selection import write_examples

    count = write_examples(Path(name), examples)
    if not quiet:
        print(f"wrote {count:,} conversations to {name}")


def _render(config: RunConfig, examples: Sequence[Example], report: LoadReport) -> _Seen:
    from chulengo.data.ledger import longest_side, settle

    renderer, limit = _open(config)
    rows, refused = [], []
    by_source: dict[str, Example] = {}
    for example in examples:
        try:
            rows.append(renderer.render(example))
        except RenderError as error:
            refused.append(str(error))
            continue
        by_source[example.source] = example
    if not rows and refused:
        raise RenderError(f"None of the {len(refused):,} rows can be rendered in the style {renderer.style}. "
                          f"The first: {refused[0]}")
    used, ledger = settle(rows, max_seq_tokens=limit, overlong=config.training.overlong,
                          allow_cut_end_of_turn=config.training.allow_cut_end_of_turn)
    lengths = [longest_side(row) for row in rows]
    return _Seen(renderer, report, [by_source[row.source] for row in used], used, lengths, ledger, refused)


def _open(config: RunConfig) -> tuple[Renderer, int]:
    """Returns the renderer and the limit in tokens; a folder needs only a tokenizer for that."""
    from chulengo.data.renderer import Renderer
    from chulengo.data.tokenizer import load_tokenizer
    from chulengo.model.folder import is_encoder_decoder, read_config, resolve_model
    from chulengo.train.inputs import sequence_limit

    folder = Path(config.model.name).expanduser()
    if config.model.name == "nano" or not folder.is_dir() or (folder / "adapter_config.json").is_file():
        folder = resolve_model(config.model.name, revision=config.model.revision, offline=config.model.offline)
    model_config = read_config(folder) if (folder / "config.json").is_file() else {}
    tokenizer = load_tokenizer(folder)
    prompt = config.prompt
    renderer = Renderer(
        tokenizer, style=prompt.style, system=prompt.system, train_on=prompt.train_on, train_roles=prompt.train_roles,
        train_end_of_turn=prompt.train_end_of_turn, model_type=model_config.get("model_type"),
        encoder_decoder=is_encoder_decoder(model_config),
    )
    wanted = config.training.max_seq_tokens
    if wanted is None and not model_config:
        wanted = tokenizer.model_max_tokens
    return renderer, sequence_limit(wanted, model_config)


def _as_json(seen: _Seen, num_rows: int) -> dict[str, Any]:
    rows = []
    for row, example in list(zip(seen.rows, seen.examples, strict=True))[:num_rows]:
        spelled, encoder = seen.renderer.spell(example)
        entry: dict[str, Any] = {
            "ids": row.ids,
            "trained": [int(flag) for flag in row.trained],
            "text": "".join(spelled[: len(row.ids)]),  # a shortened row is a beginning of the whole
            "source": row.source,
        }
        if row.encoder_ids is not None and encoder is not None:
            entry |= {"encoder_ids": row.encoder_ids, "encoder_text": "".join(encoder)}
        rows.append(entry)
    ledger = seen.ledger.to_dict()
    ledger["problems"] = [*ledger["problems"], *_refusals(seen)]
    ledger["refused_rows"] = list(seen.refused)
    return {
        "rows": rows,
        "ledger": ledger,
        "style": {"name": seen.renderer.style, "reason": seen.renderer.style_reason},
        "data": seen.report.to_dict(),
    }


def _refusals(seen: _Seen) -> list[str]:
    count = len(seen.refused)
    if not count:
        return []
    named = "".join(f"\n    {text.splitlines()[0]}" for text in seen.refused[:NUM_NAMED])
    more = f"\n    and {count - NUM_NAMED:,} more" if count > NUM_NAMED else ""
    return [f"{count:,} rows cannot be rendered in the style {seen.renderer.style}:{named}{more}"]


def _print(seen: _Seen, num_rows: int) -> None:
    from rich.console import Console

    from chulengo.cli.ledger_view import ledger_table, length_bars, long_row_lines, script_counts

    console = Console(file=sys.stdout, highlight=False, markup=False)
    in_colour = console.is_terminal and not console.no_color
    # soft wrap: the terminal breaks lines, so that copied text and pipes keep theirs
    say = functools.partial(console.print, soft_wrap=True)
    legend = "trained on green, context on grey, control tokens bold" if in_colour else "⟦trained⟧, │ between tokens"
    say("\n".join([*_head(seen), f"tokens: {legend}; ␣ space, ⏎ line break"]))
    for row, example in list(zip(seen.rows, seen.examples, strict=True))[:num_rows]:
        say(f"\n{row.source}  {len(row.ids):,} tokens, {sum(row.trained):,} trained")
        for part in _drawn(seen.renderer, row, example, in_colour=in_colour):
            say(part)
    say()
    console.print(ledger_table(seen.ledger))
    say("\n".join(["row lengths in tokens", *length_bars(seen.lengths, seen.ledger.max_seq_tokens)]))
    if seen.ledger.long_rows:
        say("\n".join([f"rows over {seen.ledger.max_seq_tokens:,} tokens", *long_row_lines(seen.ledger)]))
    scripts = script_counts(seen.examples)
    say("scripts (by most letters of a row): " + ", ".join(f"{s} {n:,}" for s, n in scripts.items()))
    for group in seen.ledger.duplicates[:NUM_NAMED]:
        say("same tokens: " + ", ".join(group[:NUM_NAMED]))
    for problem in [*seen.ledger.problems, *_refusals(seen)]:
        say(f"\nWARNING, training would stop here: {problem}", style="yellow" if in_colour else None)


def _drawn(renderer: Renderer, row: RenderedRow, example: Example, *, in_colour: bool) -> list[Text]:
    """Returns the row's tokens to print: one text, or one for the encoder and one for the decoder."""
    from rich.text import Text

    from chulengo.cli.token_view import coloured, marked

    controls = set(renderer.tokenizer.control_tokens.values())
    spelled, encoder = renderer.spell(example)
    parts = [("", row.ids, row.trained, spelled)]
    if row.encoder_ids is not None and encoder is not None:
        context = [False] * len(row.encoder_ids)
        parts = [("encoder: ", row.encoder_ids, context, encoder), ("decoder: ", row.ids, row.trained, spelled)]
    if in_colour:
        return [Text(label) + coloured(ids, trained, texts, controls) for label, ids, trained, texts in parts]
    return [Text(label + marked(ids, trained, texts, controls)) for label, ids, trained, texts in parts]


def _head(seen: _Seen) -> list[str]:
    report = seen.report
    reasons = Counter(report.reasons.values())
    lines = [
        f"style:  {seen.renderer.style} ({seen.renderer.style_reason})",
        f"data:   {report.source}: {report.rows_kept:,} of {report.rows_read:,} rows",
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
