"""Perplexity: how surprised a model is by the answers of held-out conversations.

Token-weighted: the summed loss of all supervised tokens over their number, then the exponential. A mean of batch
means would weigh a token by how many others happen to be in its batch, and a count of padding would flatter the
number. The tokens are those that training would train on, since the same renderer and the same loss make them.

What a batch gives is taken apart by row before anything is summed, so scores of single rows (and intervals from them)
cost no more than the total, and how rows were batched, padded or packed does not show: each token's loss is fp32, all
sums are fp64. What is left is the rounding of the model's own products in a batch of another shape.

Perplexities are comparable between two models only when tokenizer, renderer and rows are the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chulengo.data.batches import Batch, BatchPlan
from chulengo.errors import DataError, ModelError
from chulengo.evaluate.results import Score
from chulengo.model.loss import target_nll

if TYPE_CHECKING:
    from torch import Tensor

    from chulengo.data.renderer import RenderedRow

VERSION = "perplexity/1"
DEFINITION = (
    "exp(sum of -ln p over all supervised tokens / number of supervised tokens); supervised: the tokens that the "
    "renderer trains (answers and their end-of-turn token unless told otherwise), each given all tokens before it."
)
MAX_MEAN_NATS = math.log(1e300)
BATCH_TOKENS = 8192  # at once, as in a step of training: four rows of 2,048


@dataclass(frozen=True, slots=True)
class Losses:
    """What rows gave, in their order.

    Attributes:
        nll: summed -ln p of each row's targets, in nats; fp64 [rows].
        targets: how many targets; int64 [rows].
        hits: how many of them were the likeliest token; int64 [rows].
    """

    nll: NDArray[np.float64]
    targets: NDArray[np.int64]
    hits: NDArray[np.int64]


def perplexity(
    model: Any, rows: Sequence[RenderedRow], *, pad_id: int, batch_size: int = 8, per_item: bool = False,
    packed: bool = False, max_seq_tokens: int = 0,
) -> Score:
    """Returns the perplexity of rendered rows; `details` has the mean loss in nats and the number of tokens.

    Args:
        model: see `row_losses`.
        rows: see `row_losses`.
        pad_id: see `row_losses`.
        batch_size: see `row_losses`.
        per_item: also say what every row gave.
        packed: see `row_losses`.
        max_seq_tokens: see `row_losses`.

    Raises:
        ModelError: a loss is NaN or infinite; the rows are named.
        DataError: no row has a supervised token.
    """
    losses = row_losses(
        model, rows, pad_id=pad_id, batch_size=batch_size, packed=packed, max_seq_tokens=max_seq_tokens
    )
    return _score(losses, [row.source for row in rows], per_item=per_item)


def score_batches(model: Any, batches: Iterable[Batch]) -> Score:
    """Returns the perplexity of batches with a conversation a row, as `data.batches.collate_padded` makes them."""
    found: list[Losses] = []
    sources: list[str] = []
    with _Evaluating(model):
        for batch in batches:
            found.append(_batch_losses(model, batch, None, batch["sources"]))
            sources += batch["sources"]
    joined = Losses(
        np.concatenate([each.nll for each in found]), np.concatenate([each.targets for each in found]),
        np.concatenate([each.hits for each in found]),
    )
    return _score(joined, sources, per_item=False)


def row_losses(
    model: Any, rows: Sequence[RenderedRow], *, pad_id: int, batch_size: int = 8, packed: bool = False,
    max_seq_tokens: int = 0, on_rows: Callable[[int], None] = lambda done: None,
) -> Losses:
    """Returns the summed loss of every row, in the order given.

    Args:
        model: a causal or encoder-decoder model, plain or PEFT-wrapped, or the fast engine's; left in the mode it
            came in.
        rows: conversations, none longer than the model's context.
        pad_id: any id; padding is masked.
        batch_size: most rows (packs, when packed) at a time, longest first; fewer where they are more than
            `BATCH_TOKENS` tokens together.
        packed: several rows behind each other, as training with `batching: packed` has them.
        max_seq_tokens: tokens of a pack; only looked at when packed.
        on_rows: called with the number of rows that are done, after every batch.

    Raises:
        ModelError: a loss is NaN or infinite; the rows are named.
    """
    plan = BatchPlan(rows, packed=packed, max_seq_tokens=max_seq_tokens, pad_id=pad_id, seed=0)
    packs = plan.packs if plan.packs is not None else [[index] for index in range(len(rows))]
    nll, targets, hits = np.zeros(len(rows)), np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    order = np.argsort(-np.asarray(plan.lengths), kind="stable").tolist()
    done = 0
    with _Evaluating(model):
        while order:
            some = max(1, min(batch_size, BATCH_TOKENS // max(1, plan.lengths[order[0]])))
            units, order = order[:some], order[some:]
            held = [row for unit in units for row in packs[unit]]
            batch = plan.collate(units)
            owners = _owners([packs[unit] for unit in units], rows, batch) if packed else None
            losses = _batch_losses(model, batch, owners, [rows[row].source for row in held])
            nll[held], targets[held], hits[held] = losses.nll, losses.targets, losses.hits
            done += len(held)
            on_rows(done)
    return Losses(nll, targets, hits)


def _owners(packs: list[list[int]], rows: Sequence[RenderedRow], batch: Batch) -> Tensor:
    """Returns which of the batch's conversations each place of a packed batch belongs to, counted from 0."""
    import torch

    owners = torch.zeros(batch["labels"].shape, dtype=torch.int64)
    numbers = itertools.count()
    for line, pack in enumerate(packs):
        end = 0
        for row in pack:
            start, end = end, end + len(rows[row].ids)
            owners[line, start:end] = next(numbers)
    return owners


