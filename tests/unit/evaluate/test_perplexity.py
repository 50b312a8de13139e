"""Perplexity against a hand-written loop in fp64, and its independence of batching."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import tiny_models as tiny
from chulengo.errors import DataError, ModelError
from chulengo.evaluate.perplexity import perplexity, row_losses, score_batches
from fast_models import make_fast, make_reference, randomise, reference_factors


@dataclass
class Row:
    ids: list[int]
    trained: list[bool]
    source: str
    encoder_ids: list[int] | None = None


def rows(count: int = 9, *, encoder: bool = False) -> Any:
    numbers = random.Random(1)
    made = []
    for index in range(count):
        length = numbers.randrange(2, 50)
        ids = [numbers.randrange(256) for _ in range(length)]
        trained = [numbers.random() < 0.6 for _ in range(length)]
        made.append(Row(ids, trained, f"f:{index + 1}", ids[::-1] if encoder else None))
    return made


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.tiny_llama()


def by_hand(model: Any, all_rows: Any) -> tuple[float, int]:
    total, count = 0.0, 0
    for row in all_rows:
        with torch.no_grad():
            logits = model(torch.tensor([row.ids])).logits[0].double()
        for place in range(1, len(row.ids)):
            if row.trained[place]:
                chances = torch.softmax(logits[place - 1], -1)
                total -= math.log(float(chances[row.ids[place]]))
                count += 1
    return math.exp(total / count), count


def test_equals_the_sum_written_out(llama: Any) -> None:
    value, count = by_hand(llama, rows())
    score = perplexity(llama, rows(), pad_id=0)
    assert score.value == pytest.approx(value, rel=1e-5)
    assert score.details == {"loss": pytest.approx(math.log(value), rel=1e-6), "supervised_tokens": count}
    assert score.num_items == 9


def test_many_long_rows_are_not_read_at_once(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    some = rows(24)
    lengths = sorted((len(row.ids) for row in some), reverse=True)
    monkeypatch.setattr("chulengo.evaluate.perplexity.BATCH_TOKENS", 2 * lengths[0])
    done: list[int] = []
    found = row_losses(llama, some, pad_id=0, batch_size=100, on_rows=done.append)
    assert done[0] == 2
    assert done[-1] == len(some)
    sizes = [end - start for start, end in zip([0, *done], done, strict=False)]
    firsts = [0, *done[:-1]]
    assert all(size * lengths[first] <= 2 * lengths[0] for size, first in zip(sizes, firsts, strict=True))
    np.testing.assert_allclose(found.nll, row_losses(llama, some, pad_id=0, batch_size=100).nll, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 9, 100])
@pytest.mark.parametrize("pad_id", [0, 7])
def test_independent_of_batch_size_and_padding(llama: Any, batch_size: int, pad_id: int) -> None:
    one = perplexity(llama, rows(), pad_id=0, batch_size=3).details["loss"]
    assert perplexity(llama, rows(), pad_id=pad_id, batch_size=batch_size).details["loss"] == pytest.approx(
        one, rel=1e-6
    )


@pytest.mark.parametrize("max_seq_tokens", [50, 70, 128])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_packed_rows_give_what_single_rows_give(llama: Any, batch_size: int, max_seq_tokens: int) -> None:
    alone = perplexity(llama, rows(24), pad_id=0, batch_size=1, per_item=True)
    packed = perplexity(llama, rows(24), pad_id=0, batch_size=batch_size, per_item=True, packed=True,
                        max_seq_tokens=max_seq_tokens)
    assert packed.value == pytest.approx(alone.value, rel=1e-6)
    assert [item["source"] for item in packed.items] == [item["source"] for item in alone.items]
    for one, other in zip(packed.items, alone.items, strict=True):
        assert one["supervised_tokens"] == other["supervised_tokens"]
        assert one["loss"] == (other["loss"] and pytest.approx(other["loss"], rel=1e-5))


def test_single_rows_cost_no_batch_of_their_own(llama: Any) -> None:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = llama.register_forward_hook(count)
    try:
        perplexity(llama, rows(), pad_id=0, batch_size=4, per_item=True)
    finally:
        hook.remove()
    assert calls == 3


def test_hits_are_the_likeliest_tokens(llama: Any) -> None:
    some = rows(5)
    losses = row_losses(llama, some, pad_id=0, batch_size=5)
    for row, hits in zip(some, losses.hits.tolist(), strict=True):
        with torch.no_grad():
            likeliest = llama(torch.tensor([row.ids])).logits[0].argmax(-1).tolist()
        own = sum(
            row.trained[place] and likeliest[place - 1] == row.ids[place] for place in range(1, len(row.ids))
        )
        assert hits == own


def test_independent_of_the_padding_side(llama: Any) -> None:
    some = rows()
    width = max(len(row.ids) for row in some)

    def left(values: list[int], fill: int) -> list[int]:
        return [fill] * (width - len(values)) + values

    mask = torch.tensor([left([1] * len(row.ids), 0) for row in some])
    labels = [[-100, *(i if t else -100 for i, t in zip(r.ids[1:], r.trained[1:], strict=True))] for r in some]
    batch = {
        "input_ids": torch.tensor([left(row.ids, 3) for row in some]),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "labels": torch.tensor([left(row, -100) for row in labels]),
        "sources": [row.source for row in some],
    }
    padded_right = perplexity(llama, some, pad_id=0).details["loss"]
    assert score_batches(llama, [batch]).details["loss"] == pytest.approx(padded_right, rel=1e-6)


def test_items_add_up(llama: Any) -> None:
    score = perplexity(llama, rows(), pad_id=0, per_item=True)
    assert sorted(item["source"] for item in score.items) == sorted(row.source for row in rows())
    total = sum(item["loss"] * item["supervised_tokens"] for item in score.items if item["supervised_tokens"])
    assert total / score.details["supervised_tokens"] == pytest.approx(score.details["loss"], rel=1e-12)
    assert perplexity(llama, rows(), pad_id=0).items == ()


def test_encoder_decoder() -> None:
    model = tiny.tiny_t5()
    one = perplexity(model, rows(encoder=True), pad_id=0, batch_size=1)
    many = perplexity(model, rows(encoder=True), pad_id=0, batch_size=9)
    assert many.details["loss"] == pytest.approx(one.details["loss"], rel=1e-6)
    assert many.details["supervised_tokens"] == sum(sum(row.trained) for row in rows(encoder=True))


def test_nan_names_the_rows() -> None:
    model = tiny.tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[255] = float("nan")
    some = rows()
    some[4].ids[1] = 255
    some[4].trained[2:] = [True] * len(some[4].trained[2:])
    for row in some:
        row.ids = [i if i != 255 or row is some[4] else 0 for i in row.ids]
    with pytest.raises(ModelError, match=r"f:5 is nan"):
        perplexity(model, some, pad_id=0, batch_size=1)
    assert not model.training


def test_no_supervised_token(llama: Any) -> None:
    some = rows(3)
    for row in some:
        row.trained = [False] * len(row.ids)
    with pytest.raises(DataError, match="supervised"):
        perplexity(llama, some, pad_id=0)


def test_the_mode_of_the_model_is_restored(llama: Any) -> None:
    llama.train()
    try:
        perplexity(llama, rows(2), pad_id=0)
        assert llama.training
    finally:
        llama.eval()


@pytest.fixture(scope="module")
def both_engines(family_folder: Any) -> tuple[Any, Any]:
    """The fast engine's model and transformers', with the same adapter."""
    folder = family_folder("qwen 3")
    fast, reference = make_fast(folder), make_reference(folder).eval()
    randomise(fast.named_parameters(), reference_factors(reference))
    return fast, reference


@pytest.mark.parametrize("schedule", [{"batch_size": 1}, {"batch_size": 8}, {"batch_size": 2, "packed": True}])
def test_the_fast_engine_gives_every_row_what_the_reference_engine_gives(
    both_engines: tuple[Any, Any], schedule: dict[str, Any]
) -> None:
    fast, reference = both_engines
    some = rows(20)
    found = row_losses(fast, some, pad_id=0, max_seq_tokens=100, **schedule)
    usual = row_losses(reference, some, pad_id=0, batch_size=1)
    assert np.abs(found.nll - usual.nll).max() > 0  # two computations
    np.testing.assert_allclose(found.nll, usual.nll, rtol=1e-6)
    assert found.targets.tolist() == usual.targets.tolist()
    assert found.hits.tolist() == usual.hits.tolist()
    assert fast.training is False


def test_the_fast_engine_without_dropout_and_in_parts(family_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from chulengo.model import fast as module

    model = make_fast(family_folder("mistral"), lora={"dropout": 0.3})
    randomise(model.named_parameters())
    whole = row_losses(model, rows(), pad_id=0)
    monkeypatch.setattr(module, "TARGETS_AT_ONCE", 7)
    model.train()
    parts = row_losses(model, rows(), pad_id=0)
    np.testing.assert_allclose(parts.nll, whole.nll, rtol=1e-6)
    assert model.training


def test_a_nan_of_the_fast_engine_names_its_row(family_folder: Any) -> None:
    model = make_fast(family_folder("mistral"))
    some = rows(3)
    model.weights.embedding_VD[some[1].ids[0]] = torch.nan
    with pytest.raises(ModelError, match="f:2"):
        row_losses(model, some, pad_id=0)
