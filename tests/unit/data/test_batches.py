from __future__ import annotations

import numpy as np
import pytest

from chulengo.data.batches import (
    IGNORE,
    BatchPlan,
    EpochBatches,
    collate_packed,
    collate_padded,
    epoch_steps,
    micro_batches,
    pack_rows,
    packing_efficiency,
    pad_token,
)
from chulengo.data.renderer import RenderedRow


def make_rows(count: int) -> list[RenderedRow]:
    lengths = np.random.default_rng(0).integers(6, 40, count).tolist()
    return [RenderedRow(ids=[1] * n, trained=[True] * n, source=f"row:{i}") for i, n in enumerate(lengths)]


LENGTHS = np.random.default_rng(0).integers(5, 400, 203).tolist()


@pytest.mark.parametrize("by_length", [False, True])
def test_epoch_holds_every_row_once_and_only_the_last_step_is_smaller(by_length: bool) -> None:
    steps = epoch_steps(LENGTHS, step_rows=8, by_length=by_length, seed=1, epoch=2)
    assert sorted(i for step in steps for i in step) == list(range(203))
    assert [len(step) for step in steps] == [8] * 25 + [3]


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return epoch_steps(LENGTHS, step_rows=8, by_length=True, seed=seed, epoch=epoch)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


def test_group_by_length_saves_padding_and_starts_with_the_longest_row() -> None:
    def padding(by_length: bool) -> int:
        steps = epoch_steps(LENGTHS, step_rows=8, by_length=by_length, seed=1, epoch=0)
        return sum(max(LENGTHS[i] for i in s) * len(s) - sum(LENGTHS[i] for i in s) for s in steps)

    assert padding(True) < 0.4 * padding(False)
    first = epoch_steps(LENGTHS, step_rows=8, by_length=True, seed=1, epoch=0)[0]
    whole = epoch_steps(LENGTHS[:200], step_rows=8, by_length=True, seed=1, epoch=0)[0]
    assert max(LENGTHS[:200]) in [LENGTHS[i] for i in whole]
    assert len(first) == 8


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "world"), [(1, 8, 1), (8, 1, 1), (4, 2, 1), (2, 2, 2), (4, 1, 2)]
)
def test_a_step_has_the_same_rows_however_it_is_split(batch_size: int, accumulation: int, world: int) -> None:
    expected = [set(s) for s in epoch_steps(LENGTHS, step_rows=8, by_length=True, seed=5, epoch=1)]
    ranks = []
    for rank in range(world):
        sampler = EpochBatches(
            LENGTHS, batch_size=batch_size, accumulation=accumulation, by_length=True, seed=5, rank=rank, world=world
        )
        sampler.set_epoch(1)
        assert sampler.steps_per_epoch == 26
        assert len(list(sampler)) == len(sampler)
        ranks.append(list(sampler))
    assert len({len(batches) for batches in ranks}) == 1
    for number, rows in enumerate(expected):
        span = slice(number * accumulation, (number + 1) * accumulation)
        seen = [i for batches in ranks for batch in batches[span] for i in batch if i >= 0]
        assert sorted(seen) == sorted(rows)


def test_a_rank_without_rows_gets_a_batch_without_targets() -> None:
    assert micro_batches([[4, 5, 6]], batch_size=2, rank=0, world=2) == [[4, 5]]
    assert micro_batches([[4, 5]], batch_size=2, rank=1, world=2) == [[-5]]
    plan = BatchPlan(make_rows(6), packed=False, max_seq_tokens=64, pad_id=0, seed=0)
    batch = plan.collate([-5])
    assert batch["num_targets"] == 0
    assert batch["num_tokens"] == 0
    assert (batch["labels"] == IGNORE).all()
    assert batch["input_ids"].tolist() == [plan.rows[4].ids]


