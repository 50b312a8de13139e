"""The built-in chat styles: each says, in order, which control tokens and which texts a conversation consists of.

A style never produces a string to be tokenised and searched afterwards. It lays a conversation out as *elements*:
`Control` (one token, by id) and `Group` (texts that are encoded together, once). Every text says to which turn it
belongs, so that the loss mask follows from the layout and a user's text has no way to become a control token.

One rule makes training and generation agree: an answer begins a group of its own. What comes before it is then
encoded without any knowledge of the answer, exactly as when the model is about to speak, so that `prompt()` is a
prefix of `render()` for any tokenizer, and no token can reach from the prompt into the answer. For Llama 2 this gives
the same ids as Meta's encoding of prompt and answer in one string, because a SentencePiece piece never reaches over
the space before the answer (checked on all 1,380 turns of guanaco-llama2-1k).

The styles and their authorities:

- `llama2`: Meta's `llama/generation.py`: each exchange is `<s>` + `[INST] {user} [/INST] {answer} ` + `</s>`, contents
  stripped, the system prompt folded into the first user turn (neither it nor that turn's left side is stripped then,
  as there). The space before `</s>` belongs to the answer and carries loss: the history that the model will see has
  it, and a model that is not taught to write it never learns to reach `</s>` from its last word.
- `mistral`: mistral-common's v1 instruct tokenizer (Mistral 7B Instruct v0.1 and v0.2): one `<s>`, then
  `[INST] {user} [/INST]` and `{answer}` each encoded as a text of its own, `</s>` after each answer; the system prompt
  stands before the first user turn with an empty line between. Contents as written.
- `chatml`: `<|im_start|>{role}\\n{content}<|im_end|>` with a line break between turns. The beginning-of-text token
  comes first only where the vocabulary has one that has no other office (Qwen has none).
- `llama3`: Meta's `ChatFormat`: header tokens, an empty line, the stripped content, `<|eot_id|>`.
- `guanaco`: `### Human: {user} ### Assistant: {answer}`, as openassistant-guanaco writes it, contents stripped, plus an
  end-of-text token after *each* answer: the data set itself has none, which is why models trained on its bare text
  go on to write the next question.
- `plain`: the contents and nothing else: system prompt, empty line, user text, line break, answer, end of text. For
  completion models, and for encoder-decoder models, whose input is then the bare user text (`bare_text`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from chulengo.data.tokenizer import Tokenizer
from chulengo.data.types import Message
from chulengo.errors import ConfigError, RenderError

BOS, EOS = "bos", "eos"


@dataclass(frozen=True, slots=True)
class Control:
    """One control token.

    Attributes:
        token_id: its id.
        turn: index of the message it belongs to; None for the style's own.
        end: whether it ends that turn.
        begin: whether it is a beginning-of-text token, which nothing predicts.
    """

    token_id: int
    turn: int | None = None
    end: bool = False
    begin: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """Some text: `turn` and `end` as in `Control`."""

    text: str
    turn: int | None = None
    end: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """Texts that are encoded as one; `prefix` as in `Tokenizer.encode`."""

    texts: tuple[Text, ...]
    prefix: bool = False


Element = Control | Group


class Style(Protocol):
    """How a conversation is laid out."""

    @property
    def name(self) -> str:
        """The name it is chosen by."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer."""

    def lay_out(self, messages: Sequence[Message], *, answer_next: bool) -> list[Element]:
        """Returns the elements of a conversation; `answer_next` adds what stands before the next answer."""

    def tidy(self, text: str) -> str:
        """Returns an answer's decoded text as the user sees it."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the built-in styles need to know of a vocabulary: ids by name, and whether text after one gets a space."""

    ids: Mapping[str, int]
    prefix_after_control: bool

    def control(self, name: str, turn: int | None = None, *, end: bool = False) -> Control:
        """Returns the element of one control token."""
        return Control(self.ids[name], turn, end, begin=name == BOS)


Builder = Callable[[Sequence[Message], Tokens, bool], Iterator[Element]]


@dataclass(frozen=True, slots=True)
class Definition:
    """A built-in style.

    Attributes:
        build: lays a conversation out.
        needs: control tokens (`bos`, `eos`, or their text) that the vocabulary must have.
        stops: those of them that end an answer.
        tidy: an answer's decoded text -> what the user sees.
    """

    build: Builder
    needs: tuple[str, ...]
    stops: tuple[str, ...]
    tidy: Callable[[str], str]