def _batch_losses(model: Any, batch: Batch, owners: Tensor | None, sources: Sequence[str]) -> Losses:
    nll, hit, places = target_nll(model, batch)
    places = places.cpu()
    owner = (places[:, 0] if owners is None else owners[places[:, 0], places[:, 1]]).numpy()
    size = len(sources)
    sums = np.bincount(owner, nll.double().cpu().numpy(), size).astype(np.float64)
    broken = [source for source, total in zip(sources, sums, strict=True) if not math.isfinite(total)]
    if broken:
        raise ModelError(
            f"The loss of {', '.join(broken[:4])}{' …' if len(broken) > 4 else ''} is "
            f"{sums[list(sources).index(broken[0])]}.",
            next_step="--dtype float32 shows whether the number range is to blame",
        )
    counts = np.bincount(owner, minlength=size).astype(np.int64)
    return Losses(sums, counts, np.bincount(owner, hit.double().cpu().numpy(), size).astype(np.int64))


class _Evaluating:
    """Puts a model into evaluation mode for a block, and back into the mode it came in."""

    def __init__(self, model: Any) -> None:
        self._model, self._was_training = model, bool(model.training)

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *error: object) -> None:
        self._model.train(self._was_training)


def mean_nats(losses: Losses) -> float:
    """Returns the mean loss of all targets, in nats.

    Raises:
        DataError: there is no target.
        ModelError: the mean is beyond what an exponential can show.
    """
    targets = int(losses.targets.sum())
    if targets == 0:
        raise DataError(
            "No token of the data is supervised, so there is no perplexity.",
            next_step="chulengo inspect --data … shows which tokens would be",
        )
    mean = math.fsum(losses.nll) / targets
    if mean > MAX_MEAN_NATS:
        raise ModelError(f"The mean loss is {mean:.0f} nats a token: the model's weights are broken.")
    return mean


def _score(losses: Losses, sources: Sequence[str], *, per_item: bool) -> Score:
    mean = mean_nats(losses)
    items = tuple(
        {"source": source, "loss": nll / count if count else None, "supervised_tokens": count}
        for source, nll, count in zip(sources, losses.nll.tolist(), losses.targets.tolist(), strict=True)
    )
    return Score(
        name="perplexity", version=VERSION, definition=DEFINITION, value=math.exp(mean), num_items=len(sources),
        details={"loss": mean, "supervised_tokens": int(losses.targets.sum())}, items=items if per_item else (),
    )
