"""Answers for one prompt or a file of prompts, batched.

  chulengo generate --adapter runs/demo --prompt "Where do guanacos live?"
  chulengo generate --adapter runs/demo --prompts questions.txt --out answers.jsonl --both
  chulengo generate --model FOLDER --raw --prompt "Once upon" --max-new-tokens 200

--prompts takes a text file (one prompt a line), rows with `prompt` or `messages`, or any data format. With --out the
answers are written batch by batch, one JSON row each; the same command goes on where it was stopped. The file is ready
for `chulengo score --predictions`, for `chulengo rate`, and as `--data` of any other command.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chulengo.cli.inference import (
    add_model_arguments,
    add_sampling_arguments,
    add_session_arguments,
    memory_explained,
    session_config,
    session_from,
    settings_from,
)
from chulengo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from chulengo.config import RunConfig
    from chulengo.generate.answer_file import AnswerFile
    from chulengo.generate.engine import Answer, Prompt
    from chulengo.generate.prompts import PromptRow
    from chulengo.generate.settings import GenerationSettings
    from chulengo.model.session import Session

BATCHES_A_CHUNK = 8  # prompts of so many batches are rendered, and sorted by length, together
NOTE_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `chulengo generate`."""
    add_model_arguments(parser)
    add_session_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="one prompt")
    parser.add_argument("--prompts", metavar="FILE", help="a file of prompts: txt, jsonl, csv, …")
    parser.add_argument("--system", metavar="TEXT", help="system prompt for prompts without one")
    parser.add_argument("--raw", action="store_true", help="go on from the text as it is, without a chat format")
    parser.add_argument("--both", action="store_true", help="the base model's answer beside the adapter's")
    parser.add_argument("--out", metavar="FILE", help="write JSON rows here; goes on with a file that is there")
    parser.add_argument("--json", action="store_true", help="print JSON rows instead of text")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at a time (default: 8)")
    add_sampling_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs `chulengo generate`; returns 0."""
    from chulengo.generate.answer_file import AnswerFile, same_prompts

    _check(arguments)
    config = session_config(arguments)
    settings = settings_from(arguments)
    rows = _rows(arguments, config)
    session = session_from(arguments, config)
    if arguments.both and not session.has_adapter:
        raise ConfigError("--both puts the base beside an adapter, and there is none.", next_step="--adapter FOLDER")
    common = _common(session, settings, raw=arguments.raw)
    file = AnswerFile(Path(arguments.out), rows, common, both=arguments.both) if arguments.out else None
    finished = {} if file is None else file.finished
    if file is not None and finished:
        print(f"{file.path}: {len(finished)} of {len(rows)} answers are there, going on", file=sys.stderr)
    repeats = same_prompts(rows)
    if repeats:
        _note_repeats(repeats, greedy=settings.temperature == 0)
    # a greedy answer is the same every time: a prompt that occurs again is not generated again
    asking = Asking(session, settings, common, rows, repeats if settings.temperature == 0 else {}, arguments)
    made = list(finished.values())
    noted = time.monotonic()
    for answered in asking.batches(finished):
        made += answered
        if file is None:
            _show(answered, as_json=arguments.json, many=len(rows) > 1)
            continue
        file.append(answered)
        if time.monotonic() - noted > NOTE_SECONDS or len(file.finished) == len(rows):
            noted = time.monotonic()
            print(f"{file.path}: {len(file.finished)} of {len(rows)}", file=sys.stderr)
    if file is not None:
        file.put_in_order()
    too_long = [row for row in made if row["finish_reason"] == "context" and not row["num_tokens"]]
    if too_long:
        raise _too_long(too_long, len(rows), session, file)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if (arguments.prompt is None) == (arguments.prompts is None):
        given = "Neither --prompt nor --prompts is" if arguments.prompt is None else "Both --prompt and --prompts are"
        raise ConfigError(f"{given} given.", allowed="one of them", next_step='--prompt "Where do guanacos live?"')
    if arguments.raw and arguments.system is not None:
        raise ConfigError("--raw has no messages, so --system has no place.", next_step="put the text into the prompt")
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size is {arguments.batch_size}.", allowed="1 or more")


def _rows(arguments: argparse.Namespace, config: RunConfig) -> list[PromptRow]:
    from chulengo.generate.prompts import prompt_row, read_prompts, with_system

    if arguments.prompt is not None:
        if not arguments.raw and not arguments.prompt.strip():
            raise DataError("The prompt is empty.", next_step='--prompt "…", or --raw to start from nothing')
        rows = [prompt_row(arguments.prompt, raw=arguments.raw)]
    else:
        from chulengo.data.prompts import load_template
        from chulengo.train.inputs import EMBEDDED_DATA

        given = arguments.prompts
        template = load_template(config.prompt.template) if config.prompt.template else None
        rows = read_prompts(
            str(EMBEDDED_DATA[given]()) if given in EMBEDDED_DATA else given, raw=arguments.raw,
            format_name=config.data.format, columns=config.data.columns,
            template=template, hub_split=config.data.hub_split, offline=config.model.offline,
        )
    return [with_system(row, arguments.system) for row in rows]


def _common(session: Session, settings: GenerationSettings, *, raw: bool) -> dict[str, Any]:
    """What every row of a file has in common; a file with another value here holds other answers."""
    from chulengo.model.adapter_hash import adapter_hash

    return {
        "settings": settings.to_dict(),
        "model": session.model_name,
        "adapter": None if session.adapter is None else str(session.adapter),
        "adapter_weights": adapter_hash(session.adapter),
        "quantization": session.quantization,
        "renderer": None if raw else session.renderer.fingerprint(),
    }


@dataclass(frozen=True, slots=True)
class Asking:
    """Who is asked, what and how."""

    session: Session
    settings: GenerationSettings
    common: dict[str, Any]
    rows: list[PromptRow]
    repeats: dict[str, list[PromptRow]]  # id of a prompt -> the rows that take its answer over
    arguments: argparse.Namespace

    def batches(self, finished: Mapping[str, Any]) -> Iterator[list[dict[str, Any]]]:
        """Yields finished rows: with --out batch by batch, else chunk by chunk and in order."""
        from chulengo.generate.answer_file import repeated_row
        from chulengo.generate.settings import item_seed

        places = {row.id: index for index, row in enumerate(self.rows)}
        # an item's random numbers depend on its place in the whole file, not on what is left of it
        seeds = {id_: item_seed(self.settings.seed, index) for id_, index in places.items()}
        taken_over = {row.id for rows in self.repeats.values() for row in rows}
        for id_, rows in self.repeats.items():
            if id_ in finished and (late := [row for row in rows if row.id not in finished]):
                yield [repeated_row(finished[id_], row, seeds[row.id]) for row in late]
        left = [row for row in self.rows if row.id not in finished and row.id not in taken_over]
        for chunk in batched(left, self.arguments.batch_size * BATCHES_A_CHUNK):
            made: dict[str, dict[str, Any]] = {}
            for answered in self._chunk(chunk, seeds):
                for row in answered:
                    made[row["id"]] = row
                    for other in self.repeats.get(row["id"], ()):
                        if other.id not in finished:
                            made[other.id] = repeated_row(row, other, seeds[other.id])
                if self.arguments.out:
                    yield list(made.values())
                    made = {}
            if made:
                yield sorted(made.values(), key=lambda row: places[row["id"]])

    def _chunk(self, chunk: Sequence[PromptRow], seeds: Mapping[str, int]) -> Iterator[list[dict[str, Any]]]:
        from chulengo.generate.answer_file import answer_row
        from chulengo.generate.engine import complete_all

        prompts = {row.id: _prompt(self.session, row, raw=self.arguments.raw) for row in chunk}
        sides = ("tuned", "base") if self.arguments.both else ("tuned",)
        size = self.arguments.batch_size
        # longest first: prompts of a batch are alike, and one too large for the memory fails at the start
        for batch in batched(sorted(chunk, key=lambda row: -len(prompts[row.id].ids)), size):
            answers: dict[str, list[Answer]] = {}
            with memory_explained(f"--batch-size {max(1, size // 2)}"):
                for side in sides:
                    with self.session.side(side) as model:
                        answers[side] = complete_all(
                            model, [prompts[row.id] for row in batch], self.settings, size,
                            [seeds[row.id] for row in batch],
                        )
            base = answers.get("base", [None] * len(batch))
            yield [
                answer_row(row, tuned, self.common, base=other)
                for row, tuned, other in zip(batch, answers["tuned"], base, strict=True)
            ]


def batched(rows: Sequence[PromptRow], size: int) -> Iterator[Sequence[PromptRow]]:
    """Yields the rows in groups of `size`, the last perhaps smaller."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _prompt(session: Session, row: PromptRow, *, raw: bool) -> Prompt:
    from chulengo.errors import RenderError
    from chulengo.generate.engine import chat_prompt, raw_prompt

    if raw:
        return raw_prompt(session.tokenizer, row.messages[0].content, encoder_decoder=session.encoder_decoder)
    try:
        return chat_prompt(session.renderer, row.messages)
    except RenderError as error:
        raise RenderError(f"{row.source}: {error.given}", allowed=error.allowed, next_step=error.next_step) from error