def test_packs_hold_every_row_once_and_fill_well() -> None:
    packs = pack_rows(LENGTHS, max_seq_tokens=512, seed=0)
    assert sorted(i for pack in packs for i in pack) == list(range(203))
    assert max(sum(LENGTHS[i] for i in pack) for pack in packs) <= 512
    assert packing_efficiency(LENGTHS, packs, max_seq_tokens=512) > 0.97
    assert len(packs) <= -(-sum(LENGTHS) // 512) + 2


def test_packing_hand_worked_case_and_too_long_row() -> None:
    packs = pack_rows([6, 4, 5, 5, 3, 7], max_seq_tokens=10, seed=0)
    assert sorted(sorted([6, 4, 5, 5, 3, 7][i] for i in pack) for pack in packs) == [[3, 7], [4, 6], [5, 5]]
    with pytest.raises(ValueError, match="11 tokens"):
        pack_rows([11], max_seq_tokens=10, seed=0)


ROWS = [
    RenderedRow(ids=[1, 10, 11, 2], trained=[True, False, True, True], source="a"),
    RenderedRow(ids=[1, 20], trained=[True, True], source="b"),
    RenderedRow(ids=[1, 30, 31], trained=[False, False, True], source="c"),
]


def test_padded_batch_by_hand() -> None:
    batch = collate_padded(ROWS[:2], pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 10, 11, 2], [1, 20, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    # the first token of a row has nothing before it to be predicted from
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 11, 2], [IGNORE, 20, IGNORE, IGNORE]]
    assert (batch["num_tokens"], batch["num_targets"], batch["sources"]) == (6, 3, ["a", "b"])


def test_padding_with_the_end_token_does_not_hide_real_end_tokens() -> None:
    batch = collate_padded(ROWS[:2], pad_id=2)
    assert batch["labels"][0].tolist() == [IGNORE, IGNORE, 11, 2]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_packed_batch_by_hand() -> None:
    batch = collate_packed([[ROWS[0], ROWS[1]], [ROWS[2]]], pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 10, 11, 2, 1, 20], [1, 30, 31, 9, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]]
    assert batch["labels"].tolist() == [
        [IGNORE, IGNORE, 11, 2, IGNORE, 20], [IGNORE, IGNORE, 31, IGNORE, IGNORE, IGNORE]
    ]
    assert "attention_mask" not in batch
    assert (batch["num_tokens"], batch["num_targets"]) == (9, 4)
    flat = collate_packed([[ROWS[0], ROWS[1]], [ROWS[2]]], pad_id=9, flatten=True)
    assert flat["input_ids"].tolist() == [[1, 10, 11, 2, 1, 20, 1, 30, 31]]
    assert flat["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]


def test_encoder_decoder_batch_by_hand() -> None:
    rows = [
        RenderedRow(ids=[7, 8, 1], trained=[True, True, True], source="a", encoder_ids=[3, 4]),
        RenderedRow(ids=[9, 1], trained=[True, False], source="b", encoder_ids=[5, 6, 7]),
    ]
    batch = collate_padded(rows, pad_id=0)
    assert batch["input_ids"].tolist() == [[3, 4, 0], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["decoder_ids"].tolist() == [[7, 8, 1], [9, 1, 0]]
    assert batch["labels"].tolist() == [[7, 8, 1], [9, IGNORE, IGNORE]]
    assert (batch["num_tokens"], batch["num_targets"]) == (10, 4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("world", [1, 3])
def test_validation_drops_nothing_and_repeats_nothing(packed: bool, world: int) -> None:
    rows = make_rows(23)
    plan = BatchPlan(rows, packed=packed, max_seq_tokens=64, pad_id=0, seed=0)
    sources = [
        source for rank in range(world) for batch in plan.validation_batches(4, rank=rank, world=world)
        for source in batch["sources"]
    ]
    assert sorted(sources) == sorted(row.source for row in rows)


def test_pad_token_falls_back() -> None:
    assert [pad_token(5, 2), pad_token(None, 2), pad_token(None, None), pad_token(0, 2)] == [5, 2, 0, 0]
