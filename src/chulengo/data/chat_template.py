"""A tokenizer's own chat template as a style.

A template is a program that turns messages into one string. Two things are lost in that string: which characters a
user typed and which the template wrote, and which turn each belongs to. Both are found again without searching for
any content: the template is first run with placeholders instead of contents, once for each sequence of roles. What
stands between placeholders is the template's own text, and only there are control tokens looked for. A user's text
that contains one stays text.

Where an answer begins and ends follows from running the template on the turns so far: with its generation prompt,
which must be a prefix of the whole (it is what the model will be given when it has to answer), and with the answer,
whose last control token ends the turn. A template that rewrites earlier turns so that this does not hold cannot be
trained on without a difference to what is served later; it is refused, and the message names the turn.

The real contents are then put in the placeholders' places, and the result must equal what the template makes of the
real contents. So a template that looks into contents (reasoning models cut `<think>` out of them) is refused too where
it changes them, except for stripping, which is found by padding the placeholders.

Templates run in jinja2's immutable sandbox with the functions that transformers gives them. One differs: the date
that `strftime_now` tells is fixed, because a prompt that changes overnight would differ between training, resume and
serving.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from chulengo.data.styles import Control, Element, Group, Text
from chulengo.data.tokenizer import Tokenizer
from chulengo.data.types import Message
from chulengo.errors import ConfigError, RenderError

FIXED_DATE = datetime(2024, 7, 26)  # the date in Llama 3's own template where it is given no clock
# the padding is white space that str.strip removes and no template writes; the marks are for private use
_PAD, _OPEN, _CLOSE = "\u2003", "\ue000", "\ue001"
_SLOT = re.compile(f"({_PAD}?){_OPEN}(\\d+){_CLOSE}({_PAD}?)")


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a message's content goes, and which of its ends the template strips."""

    turn: int
    keeps_left: bool
    keeps_right: bool

    def fill(self, content: str) -> str:
        content = content if self.keeps_left else content.lstrip()
        return content if self.keeps_right else content.rstrip()


@dataclass(frozen=True, slots=True)
class _Answer:
    begin: int  # places in the skeleton's raw text
    slot: int
    end: int


@dataclass(frozen=True, slots=True)
class _Skeleton:
    raw: str  # the template's output with placeholders
    pieces: tuple[str | _Slot, ...]
    layout: tuple[Control | tuple[bool, tuple[Text | _Slot, ...]], ...]

    def filled(self, messages: Sequence[Message]) -> str:
        return "".join(p if isinstance(p, str) else p.fill(messages[p.turn].content) for p in self.pieces)