def _note_repeats(repeats: dict[str, list[PromptRow]], *, greedy: bool) -> None:
    count = sum(map(len, repeats.values()))
    how = "take over its answer (greedy)" if greedy else "are answered with random numbers of their own"
    rows = "1 row repeats an earlier prompt and" if count == 1 else f"{count:,} rows repeat an earlier prompt and"
    if count == 1:
        how = how.replace("take", "takes").replace("are", "is").replace("their", "its")
    print(f"note: {rows} {how}", file=sys.stderr)


def _show(rows: list[dict[str, Any]], *, as_json: bool, many: bool) -> None:
    for row in rows:
        if as_json:
            print(json.dumps(row, ensure_ascii=False))
            continue
        if many:
            asked = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
            print(f"[{row['id']}] {asked}")
        if "base" in row:
            print(f"base:  {row['base']['answer']}\ntuned: {row['answer']}")
        else:
            print(row["answer"])
        if many:
            print()


def _too_long(rows: list[dict[str, Any]], total: int, session: Session, file: AnswerFile | None) -> DataError:
    shown = ", ".join(f"{row['id']} ({row['num_prompt_tokens']:,} tokens)" for row in rows[:5])
    kept = f" The other {total - len(rows)} are in {file.path}." if file is not None and total > len(rows) else ""
    which = f"{len(rows)} of {total} prompts are" if total > 1 else "The prompt is"
    return DataError(
        f"{which} as long as the model's context of {session.context:,} tokens or longer, with no room for an answer: "
        f"{shown}{' …' if len(rows) > 5 else ''}.{kept}",
        next_step="shorten them, or take a model with a longer context",
    )
