"""A file of answers that can be stopped and gone on with: one JSON row a prompt.

A row stands for itself: prompt, answer, seed, settings, model. `prompt` and `completion` are lists of messages, so a
file of answers is read as chats by every command that reads data (a raw continuation as `text`); `id` and `answer` are
what scoring and rating look for; `reference` is the data's own answer, where there is one.

Rows are appended batch by batch, in the order in which batches are made (by length), and put into the order of the
prompts when all are there. A last row that was torn by an interruption is taken off; any other row that does not belong
to the same prompts, settings and model is an error, for a set of answers from two models looks like one from none.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chulengo.errors import DataError
from chulengo.generate.engine import Answer
from chulengo.generate.prompts import PromptRow

Row = dict[str, Any]


def question_of(row: PromptRow) -> Row:
    """Returns the columns that say what was asked: `id` and `prompt`, and `reference` where there is one."""
    if row.messages[0].role == "text":
        prompt: Any = row.messages[0].content
    else:
        prompt = [{"role": message.role, "content": message.content} for message in row.messages]
    return {"id": row.id, "prompt": prompt, **({} if row.reference is None else {"reference": row.reference})}


def answer_columns(answer: Answer) -> Row:
    """Returns the columns that say what was answered, and how."""
    return {
        "answer": answer.text, "finish_reason": answer.finish_reason, "num_tokens": len(answer.ids),
        "num_prompt_tokens": answer.num_prompt_tokens, "seed": answer.seed, "seconds": round(answer.seconds, 4),
    }


def answer_row(row: PromptRow, answer: Answer, common: Mapping[str, Any], *, base: Answer | None = None) -> Row:
    """Returns the row of one answer.

    Args:
        row: what was asked.
        answer: what was answered.
        common: what all rows of a file share: settings and model.
        base: the base model's answer, where both were asked.
    """
    asked = question_of(row)
    if isinstance(asked["prompt"], str):
        whole: Row = {"text": asked["prompt"] + answer.text}
    else:
        whole = {"completion": [{"role": "assistant", "content": answer.text}]}
    beside = {} if base is None else {"base": answer_columns(base)}
    return {**asked, **whole, **answer_columns(answer), **beside, **common}


def same_prompts(rows: Sequence[PromptRow]) -> dict[str, list[PromptRow]]:
    """Returns for the first row of each prompt that occurs more than once, by id, the rows that repeat it."""
    first: dict[tuple[Any, ...], str] = {}
    found: dict[str, list[PromptRow]] = {}
    for row in rows:
        key = tuple((message.role, message.content) for message in row.messages)
        if key in first:
            found.setdefault(first[key], []).append(row)
        else:
            first[key] = row.id
    return found


def repeated_row(made: Row, row: PromptRow, seed: int) -> Row:
    """Returns the row of a prompt that has been answered under another id; `same_as` names that."""
    return {**made, **question_of(row), "seed": seed, "same_as": made["id"]}


class AnswerFile:
    """The answers on disk, and which are still to come."""

    def __init__(self, path: Path, rows: Sequence[PromptRow], common: Mapping[str, Any], *, both: bool) -> None:
        """Opens the file, or finds that there is none yet.

        Args:
            path: where.
            rows: every prompt that is to be answered.
            common: what every row has in common; a file with another value here holds other answers.
            both: whether the base's answers stand beside.

        Raises:
            DataError: the file holds something else: other settings, another model, other prompts.
        """
        self.path = path
        self._rows, self._common, self._both = rows, json.loads(json.dumps(dict(common))), both
        self.finished: dict[str, Row] = {}
        if path.is_dir():
            raise DataError(f"--out {path} is a folder.", next_step=f"--out {path / 'answers.jsonl'}")
        if path.exists():
            self._read()
        elif not path.parent.is_dir():
            raise DataError(f"There is no folder {path.parent}.", next_step=f"mkdir -p {path.parent}")

    def append(self, rows: Sequence[Row]) -> None:
        """Writes finished rows.

        Raises:
            DataError: the disk is full or the folder is gone.
        """
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # before the next batch starts, also for a machine that goes down
        except OSError as error:
            raise self._unwritable(error) from error
        self.finished |= {row["id"]: row for row in rows}

    def put_in_order(self) -> None:
        """Puts the rows into the order of the prompts; the file is whole at every moment.

        Raises:
            DataError: the disk is full or the folder is gone.
        """
        wanted = [row.id for row in self._rows if row.id in self.finished]
        if wanted == list(self.finished):
            return
        draft = self.path.with_name(self.path.name + ".unfinished")
        try:
            with draft.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(self.finished[id_], ensure_ascii=False) + "\n" for id_ in wanted)
            os.replace(draft, self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise self._unwritable(error) from error

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        asked = {row.id: question_of(row)["prompt"] for row in self._rows}
        for number, line in enumerate(whole.splitlines(), 1):
            found = _row_of(line)
            key = found.get("id")
            wrong = [name for name in self._common if name not in found or found[name] != self._common[name]]
            if self._both != ("base" in found):
                wrong.append("--both")
            if key not in asked or found.get("prompt") != asked[key]:
                wrong.append("prompts")
            if wrong:
                raise DataError(
                    f"{self.path}:{number} holds answers of another command (other {', '.join(wrong)}).",
                    next_step="name another --out, or move the file away",
                )
            self.finished[str(key)] = found
        if len(whole) < len(content):
            if not whole and _row_of(content) == {} and not content.lstrip().startswith(b"{"):
                raise DataError(f"{self.path} is not a file of answers.", next_step="name another --out")
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"The answers cannot be written to {self.path}: {error.strerror}.",
            next_step="make room (or name another file), then give the same command: it goes on",
        )


def _row_of(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