@dataclass(frozen=True, slots=True)
class BuiltInStyle:
    """A built-in style with the ids of one vocabulary."""

    name: str
    tokens: Tokens
    stop_ids: frozenset[int]

    def lay_out(self, messages: Sequence[Message], *, answer_next: bool) -> list[Element]:
        """See `Style.lay_out`."""
        return list(STYLES[self.name].build(messages, self.tokens, answer_next))

    def tidy(self, text: str) -> str:
        """See `Style.tidy`."""
        return STYLES[self.name].tidy(text)


def built_in_style(name: str, tokenizer: Tokenizer) -> BuiltInStyle:
    """Returns the style with this vocabulary's ids.

    Raises:
        ConfigError: the vocabulary lacks a control token that the style needs.
    """
    ids = control_ids(tokenizer)
    definition = STYLES[name]
    lacking = [token for token in definition.needs if token not in ids]
    if lacking:
        named = ["a beginning-of-text token" if t == BOS else "an end-of-text token" if t == EOS else t
                 for t in lacking]
        possible = [other for other, entry in STYLES.items() if all(t in ids for t in entry.needs)]
        possible += ["tokenizer"] if tokenizer.chat_template else []
        raise ConfigError(
            f"The chat style {name!r} needs {', '.join(named)}, which this model's vocabulary does not have.",
            allowed=", ".join(possible) or None,
            next_step=f"--set prompt.style={possible[-1]}" if possible else "choose another base model",
        )
    tokens = Tokens({t: ids[t] for t in ids}, tokenizer.prefix_after_control)
    stops = {ids[t] for t in definition.stops} | ({ids[EOS]} if EOS in ids else set())
    return BuiltInStyle(name, tokens, frozenset(stops))


def bare_text(messages: Sequence[Message]) -> Group:
    """Returns the contents alone, in one group: what an encoder reads in the style `plain`, any order of roles."""
    texts: list[Text] = []
    for turn, message in enumerate(messages):
        if turn:
            texts.append(Text("\n\n" if messages[turn - 1].role == "system" else "\n"))
        texts.append(Text(message.content, turn))
    return Group(tuple(texts), prefix=True)


def control_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the ids of all control tokens by text, and of the text's two ends as `bos` and `eos`."""
    ids = dict(tokenizer.control_tokens)
    if tokenizer.bos_id is not None:
        ids[BOS] = tokenizer.bos_id
    if tokenizer.eos_id is not None:
        ids[EOS] = tokenizer.eos_id
    return ids


@dataclass(frozen=True, slots=True)
class _Exchange:
    system: str | None  # only in the first one
    user: str
    user_turn: int
    answer: str | None
    answer_turn: int


def _exchanges(messages: Sequence[Message]) -> Iterator[_Exchange]:
    """Yields user and answer pairs of a strictly alternating conversation, the last perhaps without its answer."""
    system = messages[0].content if messages and messages[0].role == "system" else None
    first = 0 if system is None else 1
    for index in range(first, len(messages)):
        expected = "user" if (index - first) % 2 == 0 else "assistant"
        role = messages[index].role
        if role == expected:
            continue
        if role == "system":
            what = f"Message {index + 1} is a system message in mid-conversation."
        elif index == first:
            what = f"The conversation starts with a message of the {role}."
        else:
            what = f"Messages {index} and {index + 1} are both {role} messages."
        raise RenderError(
            what,
            allowed="an optional system message, then user and assistant in turns",
            next_step="correct the row, or --set prompt.style=chatml (or llama3) where the model knows that style",
        )
    if len(messages) == first:
        raise RenderError("The conversation has no user message.")
    for index in range(first, len(messages), 2):
        answer = messages[index + 1].content if index + 1 < len(messages) else None
        yield _Exchange(system if index == first else None, messages[index].content, index, answer, index + 1)


def _llama2(messages: Sequence[Message], tokens: Tokens, answer_next: bool) -> Iterator[Element]:
    for exchange in _exchanges(messages):
        turn = exchange.user_turn
        yield tokens.control(BOS)
        if exchange.system is None:
            prompt = [Text("[INST]"), Text(" " + exchange.user.strip(), turn)]
        else:
            # Meta strips the folded whole, whose left end is <<SYS>>: only the right end can change
            user = exchange.user.rstrip()
            mark = "\n<</SYS>>\n\n" if user else "\n<</SYS>>"
            prompt = [Text("[INST] <<SYS>>\n"), Text(exchange.system, turn - 1), Text(mark, turn - 1, end=True),
                      Text(user, turn)]
        yield Group((*prompt, Text(" [/INST]", turn, end=True)), prefix=True)
        if exchange.answer is not None:
            yield Group((Text(f" {exchange.answer.strip()} ", exchange.answer_turn),))
            yield tokens.control(EOS, exchange.answer_turn, end=True)


