"""The fast engine's model against transformers and peft on the same weights, and wrong models that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chulengo.data.batches import collate_packed, collate_padded
from chulengo.kernels.reference import attention, rope
from chulengo.model import llama_shape
from chulengo.model.fast import FastModel, load_fast
from fast_models import FAMILIES, distance, errors, make_family, make_fast, make_reference, randomise, reference_factors
from training_kit import make_rows

CEILING = 1e-5


@pytest.mark.parametrize("form", ["folded", "separate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_every_gradient(family_folder: Any, family: str, form: str) -> None:
    folder = family_folder(family)
    found = errors(make_fast(folder, lora={"form": form}), make_reference(folder))
    assert len(found) == 2 + 4 * 7 * 2
    assert max(found.values()) <= CEILING, found


@pytest.mark.parametrize(
    "lora",
    [
        {"targets": ("q_proj", "v_proj"), "rslora": True}, {"targets": ("down_proj",)},
        {"targets": ("k_proj", "up_proj")}, {"rank": 1, "alpha": 3.0},
    ],
)  # fmt: skip
@pytest.mark.parametrize("activations", ["keep", "full"])
def test_other_adapters(family_folder: Any, lora: dict[str, Any], activations: str) -> None:
    folder = family_folder("qwen 2")
    found = errors(make_fast(folder, lora=lora, activations=activations), make_reference(folder, **lora))
    assert max(found.values()) <= CEILING, found


def test_weights_that_are_not_quantised(family_folder: Any) -> None:
    folder = family_folder("qwen 3")
    for form in ("folded", "separate"):
        model = make_fast(folder, quantization="none", lora={"form": form})
        found = errors(model, make_reference(folder, nf4_weights=False))
        assert max(found.values()) <= CEILING, found


def test_really_trained_weights(shared_data: Path) -> None:
    folder = shared_data / "stories260K"
    if not folder.is_dir():
        pytest.skip("no stories260K among the shared data")
    for form in ("folded", "separate"):
        found = errors(make_fast(folder, lora={"form": form}), make_reference(folder))
        assert max(found.values()) <= 2 * CEILING, found


def test_stories_are_told_as_published(shared_data: Path) -> None:
    folder = shared_data / "stories260K"
    if not folder.is_dir():
        pytest.skip("no stories260K among the shared data")
    reference = make_reference(folder, nf4_weights=False)
    model = load_fast(folder, quantization="none", device="cpu")
    ids = [1]
    for _ in range(20):
        ids.append(int(model.logits(ids)[-1].argmax()))
    told = reference.generate(torch.tensor([[1]]), max_new_tokens=20, do_sample=False)[0].tolist()
    assert ids == told


def test_bfloat16_is_no_farther_from_float32_than_the_reference_is(tmp_path: Path) -> None:
    # both forms round differently, neither may be worse than transformers in bfloat16 by more than a third
    folder = make_family("llama with shared key heads", tmp_path, dtype=torch.bfloat16)
    exact, plain = make_reference(folder), make_reference(folder)
    plain.to(torch.bfloat16)
    rows = make_rows(6, seed=9)
    for form in ("folded", "separate"):
        model = make_fast(folder, compute_dtype="bfloat16", lora={"form": form})
        randomise(*(reference_factors(m) for m in (exact, plain)), model.named_parameters())
        with torch.no_grad():
            truth, usual = (torch.cat([m(torch.tensor([r.ids])).logits[0] for r in rows]) for m in (exact, plain))
        assert distance(model.logits([r.ids for r in rows]), truth) <= 1.33 * distance(usual, truth)


def test_a_batch_without_targets(family_folder: Any) -> None:
    model = make_fast(family_folder("qwen 3"))
    batch = collate_padded(make_rows(2), pad_id=0)
    batch["labels"][:] = -100
    nll, count = model.nll(batch)
    nll.backward()
    assert (float(nll.detach()), count) == (0.0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in model.named_parameters().values())


class TestWrongModels:
    """Each is one slip away from the right one; the check above must see it by a wide margin."""

    def refused(self, folder: Path, model: FastModel | None = None) -> None:
        found = errors(model or make_fast(folder), make_reference(folder))
        assert found["logits"] > 100 * CEILING, found["logits"]
        assert max(v for k, v in found.items() if "lora" in k) > 100 * CEILING

    def test_rope_turns_the_other_way_for_keys(self, family_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        right = rope.forward

        def wrong(q: Any, k: Any, cos: Any, sin: Any, position: Any, out: Any = None) -> Any:
            return right(q, k, cos, sin, position)[0], right(q, k, cos, -sin, position)[1]

        monkeypatch.setattr(rope, "forward", wrong)
        self.refused(family_folder("llama with shared key heads"))

    def test_gradient_of_rope_turns_the_wrong_way(self, family_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        right = rope.backward

        def wrong(dq: Any, dk: Any, cos: Any, sin: Any, position: Any, **more: Any) -> Any:
            return right(dq, dk, cos, -sin, position, **more)

        monkeypatch.setattr(rope, "backward", wrong)
        folder = family_folder("llama with shared key heads")
        found = errors(make_fast(folder), make_reference(folder))
        assert found["logits"] <= CEILING
        assert found["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] > 100 * CEILING

    @pytest.mark.parametrize("missing", ["q_norm_H", "both"])
    def test_norm_of_heads_missing(self, family_folder: Any, missing: str) -> None:
        folder = family_folder("qwen 3")
        model = make_fast(folder)
        for layer in model.weights.layers:
            if missing == "both":
                layer.q_norm_H = layer.k_norm_H = None
            else:
                layer.q_norm_H = torch.ones_like(layer.q_norm_H)  # type: ignore[arg-type]
        self.refused(folder, model)

    def test_query_heads_read_the_wrong_key_head(self, family_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        right = attention.packed_attention

        def wrong(q: Any, k: Any, v: Any, ends: Any, longest: int) -> Any:
            # head n reads n % K instead of n // (N / K)
            order = torch.arange(q.shape[1]).view(-1, k.shape[1]).t().flatten()
            return right(q[:, order], k, v, ends, longest)[:, order.argsort()]

        monkeypatch.setattr(attention, "packed_attention", wrong)
        self.refused(family_folder("llama with shared key heads"))

    @pytest.mark.parametrize("kind", ["default", "linear"])
    def test_llama_3_scaling_left_out_or_taken_for_linear(
        self, family_folder: Any, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        right = llama_shape.rope_frequencies
        monkeypatch.setattr(llama_shape, "rope_frequencies", lambda r, size: right(replace(r, kind=kind), size))
        self.refused(family_folder("llama 3 rope"))

    def test_bias_left_out(self, family_folder: Any) -> None:
        folder = family_folder("qwen 2")
        model = make_fast(folder)
        for layer in model.weights.layers:
            layer.qkv.bias_O = None
        self.refused(folder, model)

    def test_another_epsilon(self, family_folder: Any) -> None:
        folder = family_folder("llama with every bias")
        model = make_fast(folder)
        model.shape = replace(model.shape, norm_eps=1e-2)
        self.refused(folder, model)

    def test_scale_of_the_adapter(self, family_folder: Any) -> None:
        folder = family_folder("llama with shared key heads")
        self.refused(folder, make_fast(folder, lora={"alpha": 8.2}))


def test_longer_than_the_tables(family_folder: Any) -> None:
    model = load_fast(family_folder("qwen 2"), device="cpu", max_seq_tokens=16)
    model.logits(list(range(16)))
    with pytest.raises(Exception, match="up to 16"):
        model.logits(list(range(17)))


def test_packed_batches_are_read_like_padded_ones(family_folder: Any) -> None:
    model = make_fast(family_folder("mistral"))
    randomise(model.named_parameters())
    rows = make_rows(6)
    alone = sum(float(model.nll(collate_padded([row], pad_id=0))[0].detach()) for row in rows)
    for batch in (collate_packed([rows[:2], rows[2:]], pad_id=0), collate_packed([rows], pad_id=0, flatten=True)):
        assert float(model.nll(batch)[0].detach()) == pytest.approx(alone, rel=1e-6)
