"""The shapes that conversations have between a file and a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "text"]
Kind = Literal["chat", "text", "preference", "kto"]


@dataclass(frozen=True, slots=True)
class Record:
    """One raw row of a source.

    Attributes:
        fields: column name -> value, as the file has it.
        source: where it came from, `path:line` (1-based) or `path#row`; shown in every error about it.
    """

    fields: dict[str, Any]
    source: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: system, user or assistant; `text` for raw text that is not a chat.
        content: the text, as written.
        trained: True or False overrides the run's choice for this turn; None follows it.
    """

    role: Role
    content: str
    trained: bool | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation (or text), ready to be rendered.

    Attributes:
        messages: the turns. For a preference pair the last one is the chosen answer.
        source: see `Record.source`.
        kind: what the row is.
        rejected: the rejected answer's turns (preference pairs only).
        desirable: the label (KTO rows only).
        references: all accepted answers where the data has several (SQuAD).
        group: rows of the same group stay on the same side of a split (SQuAD: questions on one paragraph); "": the
            first user message decides.
    """

    messages: tuple[Message, ...]
    source: str
    kind: Kind = "chat"
    rejected: tuple[Message, ...] = ()
    desirable: bool | None = None
    references: tuple[str, ...] = ()
    group: str = ""

    @property
    def answer(self) -> str | None:
        """The last message's text when the assistant wrote it, else None."""
        last = self.messages[-1] if self.messages else None
        return last.content if last is not None and last.role == "assistant" else None
