"""Talk to a model in the terminal: base, adapter, or both beside each other.

  chulengo chat                                   the embedded model
  chulengo chat --adapter runs/demo --both        base and tuned answer every question
  printf 'Hello!\\nAnd you?\\n' | chulengo chat     without a terminal: a question a line, plain answers

In the chat, /help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.
"""

from __future__ import annotations

import argparse
import json
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from chulengo.cli.inference import (
    add_model_arguments,
    add_sampling_arguments,
    add_session_arguments,
    memory_explained,
    session_config,
    session_from,
    settings_from,
)
from chulengo.errors import ChulengoError, ConfigError, DataError

if TYPE_CHECKING:
    from chulengo.generate.conversation import ChatState, Side
    from chulengo.generate.engine import Answer
    from chulengo.model.session import Session

QUOTES = '"""'  # alone on a line: begins and ends a question of several lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `chulengo chat`."""
    add_model_arguments(parser)
    add_session_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--both", action="store_true", help="base and tuned answer, one after the other")
    parser.add_argument("--load", metavar="FILE", help="go on with a conversation that /save wrote")
    add_sampling_arguments(parser, temperature=0.7, top_p=0.9)


def run(arguments: argparse.Namespace) -> int:
    """Runs `chulengo chat` until its input ends; returns 0."""
    from chulengo.generate.conversation import ChatState

    config = session_config(arguments)
    settings = settings_from(arguments)
    if arguments.both and arguments.adapter is None:
        raise ConfigError("--both puts the base beside an adapter, and there is none.", next_step="--adapter FOLDER")
    session = session_from(arguments, config)
    tuned: tuple[Side, ...] = ("base", "tuned") if arguments.both else ("tuned",)
    state = ChatState(
        settings, has_adapter=session.has_adapter, sides=tuned if session.has_adapter else ("base",),
        system=arguments.system,
    )
    if arguments.load:
        state = _load(state, arguments.load)
    screen = Screen.of_process()
    screen.note(f"{settings.describe()}. /help lists the commands, Ctrl-D leaves.")
    loop(state, session, questions(sys.stdin, terminal=screen.terminal), screen)
    return 0


@dataclass(frozen=True, slots=True)
class Screen:
    """Where a chat appears: answers on one stream, everything else on the other; colours only on a terminal."""

    out: TextIO
    notes: TextIO
    terminal: bool

    @classmethod
    def of_process(cls) -> Screen:
        """Returns the screen of this process."""
        import os

        terminal = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        return cls(sys.stdout, sys.stderr, terminal)

    def note(self, text: str) -> None:
        """Shows a remark of the program."""
        if text:
            print(self._coloured(printable(text), "2"), file=self.notes, flush=True)

    def label(self, side: Side, *, both: bool) -> None:
        """Shows who answers next."""
        if self.terminal or both:
            print(self._coloured(f"{side}>", "36" if side == "base" else "32"), end=" ", file=self.out, flush=True)

    def piece(self, text: str) -> None:
        """Shows some text of an answer."""
        print(text if not self.terminal else printable(text), end="", file=self.out, flush=True)

    def end(self) -> None:
        """Ends an answer's line."""
        print(file=self.out, flush=True)

    def _coloured(self, text: str, code: str) -> str:
        import os

        return f"\033[{code}m{text}\033[0m" if self.terminal and "NO_COLOR" not in os.environ else text


def printable(text: str) -> str:
    """Returns the text with control characters shown, so that a model cannot write to the terminal's control."""
    return "".join(f"\\x{ord(c):02x}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def questions(source: TextIO, *, terminal: bool) -> Iterator[str]:
    """Yields what was typed, a line or several at a time, until the input ends.

    On a terminal, `readline` gives editing and history, and a paste of several lines arrives as one text (bracketed
    paste). Anywhere, a line of three quotation marks begins and ends a text of several lines.
    """
    read = _typed if terminal else _lines(source)
    while True:
        try:
            line = read("you> ")
            if line.strip() == QUOTES:
                block = []
                while (inner := read("...  ")).strip() != QUOTES:
                    block.append(inner)
                line = "\n".join(block)
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)", file=sys.stderr)
            continue
        # a byte that is no UTF-8 arrives as a lone surrogate, which no tokenizer takes
        yield line.encode("utf-8", "replace").decode()


def _typed(prompt: str) -> str:
    import readline

    readline.parse_and_bind("set enable-bracketed-paste on")
    return input(prompt)


def _lines(source: TextIO) -> Callable[[str], str]:
    def read(_prompt: str) -> str:
        line = source.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    return read


