"""Conversations on disk: `simulation.json` says what was asked for, `transcripts.jsonl` holds what was said.

A row is a chat in `messages`, so a file of transcripts is training data as it stands; what else is known of a turn
(its seed, its length, what the real agent said) stands beside its text. Rows are appended when a conversation has
ended and are in the order of the scenarios once all have. A last row that was torn by an interruption is taken off,
and its conversation is had again: the same, since its seeds are.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chulengo.errors import ChulengoError, DataError
from chulengo.evaluate.simulate.talk import Asked, Conversation, Said

SETTINGS_FILE, TRANSCRIPTS_FILE = "simulation.json", "transcripts.jsonl"
FORMAT = "chulengo-simulation/1"


def row_of(conversation: Conversation) -> dict[str, Any]:
    """Returns the conversation as a JSON-able row."""
    asked, scenario = conversation.asked, conversation.asked.scenario
    messages = [] if scenario.system is None else [{"role": "system", "content": scenario.system}]
    for turn, client in enumerate(conversation.client):
        messages.append({"role": "user", **_said(client)})
        if turn < len(conversation.agent):
            message = {"role": "assistant", **_said(conversation.agent[turn])}
            if turn < len(scenario.real_answers):
                message["real_answer"] = scenario.real_answers[turn]
            messages.append(message)
    row: dict[str, Any] = {
        "id": asked.id, "scenario": scenario.id, "repeat": asked.repeat, "fingerprint": scenario.fingerprint(),
        "ended_by": conversation.ended_by, "num_turns": len(conversation.agent), "goal_reached": conversation.reached,
    }
    if scenario.met_when is not None:
        row["conditions"] = [
            {"kind": condition.kind, "texts": list(condition.texts), "met_in_turn": turn}
            for condition, turn in zip(scenario.met_when.conditions, conversation.met, strict=True)
        ]
    return {**row, "messages": messages}


def conversation_of(row: Mapping[str, Any], asked: Asked) -> Conversation:
    """Returns the conversation of a row that `row_of` made."""
    said: dict[str, list[Said]] = {"user": [], "assistant": []}
    for message in row["messages"]:
        if message["role"] != "system":
            said[message["role"]].append(Said(
                message["content"], "seed" in message, message.get("seed"), message.get("num_tokens"),
                message.get("finish_reason"),
            ))
    met = tuple(condition["met_in_turn"] for condition in row.get("conditions", ()))
    return Conversation(
        asked, tuple(said["user"]), tuple(said["assistant"]), row["ended_by"], row["goal_reached"], met
    )


class TranscriptFile:
    """The transcripts of one folder, to be gone on with."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], asked: Sequence[Asked]) -> None:
        """Opens the folder or makes it.

        Args:
            folder: where the files are.
            settings: everything that decides what is said; a folder of other settings is refused.
            asked: every conversation that is to be had.

        Raises:
            DataError: the folder holds another simulation, or something else under these names.
        """
        self._folder, self._asked = folder, {each.id: each for each in asked}
        self.path = folder / TRANSCRIPTS_FILE
        self.finished: dict[str, Conversation] = {}
        wanted = json.loads(json.dumps({"format": FORMAT, **settings}))  # as it will read back: tuples as lists
        _open_folder(folder, wanted, has_transcripts=self.path.exists())
        if self.path.exists():
            self._read()

    @property
    def left(self) -> list[Asked]:
        """The conversations that have not ended yet."""
        return [each for each in self._asked.values() if each.id not in self.finished]

    def append(self, conversation: Conversation) -> None:
        """Writes one finished conversation.

        Raises:
            DataError: the disk is full or the folder is gone.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row_of(conversation), ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(
                f"The transcripts cannot be written to {self.path}: {error.strerror}.",
                next_step="make room, then give the same command: it goes on",
            ) from error
        self.finished[conversation.asked.id] = conversation

    def in_order(self) -> list[Conversation]:
        """Returns all finished conversations in the order asked for; puts the file into that order too."""
        ordered = [self.finished[each] for each in self._asked if each in self.finished]
        lines = "".join(json.dumps(row_of(each), ensure_ascii=False) + "\n" for each in ordered)
        if self.path.read_text(encoding="utf-8") != lines:
            replace_file(self.path, lines)
        return ordered

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                asked = self._asked.get(row["id"])
                if asked is None or row["fingerprint"] != asked.scenario.fingerprint():
                    raise DataError(
                        f"{self.path}:{number} is a conversation of other scenarios ({row['id']!r}).",
                        next_step="name another --out, or give the scenarios that it was made with",
                    )
                self.finished[asked.id] = conversation_of(row, asked)
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{self.path}:{number} is no transcript: {error!r:.200}.",
                    next_step="name another --out, or move the file away",
                ) from error
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))


def _said(said: Said) -> dict[str, Any]:
    made = {"seed": said.seed, "num_tokens": said.num_tokens, "finish_reason": said.finish_reason}
    return {"content": said.text, **(made if said.by_model else {})}


def _open_folder(folder: Path, settings: Mapping[str, Any], *, has_transcripts: bool) -> None:
    file = folder / SETTINGS_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            if has_transcripts:
                raise DataError(f"{folder} has a {TRANSCRIPTS_FILE} and no {SETTINGS_FILE}.",
                                next_step="name another --out")
            replace_file(file, json.dumps(settings, ensure_ascii=False, indent=1) + "\n")
            return
        there = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ChulengoError(f"{folder} cannot be written to: {error.strerror or error}.",
                            next_step="--out with a folder that can be written to") from error
    except ValueError as error:
        raise DataError(f"{file} is not JSON.", next_step="name another --out") from error
    there = there if isinstance(there, dict) else {}
    other = [name for name in settings if there.get(name) != settings[name]]
    if other:
        raise DataError(
            f"{folder} holds another simulation (other {', '.join(other)}).",
            next_step="name another --out, or give the settings that it was made with",
        )


def replace_file(file: Path, text: str) -> None:
    """Writes a text file that is whole or as it was before.

    Raises:
        ChulengoError: it cannot be written.
    """
    draft = file.with_name(file.name + ".unfinished")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise ChulengoError(f"{file} cannot be written: {error.strerror or error}.",
                            next_step="make room, then type the same again: it goes on") from error