def _mistral(messages: Sequence[Message], tokens: Tokens, answer_next: bool) -> Iterator[Element]:
    yield tokens.control(BOS)
    for exchange in _exchanges(messages):
        turn = exchange.user_turn
        system = () if exchange.system is None else (Text(" " + exchange.system, turn - 1),
                                                     Text("\n\n", turn - 1, end=True))
        user = exchange.user if system else " " + exchange.user
        yield Group((Text("[INST]"), *system, Text(user, turn), Text(" [/INST]", turn, end=True)), prefix=True)
        if exchange.answer is not None:
            # the space is the one that SentencePiece puts before a text of its own
            yield Group((Text(" " + exchange.answer, exchange.answer_turn),))
            yield tokens.control(EOS, exchange.answer_turn, end=True)


def _guanaco(messages: Sequence[Message], tokens: Tokens, answer_next: bool) -> Iterator[Element]:
    if BOS in tokens.ids:
        yield tokens.control(BOS)
    for exchange in _exchanges(messages):
        turn = exchange.user_turn
        system = () if exchange.system is None else (Text(exchange.system.strip(), turn - 1),
                                                     Text("\n\n", turn - 1, end=True))
        user = Text(" " + exchange.user.strip(), turn)
        end = (Text(" ### Assistant:", turn, end=True),) if exchange.answer is not None or answer_next else ()
        yield Group((*system, Text("### Human:"), user, *end), prefix=True)
        if exchange.answer is not None:
            yield Group((Text(" " + exchange.answer.strip(), exchange.answer_turn),))
            yield tokens.control(EOS, exchange.answer_turn, end=True)


def _plain(messages: Sequence[Message], tokens: Tokens, answer_next: bool) -> Iterator[Element]:
    if BOS in tokens.ids:
        yield tokens.control(BOS)
    for exchange in _exchanges(messages):
        turn = exchange.user_turn
        system = () if exchange.system is None else (Text(exchange.system, turn - 1),
                                                     Text("\n\n", turn - 1, end=True))
        end = (Text("\n", turn, end=True),) if exchange.answer is not None or answer_next else ()
        yield Group((*system, Text(exchange.user, turn), *end), prefix=True)
        if exchange.answer is not None:
            yield Group((Text(exchange.answer, exchange.answer_turn),))
            yield tokens.control(EOS, exchange.answer_turn, end=True)


def _chatml(messages: Sequence[Message], tokens: Tokens, answer_next: bool) -> Iterator[Element]:
    begin = tokens.ids.get(BOS)
    if begin is not None and begin not in (tokens.ids.get(EOS), tokens.ids["<|im_start|>"]):
        yield tokens.control(BOS)
    after = tokens.prefix_after_control
    roles = [message.role for message in messages] + (["assistant"] if answer_next else [])
    for turn, role in enumerate(roles):
        if turn:
            yield Group((Text("\n"),), prefix=after)
        yield tokens.control("<|im_start|>")
        header = Text(f"{role}\n")
        if turn == len(messages):
            yield Group((header,), prefix=after)
            return
        content = Text(messages[turn].content, turn)
        if role == "assistant":
            yield Group((header,), prefix=after)
            yield Group((content,))
        else:
            yield Group((header, content), prefix=after)
        yield tokens.control("<|im_end|>", turn, end=True)


def _llama3(messages: Sequence[Message], tokens: Tokens, answer_next: bool) -> Iterator[Element]:
    yield tokens.control(BOS)
    after = tokens.prefix_after_control
    roles = [message.role for message in messages] + (["assistant"] if answer_next else [])
    for turn, role in enumerate(roles):
        yield tokens.control("<|start_header_id|>")
        yield Group((Text(role),), prefix=after)
        yield tokens.control("<|end_header_id|>")
        yield Group((Text("\n\n"),), prefix=after)
        if turn < len(messages):
            yield Group((Text(messages[turn].content.strip(), turn),))
            yield tokens.control("<|eot_id|>", turn, end=True)


def _without_first_space(text: str) -> str:
    return text.removeprefix(" ")


_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
STYLES: dict[str, Definition] = {
    "llama2": Definition(_llama2, (BOS, EOS), (EOS,), str.strip),
    "mistral": Definition(_mistral, (BOS, EOS), (EOS,), _without_first_space),
    "chatml": Definition(_chatml, ("<|im_start|>", "<|im_end|>"), ("<|im_end|>",), str),
    "llama3": Definition(_llama3, (BOS, *_HEADERS), ("<|eot_id|>",), str.strip),
    "guanaco": Definition(_guanaco, (EOS,), (EOS,), str.strip),
    "plain": Definition(_plain, (EOS,), (EOS,), str),
}
