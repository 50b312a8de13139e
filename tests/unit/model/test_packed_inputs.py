"""Batches as packed inputs: sequences, positions, the places of the loss, and static shapes."""

from __future__ import annotations

import pytest
import torch

from chulengo.data.batches import IGNORE, collate_packed, collate_padded
from chulengo.data.renderer import RenderedRow
from chulengo.errors import DataError
from chulengo.model.packed_inputs import pack_batch, pack_sequences


def row(ids: list[int], trained: str) -> RenderedRow:
    return RenderedRow(ids, [c == "1" for c in trained], "rows:1", [len(ids)], None)


ROWS = [row([5, 6, 7], "011"), row([8, 9], "01"), row([3, 4, 5, 6], "0001")]


def test_by_hand() -> None:
    inputs = pack_batch(collate_padded(ROWS, pad_id=0))
    assert inputs.ids_T.tolist() == [5, 6, 7, 8, 9, 3, 4, 5, 6]
    assert inputs.position_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert inputs.cu_seqlens.tolist() == [0, 3, 5, 9]
    assert inputs.max_seqlen == 4
    assert inputs.place_N.tolist() == [0, 1, 3, 7]
    assert inputs.target_N.tolist() == [6, 7, 9, 6]
    assert inputs.num_targets == 4
    assert (inputs.cu_seqlens.dtype, inputs.position_T.dtype) == (torch.int32, torch.int32)


def test_padding_of_packs_is_a_sequence_of_its_own() -> None:
    inputs = pack_batch(collate_packed([ROWS[:2], ROWS[2:]], pad_id=0))
    assert inputs.ids_T.tolist() == [5, 6, 7, 8, 9, 3, 4, 5, 6, 0]
    assert inputs.position_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0]
    assert inputs.cu_seqlens.tolist() == [0, 3, 5, 9, 10]
    assert inputs.place_N.tolist() == [0, 1, 3, 7]


def test_static_shapes() -> None:
    batch = collate_padded(ROWS, pad_id=0)
    inputs = pack_batch(batch, max_sequences=5, max_targets=6)
    assert inputs.cu_seqlens.tolist() == [0, 3, 5, 9, 9, 9]
    assert inputs.place_N.tolist() == [0, 1, 3, 7, 0, 0]
    assert inputs.target_N.tolist() == [6, 7, 9, 6, IGNORE, IGNORE]
    assert inputs.num_targets == 4
    with pytest.raises(DataError, match="3 sequences"):
        pack_batch(batch, max_sequences=2)
    with pytest.raises(DataError, match="4 targets"):
        pack_batch(batch, max_targets=3)


def test_what_cannot_be_packed() -> None:
    with pytest.raises(DataError, match="without tokens"):
        pack_sequences([[1], []])
    with pytest.raises(DataError, match="encoder-decoder"):
        pack_batch({"decoder_ids": torch.zeros(1, 1)})
    wrong = collate_padded(ROWS, pad_id=0)
    wrong["labels"][1, 0] = 8
    with pytest.raises(DataError, match="first token"):
        pack_batch(wrong)
