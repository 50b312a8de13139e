"""Held-out dialogues as scripts: the customer's turns are said again, the real agent's answers are kept beside.

Rows with a column `dialogue` that is one text with speakers in it (TweetSumm: ` customer: … support: …` without line
ends) are read here; any other chat data as training reads it. A speaker's name counts where white space or nothing
stands before it, and a colon and white space after it. That is the data's own rule, and not always decidable: of
TweetSumm's 1,099 dialogues 60 have another number of markers than of tweets, since handles in the text were replaced
by `customer:` and `support:` too.

Turns of one speaker in a row are joined with a line end; what the agent says before the customer has spoken is left
out, and so are empty turns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from chulengo.data.cleaning import clean
from chulengo.data.load import load_examples
from chulengo.data.prompts import PromptTemplate
from chulengo.data.selection import sample
from chulengo.data.sources import read_records
from chulengo.data.types import Example, Message, Role
from chulengo.errors import DataError
from chulengo.evaluate.simulate.scenarios import Scenario, check_ids

COLUMN = "dialogue"
SPEAKERS: dict[str, Role] = {
    "customer": "user", "client": "user", "user": "user",
    "support": "assistant", "agent": "assistant", "assistant": "assistant",
}  # fmt: skip
_MARKER = re.compile(rf"(?:^|(?<=\s))({'|'.join(SPEAKERS)}):(?=\s|$)")


def dialogue_turns(text: str) -> list[Message]:
    """Returns the turns of one text with speakers in it, as they stand.

    Raises:
        DataError: the text does not begin with a speaker.
    """
    marks = list(_MARKER.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise DataError(
            f"the dialogue does not begin with a speaker: {text.strip()[:60]!r}",
            allowed=", ".join(f"{name}:" for name in SPEAKERS),
        )
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        Message(SPEAKERS[mark.group(1)], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)
    ]


def alternating(turns: Sequence[Message]) -> tuple[Message, ...]:
    """Returns system prompt, user and assistant in turn: joined, without empty turns and leading answers."""
    kept: list[Message] = []
    for turn in turns:
        speaks_first = turn.role == "assistant" and not any(each.role == "user" for each in kept)
        if turn.role not in ("system", "user", "assistant") or not turn.content.strip() or speaks_first:
            continue
        if kept and kept[-1].role == turn.role:
            kept[-1] = Message(turn.role, f"{kept[-1].content}\n{turn.content.strip()}")
        else:
            kept.append(Message(turn.role, turn.content.strip()))
    return tuple(kept)


def load_dialogues(
    spec: str, *, format_name: str = "auto", columns: Mapping[str, str] | None = None,
    template: PromptTemplate | None = None, cleaning: Sequence[str] = (), hub_split: str = "train",
    offline: bool = False, num_rows: int | None = None, seed: int = 0, replay_turns: int | None = None,
) -> list[Scenario]:  # fmt: skip
    """Returns a scenario for each dialogue of a data source, in its order.

    Args:
        spec: a data source: a file, a folder, a Hub name.
        format_name: a data format, or auto.
        columns: our column name -> the data's; `dialogue` names the column with whole dialogues.
        template: a prompt template, for rows of columns.
        cleaning: cleaning steps, as in training.
        hub_split: which split of a Hub data set.
        offline: no network.
        num_rows: a random subset of this many dialogues.
        seed: of that subset.
        replay_turns: the customer's turns that are said again before the client model goes on; None: all of them, and
            no client model.

    Raises:
        DataError: no dialogue in which a customer speaks and an agent answers, a broken row, or two rows with one id.
        ConfigError: see `load_examples`.
    """
    known = columns or {}
    texts = None
    if format_name == "auto" and template is None:
        texts = _texts(spec, known.get(COLUMN, COLUMN), hub_split, offline)
    if texts is not None:
        ids = {example.source: name for name, example in texts}
        cleaned = [clean(example, cleaning) for _, example in texts]
        examples = [example for example in cleaned if example is not None]
    else:
        examples, _ = load_examples(
            spec, format=format_name, columns=columns, hub_split=hub_split, offline=offline, template=template,
            cleaning=cleaning,
        )
        ids = {example.source: Path(example.source).name for example in examples}
    examples = [replace(example, messages=alternating(example.messages)) for example in examples]
    spoken = [example for example in examples if _speak(example)]
    if not spoken:
        raise DataError(f"{spec}: none of its {len(examples)} rows is a dialogue of a customer and an agent.",
                        next_step="--replay with chats, or with a column dialogue of 'customer: … support: …'")
    drawn = spoken if num_rows is None else sample(spoken, num_rows, seed)
    check_ids([ids[example.source] for example in drawn], spec)
    return [_scenario(ids[example.source], example, replay_turns) for example in drawn]


def _texts(spec: str, column: str, hub_split: str, offline: bool) -> list[tuple[str, Example]] | None:
    """Returns id and turns of each row of whole dialogues; None when the first row is something else."""
    found: list[tuple[str, Example]] = []
    for record in read_records(spec, hub_split=hub_split, offline=offline):
        text = record.fields.get(column)
        if not found and (not isinstance(text, str) or _MARKER.match(text.lstrip()) is None):
            return None
        if not isinstance(text, str):
            raise DataError(f"{record.source}: its column '{column}' is no text.")
        try:
            turns = dialogue_turns(text)
        except DataError as error:
            raise DataError(f"{record.source}: {error.given}", allowed=error.allowed) from error
        own = record.fields.get("id")
        name = Path(record.source).name if own is None or isinstance(own, dict | list) else str(own)
        found.append((name, Example(tuple(turns), record.source)))
    return found


def _speak(example: Example) -> bool:
    return {"user", "assistant"} <= {message.role for message in example.messages}


def _scenario(name: str, example: Example, replay_turns: int | None) -> Scenario:
    first = example.messages[0]
    said = tuple(turn.content for turn in example.messages if turn.role == "user")
    answers = tuple(turn.content for turn in example.messages if turn.role == "assistant")
    count = len(said) if replay_turns is None else replay_turns
    return Scenario(
        id=name, source=example.source, script=said[:count], played=replay_turns is not None,
        system=first.content if first.role == "system" else None, real_answers=answers[:count],
    )
