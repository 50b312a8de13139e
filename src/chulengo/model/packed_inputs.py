"""A batch as the fast engine reads it: all tokens behind each other, and where the loss is.

Padding is left out (of padded batches) or stands at the end of a pack as a sequence of its own (of packed ones), so
attention needs no mask: it runs within each sequence, by `cu_seqlens`. The loss needs the states of tokens whose next
token is a target, and no other, so those places are looked up here, on the host, before anything is on the device;
nothing in a training step has to wait for the device to say how many there are.

Static shapes. `max_sequences` and `max_targets` fill `cu_seqlens` with empty sequences and the targets with `IGNORE`,
so that with packs of one token budget every batch has the same shapes, as CUDA graphs want. The loss is the same.

Legend: T tokens, S sequences, N targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chulengo.data.batches import IGNORE
from chulengo.errors import DataError


@dataclass(frozen=True, slots=True)
class PackedInputs:
    """One micro-batch.

    Attributes:
        ids_T: int64, the tokens of all sequences.
        position_T: int32, from 0 in every sequence.
        cu_seqlens: int32 [S + 1], the end of each sequence.
        max_seqlen: tokens of the longest sequence.
        place_N: int64, the token from whose state each target is predicted.
        target_N: int64; IGNORE where a place is only there to fill up.
        num_targets: targets that count.
    """

    ids_T: Tensor
    position_T: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    place_N: Tensor
    target_N: Tensor
    num_targets: int

    def to(self, device: torch.device) -> PackedInputs:
        """Returns the same inputs on `device`."""
        ids, positions, ends, places, targets = (x.to(device, non_blocking=True) for x in self.tensors())
        return PackedInputs(ids, positions, ends, self.max_seqlen, places, targets, self.num_targets)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns ids, positions, ends, places and targets."""
        return self.ids_T, self.position_T, self.cu_seqlens, self.place_N, self.target_N

    def clone(self) -> PackedInputs:
        """Returns a copy with memory of its own."""
        ids, positions, ends, places, targets = (x.clone() for x in self.tensors())
        return PackedInputs(ids, positions, ends, self.max_seqlen, places, targets, self.num_targets)

    def copy_(self, other: PackedInputs) -> None:
        """Takes the content of another batch of the same shapes."""
        torch._foreach_copy_(list(self.tensors()), list(other.tensors()))

    def filled(self, tokens: int, sequences: int, targets: int, max_seqlen: int) -> PackedInputs:
        """Returns the batch filled up to these sizes, none smaller than its own; no number of the batch changes.

        Args:
            tokens: the added ones stand in sequences of their own, of at most `max_seqlen`.
            sequences: those of the added tokens are among them; the rest are empty.
            targets: the added ones are ignored.
            max_seqlen: what attention is told.
        """
        own, used = len(self.ids_T), len(self.cu_seqlens) - 1
        if (own, used, len(self.target_N)) == (tokens, sequences, targets):
            return self
        extra = torch.arange(tokens - own, device=self.ids_T.device)
        starts = torch.arange(own, tokens, max_seqlen, device=self.ids_T.device)[1:]
        ends = torch.cat((self.cu_seqlens, starts.to(torch.int32)))
        missing = sequences + 1 - len(ends)
        room = targets - len(self.target_N)
        if missing < 0 or room < 0 or tokens < own:
            raise DataError(f"A batch of {own} tokens cannot be filled up to {tokens}.")
        fill = torch.nn.functional.pad
        return PackedInputs(
            fill(self.ids_T, (0, tokens - own)), torch.cat((self.position_T, (extra % max_seqlen).to(torch.int32))),
            fill(ends, (0, missing), value=tokens), max_seqlen, fill(self.place_N, (0, room)),
            fill(self.target_N, (0, room), value=IGNORE), self.num_targets,
        )  # fmt: skip


def pack_sequences(sequences: Sequence[Sequence[int]]) -> PackedInputs:
    """Returns inputs without targets, of sequences of token ids; every sequence has at least one."""
    lengths = [len(sequence) for sequence in sequences]
    if not lengths or min(lengths) == 0:
        raise DataError("There is a sequence without tokens.", allowed="one token or more")
    ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    return _packed(ids, torch.tensor(lengths), torch.full_like(ids, IGNORE), None, None)


def pack_batch(
    batch: dict[str, Any], *, max_sequences: int | None = None, max_targets: int | None = None
) -> PackedInputs:
    """Returns a batch of `data.batches` as packed inputs, on the CPU.

    Args:
        batch: of `collate_padded` or `collate_packed`, on the CPU.
        max_sequences: fill `cu_seqlens` up to this many sequences; None: as many as there are.
        max_targets: fill the targets up to this many; None: as many as there are.

    Raises:
        DataError: an encoder-decoder batch, or more sequences or targets than the maximum.
    """
    if "decoder_ids" in batch:
        raise DataError("The batch is for an encoder-decoder model.", allowed="causal batches in the fast engine")
    ids, labels = batch["input_ids"], batch["labels"]
    if "position_ids" in batch:
        # a sequence starts wherever a position is 0; each pack starts with one, so flattening keeps them apart
        starts = (batch["position_ids"].flatten() == 0).nonzero().flatten()
        lengths = torch.diff(starts, append=torch.tensor([ids.numel()]))
        return _packed(ids.flatten(), lengths, labels.flatten(), max_sequences, max_targets)
    kept = batch["attention_mask"].bool()
    return _packed(ids[kept], kept.sum(1), labels[kept], max_sequences, max_targets)


def _packed(
    ids_T: Tensor, lengths: Tensor, labels_T: Tensor, max_sequences: int | None, max_targets: int | None
) -> PackedInputs:
    lengths = lengths[lengths > 0]
    ends = lengths.cumsum(0)
    starts = ends - lengths
    positions = torch.arange(len(ids_T)) - starts.repeat_interleave(lengths)
    targets = (labels_T != IGNORE).nonzero().flatten()
    if (positions[targets] == 0).any():
        raise DataError("The first token of a sequence is a target, with nothing to predict it from.")
    count = len(targets)
    empty = _room("sequences", len(lengths), max_sequences)
    unused = _room("targets", count, max_targets)
    return PackedInputs(
        ids_T=ids_T.contiguous(),
        position_T=positions.to(torch.int32),
        cu_seqlens=torch.cat((starts[:1], ends, torch.full((empty,), len(ids_T)))).to(torch.int32),
        max_seqlen=int(lengths.max()),
        place_N=torch.cat((targets - 1, torch.zeros(unused, dtype=torch.int64))),
        target_N=torch.cat((labels_T[targets], torch.full((unused,), IGNORE))),
        num_targets=count,
    )


def _room(what: str, used: int, most: int | None) -> int:
    if most is None:
        return 0
    if used > most:
        raise DataError(f"A batch has {used} {what}.", allowed=f"at most {most}, as the static shapes were made for")
    return most - used
