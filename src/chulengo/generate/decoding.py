"""A batch of prompts held by a model: the next token's logits, one token at a time.

The fast engine's model brings its own (`model.decode`). For transformers' models there are three forms with the same
methods. Decoder-only models read prompts padded on the left, so that every row's next
token is the last column; the mask hides the padding and positions start at 0 at each row's first real token, which
makes a padded row the same computation as the row alone. Encoder-decoder models read the padded input once, then
decode from their start token.

The cache is the one the model makes itself: that is right for sliding windows and hybrid layers, where a cache built
here would not be. A model without one (`past_key_values` is not among the arguments of its `forward`) is read whole
again for every token, row by row: slow, and the same answers.

B: rows, T: padded prompt tokens, V: vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from chulengo.errors import ModelError

if TYPE_CHECKING:
    import torch


class Decoding(Protocol):
    """What the engine needs of a model that is in the middle of a batch."""

    def context(self, prompt: Sequence[int]) -> Sequence[int]:
        """Returns the ids that stand before the first new one, where a repetition penalty counts from."""

    def start(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Reads the prompts; returns the logits of each row's next token, [B, V]."""

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Appends one token to every row; returns the logits of the token after it, [B, V]."""

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows only, in this order."""


def decoding_for(model: Any) -> Decoding:
    """Returns the form of decoding that the model needs.

    Args:
        model: the fast engine's model, a `PreTrainedModel`, or a `PeftModel` around one.
    """
    from chulengo.model.fast import FastModel

    if isinstance(model, FastModel):
        return model.decoding()
    if bool(getattr(model.config, "is_encoder_decoder", False)):
        return EncoderDecoderDecoding(model)
    names = forward_arguments(model)
    return CausalDecoding(model, names) if "past_key_values" in names else UncachedDecoding(model)


def forward_arguments(model: Any) -> frozenset[str]:
    """Returns the names of the arguments that the transformers model's `forward` takes."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return frozenset(inspect.signature(inner.forward).parameters)


class CausalDecoding:
    """A decoder-only model with its key-value cache."""

    def __init__(self, model: Any, names: frozenset[str]) -> None:
        """Args: the model, and the names of its forward arguments."""
        self._model = model
        self._positions = "position_ids" in names
        # without it the logits of all T prompt tokens are made: 4,096 x 32,000 fp32 are 524 MB a row
        self._extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
        self._cache: Any = None

    def context(self, prompt: Sequence[int]) -> Sequence[int]:
        """See `Decoding.context`."""
        return prompt

    def start(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `Decoding.start`."""
        import torch

        width = max(map(len, prompts))
        ids_BT = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask_BT = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        self._mask_BT = torch.tensor(mask_BT, device=self._model.device)
        positions_BT = (self._mask_BT.cumsum(-1) - 1).clamp(min=0)
        self._next_B = positions_BT[:, -1] + 1
        return self._forward(torch.tensor(ids_BT, device=self._model.device), positions_BT)

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """See `Decoding.step`."""
        import torch

        self._mask_BT = torch.cat([self._mask_BT, self._mask_BT.new_ones(len(tokens), 1)], dim=1)
        positions_B1 = self._next_B[:, None]
        self._next_B = self._next_B + 1
        return self._forward(torch.tensor(tokens, device=self._model.device)[:, None], positions_B1)

    def _forward(self, ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        positions = {"position_ids": positions_BT} if self._positions else {}
        output = self._model(
            input_ids=ids_BT, attention_mask=self._mask_BT, past_key_values=self._cache, use_cache=True,
            **positions, **self._extra,
        )
        self._cache = output.past_key_values
        logits_BV: torch.Tensor = output.logits[:, -1]
        return logits_BV

    def keep(self, rows: Sequence[int]) -> None:
        """See `Decoding.keep`."""
        import torch

        index = torch.tensor(rows, device=self._model.device)
        self._mask_BT, self._next_B = self._mask_BT[index], self._next_B[index]
        self._cache.batch_select_indices(index)


class UncachedDecoding:
    """A decoder-only model without a key-value cache (state-space models): every row whole, each time."""

    def __init__(self, model: Any) -> None:
        """Args: the model."""
        self._model = model

    def context(self, prompt: Sequence[int]) -> Sequence[int]:
        """See `Decoding.context`."""
        return prompt

    def start(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `Decoding.start`."""
        self._rows = [list(prompt) for prompt in prompts]
        return self._forward()

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """See `Decoding.step`."""
        for row, token in zip(self._rows, tokens, strict=True):
            row.append(token)
        return self._forward()

    def _forward(self) -> torch.Tensor:
        import torch

        device = self._model.device
        return torch.stack(
            [self._model(input_ids=torch.tensor([row], device=device)).logits[0, -1] for row in self._rows]
        )

    def keep(self, rows: Sequence[int]) -> None:
        """See `Decoding.keep`."""
        self._rows = [self._rows[row] for row in rows]


class EncoderDecoderDecoding:
    """An encoder-decoder model: the input is encoded once, the answer starts at the decoder's start token."""

    def __init__(self, model: Any) -> None:
        """Reads the decoder's start token.

        Raises:
            ModelError: the configuration names none.
        """
        self._model = model
        start = getattr(model.config, "decoder_start_token_id", None)
        if start is None and getattr(model, "generation_config", None) is not None:
            start = model.generation_config.decoder_start_token_id
        if start is None:
            raise ModelError(
                "The encoder-decoder model's config.json has no decoder_start_token_id.",
                next_step="add it (T5: the id of the padding token)",
            )
        self._start = int(start)
        self._cache: Any = None

    def context(self, prompt: Sequence[int]) -> Sequence[int]:
        """See `Decoding.context`."""
        return [self._start]

    def start(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `Decoding.start`."""
        import torch

        width = max(map(len, prompts))
        device = self._model.device
        ids_BT = torch.tensor([list(p) + [0] * (width - len(p)) for p in prompts], device=device)
        self._mask_BT = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in prompts], device=device)
        self._encoded: Any = self._model.get_encoder()(input_ids=ids_BT, attention_mask=self._mask_BT)
        return self.step([self._start] * len(prompts))

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """See `Decoding.step`."""
        import torch

        output = self._model(
            encoder_outputs=self._encoded, attention_mask=self._mask_BT, past_key_values=self._cache,
            decoder_input_ids=torch.tensor(tokens, device=self._model.device)[:, None], use_cache=True,
        )
        self._cache = output.past_key_values
        logits_BV: torch.Tensor = output.logits[:, -1]
        return logits_BV

    def keep(self, rows: Sequence[int]) -> None:
        """See `Decoding.keep`."""
        import torch

        index = torch.tensor(rows, device=self._model.device)
        self._mask_BT = self._mask_BT[index]
        self._encoded.last_hidden_state = self._encoded.last_hidden_state[index]
        self._cache.batch_select_indices(index)
