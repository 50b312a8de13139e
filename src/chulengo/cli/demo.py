"""The whole loop in one command: look at the data, train, score before and after, compare answers.

  chulengo demo
  chulengo demo --model meta-llama/Llama-2-7b-chat-hf --data mlabonne/guanaco-llama2-1k

Without options it fine-tunes the embedded nano model on its demo data, on a CPU, in minutes: the model learns the
prices, times and manners of a company that it has never heard of, and is then asked about them in other words.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chulengo import nano
from chulengo.cli.arguments import add_run_arguments, config_from
from chulengo.config import RunConfig
from chulengo.data.wording import four_digits

if TYPE_CHECKING:
    from rich.console import Console

    from chulengo.data.types import Example
    from chulengo.evaluate.results import Score
    from chulengo.generate.engine import Answer
    from chulengo.train.finetune import RunResult
    from chulengo.train.inputs import Inputs

MAX_ASKED = 100  # questions of the exact-match score; generation is the slow part of large models
NUM_SHOWN = 5
MAX_NEW_TOKENS = 64
# a first try on one's own data should end with an adapter, not with a question; the ledger says what the policy did
OWN_DEFAULTS = ("training.overlong=drop_turns", "training.gradient_checkpointing=true")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    add_run_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="the run folder (default: runs/<model>-<data>-<n>)")


def run(arguments: argparse.Namespace) -> int:
    """Runs the loop and prints what to type next."""
    from rich.console import Console

    from chulengo.train.finetune import check_out, prepare_inputs
    from chulengo.train.inputs import check_rows

    config = demo_config(arguments)
    check_out(config)
    console = Console(highlight=False)
    console.rule(f"[bold]1 · the data: {config.data.train}")
    inputs = prepare_inputs(config)
    _show_data(console, inputs)
    check_rows(inputs)
    console.rule(f"[bold]2 · QLoRA on {config.model.name}, weights in {config.model.quantization}")
    from chulengo.cli.train import train

    result = train(config, inputs, resume=False)
    console.rule("[bold]3 · before and after, on held-out conversations")
    _score(console, config, result)
    _say_next(console, result.paths.root, config)
    return 0


def demo_config(arguments: argparse.Namespace) -> RunConfig:
    """Returns the demo's recipe, or the user's own model and data on the usual defaults."""
    own = arguments.model or arguments.data or arguments.config
    if not own:
        arguments.config = str(nano.demo_recipe())
    elif not arguments.data and not arguments.config:
        arguments.data = "nano-demo"
    return config_from(arguments, *OWN_DEFAULTS)


def _show_data(console: Console, inputs: Inputs) -> None:
    from chulengo.cli.inspect import drawn
    from chulengo.cli.ledger_view import ledger_table

    in_colour = console.is_terminal and not console.no_color
    marks = "on green" if in_colour else "in ⟦ ⟧"
    console.print(f"One conversation as the model sees it; only the tokens {marks} carry loss:\n")
    row = inputs.train.rows[0]
    example = next(e for e in inputs.train.examples if e.source == row.source)
    for part in drawn(inputs.renderer, row, example, in_colour=in_colour):
        console.print(part, soft_wrap=True)
    console.print()
    console.print(ledger_table(inputs.train.ledger))


def _score(console: Console, config: RunConfig, result: RunResult) -> None:
    """Prints and saves perplexity, exact match and sample answers of base and tuned side by side."""
    from chulengo.evaluate.exact_match import answerable, exact_match, question_of
    from chulengo.evaluate.results import write_results
    from chulengo.generate.engine import answer_all
    from chulengo.generate.settings import GenerationSettings
    from chulengo.model.session import open_session

    held_out = result.inputs.validation
    if held_out is None:
        console.print("No validation rows (data.validation_fraction is 0), so there is nothing to score on.")
        return
    asked = answerable(held_out.examples)[:MAX_ASKED]
    session = open_session(
        config.model.name, str(result.paths.root), revision=config.model.revision,
        quantization=config.model.quantization, double_quant=config.model.double_quant,
        compute_dtype=config.model.compute_dtype, device=config.model.device, attention=config.model.attention,
        offline=config.model.offline, engine=config.model.engine,
    )
    settings = GenerationSettings(max_new_tokens=MAX_NEW_TOKENS)
    answers: dict[str, list[Answer]] = {}
    scores: dict[str, Score] = {}
    for side in ("base", "tuned"):
        with console.status(f"{side} answers {len(asked)} questions"), session.side(side) as model:
            answers[side] = answer_all(model, session.renderer, [question_of(e) for e in asked], settings, 16)
        scores[side] = exact_match(asked, answers[side])
    _print_scores(console, result, scores)
    _print_answers(console, asked, answers)
    write_results(result.paths.root / "scores.json", {side: score.to_dict() for side, score in scores.items()})
    lines = [_sample(example, answers["base"][i], answers["tuned"][i]) for i, example in enumerate(asked)]
    result.paths.samples.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")


def _print_scores(console: Console, result: RunResult, scores: dict[str, Score]) -> None:
    import math

    from rich.table import Table

    from chulengo.cli.eval import cell

    table = Table("", "base", "tuned", "over")
    if result.base_loss is not None and result.tuned_loss is not None and result.inputs.validation is not None:
        tokens = result.inputs.validation.ledger.num_supervised_tokens
        losses = (result.base_loss, result.tuned_loss)
        table.add_row("perplexity", *(four_digits(math.exp(min(loss, 700))) for loss in losses), f"{tokens:,} tokens")
    table.add_row("exact match", cell(scores["base"]), cell(scores["tuned"]), f"{scores['base'].num_items} answers")
    console.print(table)


def _print_answers(console: Console, asked: list[Example], answers: dict[str, list[Answer]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("question", "base", "tuned", show_lines=True, expand=True)
    # far apart, and not in step with the order in which the data goes through its topics
    for place in sorted({number * len(asked) * 21 // 34 % len(asked) for number in range(NUM_SHOWN)}):
        right = answers["tuned"][place].text.strip() == (asked[place].answer or "").strip()
        said = escape(answers["tuned"][place].text)
        table.add_row(
            escape(asked[place].messages[-2].content), escape(answers["base"][place].text),
            f"[green]{said}[/green]" if right else said,
        )
    console.print(table)


def _sample(example: Example, base: Answer, tuned: Answer) -> dict[str, Any]:
    return {
        "source": example.source, "question": example.messages[-2].content, "expected": example.answer,
        "base": base.text, "tuned": tuned.text,
    }


def _say_next(console: Console, root: Path, config: RunConfig) -> None:
    folder = shlex.quote(str(root))
    console.print(f"\nLoss plot: {root / 'plots' / 'loss.png'}   all answers: {root / 'samples.jsonl'}")
    console.print("\nWhat to type next:")
    for command, what in (
        (f"chulengo chat --adapter {folder} --both", "talk to base and tuned side by side"),
        (f"chulengo inspect --model {config.model.name} --data YOUR.jsonl", "your own data as the model sees it"),
        (f"chulengo train --model {config.model.name} --data YOUR.jsonl", "train on it"),
        ("chulengo doctor", "what this machine could do with a larger model"),
    ):
        console.print(f"  {command:<60} {what}", soft_wrap=True)
