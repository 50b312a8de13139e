"""Decoding with a cache against a full forward and against transformers' generate, and wrong ones that are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import tiny_models as tiny
from chulengo.errors import ModelError
from chulengo.generate.engine import Prompt, complete_all
from chulengo.generate.settings import GenerationSettings
from chulengo.model import decode
from chulengo.model.fast import FastModel, load_fast
from fast_models import FAMILIES, distance, make_fast, make_reference, randomise, reference_factors
from training_kit import VOCAB

CEILING = 1e-5
GREEDY = GenerationSettings(max_new_tokens=16)
SHARED = "llama with shared key heads"


def prompts(*lengths: int) -> list[list[int]]:
    numbers = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB, (length,), generator=numbers).tolist() for length in lengths]


def adapted(folder: Path, **settings: Any) -> FastModel:
    model = make_fast(folder, **settings)
    randomise(model.named_parameters())
    return model


def worst_step(model: FastModel, decoding: decode.FastDecoding, *, steps: int = 14) -> float:
    """Returns the largest error of a step's logits; on the way the cache grows, and rows leave and change places."""
    rows = prompts(1, 5, 30, 17)
    worst = 0.0
    logits = decoding.start(rows)
    for number in range(steps):
        ends = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
        worst = max(worst, distance(logits, model.logits(rows)[ends.to(model.device)]))
        if number == steps // 2:
            decoding.keep([2, 0])
            rows, logits = [rows[2], rows[0]], logits[[2, 0]]
        tokens = logits.argmax(-1).tolist()
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        logits = decoding.step(tokens)
    return worst


@pytest.mark.parametrize("form", ["folded", "separate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_is_the_full_forward(
    family_folder: Any, family: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "PLACE_STEP", 8)
    monkeypatch.setattr(decode, "PROMPT_TOKENS", 33)  # three parts: 1 + 5, 30, 17
    model = adapted(family_folder(family), lora={"form": form}, weights="resident")
    assert worst_step(model, model.decoding()) <= CEILING


@pytest.mark.parametrize("weights", ["stream", "resident"])
def test_bfloat16(family_folder: Any, weights: str) -> None:
    model = adapted(family_folder("qwen 3"), compute_dtype="bfloat16", weights=weights)
    assert worst_step(model, model.decoding()) <= 2e-2


def as_prompts(rows: list[list[int]], stop: frozenset[int]) -> list[Prompt]:
    return [Prompt(tuple(row), stop, tiny.ByteRenderer().decode) for row in rows]


def generated(reference: Any, row: list[int], stop: frozenset[int]) -> tuple[int, ...]:
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=16, do_sample=False, eos_token_id=sorted(stop) or None, pad_token_id=0)
    ids = torch.tensor([row])
    out = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)[0].tolist()
    new = out[len(row):]
    return tuple(new[:-1]) if new[-1] in stop else tuple(new)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_generate_and_of_the_reference_engine(family_folder: Any, family: str) -> None:
    folder = family_folder(family)
    model, reference = make_fast(folder, lora={"form": "separate"}), make_reference(folder).eval()
    randomise(model.named_parameters(), reference_factors(reference))
    rows = prompts(3, 40, 1, 22, 9)
    free = complete_all(model, as_prompts(rows, frozenset()), GREEDY, 5)
    stop = frozenset(answer.ids[3 + 2 * number] for number, answer in enumerate(free[::2]))
    asked = as_prompts(rows, stop)
    expected = [generated(reference, row, stop) for row in rows]
    assert len({len(ids) for ids in expected}) > 1  # rows leave the batch at different steps
    for batch_size in (1, 2, 5):
        answers = complete_all(model, asked, GREEDY, batch_size)
        assert [answer.ids for answer in answers] == expected
        usual = complete_all(reference, asked, GREEDY, batch_size)
        assert [(a.ids, a.finish_reason, a.seed) for a in answers] == [(a.ids, a.finish_reason, a.seed) for a in usual]


def test_sampled_answers_are_the_reference_engines_and_do_not_know_their_batch(family_folder: Any) -> None:
    folder = family_folder("qwen 2")
    model, reference = make_fast(folder), make_reference(folder).eval()
    randomise(model.named_parameters(), reference_factors(reference))
    warm = GenerationSettings(max_new_tokens=12, temperature=1.0, top_p=0.9, repetition_penalty=1.3, seed=4)
    asked = as_prompts(prompts(8, 2, 33, 15), frozenset())
    found = [[a.ids for a in complete_all(model, asked, warm, batch_size)] for batch_size in (1, 3, 4)]
    assert found[0] == found[1] == found[2] == [a.ids for a in complete_all(reference, asked, warm, 4)]
    assert found[0] != [a.ids for a in complete_all(model, asked, replace(warm, seed=5), 4)]


