"""Answers for one prompt or a file of prompts, batched.

  chulengo generate --adapter runs/demo --prompt "Where do guanacos live?"
  chulengo generate --adapter runs/demo --prompts questions.txt --out answers.jsonl --both
  chulengo generate --model FOLDER --raw --prompt "Once upon" --max-new-tokens 200

--prompts takes a text file (one prompt a line), rows with `prompt` or `messages`, or any data format. With --out the
answers are written as they come, one JSON row each; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
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
    from chulengo.generate.engine import Answer, Prompt
    from chulengo.generate.prompts import PromptRow
    from chulengo.generate.settings import GenerationSettings
    from chulengo.model.session import Session

BATCHES_A_CHUNK = 8  # prompts of so many batches are sorted by length together, then written


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
    _check(arguments)
    config = session_config(arguments)
    settings = settings_from(arguments)
    rows = _rows(arguments, config)
    session = session_from(arguments, config)
    if arguments.both and not session.has_adapter:
        raise ConfigError("--both puts the base beside an adapter, and there is none.", next_step="--adapter FOLDER")
    common = _common(session, settings, raw=arguments.raw)
    out = Path(arguments.out) if arguments.out else None
    finished = _finished(out, rows, common, both=arguments.both)
    if out is not None and finished:
        print(f"{out}: {len(finished)} of {len(rows)} answers are there, going on", file=sys.stderr)
    # an item's random numbers depend on its place in the whole file, not on what is left of it
    left = [(index, row) for index, row in enumerate(rows) if row.id not in finished]
    too_long = [row for row in finished.values() if _unanswered(row)]
    size = arguments.batch_size * BATCHES_A_CHUNK
    for start in range(0, len(left), size):
        answered = _answer(session, settings, left[start : start + size], arguments, common)
        too_long += [row for row in answered if _unanswered(row)]
        _emit(answered, out, as_json=arguments.json, many=len(rows) > 1)
        if out is not None:
            print(f"{out}: {len(finished) + min(start + size, len(left))} of {len(rows)}", file=sys.stderr)
    if too_long:
        raise _too_long(too_long, len(rows), session, out)
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

        template = load_template(config.prompt.template) if config.prompt.template else None
        rows = read_prompts(
            arguments.prompts, raw=arguments.raw, format_name=config.data.format, columns=config.data.columns,
            template=template, hub_split=config.data.hub_split, offline=config.model.offline,
        )
    return [with_system(row, arguments.system) for row in rows]


def _common(session: Session, settings: GenerationSettings, *, raw: bool) -> dict[str, Any]:
    """What every row of a file has in common; a file with another value here holds other answers."""
    return {
        "settings": settings.to_dict(),
        "model": session.model_name,
        "adapter": None if session.adapter is None else str(session.adapter),
        "quantization": session.quantization,
        "renderer": None if raw else session.renderer.fingerprint(),
    }


def _answer(
    session: Session, settings: GenerationSettings, chunk: list[tuple[int, PromptRow]], arguments: argparse.Namespace,
    common: dict[str, Any],
) -> list[dict[str, Any]]:
    from chulengo.generate.engine import complete_all
    from chulengo.generate.settings import item_seed

    prompts = [_prompt(session, row, raw=arguments.raw) for _, row in chunk]
    seeds = [item_seed(settings.seed, index) for index, _ in chunk]
    sides = ("tuned", "base") if arguments.both else ("tuned",)
    answers: dict[str, list[Answer]] = {}
    with memory_explained(f"--batch-size {max(1, arguments.batch_size // 2)}"):
        for side in sides:
            with session.side(side) as model:
                answers[side] = complete_all(model, prompts, settings, arguments.batch_size, seeds)
    made = []
    for place, (_, row) in enumerate(chunk):
        result = {
            "id": row.id,
            "messages": [{"role": m.role, "content": m.content} for m in row.messages],
            **_said(answers["tuned"][place]),
        }
        if row.reference is not None:
            result["reference"] = row.reference
        if arguments.both:
            result["base"] = _said(answers["base"][place])
        made.append({**result, **common})
    return made


def _prompt(session: Session, row: PromptRow, *, raw: bool) -> Prompt:
    from chulengo.errors import RenderError
    from chulengo.generate.engine import chat_prompt, raw_prompt

    if raw:
        return raw_prompt(session.tokenizer, row.messages[0].content, encoder_decoder=session.encoder_decoder)
    try:
        return chat_prompt(session.renderer, row.messages)
    except RenderError as error:
        raise RenderError(f"{row.source}: {error.given}", allowed=error.allowed, next_step=error.next_step) from error


def _said(answer: Answer) -> dict[str, Any]:
    return {
        "answer": answer.text, "finish_reason": answer.finish_reason, "num_tokens": len(answer.ids),
        "num_prompt_tokens": answer.num_prompt_tokens, "seed": answer.seed, "seconds": round(answer.seconds, 4),
    }


def _emit(rows: list[dict[str, Any]], out: Path | None, *, as_json: bool, many: bool) -> None:
    if out is not None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            with out.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise DataError(
                f"The answers cannot be written to {out}: {error.strerror}.",
                next_step="make room (or name another file), then give the same command: it goes on",
            ) from error
        return
    for row in rows:
        if as_json:
            print(json.dumps(row, ensure_ascii=False))
            continue
        if many:
            print(f"[{row['id']}] {row['messages'][-1]['content']}")
        if "base" in row:
            print(f"base:  {row['base']['answer']}\ntuned: {row['answer']}")
        else:
            print(row["answer"])
        if many:
            print()


def _finished(
    out: Path | None, rows: list[PromptRow], common: dict[str, Any], *, both: bool
) -> dict[str, dict[str, Any]]:
    """Returns the rows that the file has, by id; takes off a last row that was torn by an interruption.

    Raises:
        DataError: the file holds something else: other settings, another model, other prompts.
    """
    if out is None:
        return {}
    if not out.exists():
        if not out.parent.is_dir():
            raise DataError(f"There is no folder {out.parent}.", next_step=f"mkdir -p {out.parent}")
        return {}
    if out.is_dir():
        raise DataError(f"--out {out} is a folder.", next_step=f"--out {out / 'answers.jsonl'}")
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    asked = {row.id: [{"role": m.role, "content": m.content} for m in row.messages] for row in rows}
    finished: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        found = _row_of(line)
        key = found.get("id")
        wrong = [name for name in common if name not in found or found[name] != common[name]]
        if both != ("base" in found):
            wrong.append("--both")
        if key not in asked or found.get("messages") != asked[key]:
            wrong.append("prompts")
        if wrong:
            raise DataError(
                f"{out}:{number} holds answers of another command (other {', '.join(wrong)}).",
                next_step="name another --out, or move the file away",
            )
        finished[str(key)] = found
    if len(whole) < len(content):
        if not whole and _row_of(content) == {} and not content.lstrip().startswith(b"{"):
            raise DataError(f"{out} is not a file of answers.", next_step="name another --out")
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return finished


def _unanswered(row: dict[str, Any]) -> bool:
    return bool(row["finish_reason"] == "context" and not row["num_tokens"])


def _row_of(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _too_long(rows: list[dict[str, Any]], total: int, session: Session, out: Path | None) -> DataError:
    shown = ", ".join(f"{row['id']} ({row['num_prompt_tokens']:,} tokens)" for row in rows[:5])
    kept = f" The other {total - len(rows)} are in {out}." if out is not None and total > len(rows) else ""
    which = f"{len(rows)} of {total} prompts are" if total > 1 else "The prompt is"
    return DataError(
        f"{which} as long as the model's context of {session.context:,} tokens or longer, with no room for an answer: "
        f"{shown}{' …' if len(rows) > 5 else ''}.{kept}",
        next_step="shorten them, or take a model with a longer context",
    )
