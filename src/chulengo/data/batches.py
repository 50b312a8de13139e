"""Rows to batches: the order of an epoch, exact packing, and padded or packed tensors.

The order. One optimiser step takes `step_rows = batch_size * gradient_accumulation * ranks` rows. Which rows those are
depends on the seed, the epoch and `step_rows` only, never on how the product is made up: 1 x 8, 8 x 1 and 2 ranks x 4
see the same rows in the same steps. The order of an epoch is a function of (seed, epoch), so a resumed run computes it
again and starts at its batch; there is no state to save and nothing to replay.

Group by length. Rows are shuffled, cut into pools of up to 50 steps (a quarter of the epoch when that is less), sorted
by length within a pool, cut into steps, and the steps are shuffled. An epoch's last, smaller step is taken from the
shuffle, not from the sorted end, so that it is not always the longest rows. In epoch 0 the step with the longest row
comes first: memory that does not suffice shows at step 1 and not after an hour.

Packing. Best-fit decreasing puts whole rows into packs of at most `max_seq_tokens`; a row is never cut. Positions
restart at 0 with every row and no 2-D mask is given: transformers derives the block-diagonal causal mask from the
restarts (masking_utils.find_packed_sequence_indices), and flash attention its variable-length form. The first token of
a row is never a target. So the packed loss is the unpacked loss. Packs are made once for a run, because the number of
steps in an epoch must not change; the order of packs changes every epoch. The limit: rows that share a pack share it
in every epoch.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from chulengo.data.renderer import RenderedRow

IGNORE = -100  # label of a position without loss, as torch.nn.functional.cross_entropy has it

POOL_STEPS = 50  # steps whose rows are sorted together; transformers' value

Batch = dict[str, Any]


def row_length(row: RenderedRow) -> int:
    """Returns the number of tokens of a row, the encoder's included."""
    return len(row.ids) + len(row.encoder_ids or ())


def mean_length(lengths: Sequence[int]) -> int:
    """Returns the mean tokens of rows or packs, rounded, at least 1."""
    return max(1, round(sum(lengths) / max(1, len(lengths))))