def test_rows_at_the_end_of_the_context(family_folder: Any) -> None:
    # rows that have ended there stay in the batch for a while, at a place that no other row reads
    folder = family_folder(SHARED)
    model, reference = make_fast(folder), make_reference(folder).eval()
    asked = as_prompts(prompts(100, 126, 127, 128, 120, 129), frozenset())
    answers, usual = (complete_all(m, asked, GREEDY, 6) for m in (model, reference))
    assert [a.finish_reason for a in answers] == ["length", *["context"] * 5]
    assert [len(a.ids) for a in answers] == [16, 2, 1, 0, 8, 0]
    assert [a.ids for a in answers] == [a.ids for a in usual]
    with pytest.raises(ModelError, match="up to 128"):
        model.decoding().start(prompts(129))


def test_the_model_is_left_as_it_came(family_folder: Any) -> None:
    model = make_fast(family_folder("mistral"))
    for training in (True, False):
        model.train(training)
        complete_all(model, as_prompts(prompts(3), frozenset()), GREEDY)
        assert model.training is training


def test_an_adapter_that_is_trained_on_answers_as_it_is_now(family_folder: Any) -> None:
    model = adapted(family_folder("qwen 2"), weights="resident")
    before = model.decoding().start(prompts(9))
    (flat,) = model.trainable_parameters()
    with torch.no_grad():
        flat.mul_(1.5)
    after = model.decoding().start(prompts(9))
    assert distance(after, before) > 1e-3
    assert distance(after, model.logits(prompts(9))[-1:]) <= CEILING


def test_the_size_of_the_cache(family_folder: Any) -> None:
    model = make_fast(family_folder("qwen 3"))
    decoding = model.decoding()
    decoding.start(prompts(3, 7, 5))
    held = sum(cache.nbytes for cache in decoding._memory._caches)
    assert held == decode.cache_bytes(model.shape.sizes, torch.float32, 3 * decode.PLACE_STEP)


