"""How well a model predicts plain text: perplexity, bits per byte, next-token accuracy, with every choice stated.

A text longer than the model's view is read through a window. The first window scores all of its tokens; each further
one moves on by `stride` tokens and scores only those, given as many before them as the window still holds. Every
token is so scored once, by a long context. A stride as long as the window is the cheap form: tokens at the start of a
window then have almost nothing before them, and the perplexity is higher. Numbers of different windows, strides or
beginnings are different scores, so all three are in the definition, and scores with other definitions are not compared.

The beginning (`bos`): `window` puts the beginning-of-sequence token before every window, as a model that was trained
on such windows expects; `document` only before a text; `none` nowhere, and then a text's first token is not scored,
since nothing precedes it. A tokenizer without that token can only have `none`. The end of a text is not scored.

Perplexity counts tokens, so two models with other tokenizers can only be compared in bits per byte: the same losses
over the UTF-8 bytes of the text that was scored.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chulengo.data.renderer import RenderedRow
from chulengo.errors import ConfigError, DataError, ModelError
from chulengo.evaluate.loss_metrics import bits_per_byte_metric, next_token_metric, perplexity_metric
from chulengo.evaluate.metrics.metric import Counts, Metric
from chulengo.evaluate.perplexity import Losses, row_losses

if TYPE_CHECKING:
    from chulengo.data.tokenizer import Tokenizer

VERSION = "text-loss/1"


@dataclass(frozen=True, slots=True)
class Windowing:
    """How a text is cut.

    Attributes:
        window: tokens that the model sees at once, the beginning included; 2 or more.
        stride: tokens that each further window scores; at most `window` - 1.
        bos: window, document or none.
        num_windows: only this many windows are scored, evenly spread; 0: all.
    """

    window: int
    stride: int
    bos: str
    num_windows: int = 0

    def describe(self) -> str:
        """Returns the part of a definition that says how texts are cut."""
        before = {
            "window": "the beginning-of-sequence token stands before every window",
            "document": "the beginning-of-sequence token stands before every text",
            "none": "no beginning-of-sequence token; a text's first token is not scored",
        }[self.bos]
        some = f"; only {self.num_windows} of these windows, evenly spread" if self.num_windows else ""
        return (
            f"every token of the plain text once; windows of {self.window} tokens, each further one scoring "
            f"{self.stride} new tokens given the ones before them in the window; {before}; the end of a text is not "
            f"scored{some}"
        )


@dataclass(frozen=True, slots=True)
class Window:
    """One window of a text.

    Attributes:
        id: the text's id and the window's number, from 1.
        group: the text's group.
        row: its tokens; `trained` marks those that are scored.
        num_bytes: UTF-8 bytes of the text that the scored tokens stand for.
    """

    id: str
    group: str
    row: RenderedRow
    num_bytes: int


def windowing_for(tokenizer: Tokenizer, windowing: Windowing, context: int | None) -> tuple[Windowing, list[str]]:
    """Returns what of a windowing this model can do, and sentences on what had to be changed.

    Raises:
        ConfigError: no token would be scored.
    """
    window, stride, bos = windowing.window, windowing.stride, windowing.bos
    notes = []
    if bos != "none" and tokenizer.bos_id is None:
        bos = "none"
        notes.append("the tokenizer has no beginning-of-sequence token: bos is none, first tokens are not scored")
    if context is not None and window > context:
        notes.append(f"the model's context is {context} tokens: the window is {context}, not {window}")
        window = context
    # one place is the beginning's, or the token's that the first new one is predicted from
    if stride > window - 1:
        notes.append(f"the stride is {window - 1}, not {stride}: a window has no more new tokens")
        stride = window - 1
    if window < 2:
        raise ConfigError(f"A window of {window} tokens scores nothing.", allowed="window: 2 or more")
    return Windowing(window, stride, bos, windowing.num_windows), notes


def windows_of(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, str, str]], windowing: Windowing
) -> list[Window]:
    """Returns the windows of texts, in order.

    Args:
        tokenizer: text to ids.
        texts: id, group and text of each.
        windowing: see `windowing_for`.

    Raises:
        DataError: no token is scored.
    """
    made = [window for id_, group, text in texts for window in _windows(tokenizer, id_, group, text, windowing)]
    if not made:
        raise DataError("The texts have no token that can be scored.", next_step="name longer texts")
    return made


def _windows(tokenizer: Tokenizer, id_: str, group: str, text: str, windowing: Windowing) -> Iterator[Window]:
    ids, starts = tokenizer.encode(text)
    # where each token's text begins, in bytes; a token's own text ends where the next one's begins
    bytes_before = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])])
    begin = bytes_before[[*starts, len(text)]]
    bos = [] if windowing.bos == "none" or tokenizer.bos_id is None else [tokenizer.bos_id]
    scored = 0 if bos else 1  # up to this token all are scored, or cannot be
    for number in itertools.count(1):
        has_bos = bool(bos) and (windowing.bos == "window" or number == 1)
        room = windowing.window - has_bos
        end = min(len(ids), room if number == 1 else scored + windowing.stride)
        if end <= scored:
            return
        start = max(0, end - room)
        seen = [*(bos if has_bos else []), *ids[start:end]]
        flags = [False] * (len(seen) - (end - scored)) + [True] * (end - scored)
        name = f"{id_}/{number}"
        row = RenderedRow(seen, flags, name, [])
        yield Window(name, group, row, int(begin[end] - begin[scored]))
        scored = end


def window_losses(
    model: Any, windows: Sequence[Window], *, pad_id: int, batch_size: int = 8,
    on_rows: Callable[[int], None] = lambda done: None,
) -> Losses:
    """Returns what each window's scored tokens gave.

    Raises:
        ModelError: the model is an encoder-decoder, which predicts no plain text; or a loss is not finite.
    """
    if model.config.is_encoder_decoder:
        raise ModelError("An encoder-decoder model does not go on with plain text, so it has no perplexity of it.",
                         next_step="a task of kind chat")
    rows = [window.row for window in windows]
    return row_losses(model, rows, pad_id=pad_id, batch_size=batch_size, on_rows=on_rows)


def text_metrics(windowing: Windowing) -> dict[str, Metric]:
    """Returns the metrics of plain text by name, with the windowing in their definitions."""
    over = windowing.describe()
    return {
        "perplexity": perplexity_metric(f"{VERSION} perplexity", f"exp(mean of -ln p over tokens): {over}."),
        "bits_per_byte": bits_per_byte_metric(
            f"{VERSION} bits-per-byte", f"sum of -log2 p / UTF-8 bytes of the text that was scored: {over}."
        ),
        "next_token_accuracy": next_token_metric(
            f"{VERSION} next-token", f"Share of tokens that were the model's likeliest one: {over}."
        ),
    }


def text_counts(losses: Losses, windows: Sequence[Window]) -> dict[str, Counts]:
    """Returns the counts of each metric of plain text, [windows, columns]."""
    sizes = np.array([window.num_bytes for window in windows], np.float64)
    return {
        "perplexity": np.stack([losses.nll, losses.targets.astype(np.float64)], axis=1),
        "bits_per_byte": np.stack([losses.nll, sizes], axis=1),
        "next_token_accuracy": np.stack([losses.hits, losses.targets], axis=1).astype(np.float64),
    }
