"""A chat as a value, and what each typed line does to it.

`respond(state, line)` is the whole logic: it touches no terminal, no model and no file, and returns the next state
and one action for the loop around it (answer this question, save there, say that). So every command is tested without
a model, and another front end needs no second chat.

A chat is a list of exchanges, each a question with one answer a side (base, tuned). A side that was not asked at the
time reads the other side's answer in its history, so that `/both` can be switched on in mid-chat.

History longer than the context: the oldest exchanges are left out of what the model reads (never cut in the middle,
never the system prompt), and the loop says so. They stay in the chat, in `/save` and after `/undo`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from chulengo.data.types import Message
from chulengo.errors import ChulengoError, nearest
from chulengo.generate.settings import GenerationSettings, with_setting

Side = Literal["base", "tuned"]

COMMANDS = {
    "/help": "this list",
    "/system [TEXT]": "set the system prompt; alone: show it; `/system -`: none of its own",
    "/set [NAME VALUE]": "change a setting (temperature, top_p, top_k, max_new_tokens, repetition_penalty, seed)",
    "/retry": "answer the last question again, with other random numbers",
    "/undo": "forget the last question and its answer",
    "/new": "forget the whole conversation",
    "/both": "answer with base and tuned, one after the other",
    "/base": "answer with the base model only",
    "/tuned": "answer with the adapter only",
    "/history": "show the conversation so far",
    "/save FILE": "append the conversation to a .jsonl file that `chulengo train --data` reads",
    "/load FILE": "go on with the last conversation of a file",
    "/quit": "leave (as does Ctrl-D; Ctrl-C stops an answer)",
}


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and its answers, by side."""

    question: str
    answers: tuple[tuple[Side, str], ...] = ()

    def answer(self, side: Side) -> str | None:
        """Returns the side's answer, else the other side's, else None."""
        by_side = dict(self.answers)
        return by_side.get(side, next(iter(by_side.values()), None))


@dataclass(frozen=True, slots=True)
class ChatState:
    """Everything that a chat is.

    Attributes:
        settings: how tokens are chosen.
        has_adapter: whether there are two sides to show.
        sides: who answers the next question, in this order.
        system: the system prompt typed here; None leaves the renderer's own.
        exchanges: the conversation.
        num_asked: questions asked so far, repeated ones too; each has random numbers of its own.
    """

    settings: GenerationSettings
    has_adapter: bool = False
    sides: tuple[Side, ...] = ("base",)
    system: str | None = None
    exchanges: tuple[Exchange, ...] = ()
    num_asked: int = 0

    @property
    def main_side(self) -> Side:
        """The last of the sides shown: the one that is saved and loaded."""
        return self.sides[-1]


@dataclass(frozen=True, slots=True)
class Note:
    """Show this text."""

    text: str


@dataclass(frozen=True, slots=True)
class Ask:
    """Have the question answered by the sides of the state."""

    question: str


@dataclass(frozen=True, slots=True)
class Save:
    """Append the conversation to this file."""

    path: str


@dataclass(frozen=True, slots=True)
class Load:
    """Go on with the conversation in this file."""

    path: str


@dataclass(frozen=True, slots=True)
class Quit:
    """Leave."""


Action = Note | Ask | Save | Load | Quit


def respond(state: ChatState, line: str) -> tuple[ChatState, Action]:
    """Returns the state after a typed line, and what is to be done.

    A line that starts with `/` is a command; `//` sends a text that starts with one slash.
    """
    text = line.strip()
    if not text.startswith("/") or text.startswith("//"):
        question = text[1:] if text.startswith("//") else text
        return (state, Ask(question)) if question else (state, Note(""))
    name, _, argument = text.partition(" ")
    known = {command.split()[0]: command for command in COMMANDS}
    handler = _HANDLERS.get("/quit" if name == "/exit" else name)
    if handler is None:
        close = nearest(name, known)
        hint = f"Did you mean {close}? " if close else ""
        return state, Note(f"There is no command {name}. {hint}/help lists them; //text sends a text with a slash.")
    argument = argument.strip()
    usage = known.get(name, "/quit")
    if argument and usage == name:
        return state, Note(f"{name} stands alone; {argument!r} was not sent.")
    if not argument and " " in usage and "[" not in usage:
        return state, Note(f"Use: {usage}")
    try:
        return handler(state, argument)
    except ChulengoError as error:
        return state, Note(str(error))


def answered(state: ChatState, question: str, answers: Sequence[tuple[Side, str]]) -> ChatState:
    """Returns the state with one more exchange."""
    exchange = Exchange(question, tuple(answers))
    return replace(state, exchanges=(*state.exchanges, exchange), num_asked=state.num_asked + 1)


def messages(state: ChatState, side: Side, question: str | None = None, *, skip: int = 0) -> list[Message]:
    """Returns the conversation as one side sees it, without the first `skip` exchanges, and the new question."""
    turns = [] if state.system is None else [Message("system", state.system)]
    for exchange in state.exchanges[skip:]:
        answer = exchange.answer(side)
        # a side that said nothing: no chat style has an empty answer, so the question goes with it
        if answer is not None and answer.strip():
            turns += [Message("user", exchange.question), Message("assistant", answer)]
    if question is not None:
        turns.append(Message("user", question))
    return turns