def epoch_steps(
    lengths: Sequence[int], *, step_rows: int, by_length: bool, seed: int, epoch: int
) -> list[list[int]]:
    """Returns the rows of every optimiser step of one epoch.

    Args:
        lengths: tokens of each row (or pack).
        step_rows: rows a step takes over all micro-steps and ranks.
        by_length: group rows of similar length.
        seed: the run's seed.
        epoch: 0-based.

    Returns:
        Row indices, a list a step; every row once; all lists but the last have `step_rows` entries, longest row first
        when `by_length`.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    num_full = len(lengths) // step_rows
    full, rest = order[: num_full * step_rows], order[num_full * step_rows :]
    if not by_length:
        steps = [full[i * step_rows : (i + 1) * step_rows].tolist() for i in range(num_full)]
        return steps + ([rest.tolist()] if len(rest) else [])
    size = np.asarray(lengths)
    pool_rows = max(1, min(num_full // 4, POOL_STEPS)) * step_rows
    steps = []
    for start in range(0, len(full), pool_rows):
        pool = full[start : start + pool_rows]
        pool = pool[np.argsort(-size[pool], kind="stable")]
        steps += [pool[i : i + step_rows].tolist() for i in range(0, len(pool), step_rows)]
    steps = [steps[i] for i in rng.permutation(len(steps))]
    if epoch == 0 and steps:
        longest = max(range(len(steps)), key=lambda i: int(size[steps[i][0]]))
        steps[0], steps[longest] = steps[longest], steps[0]
    if len(rest):
        steps.append(rest[np.argsort(-size[rest], kind="stable")].tolist())
    return steps


def micro_batches(steps: list[list[int]], *, batch_size: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """Returns one rank's micro-batches of an epoch, in order.

    Every rank gets the same number, since gradients are exchanged at each step. A rank for which an epoch's last step
    has no rows left gets `[-1 - i]`: row `i` without targets, which adds nothing to the loss.
    """
    batches = []
    for rows in steps:
        parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        for start in range(0, len(parts), world):
            turn = parts[start : start + world]
            batches.append(turn[rank] if rank < len(turn) else [-1 - parts[0][0]])
    return batches


class EpochBatches:
    """Batch sampler of one rank: the micro-batches of the current epoch, recomputed from (seed, epoch)."""

    def __init__(
        self, lengths: Sequence[int], *, batch_size: int, accumulation: int, by_length: bool, seed: int,
        rank: int = 0, world: int = 1,
    ) -> None:
        self._lengths = list(lengths)
        self._step_rows = batch_size * accumulation * world
        self._batch_size, self._by_length, self._seed = batch_size, by_length, seed
        self._rank, self._world = rank, world
        self.epoch = 0
        self._size = len(self._epoch(0))
        self.steps_per_epoch = -(-len(self._lengths) // self._step_rows)

    def _epoch(self, epoch: int) -> list[list[int]]:
        steps = epoch_steps(
            self._lengths, step_rows=self._step_rows, by_length=self._by_length, seed=self._seed, epoch=epoch
        )
        return micro_batches(steps, batch_size=self._batch_size, rank=self._rank, world=self._world)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._epoch(self.epoch))


def pack_rows(lengths: Sequence[int], *, max_seq_tokens: int, seed: int) -> list[list[int]]:
    """Returns packs of row indices, each of at most `max_seq_tokens` tokens; every row is in exactly one.

    Best-fit decreasing: the longest row first, each into the pack with the least room that still takes it. At most
    11/9 of the best possible number of packs (Johnson 1973); O(n log n). The seed orders rows of equal length.

    Raises:
        ValueError: a row is longer than a pack; the ledger settles such rows before.
    """
    order = np.random.default_rng([seed, 0]).permutation(len(lengths))
    order = order[np.argsort(-np.asarray(lengths)[order], kind="stable")]
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for row in order.tolist():
        length = lengths[row]
        if length > max_seq_tokens:
            raise ValueError(f"row {row} has {length} tokens, a pack takes {max_seq_tokens}")
        place = bisect.bisect_left(room, (length, -1))
        if place == len(room):
            packs.append([row])
            left, pack = max_seq_tokens - length, len(packs) - 1
        else:
            left, pack = room.pop(place)
            packs[pack].append(row)
            left -= length
        if left:
            bisect.insort(room, (left, pack))
    return packs


def packing_efficiency(lengths: Sequence[int], packs: Sequence[Sequence[int]], *, max_seq_tokens: int) -> float:
    """Returns the share of the packs' places that hold a token, 0 to 1."""
    return sum(lengths) / (len(packs) * max_seq_tokens) if packs else 0.0


def row_labels(row: RenderedRow) -> list[int]:
    """Returns a row's labels: its ids where they are targets, else `IGNORE`; never a causal row's first token."""
    labels = [token if trained else IGNORE for token, trained in zip(row.ids, row.trained, strict=True)]
    if row.encoder_ids is None and labels:
        labels[0] = IGNORE
    return labels


def collate_padded(rows: Sequence[RenderedRow], *, pad_id: int) -> Batch:
    """Returns one batch, a row each, padded on the right.

    Returns:
        `input_ids`, `attention_mask`, `labels`: int64 [rows, tokens]; with encoder-decoder rows `input_ids` and
        `attention_mask` are the encoder's and `decoder_ids` [rows, decoder tokens] are the unshifted decoder ids.
        `sources`: a name a row; `num_tokens`, `num_targets`: counts without padding.
    """
    import torch

    labels = _padded([row_labels(row) for row in rows], IGNORE)
    own = _padded([row.ids for row in rows], pad_id)
    batch: Batch = {"labels": labels, "sources": [row.source for row in rows]}
    if any(row.encoder_ids is not None for row in rows):
        encoder = [list(row.encoder_ids or ()) for row in rows]
        batch |= {"input_ids": _padded(encoder, pad_id), "decoder_ids": own}
        counts = [len(ids) for ids in encoder]
    else:
        batch["input_ids"] = own
        counts = [len(row.ids) for row in rows]
    width = batch["input_ids"].shape[1]
    batch["attention_mask"] = (torch.arange(width)[None] < torch.tensor(counts)[:, None]).long()
    return _counted(batch, rows)


