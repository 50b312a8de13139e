from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chulengo.data.batches import collate_packed, collate_padded
from chulengo.model.load import load_base
from chulengo.model.loss import supervised_nll, target_nll
from training_kit import make_llama, make_rows, make_t5


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> object:
    return load_base(make_llama(tmp_path_factory.mktemp("llama")), quantization="none", device="cpu")


def by_hand(model: object, rows: list) -> float:
    """Each row alone, in fp64 log-softmax, token by token."""
    total = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].double()
        logp = logits.log_softmax(-1)
        total -= sum(float(logp[i - 1, row.ids[i]]) for i in range(1, len(row.ids)) if row.trained[i])
    return total


def test_padded_and_packed_equal_each_row_alone(llama: object) -> None:
    rows = make_rows(5)
    with torch.no_grad():
        expected = by_hand(llama, rows)
        padded, count = supervised_nll(llama, collate_padded(rows, pad_id=0))
        packed, packed_count = supervised_nll(llama, collate_packed([rows[:3], rows[3:]], pad_id=0))
    assert padded.dtype == torch.float32
    assert count == packed_count == sum(sum(row.trained[1:]) for row in rows)
    assert float(padded) == pytest.approx(expected, rel=1e-6)
    assert float(packed) == pytest.approx(expected, rel=1e-6)


def test_equals_transformers_own_loss(llama: object) -> None:
    batch = collate_padded(make_rows(4), pad_id=0)
    own = llama(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss
    nll, count = supervised_nll(llama, batch)
    assert float(nll) / count == pytest.approx(float(own), rel=1e-6)


def test_head_runs_only_where_there_is_a_target(llama: object) -> None:
    rows = make_rows(2)
    for row in rows:
        row.trained[:] = [i == 3 for i in range(len(row.ids))]
    seen = []
    hook = llama.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    supervised_nll(llama, collate_padded(rows, pad_id=0))
    hook.remove()
    assert seen == [1]


def test_without_targets_it_is_zero_and_keeps_gradients_zero(llama: object) -> None:
    batch = collate_padded(make_rows(2), pad_id=0)
    batch["labels"].fill_(-100)
    weight = llama.lm_head.weight.requires_grad_(True)
    nll, count = supervised_nll(llama, batch)
    nll.backward()
    assert (float(nll.detach()), count) == (0.0, 0)
    assert weight.grad is not None
    assert not weight.grad.any()
    weight.requires_grad_(False).grad = None


def test_encoder_decoder_equals_transformers_own_loss(tmp_path: Path) -> None:
    model = load_base(make_t5(tmp_path), quantization="none", device="cpu")
    batch = collate_padded(make_rows(3, encoder=True), pad_id=0)
    own = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss
    nll, count = supervised_nll(model, batch)
    assert float(nll) / count == pytest.approx(float(own), rel=1e-6)


def test_decoder_tokens_without_loss_are_still_seen_by_the_decoder(tmp_path: Path) -> None:
    # the model's own label shift would hand the decoder padding in their place
    model = load_base(make_t5(tmp_path), quantization="none", device="cpu")
    rows = make_rows(1, encoder=True)
    rows[0].trained[:] = [False] * (len(rows[0].ids) - 1) + [True]
    first, _ = supervised_nll(model, collate_padded(rows, pad_id=0))
    rows[0].ids[0] += 1
    second, _ = supervised_nll(model, collate_padded(rows, pad_id=0))
    assert float(first) != float(second)


@pytest.mark.parametrize("at_once", [1, 7, 2048])
def test_target_nll_takes_the_sum_apart(llama: object, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("chulengo.model.loss.TARGETS_AT_ONCE", at_once)
    batch = collate_padded(make_rows(5), pad_id=0)
    total, count = supervised_nll(llama, batch)
    nll, hit, places = target_nll(llama, batch)
    assert (nll.dtype, len(nll), len(hit)) == (torch.float32, count, count)
    assert float(nll.double().sum()) == pytest.approx(float(total.detach()), rel=1e-6)
    assert not nll.requires_grad
    expected = (batch["labels"] != -100).nonzero()
    assert torch.equal(places, expected[expected[:, 1] > 0])


def test_target_nll_without_targets(llama: object) -> None:
    batch = collate_padded(make_rows(2), pad_id=0)
    batch["labels"].fill_(-100)
    nll, hit, places = target_nll(llama, batch)
    assert (len(nll), len(hit), tuple(places.shape)) == (0, 0, (0, 2))