def loop(state: ChatState, session: Session, lines: Iterator[str], screen: Screen) -> ChatState:
    """Does what each line asks until one says to leave or they end; returns the last state."""
    from chulengo.generate.conversation import Ask, Load, Note, Quit, Save, respond

    for line in lines:
        try:
            after, action = respond(state, line)
            match action:
                case Quit():
                    return after
                case Note(text):
                    state = after
                    screen.note(text)
                case Save(path):
                    screen.note(_save(after, path, session))
                case Load(path):
                    state = _load(after, path)
                    screen.note(f"{len(state.exchanges)} exchanges from {path}.")
                case Ask(question):
                    # a question that could not be answered leaves the chat as it was before it
                    state = _ask(after, question, session, screen) or state
        except ChulengoError as error:
            screen.note(str(error))
        except KeyboardInterrupt:  # outside an answer, which handles its own: nothing to stop, and no reason to leave
            screen.note("(Ctrl-D or /quit leaves)")
    return state


def _ask(state: ChatState, question: str, session: Session, screen: Screen) -> ChatState | None:
    from chulengo.generate.conversation import answered

    answers: list[tuple[Side, str]] = []
    for side in state.sides:
        text, ended = _answer(state, question, side, session, screen)
        if text.strip():
            answers.append((side, text))
        if ended is None:
            screen.note("(stopped; /retry asks again, /undo forgets it)" if text.strip() else "(stopped)")
            break
        screen.note(_ending(ended, state))
    return answered(state, question, answers) if answers else None


def _answer(
    state: ChatState, question: str, side: Side, session: Session, screen: Screen
) -> tuple[str, Answer | None]:
    """Streams one side's answer; returns its text and the finished answer, None when Ctrl-C stopped it."""
    from chulengo.generate.conversation import messages, num_skipped
    from chulengo.generate.engine import chat_prompt, stream
    from chulengo.generate.settings import item_seed

    def num_tokens(turns: list[Any]) -> int:
        return len(session.renderer.prompt(turns))

    skip = num_skipped(state, side, question, num_tokens, session.context)
    if skip:
        screen.note(
            f"(the oldest {skip} of {len(state.exchanges)} exchanges no longer fit into the context of "
            f"{session.context:,} tokens: the model does not see them)"
        )
    prompt = chat_prompt(session.renderer, messages(state, side, question, skip=skip))
    if session.context is not None and len(prompt.ids) >= session.context and not session.encoder_decoder:
        raise DataError(
            f"The question is too long: {len(prompt.ids):,} tokens, and the model's context is {session.context:,}.",
            next_step="a shorter question",
        )
    text = ""
    screen.label(side, both=len(state.sides) > 1)
    try:
        with session.side(side) as model, memory_explained("/set max_new_tokens lower, or /new"):
            pieces = stream(model, prompt, state.settings, item_seed(state.settings.seed, state.num_asked))
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    screen.end()
                    return text, end.value
                text += piece
                screen.piece(piece)
    except KeyboardInterrupt:
        screen.end()
        return text, None


def _ending(answer: Answer, state: ChatState) -> str:
    if not answer.text.strip():
        return "(an empty answer; it is not kept)"
    if answer.finish_reason == "length":
        return f"(cut at {state.settings.max_new_tokens} tokens; /set max_new_tokens N, then /retry)"
    if answer.finish_reason == "context":
        return "(cut: the model's context is full)"
    return ""


def _save(state: ChatState, path: str, session: Session) -> str:
    from chulengo.generate.conversation import messages

    def turns(side: Side) -> list[dict[str, str]]:
        return [{"role": m.role, "content": m.content} for m in messages(state, side)]

    row: dict[str, Any] = {
        "messages": turns(state.main_side), "side": state.main_side, "model": session.model_name,
        "adapter": None if session.adapter is None else str(session.adapter), "settings": state.settings.to_dict(),
        "renderer": session.renderer.fingerprint(),
    }
    if len(state.sides) > 1:
        row["base_messages"] = turns("base")
    file = Path(path).expanduser()
    try:
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise DataError(f"The conversation cannot be saved to {file}: {error.strerror}.") from error
    return f"Appended {len(row['messages'])} messages to {file}."


def _load(state: ChatState, path: str) -> ChatState:
    from chulengo.data.types import Message
    from chulengo.generate.conversation import from_messages

    file = Path(path).expanduser()
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        row = json.loads(lines[-1])
        turns = [Message(turn["role"], str(turn["content"])) for turn in row["messages"]]
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise DataError(
            f"The last line of {file} is no conversation.", allowed='a JSON row with "messages", as /save writes it'
        ) from error
    return from_messages(state, turns)
