"""The token engine: prompts in, answers out, batched or as a stream.

Why a loop of our own beside `model.generate`: an answer must not depend on which other prompts are in its batch. Each
item has its own random numbers (`transformers` draws for the whole batch from one stream), its own limits and its own
end, and finished rows leave the batch (`transformers` carries them to the end as padding). Batches are made of prompts
of similar length, as many as are asked for and as the model has memory for (`model.cache_room`), and results come back
in the order of the input. Greedy equals `model.generate`.

The limit of that promise: a batch of another size may use another matrix kernel, so logits differ in the last bits,
and where two tokens are equal within that rounding another one may be chosen. In fp32 that is some 1e-6 of a logit;
in bf16 it happens now and then, in every engine.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from chulengo.data.types import Message
from chulengo.errors import ModelError
from chulengo.generate.decoding import decoding_for
from chulengo.generate.sampling import choose_tokens
from chulengo.generate.settings import GenerationSettings, item_seed
from chulengo.generate.text import TextStream, settled

if TYPE_CHECKING:
    from chulengo.data.renderer import Renderer
    from chulengo.data.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "context"]
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Answer:
    """One generated answer.

    Attributes:
        text: what the ids say, stripped by the style's rule.
        ids: the generated tokens, without the token that ended the answer.
        finish_reason: stop (the model ended its turn), length (`max_new_tokens` reached) or context (the model's
            context is full; with no ids: the prompt alone does not fit).
        num_prompt_tokens: length of the prompt.
        seed: asking this prompt alone with this seed gives this answer again.
        seconds: wall time from the start of the item's batch to its own end.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    seed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to go on from, and how the new ids become text."""

    ids: tuple[int, ...]
    stop_ids: frozenset[int]
    decode: Decode


def chat_prompt(renderer: Renderer, messages: Sequence[Message]) -> Prompt:
    """Returns the prompt at whose end the assistant speaks."""
    return Prompt(tuple(renderer.prompt(messages)), frozenset(renderer.stop_ids), renderer.decode)


def raw_prompt(tokenizer: Tokenizer, text: str, *, encoder_decoder: bool = False) -> Prompt:
    """Returns the prompt of a plain continuation: the beginning-of-sequence token and the text, no chat format.

    The new text is what decoding adds to the prompt's own text, so that a leading space is kept.

    Raises:
        ModelError: nothing to start from: an empty text and no beginning-of-sequence token.
    """
    ids, _ = tokenizer.encode(text)
    before = [tokenizer.bos_id] if tokenizer.bos_id is not None and not encoder_decoder else []
    after = [tokenizer.eos_id] if tokenizer.eos_id is not None and encoder_decoder else []
    prompt = [*before, *ids, *after]
    if not prompt:
        raise ModelError(
            "The prompt is empty and the tokenizer has no beginning-of-sequence token to start from.",
            next_step="give a prompt of at least one character",
        )
    start = len(tokenizer.decode(prompt))

    def decode(new: Sequence[int]) -> str:
        return tokenizer.decode(new) if encoder_decoder else tokenizer.decode([*prompt, *new])[start:]

    stop = frozenset() if tokenizer.eos_id is None else frozenset({tokenizer.eos_id})
    return Prompt(tuple(prompt), stop, decode)


def answer_all(
    model: Any,
    renderer: Renderer,
    conversations: Sequence[Sequence[Message]],
    settings: GenerationSettings,
    batch_size: int = 8,
) -> list[Answer]:
    """Returns the assistant's answer to every conversation, in the order given; see `complete_all`."""
    return complete_all(model, [chat_prompt(renderer, c) for c in conversations], settings, batch_size)


def stream_answer(
    model: Any, renderer: Renderer, messages: Sequence[Message], settings: GenerationSettings
) -> Generator[str, None, Answer]:
    """Yields the answer's text piece by piece as it comes; returns the `Answer`. Joined, the pieces are its text."""
    return stream(model, chat_prompt(renderer, messages), settings)


