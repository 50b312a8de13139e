"""Weights on their way from files: the bits of bitsandbytes, ready-made checkpoints, shards, and broken folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chulengo.errors import ChulengoError, ConfigError, ModelError
from chulengo.kernels.reference import nf4
from chulengo.model import nf4_weights
from chulengo.model.adapter import attach_lora
from chulengo.model.fast import FastModel, load_fast
from chulengo.model.load import load_base
from fast_models import distance, errors, make_family, make_fast
from training_kit import make_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family("llama with shared key heads", tmp_path_factory.mktemp("llama"), num_hidden_layers=2)


def stored(model: FastModel) -> dict[str, torch.Tensor]:
    """Every tensor of the quantised maps, under the names of bitsandbytes' state dict."""
    found = {}
    for group in model.weights.groups():
        for name, weight in zip(group.names, group.weights, strict=True):
            assert isinstance(weight, nf4.NF4Weight)
            for suffix, value in nf4.to_state_dict(weight).items():
                found[f"{name}.weight" + (f".{suffix}" if suffix else "")] = value
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_bits_are_those_of_bitsandbytes(llama: Path, double_quant: bool, dtype: str) -> None:
    settings: dict[str, Any] = {"double_quant": double_quant, "compute_dtype": dtype, "device": "cpu"}
    theirs = {k: v for k, v in load_base(llama, **settings).state_dict().items() if "_proj" in k}
    ours = stored(load_fast(llama, **settings))
    assert theirs.keys() == ours.keys()
    different = [k for k, v in theirs.items() if not torch.equal(v.cpu().view(-1), ours[k].view(-1))]
    assert not different, different


def test_against_bitsandbytes_own_layers(llama: Path) -> None:
    reference = attach_lora(load_base(llama, device="cpu"), rank=4, alpha=8.0, seed=1)
    for form in ("folded", "separate"):
        found = errors(make_fast(llama, lora={"form": form}), reference)
        assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("double_quant", [True, False])
def test_ready_made_checkpoint(llama: Path, tmp_path: Path, double_quant: bool) -> None:
    load_base(llama, double_quant=double_quant, device="cpu").save_pretrained(tmp_path)
    ready, ours = load_fast(tmp_path, device="cpu"), load_fast(llama, double_quant=double_quant, device="cpu")
    assert all(torch.equal(v, stored(ready)[k]) for k, v in stored(ours).items() if not k.endswith("nf4"))
    ids = list(range(3, 30))
    assert torch.equal(ready.logits(ids), ours.logits(ids))
    with pytest.raises(ModelError, match="already quantised"):
        load_fast(tmp_path, quantization="none", device="cpu")


def test_a_map_that_a_ready_made_checkpoint_left_in_16_bits(llama: Path, tmp_path: Path) -> None:
    load_base(llama, device="cpu").save_pretrained(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if not k.startswith(name)}
    tensors[name] = load_file(llama / "model.safetensors")[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    mixed, whole = (load_fast(p, device="cpu", quantization="nf4") for p in (tmp_path, llama))
    assert torch.equal(mixed.weights.layers[1].gate_up.weights[1], tensors[name])  # type: ignore[arg-type]
    mixed.attach_lora(rank=2, alpha=4)
    assert 0 < distance(mixed.logits([1, 2, 3]), whole.logits([1, 2, 3])) < 1


def test_shards(llama: Path, tmp_path: Path) -> None:
    base = load_base(llama, quantization="none", device="cpu")
    base.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = list(range(3, 30))
    assert torch.equal(load_fast(tmp_path, device="cpu").logits(ids), load_fast(llama, device="cpu").logits(ids))


def test_one_tensor_is_held_at_a_time(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    alive: list[Any] = []
    right = nf4.quantize

    def watched(weight: torch.Tensor, **settings: Any) -> nf4.NF4Weight:
        assert all(reference() is None for reference in alive)
        alive.append(weakref.ref(weight))
        return right(weight, **settings)

    monkeypatch.setattr(nf4_weights.nf4, "quantize", watched)
    load_fast(llama, device="cpu")
    assert len(alive) == 14


def test_dequantised_weights_are_near_the_original_whatever_the_shape(tmp_path: Path) -> None:
    # rows of 96 values: blocks of 64 go over their ends
    folder = make_llama(tmp_path, intermediate_size=96)
    weight = load_fast(folder, device="cpu").weights.layers[0].down.weights[0]
    assert isinstance(weight, nf4.NF4Weight)
    original = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert distance(nf4.dequantize(weight, torch.float32), original) < 0.1


def rewritten(folder: Path, target: Path, change: Any) -> Path:
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lack model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}), "1 tensors that this arch"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32)}), r"\(32,\); the config says \(64,\)"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), "torch.int8"),
    ],
)
def test_files_that_are_not_this_model(llama: Path, tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load_fast(rewritten(llama, tmp_path / "m", change), device="cpu")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_weight_that_is_not_finite_is_named_with_its_file(
    llama: Path, tmp_path: Path, value: float, double_quant: bool
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][-1, -1] = value

    folder = rewritten(llama, tmp_path / "m", spoil)
    with pytest.raises(ModelError, match=rf"{name} in .*m/model\.safetensors has values that are NaN or infinite\."):
        load_fast(folder, device="cpu", double_quant=double_quant)


def test_a_ready_made_weight_that_is_not_finite(llama: Path, tmp_path: Path) -> None:
    load_base(llama, device="cpu").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.mlp.up_proj.weight.nested_absmax"][0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight in .*, and so do 1 more\."):
        load_fast(tmp_path, device="cpu")


def test_superfluous_frequencies_and_a_stored_tied_head(tmp_path: Path) -> None:
    folder = make_family("qwen 2", tmp_path / "a", num_hidden_layers=1)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    ids = [1, 2, 3]
    again = load_fast(rewritten(folder, tmp_path / "b", change), device="cpu")
    assert torch.equal(again.logits(ids), load_fast(folder, device="cpu").logits(ids))
    assert again.weights.head_VD is again.weights.embedding_VD


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"quantization": "int8"}, ConfigError, "engine=reference"),
        ({"weights": "resident-fp4"}, ConfigError, "resident-fp8"),
        ({"activations": "some"}, ConfigError, "selective"), ({"activations": ["keep"]}, ConfigError, "1 for 2 layers"),
        ({"vocab_size": 600}, ModelError, "600 ids"), ({"backend": "quick"}, ChulengoError, "auto, fused, reference"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(llama: Path, settings: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        load_fast(llama, device="cpu", **settings).logits([1, 2])


def test_another_quantisation_in_the_files(llama: Path, tmp_path: Path) -> None:
    folder = rewritten(llama, tmp_path / "m", lambda t: None)
    config = json.loads((folder / "config.json").read_text())
    for stored_as in ({"quant_method": "gptq"}, {"quant_method": "bitsandbytes", "load_in_8bit": True},
                      {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}):
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored_as}))
        with pytest.raises(ModelError, match="already quantised") as caught:
            load_fast(folder, device="cpu")
        assert "engine=reference" in str(caught.value)