class TemplateStyle:
    """The style `tokenizer`."""

    name = "tokenizer"

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        """Compiles the template and finds the tokens that end an answer.

        Raises:
            ConfigError: the template cannot be compiled, or cannot even render a question and an answer.
        """
        self._tokenizer = tokenizer
        self._compiled = _compile(template)
        texts = sorted(tokenizer.control_tokens, key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._skeletons: dict[tuple[tuple[str, ...], bool], _Skeleton] = {}
        try:
            probe = self._skeleton(("user", "assistant"), False)
        except RenderError as error:
            raise ConfigError(
                f"The tokenizer's chat template cannot be used. {error.given}",
                next_step="choose a built-in style, e.g. --set prompt.style=chatml",
            ) from error
        ends = {e.token_id for e in probe.layout if isinstance(e, Control) and e.end and e.turn == 1}
        self.stop_ids = frozenset(ends | ({tokenizer.eos_id} if tokenizer.eos_id is not None else set()))
        slot = next(p for p in probe.pieces if isinstance(p, _Slot) and p.turn == 1)
        self._strips = not slot.keeps_left

    def tidy(self, text: str) -> str:
        """See `Style.tidy`."""
        return text.strip() if self._strips else text

    def lay_out(self, messages: Sequence[Message], *, answer_next: bool) -> list[Element]:
        """See `Style.lay_out`.

        Raises:
            RenderError: the template refuses the conversation, changes a content, or rewrites earlier turns.
        """
        skeleton = self._skeleton(tuple(m.role for m in messages), answer_next)
        contents = [{"role": m.role, "content": m.content} for m in messages]
        if (rendered := self._render(contents, answer_next)) != skeleton.filled(messages):
            turn = _first_difference(skeleton, messages, rendered)
            raise RenderError(
                f"The chat template changes the text of message {turn + 1} ({messages[turn].role}).",
                next_step="choose a built-in style, e.g. --set prompt.style=chatml, or change that message",
            )
        layout: list[Element] = []
        for element in skeleton.layout:
            if isinstance(element, Control):
                layout.append(element)
                continue
            prefix, parts = element
            texts = (p if isinstance(p, Text) else Text(p.fill(messages[p.turn].content), p.turn) for p in parts)
            layout.append(Group(tuple(texts), prefix))
        return layout

    def _render(self, messages: list[dict[str, str]], generation: bool) -> str:
        import jinja2

        named = {"bos_token": self._tokenizer.bos_id, "eos_token": self._tokenizer.eos_id,
                 "pad_token": self._tokenizer.pad_id}
        texts = {name: self._tokenizer.piece(i) for name, i in named.items() if i is not None}
        try:
            return str(self._compiled.render(messages=messages, add_generation_prompt=generation, tools=None,
                                             documents=None, **texts))
        except (jinja2.TemplateError, TypeError, KeyError, IndexError) as error:
            raise RenderError(f"The chat template refuses the conversation: {error}",
                              next_step="choose a built-in style, e.g. --set prompt.style=chatml") from error

    def _raw(self, roles: Sequence[str], generation: bool) -> str:
        contents = [{"role": role, "content": f"{_PAD}{_OPEN}{i}{_CLOSE}{_PAD}"} for i, role in enumerate(roles)]
        return self._render(contents, generation)

    def _skeleton(self, roles: tuple[str, ...], generation: bool) -> _Skeleton:
        found = self._skeletons.get((roles, generation))
        if found is None:
            raw = self._raw(roles, generation)
            matches = list(_SLOT.finditer(raw))
            turns = [int(match[2]) for match in matches]
            for turn, role in enumerate(roles):
                if turns.count(turn) != 1:
                    what = "leaves out" if turn not in turns else "repeats"
                    raise RenderError(f"The chat template {what} message {turn + 1} ({role}).",
                                      next_step="choose a built-in style, e.g. --set prompt.style=chatml")
            answers = {i: self._answer(raw, roles, i) for i, role in enumerate(roles) if role == "assistant"}
            pieces: list[str | _Slot] = []
            place = 0
            for match in matches:
                pieces += [raw[place : match.start()], _Slot(int(match[2]), bool(match[1]), bool(match[3]))]
                place = match.end()
            pieces.append(raw[place:])
            layout = tuple(self._grouped(_parts(raw, matches, answers), roles))
            found = self._skeletons[roles, generation] = _Skeleton(raw, tuple(pieces), layout)
        return found

    def _answer(self, raw: str, roles: Sequence[str], turn: int) -> _Answer:
        before = self._raw(roles[:turn], True)
        if not raw.startswith(before):
            raise RenderError(
                f"The chat template does not keep message {turn + 1} (assistant) behind its own generation prompt: "
                "what the model would be trained on differs from what it is given when it has to answer.",
                next_step="choose a built-in style, e.g. --set prompt.style=chatml",
            )
        alone, mark = self._raw(roles[: turn + 1], False), f"{_OPEN}{turn}{_CLOSE}"
        suffix = alone[alone.index(mark) + len(mark) :] if mark in alone else ""
        controls = list(self._controls.finditer(suffix))
        if not controls:
            raise RenderError(
                "The chat template writes no control token after an answer, so a model could not learn to stop.",
                next_step="choose a built-in style, e.g. --set prompt.style=guanaco",
            )
        slot = raw.index(mark)
        ending = suffix[: controls[-1].end()]
        if not raw.startswith(ending, slot + len(mark)):
            raise RenderError(
                f"The chat template ends message {turn + 1} (assistant) differently once the conversation goes on.",
                next_step="choose a built-in style, e.g. --set prompt.style=chatml",
            )
        return _Answer(len(before), slot, slot + len(mark) + len(ending))

    def _grouped(
        self, parts: Iterator[tuple[str | _Slot, int | None, bool]], roles: Sequence[str]
    ) -> Iterator[Control | tuple[bool, tuple[Text | _Slot, ...]]]:
        """Yields control tokens and groups; `parts` are texts or slots, their turn, and whether a group starts."""
        group: list[Text | _Slot] = []
        prefix, open_turn, last_slot = True, None, None
        begin = self._tokenizer.bos_id if self._tokenizer.bos_id != self._tokenizer.eos_id else None
        for content, turn, starts in parts:
            if starts and group:
                yield prefix, tuple(group)
                group, prefix = [], False
            if isinstance(content, _Slot):
                group.append(content)
                last_slot = content.turn
                open_turn = content.turn if roles[content.turn] != "assistant" else None
                continue
            place = 0
            for match in self._controls.finditer(content):
                if match.start() > place:
                    group.append(Text(content[place : match.start()], turn))
                if group:
                    yield prefix, tuple(group)
                token_id = self._tokenizer.control_tokens[match[0]]
                is_end = turn is not None and turn == last_slot and match.end() == len(content)
                owner = turn if turn is not None else open_turn
                yield Control(token_id, owner, end=is_end or (turn is None and owner is not None),
                              begin=token_id == begin and owner is None)
                group, prefix, open_turn = [], self._tokenizer.prefix_after_control, None
                place = match.end()
            if place < len(content):
                group.append(Text(content[place:], turn))
        if group:
            yield prefix, tuple(group)


def _parts(
    raw: str, matches: Sequence[re.Match[str]], answers: dict[int, _Answer]
) -> Iterator[tuple[str | _Slot, int | None, bool]]:
    """Cuts the raw text at slots and at the ends of answers: (text or slot, turn, whether a group starts here)."""
    begins = {answer.begin: turn for turn, answer in answers.items()}
    ends = {answer.end for answer in answers.values()}
    slots = {match.start(): match for match in matches}
    cuts = sorted({0, len(raw), *begins, *ends, *slots, *(match.end() for match in matches)})
    turn: int | None = None
    for start, stop in itertools.pairwise(cuts):
        turn = None if start in ends else turn
        turn = begins.get(start, turn)
        match = slots.get(start)
        if match is not None:
            yield _Slot(int(match[2]), bool(match[1]), bool(match[3])), turn, start in begins
        else:
            yield raw[start:stop], turn, start in begins


def _first_difference(skeleton: _Skeleton, messages: Sequence[Message], rendered: str) -> int:
    expected = ""
    last = 0
    for piece in skeleton.pieces:
        if isinstance(piece, _Slot):
            last = piece.turn
        expected += piece if isinstance(piece, str) else piece.fill(messages[piece.turn].content)
        if not rendered.startswith(expected):
            break
    return last


def _compile(template: str) -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` … `{% endgeneration %}`: transformers' marks, which write nothing."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = FIXED_DATE.strftime
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ConfigError(f"The tokenizer's chat template cannot be read: {error}",
                          next_step="choose a built-in style, e.g. --set prompt.style=chatml") from error


def _raise(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
             sort_keys: bool = False) -> str:
    import json

    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