def complete_all(
    model: Any,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    batch_size: int = 8,
    seeds: Sequence[int] | None = None,
) -> list[Answer]:
    """Returns the continuation of every prompt, in the order given.

    Args:
        model: as `decoding_for` takes it; left in the mode (training or not) it came in.
        prompts: token ids and how to decode. One that does not fit the model's context gets an empty answer with
            `finish_reason` context.
        settings: how to choose tokens.
        batch_size: prompts at a time; fewer where the model's `cache_tokens` do not hold so many.
        seeds: one a prompt; None: `item_seed(settings.seed, index)`.

    Raises:
        ModelError: the model gives NaN.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, allowed: 1 or more")
    chosen = seeds if seeds is not None else [item_seed(settings.seed, i) for i in range(len(prompts))]
    context = context_limit(model) if prompts else None
    rows = [_open(model, p, settings, seed, context) for p, seed in zip(prompts, chosen, strict=True)]
    # longest first: a batch too large for the memory fails at the start, not after an hour
    waiting = sorted((row for row in rows if row.finish_reason is None), key=lambda row: -len(row.prompt.ids))
    while waiting:
        some = min(batch_size, _rows_at_once(model, waiting[0]))
        batch, waiting = waiting[:some], waiting[some:]
        with closing(_advance(model, batch, settings)) as steps:
            for _ in steps:
                pass
    return [row.answer() for row in rows]


def stream(
    model: Any, prompt: Prompt, settings: GenerationSettings, seed: int | None = None
) -> Generator[str, None, Answer]:
    """Yields the continuation's text piece by piece; returns the `Answer`, whose text the joined pieces are."""
    row = _open(model, prompt, settings, settings.seed if seed is None else seed, context_limit(model))
    text = TextStream(prompt.decode)
    if row.finish_reason is None:
        # closing: a consumer that stops early must leave the model in its mode at once, not when memory is collected
        with closing(_advance(model, [row], settings)) as steps:
            for _ in steps:
                if piece := text.push(row.ids):
                    yield piece
    if piece := text.finish(row.ids):
        yield piece
    return row.answer()


def context_limit(model: Any) -> int | None:
    """Returns the most tokens that the model's prompt and answer may have together, or None when it has no limit."""
    from chulengo.model.folder import context_tokens

    return context_tokens(model.config.to_dict())


@dataclass(slots=True)
class _Row:
    prompt: Prompt
    seed: int
    limit: int  # most new tokens
    limit_reason: FinishReason
    random: random.Random
    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    seconds: float = 0.0

    def push(self, token: int, started: float) -> None:
        if token in self.prompt.stop_ids:
            self.finish_reason = "stop"
        else:
            self.ids.append(token)
            if len(self.ids) >= self.limit:
                self.finish_reason = self.limit_reason
        self.seconds = time.perf_counter() - started

    def answer(self) -> Answer:
        text = settled(self.prompt.decode(self.ids)) if self.ids else ""
        return Answer(text, tuple(self.ids), self.finish_reason or "length", len(self.prompt.ids), self.seed,
                      self.seconds)


def _open(model: Any, prompt: Prompt, settings: GenerationSettings, seed: int, context: int | None) -> _Row:
    row = _Row(prompt, seed, settings.max_new_tokens, "length", random.Random(seed))
    if context is not None:
        # the encoder's input and the decoder's output have a context each
        used = 0 if model.config.is_encoder_decoder else len(prompt.ids)
        if context - used < row.limit:
            row.limit, row.limit_reason = context - used, "context"
        if row.limit < 1 or len(prompt.ids) > context:
            row.finish_reason = "context"
    return row


def _rows_at_once(model: Any, longest: _Row) -> int:
    """Returns how many rows the model may hold, none with a longer prompt than this one; at least 1."""
    limit: int | None = getattr(model, "cache_tokens", None)
    if limit is None:
        return sys.maxsize
    from chulengo.model.decode import places_for

    # a row that has ended is carried on as long as another
    return max(1, limit // places_for(len(longest.prompt.ids) + longest.limit))


def _advance(model: Any, rows: list[_Row], settings: GenerationSettings) -> Generator[None, None, None]:
    """Yields after every new token, until all rows have ended."""
    import torch

    with _inference(model):
        started = time.perf_counter()
        decoding = decoding_for(model)
        # no_grad, not inference_mode: a model may keep tensors it makes here (rotary tables) and train with them later
        with torch.no_grad():
            logits_BV = decoding.start([row.prompt.ids for row in rows])
        live = list(rows)
        seen_BV = None
        if settings.repetition_penalty != 1:
            seen_BV = torch.zeros(logits_BV.shape, dtype=torch.bool, device=logits_BV.device)
            for index, row in enumerate(live):
                seen_BV[index, list(decoding.context(row.prompt.ids))] = True
        while True:
            uniforms = [row.random.random() for row in live] if settings.temperature else []
            tokens = choose_tokens(logits_BV, settings, uniforms=uniforms, seen_BV=seen_BV)
            for row, token in zip(live, tokens, strict=True):
                if row.finish_reason is None:
                    row.push(token, started)
            yield
            going = [i for i, row in enumerate(live) if row.finish_reason is None]
            if not going:
                return
            if seen_BV is not None:
                seen_BV.scatter_(1, torch.tensor(tokens, device=seen_BV.device)[:, None], True)
            # a copy of the cache each time that half of the rows have ended: at most one more copy in all
            if 2 * len(going) <= len(live):
                decoding.keep(going)
                live, tokens = [live[i] for i in going], [tokens[i] for i in going]
                seen_BV = None if seen_BV is None else seen_BV[going]
            with torch.no_grad():
                logits_BV = decoding.step(tokens)


@contextmanager
def _inference(model: Any) -> Iterator[None]:
    was_training = bool(model.training)
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