def num_skipped(
    state: ChatState, side: Side, question: str, num_tokens: Callable[[list[Message]], int], context: int | None
) -> int:
    """Returns how many of the oldest exchanges must be left out for question and answer to fit.

    Room is kept for the whole answer (`max_new_tokens`), but for no more than a quarter of the context: a long answer
    limit is to cost length, not memory. With everything left out the question may still be too long for the context.

    Args:
        state: the chat.
        side: whose history.
        question: what is asked next.
        num_tokens: the prompt's length in tokens.
        context: the model's context in tokens; None: unlimited.
    """
    if context is None:
        return 0
    room = context - min(state.settings.max_new_tokens, context // 4)
    for skip in range(len(state.exchanges)):
        if num_tokens(messages(state, side, question, skip=skip)) <= room:
            return skip
    return len(state.exchanges)


def from_messages(state: ChatState, turns: Sequence[Message]) -> ChatState:
    """Returns the state that goes on with these turns: an optional system prompt, then questions and answers.

    Raises:
        ChulengoError: the turns do not alternate, or do not end with an answer.
    """
    system = turns[0].content if turns and turns[0].role == "system" else None
    rest = list(turns[1:] if system is not None else turns)
    roles = [turn.role for turn in rest]
    if not rest or roles != ["user", "assistant"] * (len(rest) // 2):
        raise ChulengoError(
            f"The conversation's turns are {', '.join(roles) or 'none'}.",
            allowed="user and assistant in turn, the assistant last, a system prompt before them",
        )
    side = state.main_side
    pairs = zip(rest[::2], rest[1::2], strict=True)
    exchanges = tuple(Exchange(user.content, ((side, answer.content),)) for user, answer in pairs)
    return replace(state, system=system, exchanges=exchanges)


def _help(state: ChatState, _argument: str) -> tuple[ChatState, Action]:
    width = max(map(len, COMMANDS))
    lines = [f"{command:<{width}}  {what}" for command, what in COMMANDS.items()]
    lines.append('Several lines: paste them, or type """ , the lines, and """ .')
    return state, Note("\n".join(lines))


def _system(state: ChatState, argument: str) -> tuple[ChatState, Action]:
    if not argument:
        return state, Note(f"System prompt: {state.system or '(none of its own)'}")
    system = None if argument == "-" else argument
    return replace(state, system=system), Note("The system prompt holds from the next answer on.")


def _set(state: ChatState, argument: str) -> tuple[ChatState, Action]:
    if not argument:
        return state, Note("\n".join(f"{name} {value:g}" for name, value in state.settings.to_dict().items()))
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    settings = with_setting(state.settings, name, value.strip())
    return replace(state, settings=settings), Note(f"Now: {settings.describe()}.")


def _retry(state: ChatState, _argument: str) -> tuple[ChatState, Action]:
    if not state.exchanges:
        return state, Note("Nothing has been asked yet.")
    return replace(state, exchanges=state.exchanges[:-1]), Ask(state.exchanges[-1].question)


def _undo(state: ChatState, _argument: str) -> tuple[ChatState, Action]:
    if not state.exchanges:
        return state, Note("Nothing has been asked yet.")
    left = len(state.exchanges) - 1
    return replace(state, exchanges=state.exchanges[:-1]), Note(
        f"Forgotten: {state.exchanges[-1].question!r} ({left} left)."
    )


def _new(state: ChatState, _argument: str) -> tuple[ChatState, Action]:
    return replace(state, exchanges=()), Note("A new conversation; system prompt and settings stay.")


def _show(sides: tuple[Side, ...]) -> Callable[[ChatState, str], tuple[ChatState, Action]]:
    def handler(state: ChatState, _argument: str) -> tuple[ChatState, Action]:
        if not state.has_adapter and sides != ("base",):
            return state, Note("There is no adapter to put beside the base: start with --adapter FOLDER.")
        return replace(state, sides=sides), Note(f"Answers now come from: {' and '.join(sides)}.")

    return handler


def _history(state: ChatState, _argument: str) -> tuple[ChatState, Action]:
    lines = [f"{turn.role}: {turn.content}" for turn in messages(state, state.main_side)]
    return state, Note("\n".join(lines) or "Nothing has been said yet.")


def _save(state: ChatState, argument: str) -> tuple[ChatState, Action]:
    return (state, Save(argument)) if state.exchanges else (state, Note("Nothing to save yet."))


_HANDLERS: dict[str, Callable[[ChatState, str], tuple[ChatState, Action]]] = {
    "/help": _help,
    "/system": _system,
    "/set": _set,
    "/retry": _retry,
    "/undo": _undo,
    "/new": _new,
    "/both": _show(("base", "tuned")),
    "/base": _show(("base",)),
    "/tuned": _show(("tuned",)),
    "/history": _history,
    "/save": _save,
    "/load": lambda state, argument: (state, Load(argument)),
    "/quit": lambda state, _argument: (state, Quit()),
}
