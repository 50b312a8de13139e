"""Which chat style `auto` means for a model, and why.

In this order:

1. An encoder-decoder model reads the bare text: `plain`.
2. The tokenizer has a chat template. Where a built-in style renders a few probe conversations as the template does,
   it is that style (for Llama 2 and Mistral up to white space: there the authority is the authors' code, and their
   templates are approximations of it); any other template is used as it is: `tokenizer`.
3. No template, but the vocabulary has the control tokens that only one style uses: `llama3`, `chatml`.
4. No template and a SentencePiece vocabulary: `llama2` for a model of type llama (or of no known type: a bare
   tokenizer), `mistral` for one of type mistral.
5. Otherwise nobody can know, and a style must be named.

The choice is made by what is rendered, never by a name that looks familiar.
"""

from __future__ import annotations

from collections.abc import Sequence

from chulengo.data.chat_template import TemplateStyle
from chulengo.data.styles import STYLES, Control, Style, built_in_style
from chulengo.data.tokenizer import Tokenizer
from chulengo.data.types import Message
from chulengo.errors import ConfigError, RenderError, nearest

STYLE_NAMES = ("auto", *STYLES, "tokenizer")
# in these families the template only approximates the reference code's spaces
_UP_TO_SPACES = ("llama2", "mistral")
_TURNS = (Message("user", "Who goes there?"), Message("assistant", "A friend."), Message("user", "Come in."))
_PROBES: tuple[tuple[Message, ...], ...] = (
    _TURNS[:1], _TURNS, (Message("system", "Be brief."), *_TURNS[:1]), (Message("system", "Be brief."), *_TURNS),
)


def choose_style(
    name: str, tokenizer: Tokenizer, *, template: str | None, model_type: str | None, encoder_decoder: bool
) -> tuple[Style, str]:
    """Returns the style for a model, and the reason for it.

    Args:
        name: a style's name, or auto.
        tokenizer: the model's tokenizer.
        template: the chat template, if there is one.
        model_type: `model_type` of the model's config.json.
        encoder_decoder: whether the model has an encoder.

    Raises:
        ConfigError: an unknown name, a style that this vocabulary cannot express, or `auto` without an answer.
    """
    if name == "auto":
        return _automatic(tokenizer, template, model_type, encoder_decoder)
    if name == "tokenizer":
        if template is None:
            raise ConfigError("The model's tokenizer has no chat template.", allowed=", ".join(STYLES),
                              next_step="--set prompt.style=guanaco")
        return TemplateStyle(tokenizer, template), "asked for"
    if name not in STYLES:
        near = nearest(name, STYLE_NAMES)
        raise ConfigError(f"There is no chat style {name!r}.", allowed=", ".join(STYLE_NAMES),
                          next_step=f"--set prompt.style={near or 'auto'}")
    return built_in_style(name, tokenizer), "asked for"


def _automatic(
    tokenizer: Tokenizer, template: str | None, model_type: str | None, encoder_decoder: bool
) -> tuple[Style, str]:
    if encoder_decoder:
        return built_in_style("plain", tokenizer), "an encoder-decoder model reads the bare text"
    if template is not None:
        return _like_template(tokenizer, TemplateStyle(tokenizer, template))
    for name, token in (("llama3", "<|start_header_id|>"), ("chatml", "<|im_start|>")):
        if tokenizer.control_id(token) is not None:
            return built_in_style(name, tokenizer), f"no chat template, but the vocabulary has {token}"
    by_type = {None: "llama2", "llama": "llama2", "mistral": "mistral"}
    if tokenizer.kind == "sentencepiece" and model_type in by_type:
        kind = "no config.json" if model_type is None else f"a model of type {model_type}"
        return built_in_style(by_type[model_type], tokenizer), f"no chat template, a SentencePiece vocabulary, {kind}"
    raise ConfigError(
        "The model's tokenizer has no chat template, so its chat style cannot be known.",
        allowed=", ".join(STYLE_NAMES[1:]),
        next_step="--set prompt.style=guanaco (or plain, for a completion model)",
    )


def _like_template(tokenizer: Tokenizer, own: TemplateStyle) -> tuple[Style, str]:
    for name in ("llama2", "llama3", "mistral", "chatml"):
        try:
            style = built_in_style(name, tokenizer)
        except ConfigError:
            continue  # a style that the vocabulary cannot express is no candidate
        if _same(style, own, exact=name not in _UP_TO_SPACES):
            return style, f"the tokenizer's chat template writes the {name} format"
    return own, "the tokenizer's chat template is none of the built-in formats"


def _same(style: Style, own: TemplateStyle, *, exact: bool) -> bool:
    for probe in _PROBES:
        try:
            theirs = _spelled(own, probe, exact)
        except RenderError:
            if probe[0].role == "system":
                continue  # the template knows no system prompt; a style that knows one is no worse
            return False
        if _spelled(style, probe, exact) != theirs:
            return False
    return True


def _spelled(style: Style, messages: Sequence[Message], exact: bool) -> str:
    parts = []
    for element in style.lay_out(messages, answer_next=True):
        if isinstance(element, Control):
            parts.append(f"\0{element.token_id}\0")
        else:
            parts += [text.text if exact else "".join(text.text.split()) for text in element.texts]
    return "".join(parts)
