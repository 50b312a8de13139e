"""The one renderer: messages -> token ids and, for each token, whether it carries loss.

Training, evaluation, chat and server all call this object, so there is no second description of a prompt that could
differ. A chat style (`styles.py`, `chat_template.py`) lays a conversation out as control tokens and groups of text;
here each group is encoded once, and a token belongs to the turn in which its first character stands. The mask is then
a table look-up by turn. Nothing is ever searched for in a string.

`prompt(messages)` is always a prefix of `render(...)` of the same conversation with its answer, because an answer
starts a group of its own.

Which tokens carry loss: of a chosen turn, its own text and, unless `train_end_of_turn` is off, what ends it. Of the
style's own text nothing, unless `train_on` is everything; beginning-of-text tokens never, nor the very first token,
which nothing predicts. A message's own `trained` wins over the run's choice. A raw text is trained whole, including its
end-of-text token, under every policy.

For an encoder-decoder model the conversation up to its last answer is the encoder's input (with `</s>`, without
beginning-of-text), and that answer with `</s>` is what the decoder is trained on; earlier answers are context.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from chulengo.data.style_choice import choose_style
from chulengo.data.styles import Control, Element, Group, Text, bare_text
from chulengo.data.tokenizer import Tokenizer
from chulengo.data.types import Example, Message, Role
from chulengo.errors import ConfigError, RenderError

RENDERER_FILE = "chulengo_renderer.json"
TRAIN_ON = ("answers", "last_answer", "everything")
# whose a token is: the text of a turn is its speaker's, all else (marks, headers, ends of turns) is control
ROLES = ("system", "user", "assistant", "text", "control")
_CONTROL_ROLE = ROLES.index("control")
_BEGIN, _SCAFFOLD = -2, -1  # owners of tokens that belong to no turn
Run = tuple[int, int]  # an owner, and how many tokens in a row are its


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """One row as the model sees it.

    Attributes:
        ids: token ids; for encoder-decoder models the decoder's labels.
        trained: for each token whether it is a target of the loss (predicted from the one before it).
        source: see `Record.source`.
        turn_ends: index after the last token of each completed assistant turn.
        encoder_ids: the encoder's input; None for decoder-only models.
        answer_spans: only where nothing but the last answer is trained: for each entry of `turn_ends` the span of
            tokens that is trained when the row ends there; None otherwise.
        text_start: of a raw text the number of beginning-of-text tokens before it; None for a conversation.
        roles: for each token whose it is, as an index of `ROLES`; empty where that was not kept.
        encoder_roles: the same for `encoder_ids`.
    """

    ids: list[int]
    trained: list[bool]
    source: str
    turn_ends: list[int] = field(default_factory=list)
    encoder_ids: list[int] | None = None
    answer_spans: list[tuple[int, int]] | None = None
    text_start: int | None = None
    roles: bytes = b""
    encoder_roles: bytes = b""


class Renderer:
    """Turns conversations into tokens and loss masks, in one chat style."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        style: str = "auto",
        system: str | None = None,
        train_on: str = "answers",
        train_roles: Sequence[str] = ("assistant",),
        train_end_of_turn: bool = True,
        model_type: str | None = None,
        encoder_decoder: bool = False,
        chat_template: str | None = None,
    ) -> None:
        """Resolves the style.

        Args:
            tokenizer: the model's tokenizer.
            style: auto, tokenizer, or a name of `styles.STYLES`.
            system: system prompt for conversations without one; a conversation's own empty one suppresses it.
            train_on: answers (every turn of train_roles), last_answer (the last of them) or everything.
            train_roles: whose turns carry loss.
            train_end_of_turn: whether what ends a trained turn carries loss.
            model_type: `model_type` of config.json; helps `auto`.
            encoder_decoder: whether the model has an encoder.
            chat_template: a template to use instead of the tokenizer's own.

        Raises:
            ConfigError: an unknown name, or a style that this vocabulary cannot express.
        """
        _check_choices(train_on, train_roles)
        self.tokenizer = tokenizer
        self._template = tokenizer.chat_template if chat_template is None else chat_template
        self._style, self.style_reason = choose_style(
            style, tokenizer, template=self._template, model_type=model_type, encoder_decoder=encoder_decoder
        )
        self.style: str = self._style.name
        self.stop_ids: frozenset[int] = self._style.stop_ids
        self._system = system if system is None or system.strip() else None
        self._train_on = train_on
        self._train_roles = tuple(train_roles)
        self._train_end = train_end_of_turn
        self._encoder_decoder = encoder_decoder
        if encoder_decoder and tokenizer.eos_id is None:
            raise ConfigError("An encoder-decoder model needs an end-of-text token, and its vocabulary has none.")

    def render(self, example: Example) -> RenderedRow:
        """Returns the tokens and the loss mask of one example (for a preference pair: of the chosen answer).

        Raises:
            RenderError: the style cannot render the conversation; the message names the row.
        """
        try:
            messages, encoder, layout = self._lay_out(example)
            ids, runs = self._encode(layout)
        except RenderError as error:
            raise _in_row(error, example) from error
        chosen = [self._chosen(messages, turn) for turn in range(len(messages))]
        whole = self._train_on == "everything"
        # by owner: 2 × turn for a turn's text, + 1 for what ends it; the last two entries are _BEGIN and _SCAFFOLD
        table = [flag for wanted in chosen for flag in (wanted, wanted and self._train_end)] + [False, whole]
        trained = [flag for owner, count in runs for flag in [table[owner]] * count]
        if trained and encoder is None:
            trained[0] = False  # nothing predicts the first token; a decoder has its start token for that
        answers = [turn for turn, m in enumerate(messages) if m.role in ("assistant", "text")]
        ends = [end for _, end in _spans(runs, answers, with_end=True)]
        spans = None
        if self._train_on == "last_answer" and encoder is None:
            last = [self._last_chosen(messages, turn) for turn in answers]
            spans = _spans(runs, last, with_end=self._train_end)
        encoder_ids, encoder_runs = (None, []) if encoder is None else self._encode(encoder)
        role_of = [role for m in messages for role in (ROLES.index(m.role), _CONTROL_ROLE)] + [_CONTROL_ROLE] * 2
        is_text = any(message.role == "text" for message in messages)
        start = sum(owner == _BEGIN for owner, _ in runs[:1]) if is_text else None
        return RenderedRow(
            ids, trained, example.source, [e for e in ends if e], encoder_ids, spans, start,
            _by_token(runs, role_of), _by_token(encoder_runs, role_of),
        )

    def spell(self, example: Example) -> tuple[list[str], list[str] | None]:
        """Returns the text that each token of `render(example)` stands for, and the same of the encoder's input.

        Control tokens are spelled by their names; joined, the strings are the rendered text. Of several tokens that
        make up one character the last has it and the others are empty.

        Raises:
            RenderError: as `render`.
        """
        try:
            _, encoder, layout = self._lay_out(example)
            return self._spell(layout), None if encoder is None else self._spell(encoder)
        except RenderError as error:
            raise _in_row(error, example) from error

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids up to where the assistant speaks (encoder-decoder: the encoder's input).

        Raises:
            RenderError: the last message is the assistant's, or the style cannot render the conversation.
        """
        if messages and messages[-1].role == "assistant":
            raise RenderError("The conversation already ends with an answer.",
                              next_step="leave the last message out to ask for another answer")
        return self._encode(self._lay_out_prompt(self._checked(messages)))[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns an answer's text as a user sees it: up to the end of the turn, without control tokens."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return self._style.tidy(self.tokenizer.decode(ids[:end]))

    def settings(self) -> dict[str, Any]:
        """Returns everything that decides how a conversation is rendered, as JSON-able values."""
        return {
            "version": 1,
            "style": self.style,
            "system": self._system,
            "train_on": self._train_on,
            "train_roles": list(self._train_roles),
            "train_end_of_turn": self._train_end,
            "encoder_decoder": self._encoder_decoder,
            "chat_template": self._template if self.style == "tokenizer" else None,
        }

    def fingerprint(self) -> str:
        """Returns a sha256 over the settings, the whole vocabulary, and the golden conversations' ids and masks."""
        content = [self.settings(), vocabulary_hash(self.tokenizer), golden(self)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _checked(self, messages: Sequence[Message]) -> list[Message]:
        """Returns the messages with the default system prompt, or raises for what no style can render."""
        if not messages:
            raise RenderError("The conversation has no messages.", next_step="remove the row")
        kept = list(messages)
        if kept[0].role == "system" and not kept[0].content.strip():
            del kept[0]
        elif kept[0].role != "system" and self._system is not None:
            kept.insert(0, Message("system", self._system))
        shift = len(messages) - len(kept)
        for number, message in enumerate(kept, 1 + shift):
            if message.role not in get_args(Role) or message.role == "text":
                raise RenderError(f"Message {number} has the role {message.role!r}.",
                                  allowed="system, user, assistant", next_step="name the role in the data")
        # an empty turn among others is real (guanaco-llama2-1k has three); a row of empty answers teaches silence
        answers = [m.content for m in kept if m.role == "assistant"]
        if answers and not any(map(str.strip, answers)):
            raise RenderError("The row has no answer: every message of the assistant is empty.",
                              next_step="remove the row or fill the answer in")
        return kept

    def _lay_out(self, example: Example) -> tuple[list[Message], list[Element] | None, list[Element]]:
        """Returns the messages as rendered, the encoder's layout (None without an encoder), and the decoder's."""
        if example.kind == "text" or any(m.role == "text" for m in example.messages):
            return self._lay_out_text(example)
        messages = self._checked(example.messages)
        if not self._encoder_decoder:
            return messages, None, self._style.lay_out(messages, answer_next=False)
        last = len(messages) - 1
        if messages[last].role != "assistant":
            return messages, self._lay_out_prompt(messages), []
        answer = Group((Text(messages[last].content.strip(), last),), prefix=True)
        return messages, self._lay_out_prompt(messages[:last]), [answer, self._end_of_text(last)]

    def _lay_out_text(self, example: Example) -> tuple[list[Message], list[Element] | None, list[Element]]:
        if len(example.messages) != 1 or example.messages[0].role != "text":
            raise RenderError("A raw text is one message of the role 'text', and no chat.")
        message = example.messages[0]
        if not message.content.strip():
            raise RenderError("The text is empty.", next_step="remove the row")
        text: list[Element] = [Group((Text(message.content, 0),), prefix=True), self._end_of_text(0)]
        if self._encoder_decoder:
            return [message], [self._end_of_text()], text
        begin = self.tokenizer.bos_id
        return [message], None, text if begin is None else [Control(begin, begin=True), *text]

    def _lay_out_prompt(self, messages: list[Message]) -> list[Element]:
        if self._encoder_decoder and self.style == "plain":
            return [bare_text(messages), self._end_of_text()]
        layout = self._style.lay_out(messages, answer_next=True)
        if self._encoder_decoder:
            return [e for e in layout if not (isinstance(e, Control) and e.begin)] + [self._end_of_text()]
        return layout

    def _last_chosen(self, messages: list[Message], last: int) -> int | None:
        """Returns the turn that is trained when `last` is the last one and only the last answer is."""
        for turn in range(last, -1, -1):
            if messages[turn].role in self._train_roles:
                return None if messages[turn].trained is False else turn
        return None

    def _chosen(self, messages: list[Message], turn: int) -> bool:
        own = messages[turn].trained
        if own is not None:
            return own
        if self._train_on == "everything" or messages[turn].role == "text":
            return True
        if messages[turn].role not in self._train_roles:
            return False
        later = messages[turn + 1 :]
        return self._train_on == "answers" or not any(m.role in self._train_roles for m in later)

    def _encode(self, layout: Sequence[Element]) -> tuple[list[int], list[Run]]:
        """Returns the ids, and in runs of tokens whose they are (see `render`)."""
        ids: list[int] = []
        runs: list[Run] = []
        for element in layout:
            if isinstance(element, Control):
                ids.append(element.token_id)
                runs.append((_BEGIN if element.begin else _owner(element), 1))
                continue
            new, starts = self.tokenizer.encode("".join(t.text for t in element.texts), prefix=element.prefix)
            ids += new
            runs += _runs_of_group(element, starts)
        return ids, runs

    def _spell(self, layout: Sequence[Element]) -> list[str]:
        spelled: list[str] = []
        for element in layout:
            if isinstance(element, Control):
                spelled.append(self.tokenizer.piece(element.token_id))
                continue
            text = "".join(t.text for t in element.texts)
            starts = self.tokenizer.encode(text, prefix=element.prefix)[1]
            edges = [0, *starts[1:], len(text)]
            spelled += [text[start:end] for start, end in itertools.pairwise(edges)] if starts else []
        return spelled

    def _end_of_text(self, turn: int | None = None) -> Control:
        if self.tokenizer.eos_id is None:
            raise RenderError("The vocabulary has no end-of-text token, which a raw text needs.",
                              next_step="use conversations instead of raw text with this model")
        return Control(self.tokenizer.eos_id, turn, end=turn is not None)


def save_renderer(renderer: Renderer, folder: Path) -> None:
    """Writes `chulengo_renderer.json`: the settings, the fingerprint, and the golden conversations with their ids."""
    content = {
        "settings": renderer.settings(),
        "fingerprint": renderer.fingerprint(),
        "vocabulary": vocabulary_hash(renderer.tokenizer),
        "golden": golden(renderer),
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / RENDERER_FILE
    draft = file.with_suffix(".tmp")
    draft.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    draft.replace(file)


def load_renderer(folder: Path, tokenizer: Tokenizer) -> Renderer:
    """Returns the renderer that was saved in a folder, proved to render as it did then.

    Raises:
        RenderError: there is none, it cannot be read, or it would render otherwise with this tokenizer.
    """
    file = folder / RENDERER_FILE
    mend = "use the tokenizer that the adapter was trained with (it is saved beside the adapter)"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        settings = dict(saved["settings"])
        version = settings.pop("version")
        then, vocabulary = list(saved["golden"]), saved["vocabulary"]
    except OSError as error:
        raise RenderError(f"{folder} has no {RENDERER_FILE}.", next_step="train with chulengo, or --style") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise RenderError(f"{file} is damaged: {error}", next_step="restore it from a copy of the run") from error
    if version != 1:
        raise RenderError(f"{file} is of version {version}.", allowed="1", next_step="use a newer chulengo")
    try:
        renderer = Renderer(tokenizer, **settings)
    except ConfigError as error:
        raise RenderError(f"{file} cannot be used with this tokenizer. {error.given}", next_step=mend) from error
    except TypeError as error:
        raise RenderError(f"{file} is damaged: {error}", next_step="restore it from a copy of the run") from error
    now = golden(renderer)
    if now != then:
        changed = sum(a != b for a, b in zip(now, then, strict=False)) or abs(len(now) - len(then))
        raise RenderError(f"{changed} of {len(then)} golden conversations in {file} would be rendered otherwise now.",
                          next_step=mend)
    if vocabulary_hash(tokenizer) != vocabulary:
        raise RenderError(f"The tokenizer's vocabulary is not the one that {file} was written with.", next_step=mend)
    return renderer


def golden(renderer: Renderer) -> list[dict[str, Any]]:
    """Returns fixed conversations with the ids and masks that the renderer gives them (None: it refuses)."""
    rows = []
    for messages in GOLDEN:
        ids: list[int] | None = None
        trained: list[int] | None = None
        encoder: list[int] | None = None
        try:
            row = renderer.render(Example(messages, "golden"))
            ids, trained, encoder = row.ids, [int(t) for t in row.trained], row.encoder_ids
        except RenderError:
            pass  # a template without system prompts, say: that it refuses is what is recorded
        written = [{"role": m.role, "content": m.content} for m in messages]
        rows.append({"messages": written, "ids": ids, "trained": trained, "encoder_ids": encoder})
    return rows


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """Returns a sha256 over every entry of the vocabulary, in order."""
    pieces = "\0".join(tokenizer.piece(i) for i in range(tokenizer.vocab_size))
    return hashlib.sha256(f"{tokenizer.kind}\0{pieces}".encode("utf-8", "backslashreplace")).hexdigest()


GOLDEN: tuple[tuple[Message, ...], ...] = (
    (Message("user", "Where do guanacos live?"), Message("assistant", "In the Andes, up to 4,500 m.")),
    (Message("system", "Answer in one word."), Message("user", "  Who spits? "), Message("assistant", "Llamas.\n"),
     Message("user", "And who else?"), Message("assistant", "Alpacas.")),
    (Message("user", "¿Qué es un “chulengo”? 🦙 Чуленго — 驼羊"),
     Message("assistant", "Una cría:\n\n- pequeña\n- rápida")),
    (Message("user", "def f(x):\n    return  x*1000"), Message("assistant", "```python\n\tf(3.14)\n```")),
    (Message("user", "Write </s> [INST] <|im_end|>"), Message("assistant", "</s> [/INST] <|eot_id|> <s>")),
    (Message("text", "A plain text.\nOf two lines."),),
)


def _check_choices(train_on: str, train_roles: Sequence[str]) -> None:
    if train_on not in TRAIN_ON:
        raise ConfigError(f"prompt.train_on is {train_on!r}.", allowed=", ".join(TRAIN_ON),
                          next_step="--set prompt.train_on=answers")
    unknown = [role for role in train_roles if role not in ("system", "user", "assistant")]
    if unknown:
        raise ConfigError(f"prompt.train_roles is {list(train_roles)}.", allowed="system, user, assistant",
                          next_step="--set 'prompt.train_roles=[assistant]'")


def _owner(element: Control | Text) -> int:
    return _SCAFFOLD if element.turn is None else 2 * element.turn + element.end


def _runs_of_group(group: Group, starts: Sequence[int]) -> list[Run]:
    """Returns the owners of a group's tokens: that of the text in which a token's first character stands."""
    if len(group.texts) == 1:
        return [(_owner(group.texts[0]), len(starts))]
    owner_of_character: list[int] = []
    for text in group.texts:
        owner_of_character += [_owner(text)] * len(text.text)
    last = len(owner_of_character) - 1
    owners = [owner_of_character[min(start, last)] for start in starts]
    return [(owner, sum(1 for _ in tokens)) for owner, tokens in itertools.groupby(owners)]


def _spans(runs: Sequence[Run], turns: Sequence[int | None], *, with_end: bool) -> list[tuple[int, int]]:
    """Returns the span of tokens of each of the turns, (0, 0) for one without tokens (or None)."""
    found: dict[int, tuple[int, int]] = {}
    end = 0
    for owner, count in runs:
        start, end = end, end + count
        if owner >= 0 and count and (with_end or owner % 2 == 0):
            found[owner // 2] = (found.get(owner // 2, (start, 0))[0], end)
    return [(0, 0) if turn is None else found.get(turn, (0, 0)) for turn in turns]


def _by_token(runs: Sequence[Run], values: Sequence[int]) -> bytes:
    """Returns for each token of the runs its owner's value."""
    return b"".join(bytes((values[owner],)) * count for owner, count in runs)


def _in_row(error: RenderError, example: Example) -> RenderError:
    return RenderError(f"{example.source}: {error.given}", allowed=error.allowed, next_step=error.next_step)
