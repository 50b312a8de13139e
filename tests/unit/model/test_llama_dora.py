"""DoRA in the fast engine against PEFT's on the same weights, and wrong ones that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from chulengo.data.batches import collate_padded
from chulengo.errors import ConfigError, ModelError
from chulengo.kernels import ops
from chulengo.model import linear_group
from chulengo.model.adapter import attach_lora, save_adapter
from chulengo.model.fast import load_fast
from chulengo.model.load import load_base
from fast_models import FAMILIES, distance, errors, gradients, make_fast, make_reference, randomise, reference_factors
from training_kit import make_rows

CEILING = 1e-5
DORA = {"dora": True}
IDS = list(range(3, 40))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_every_gradient(family_folder: Any, family: str) -> None:
    folder = family_folder(family)
    found = errors(make_fast(folder, lora=DORA), make_reference(folder, **DORA))
    assert len(found) == 2 + 4 * 7 * 3
    assert max(found.values()) <= CEILING, found


@pytest.mark.parametrize(
    ("lora", "settings"),
    [
        ({"targets": ("q_proj", "v_proj"), "rslora": True}, {}), ({"targets": ("down_proj",)}, {}),
        ({"targets": ("k_proj", "up_proj"), "rank": 1}, {"weights": "resident"}),
        ({"targets": ("o_proj", "gate_proj")}, {"quantization": "none"}), ({"alpha": 3.0}, {"activations": "full"}),
        ({"targets": ("gate_proj",)}, {"activations": "full"}),  # gate's output is needed beside its gradient
        ({}, {"quantization": "none", "weights": "resident", "activations": "selective"}),
    ],
)  # fmt: skip
def test_other_adapters_and_policies(family_folder: Any, lora: dict[str, Any], settings: dict[str, Any]) -> None:
    folder = family_folder("qwen 2")
    nf4_weights = settings.get("quantization") != "none"
    reference = make_reference(folder, nf4_weights=nf4_weights, **DORA, **lora)
    found = errors(make_fast(folder, lora=DORA | lora, **settings), reference)
    assert max(found.values()) <= CEILING, found


def test_a_fresh_adapter_changes_nothing(family_folder: Any) -> None:
    folder = family_folder("qwen 3")
    for settings in ({}, {"compute_dtype": "bfloat16", "weights": "resident"}):
        fresh = make_fast(folder, lora=DORA, **settings)
        base = load_fast(folder, **{"device": "cpu", "compute_dtype": "float32", **settings})
        assert torch.equal(fresh.logits(IDS), base.logits(IDS))
        # and again after an adapter that did: the norms are those of W alone
        randomise(fresh.named_parameters(), size=0.3)
        assert not torch.equal(fresh.logits(IDS), base.logits(IDS))
        fresh.attach_lora(rank=2, alpha=4.0, **DORA)
        assert torch.equal(fresh.logits(IDS), base.logits(IDS))


def test_norms_follow_the_adapter_at_the_next_step(family_folder: Any) -> None:
    folder = family_folder("qwen 2")
    batch = collate_padded(make_rows(4), pad_id=0)
    model, again = (make_fast(folder, lora=DORA) for _ in range(2))
    gradients(model, batch)
    randomise(model.named_parameters(), again.named_parameters(), size=0.2)
    changed, fresh = gradients(model, batch), gradients(again, batch)
    assert torch.equal(changed[0], fresh[0])
    assert all(torch.equal(value, fresh[1][name]) for name, value in changed[1].items())


def test_an_adapter_of_peft_is_trained_further(family_folder: Any, tmp_path: Path) -> None:
    folder = family_folder("mistral")
    reference = attach_lora(load_base(folder, device="cpu"), rank=4, alpha=8.0, **DORA)
    randomise(reference_factors(reference))
    save_adapter(reference, tmp_path)
    model = load_fast(folder, device="cpu")
    model.load_adapter(tmp_path, trainable=True)
    assert distance(model.logits(IDS), reference(torch.tensor([IDS])).logits[0]) <= CEILING
    _, found = gradients(model, collate_padded(make_rows(4), pad_id=0))
    assert sum(name.endswith("lora_magnitude_vector") and bool(value.any()) for name, value in found.items()) == 28
    model.save_adapter(tmp_path / "again")
    for name, value in load_file(tmp_path / "adapter_model.safetensors").items():
        assert torch.equal(value, load_file(tmp_path / "again" / "adapter_model.safetensors")[name])


def test_not_with_dropout_and_not_in_fp8(family_folder: Any, tmp_path: Path) -> None:
    folder = family_folder("qwen 2")
    with pytest.raises(ConfigError, match="together") as caught:
        make_fast(folder, lora=DORA | {"dropout": 0.1})
    assert caught.value.next_step == "--set model.engine=reference"
    with pytest.raises(ConfigError, match="FP8 take no adapter with"):
        make_fast(folder, weights="stream-fp8", compute_dtype="bfloat16", lora=DORA)
    reference = attach_lora(load_base(folder, device="cpu"), rank=4, alpha=8.0, dropout=0.1, **DORA)
    randomise(reference_factors(reference))
    save_adapter(reference, tmp_path)
    model = load_fast(folder, device="cpu")
    with pytest.raises(ModelError, match="dropout"):
        model.load_adapter(tmp_path, trainable=True)
    model.load_adapter(tmp_path)  # to answer with, it has none
    assert distance(model.logits(IDS), reference.eval()(torch.tensor([IDS])).logits[0]) <= CEILING


def test_a_row_of_zeros_is_named(family_folder: Any) -> None:
    model = load_fast(family_folder("llama 3 rope"), device="cpu", quantization="none")
    weight = model.weights.layers[1].down.weights[0]
    assert isinstance(weight, Tensor)
    weight[5] = 0
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj has a row of zeros"):
        model.attach_lora(rank=2, alpha=4.0, **DORA)
    model.attach_lora(rank=2, alpha=4.0, targets=("gate_proj",), **DORA)


class TestWrongModels:
    """Each is one slip away from the right one; the check above must see it by a wide margin."""

    def found(self, folder: Path) -> dict[str, float]:
        return errors(make_fast(folder, lora=DORA), make_reference(folder, **DORA))

    def test_rows_not_divided_by_their_norm_again(self, family_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        right = linear_group.Matrices.row_norms

        def stale(self: Any, group: Any) -> Any:  # of W, as if B were still 0
            form, self.form = self.form, None
            norms = right(self, group)
            self.form = form
            return norms

        monkeypatch.setattr(linear_group.Matrices, "row_norms", stale)
        assert self.found(family_folder("qwen 2"))["logits"] > 100 * CEILING

    def test_bias_taken_for_part_of_the_product(self, family_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        right = ops.column_dot
        monkeypatch.setattr(ops, "column_dot", lambda dy, y, bias, **more: right(dy, y, None, **more))
        found = self.found(family_folder("llama with every bias"))
        assert found["logits"] <= CEILING
        assert min(v for k, v in found.items() if k.endswith("magnitude_vector")) > 100 * CEILING

    def test_gradients_of_a_and_b_of_rows_that_are_not_scaled(
        self, family_folder: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = family_folder("mistral")
        model, reference = make_fast(folder, lora=DORA), make_reference(folder, **DORA)
        right = linear_group.Rescaling.refresh

        def unscaled(self: Any, magnitude_O: Tensor, norm_O: Tensor, b_OR: Tensor) -> None:
            right(self, magnitude_O, norm_O, b_OR)
            self.b_OR.copy_(b_OR)

        monkeypatch.setattr(linear_group.Rescaling, "refresh", unscaled)
        found = errors(model, reference)
        assert found["logits"] <= CEILING
        assert min(v for k, v in found.items() if k.endswith("lora_A.weight")) > 100 * CEILING
