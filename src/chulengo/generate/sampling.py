"""Logits to the next token of every row.

One draw from the inverse of the cumulative distribution per row, with a uniform number that the row's own generator
gave. `torch.multinomial` would draw for the whole batch from one stream: a row's answer would then depend on which
other rows happen to be in its batch, and on whether they are finished. The numbers come from the processor, so a
seed means the same on every device (up to the rounding of the logits).

B: rows, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from chulengo.errors import ModelError

if TYPE_CHECKING:
    import torch

    from chulengo.generate.settings import GenerationSettings


def choose_tokens(
    logits_BV: torch.Tensor,
    settings: GenerationSettings,
    *,
    uniforms: Sequence[float],
    seen_BV: torch.Tensor | None,
) -> list[int]:
    """Returns the next token id of every row.

    Args:
        logits_BV: logits of the next token, any floating dtype; computed with in fp32.
        settings: how to choose.
        uniforms: B numbers in [0, 1), one a row; not looked at when greedy.
        seen_BV: True where a token is in the row's context; None when there is no repetition penalty.

    Raises:
        ModelError: the logits have a NaN.
    """
    import torch

    logits_BV = logits_BV.float()
    if bool(torch.isnan(logits_BV).any()):
        raise ModelError(
            "The model gives NaN instead of logits: its weights or its compute dtype are broken.",
            next_step="load it with compute dtype float32 and without quantisation to see which",
        )
    if seen_BV is not None and settings.repetition_penalty != 1:
        penalty = settings.repetition_penalty
        punished_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = torch.where(seen_BV, punished_BV, logits_BV)
    if settings.temperature == 0:
        return [int(i) for i in logits_BV.argmax(dim=-1).tolist()]
    kept_BV, order_BV = kept_probabilities(logits_BV, settings)
    cumulative_BV = kept_BV.double().cumsum(dim=-1)
    draws = torch.tensor(uniforms, dtype=torch.float64, device=kept_BV.device)[:, None]
    # the last column is the total: scaling the draw by it renormalises what top-k and top-p left
    place_B1 = torch.searchsorted(cumulative_BV, draws * cumulative_BV[:, -1:], right=True)
    # u * total can round up to the total itself: never beyond the last kept token
    last_B1 = (kept_BV > 0).sum(dim=-1, keepdim=True) - 1
    chosen_B1 = order_BV.gather(-1, torch.minimum(place_B1, last_B1))
    return [int(i) for i in chosen_B1[:, 0].tolist()]


def kept_probabilities(
    logits_BV: torch.Tensor, settings: GenerationSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the probabilities, largest first and 0 where cut off (not renormalised), and their token ids.

    Both have shape [B, V]; with top-k on, [B, min(k, V)].
    """
    import torch

    # the maximum is taken off first: a small temperature would otherwise overflow to inf - inf
    scaled_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / settings.temperature
    sorted_BV, order_BV = torch.sort(scaled_BV, dim=-1, descending=True, stable=True)
    if settings.top_k:
        sorted_BV, order_BV = sorted_BV[:, : settings.top_k], order_BV[:, : settings.top_k]
    probabilities_BV = torch.softmax(sorted_BV, dim=-1)
    if settings.top_p < 1:
        before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
        before_BV[:, 0] = 0  # the likeliest token always stays
        probabilities_BV = torch.where(before_BV < settings.top_p, probabilities_BV, 0.0)
    return probabilities_BV, order_BV
