"""Perplexity: how surprised a model is by the answers of held-out conversations.

Token-weighted: the summed loss of all supervised tokens over their number, then the exponential. A mean of batch
means would weigh a token by how many others happen to be in its batch, and a count of padding would flatter the
number. The tokens are those that training would train on, since the same renderer and the same loss make them.

Perplexities are comparable between two models only when tokenizer, renderer and rows are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from chulengo.data.batches import Batch, BatchPlan
from chulengo.errors import DataError, ModelError
from chulengo.evaluate.results import Score
from chulengo.model.loss import supervised_nll

if TYPE_CHECKING:
    from chulengo.data.renderer import RenderedRow

VERSION = "perplexity/1"
DEFINITION = (
    "exp(sum of -ln p over all supervised tokens / number of supervised tokens); supervised: the tokens that the "
    "renderer trains (answers and their end-of-turn token unless told otherwise), each given all tokens before it."
)


def perplexity(
    model: Any, rows: Sequence[RenderedRow], *, pad_id: int, batch_size: int = 8, per_item: bool = False
) -> Score:
    """Returns the perplexity of rendered rows; `details` has the mean loss in nats and the number of tokens.

    Args:
        model: a causal or encoder-decoder model, plain or PEFT-wrapped; left in the mode it came in.
        rows: conversations, none longer than the model's context.
        pad_id: any id; padding is masked.
        batch_size: rows at a time, longest first.
        per_item: also say what every row gave. The loss is a sum over a batch, so rows are then run one by one.

    Raises:
        ModelError: a loss is NaN or infinite; the rows are named.
        DataError: no row has a supervised token.
    """
    plan = BatchPlan(rows, packed=False, max_seq_tokens=0, pad_id=pad_id, seed=0)
    return score_batches(model, plan.validation_batches(1 if per_item else batch_size), per_item=per_item)


def score_batches(model: Any, batches: Iterable[Batch], *, per_item: bool = False) -> Score:
    """Returns the perplexity of batches as `data.batches` makes them; see `perplexity`."""
    import torch

    losses: list[tuple[list[str], float, int]] = []
    was_training = bool(model.training)
    model.eval()
    try:
        for batch in batches:
            on_device = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in batch.items()}
            with torch.no_grad():
                nll, count = supervised_nll(model, on_device)
            losses.append((batch["sources"], _finite(float(nll), batch["sources"]), count))
    finally:
        model.train(was_training)
    tokens = sum(count for _, _, count in losses)
    if tokens == 0:
        raise DataError(
            "No token of the data is supervised, so there is no perplexity.",
            next_step="chulengo inspect --data … shows which tokens would be",
        )
    # the sum over batches is exact in fp64; a batch's own sum is fp32
    mean = math.fsum(nll for _, nll, _ in losses) / tokens
    if mean > math.log(1e300):
        raise ModelError(f"The mean loss is {mean:.0f} nats a token: the model's weights are broken.")
    items = tuple(
        {"source": sources[0], "loss": nll / count if count else None, "supervised_tokens": count}
        for sources, nll, count in losses
    )
    return Score(
        name="perplexity", version=VERSION, definition=DEFINITION, value=math.exp(mean),
        num_items=sum(len(sources) for sources, _, _ in losses),
        details={"loss": mean, "supervised_tokens": tokens}, items=items if per_item else (),
    )


def _finite(nll: float, sources: list[str]) -> float:
    if not math.isfinite(nll):
        raise ModelError(
            f"The loss of {', '.join(sources[:4])}{' …' if len(sources) > 4 else ''} is {nll}.",
            next_step="--dtype float32 shows whether the number range is to blame",
        )
    return nll