class TestLimitedCache:
    def batches(self, model: FastModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
        """Returns what will be noted of each batch: its rows, and the rows of each part that is read together."""
        noted: list[tuple[int, list[int]]] = []
        parts = decode.FastDecoding._parts

        def looking(decoding: decode.FastDecoding) -> list[range]:
            found = parts(decoding)
            noted.append((len(decoding._lengths), [len(rows) for rows in found]))
            return found

        monkeypatch.setattr(decode.FastDecoding, "_parts", looking)
        return noted

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_answers_are_those_without_a_limit(
        self, family_folder: Any, monkeypatch: pytest.MonkeyPatch, temperature: float
    ) -> None:
        monkeypatch.setattr(decode, "PLACE_STEP", 8)
        model = adapted(family_folder(SHARED))
        asked = as_prompts(prompts(30, 3, 20, 9, 1, 12, 2), frozenset())
        settings = GenerationSettings(max_new_tokens=10, temperature=temperature, seed=3)
        noted = self.batches(model, monkeypatch)
        expected = complete_all(model, asked, settings, 4)
        assert [rows for rows, _ in noted] == [4, 3]
        model._step_memory = None
        model.cache_tokens = 50
        noted.clear()
        found = complete_all(model, asked, settings, 4)
        # longest first, with 10 new tokens: 40 places; 30, of which 32 are taken; 22 and 19 (24); 13, 12 and 11 (16)
        assert noted == [(1, [1]), (1, [1]), (2, [2]), (3, [3])]
        assert [(a.ids, a.seed) for a in found] == [(a.ids, a.seed) for a in expected]
        memory: Any = model._step_memory
        assert sum(cache.nbytes for cache in memory._caches) <= decode.cache_bytes(
            model.shape.sizes, torch.float32, model.cache_tokens
        )

    def test_a_row_that_needs_more_is_tried(self, family_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        model = adapted(family_folder(SHARED))
        asked = as_prompts(prompts(30, 12), frozenset())
        expected = complete_all(model, asked, GREEDY)
        noted = self.batches(model, monkeypatch)
        for model.cache_tokens in (0, 255):
            assert [a.ids for a in complete_all(model, asked, GREEDY)] == [a.ids for a in expected]
        assert [rows for rows, _ in noted] == [1] * 4

    def test_no_more_tokens_are_read_at_once(self, family_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        model = adapted(family_folder(SHARED))
        rows = prompts(5, 9, 20, 3)
        expected = model.decoding().start(rows)
        noted = self.batches(model, monkeypatch)
        model.cache_tokens = 16
        assert distance(model.decoding().start(rows), expected) <= CEILING
        assert noted == [(4, [2, 1, 1])]

    def test_nothing_of_it_stays_beside_matrices_that_are_written_again(
        self, family_folder: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = adapted(family_folder(SHARED), weights="resident")
        model.decoding().start(prompts(3))
        there = []
        forget = model._forget_matrices
        monkeypatch.setattr(model, "_forget_matrices", lambda: (there.append(model._step_memory), forget())[1])
        with model.disable_adapter():
            model.decoding().start(prompts(3))
        assert there == [None, None]


def test_batches_after_and_within_each_other(family_folder: Any) -> None:
    # the memory of a batch that is done with is taken again, that of one that is not is left alone
    model = adapted(family_folder(SHARED))
    first = model.decoding()
    expected = [first.start(prompts(30, 7)), first.step([4, 5]), first.step([6, 7])]
    memory = first._memory
    del first
    outer = model.decoding()
    assert outer._memory is memory
    found = [outer.start(prompts(30, 7)), outer.step([4, 5])]
    inner = model.decoding()
    assert inner._memory is not memory
    inner.start(prompts(40, 12, 9))
    inner.step([1, 2, 3])
    found.append(outer.step([6, 7]))
    assert [torch.equal(mine, before) for mine, before in zip(found, expected, strict=True)] == [True] * 3


def test_what_is_not_a_number_does_not_stay(family_folder: Any) -> None:
    model = adapted(family_folder(SHARED))
    expected = model.decoding().start(prompts(3, 9))
    broken = model.decoding()
    broken.start(prompts(30, 30))
    broken._memory._caches[0].fill_(torch.nan)
    del broken
    decoding = model.decoding()
    assert torch.equal(decoding.start(prompts(3, 9)), expected)
    assert decoding.step([1, 2]).isfinite().all()


class TestSwitchedOff:
    @pytest.mark.parametrize(
        ("form", "weights"), [("folded", "resident"), ("folded", "stream"), ("separate", "resident")]
    )
    def test_the_base_alone_and_back(self, family_folder: Any, form: str, weights: str) -> None:
        folder = family_folder("qwen 3")
        model = adapted(folder, lora={"form": form}, weights=weights)
        bare = load_fast(folder, device="cpu", weights=weights)
        rows = prompts(4, 12)
        tuned = model.logits(rows)
        for _ in range(2):
            with model.disable_adapter():
                assert torch.equal(model.logits(rows), bare.logits(rows))
                assert torch.equal(model.decoding().start(rows), bare.decoding().start(rows))
            assert torch.equal(model.logits(rows), tuned)
        assert distance(tuned, bare.logits(rows)) > 1e-2

    def test_not_in_fp8(self, family_folder: Any) -> None:
        model = adapted(family_folder("qwen 3"), weights="stream-fp8")
        with pytest.raises(ModelError, match="FP8"), model.disable_adapter():
            raise AssertionError("inside the block")

    def test_after_an_error_in_the_block(self, family_folder: Any) -> None:
        model = adapted(family_folder("qwen 3"), weights="resident")
        tuned = model.logits([1, 2, 3])
        with pytest.raises(ZeroDivisionError), model.disable_adapter():
            raise ZeroDivisionError
        assert torch.equal(model.logits([1, 2, 3]), tuned)


class TestWrongDecoders:
    """Each is one slip away from the right one; the comparison with a full forward must see it by a wide margin."""

    def refused(self, folder: Path, change: Callable[[decode.FastDecoding], None] = lambda decoding: None) -> None:
        model = adapted(folder)
        decoding = model.decoding()
        change(decoding)
        assert worst_step(model, decoding) > 100 * CEILING

    def attends(self, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Tensor]) -> None:
        monkeypatch.setattr(decode, "scaled_dot_product_attention", wrong)

    def test_query_heads_read_the_wrong_key_head(self, family_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(q_BKGH: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
            # head n reads n % K instead of n // G
            B, K, G, H = q_BKGH.shape
            q = q_BKGH.reshape(B, G, K, H).transpose(1, 2)
            return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2).reshape(B, K, G, H)

        self.attends(monkeypatch, wrong)
        self.refused(family_folder(SHARED))

    def test_a_token_does_not_see_itself(self, family_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
            later = torch.cat((attn_mask[..., 1:], torch.zeros_like(attn_mask[..., :1])), dim=-1)
            return scaled_dot_product_attention(q, k, v, attn_mask=later)

        self.attends(monkeypatch, wrong)
        self.refused(family_folder(SHARED))

    def test_empty_places_are_seen(self, family_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.attends(monkeypatch, lambda q, k, v, attn_mask: scaled_dot_product_attention(q, k, v))
        self.refused(family_folder("qwen 2"))

    def test_a_position_too_early(self, family_folder: Any) -> None:
        def change(decoding: decode.FastDecoding) -> None:
            right = decoding._forward
            decoding._forward = lambda inputs, attention, places: right(
                inputs if places is not None else replace(inputs, position_T=inputs.position_T - 1), attention, places
            )

        self.refused(family_folder("mistral"), change)

    def test_rows_that_stay_in_another_order(self, family_folder: Any) -> None:
        def change(decoding: decode.FastDecoding) -> None:
            right = decoding.keep
            decoding.keep = lambda rows: right(rows[::-1])  # type: ignore[method-assign]

        self.refused(family_folder("qwen 3"), change)