def collate_packed(packs: Sequence[Sequence[RenderedRow]], *, pad_id: int, flatten: bool = False) -> Batch:
    """Returns one batch, a pack a row (or all packs in one row), for block-diagonal attention.

    Args:
        packs: the rows of each pack.
        pad_id: fills packs up to the batch's longest; padding is a block of its own that carries no label.
        flatten: one row with all packs behind each other, the only form flash attention takes as variable-length.

    Returns:
        `input_ids`, `position_ids`, `labels`: int64 [packs, tokens]; positions restart with each row. No mask: see the
        top of this file. `sources`, `num_tokens`, `num_targets` as `collate_padded`.
    """
    rows = [row for pack in packs for row in pack]
    if flatten:
        packs = [rows]
    ids = [[token for row in pack for token in row.ids] for pack in packs]
    width = max(len(pack) for pack in ids)
    positions = [
        [p for row in pack for p in range(len(row.ids))] + list(range(width - len(pack_ids)))
        for pack, pack_ids in zip(packs, ids, strict=True)
    ]
    labels = [[label for row in pack for label in row_labels(row)] for pack in packs]
    batch: Batch = {
        "input_ids": _padded(ids, pad_id),
        "position_ids": _padded(positions, 0),
        "labels": _padded(labels, IGNORE),
        "sources": [row.source for row in rows],
    }
    return _counted(batch, rows)


def without_targets(batch: Batch) -> Batch:
    """Returns the batch with nothing to learn from and no tokens counted, for a rank that has no rows left."""
    import torch

    labels = torch.full_like(batch["labels"], IGNORE)
    return batch | {"labels": labels, "sources": [], "num_tokens": 0, "num_targets": 0}


class BatchPlan:
    """Rows, grouped as they are batched: single rows, or packs.

    One for training and one for validation; validation batches hold every row exactly once, the last, smaller batch
    included.
    """

    def __init__(
        self, rows: Sequence[RenderedRow], *, packed: bool, max_seq_tokens: int, pad_id: int, seed: int,
        flatten: bool = False,
    ) -> None:
        self.rows = rows
        row_lengths = [row_length(row) for row in rows]
        self.packs: list[list[int]] | None = None
        self.efficiency: float | None = None
        if packed:
            self.packs = pack_rows(row_lengths, max_seq_tokens=max_seq_tokens, seed=seed)
            self.efficiency = packing_efficiency(row_lengths, self.packs, max_seq_tokens=max_seq_tokens)
        self.lengths = (
            row_lengths if self.packs is None else [sum(row_lengths[i] for i in pack) for pack in self.packs]
        )
        self._pad_id, self._flatten = pad_id, flatten

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> int:
        # a data loader asks for items one by one; the batch is made from the indices, in `collate`
        return index

    def collate(self, indices: Sequence[int]) -> Batch:
        """Returns the batch of these units; `[-1 - i]` is unit `i` without targets (see `micro_batches`)."""
        if indices[0] < 0:
            return without_targets(self.collate([-1 - i for i in indices]))
        if self.packs is None:
            return collate_padded([self.rows[i] for i in indices], pad_id=self._pad_id)
        packs = [[self.rows[i] for i in self.packs[unit]] for unit in indices]
        return collate_packed(packs, pad_id=self._pad_id, flatten=self._flatten)

    def validation_batches(self, batch_size: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yields one rank's share of all units, longest first, nothing dropped and nothing twice."""
        order = np.argsort(-np.asarray(self.lengths), kind="stable").tolist()
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for indices in batches[rank::world]:
            yield self.collate(indices)


def pad_token(pad_id: int | None, eos_id: int | None) -> int:
    """Returns the id that fills padding: the pad token, else end of sequence, else 0. Padding is masked in any case."""
    return next((i for i in (pad_id, eos_id) if i is not None), 0)


def _padded(lists: Sequence[Sequence[int]], fill: int) -> Any:
    import torch

    out = torch.full((len(lists), max(len(items) for items in lists)), fill, dtype=torch.int64)
    for i, items in enumerate(lists):
        out[i, : len(items)] = torch.tensor(items, dtype=torch.int64)
    return out


def _counted(batch: Batch, rows: Sequence[RenderedRow]) -> Batch:
    batch["num_tokens"] = sum(row_length(row) for row in rows)
    batch["num_targets"] = int((batch["labels"] != IGNORE).sum())
    return batch


