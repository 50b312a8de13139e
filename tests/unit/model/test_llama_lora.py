"""Adapters of the fast engine in PEFT's files, both ways, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from chulengo.errors import ConfigError, ModelError
from chulengo.model.adapter import attach_lora, save_adapter
from chulengo.model.fast import load_fast
from chulengo.model.load import load_base
from fast_models import LORA, distance, make_family, make_fast, make_reference, randomise, reference_factors

IDS = list(range(3, 40))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family("llama with every bias", tmp_path_factory.mktemp("llama"), num_hidden_layers=2)


@pytest.mark.parametrize(
    "lora", [{}, {"targets": ("down_proj", "q_proj"), "rank": 3}, {"dora": True, "targets": ("v_proj", "up_proj")}]
)
def test_a_seed_begins_where_peft_begins(llama: Path, lora: dict[str, Any]) -> None:
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    ours = make_fast(llama, lora=lora).named_parameters()
    assert torch.equal(torch.rand(1), expected)
    theirs = reference_factors(make_reference(llama, **lora))
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    other = make_fast(llama, lora={"seed": 2}).named_parameters()
    assert not torch.equal(next(iter(ours.values())), next(iter(other.values())))


@pytest.mark.parametrize(
    "lora",
    [
        {}, {"targets": ("q_proj", "up_proj"), "rslora": True}, {"dropout": 0.1, "rank": 2, "alpha": 16.0},
        {"dora": True, "targets": ("k_proj", "down_proj")},
    ],
)  # fmt: skip
def test_files_are_those_of_peft(llama: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    reference = attach_lora(load_base(llama, device="cpu", name="org/base"), **{**LORA, **lora})
    model = make_fast(llama, name="org/base", lora=lora)
    randomise(model.named_parameters(), reference_factors(reference))
    save_adapter(reference, tmp_path / "theirs")
    model.save_adapter(tmp_path / "ours")
    ours, theirs = (json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in ("ours", "theirs"))
    # PEFT 0.21.2 writes the path of every module for all-linear; the names mean the same on this model
    theirs["target_modules"] = sorted({path.rsplit(".", 1)[-1] for path in theirs["target_modules"]})
    assert ours == theirs
    ours, theirs = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, ours[name]) and value.dtype == ours[name].dtype for name, value in theirs.items())


@pytest.mark.parametrize("lora", [{}, {"targets": ("o_proj",), "rslora": True}, {"dora": True}])
def test_plain_peft_loads_ours_and_we_load_peft(llama: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    model = make_fast(llama, lora=lora)
    randomise(model.named_parameters(), size=0.2)
    model.save_adapter(tmp_path / "ours")
    base = load_base(llama, device="cpu")
    before = base(torch.tensor([IDS])).logits[0]
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    expected = theirs(torch.tensor([IDS])).logits[0]
    assert distance(model.logits(IDS), expected) <= 1e-5
    assert distance(before, expected) > 0.01
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = load_fast(llama, device="cpu")
    again.load_adapter(tmp_path / "theirs")
    assert torch.equal(again.logits(IDS), model.logits(IDS))
    assert again.trainable_parameters() == []
    save_adapter(attach_lora(load_base(llama, device="cpu"), **{**LORA, **lora}), tmp_path / "fresh")
    again.load_adapter(tmp_path / "fresh", trainable=True)
    assert again.trainable_parameters()[0].numel() == model.trainable_parameters()[0].numel()


def test_the_base_is_the_model_without_its_adapter(llama: Path) -> None:
    base, fresh = load_fast(llama, device="cpu"), make_fast(llama)
    assert torch.equal(base.logits(IDS), fresh.logits(IDS))
    assert base.trainable_parameters() == []
    with pytest.raises(ModelError, match="no adapter"):
        base.save_adapter(llama / "x")


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"dora": True, "dropout": 0.1}, "engine=reference"), ({"train_head": True}, "engine=reference"),
        ({"train_embeddings": True}, "engine=reference"), ({"rank": 0}, "1 and above"), ({"dropout": 1.0}, "up to"),
        ({"targets": ("q_prj",)}, "q_proj"), ({"targets": ()}, "all-linear"), ({"form": "fold"}, "folded"),
        ({"dropout": 0.1, "form": "folded"}, "separate"), ({"dora": True, "form": "separate"}, "folded, auto"),
    ],
)
def test_settings_that_are_refused(llama: Path, lora: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_fast(llama, lora=lora)


def test_the_form_is_said(llama: Path) -> None:
    assert make_fast(llama).describe()["adapter"] == "folded"
    assert make_fast(llama, lora={"dropout": 0.1}).describe()["adapter"] == "separate"
    assert make_fast(llama, lora={"dora": True}).describe()["adapter"] == "folded"
    assert load_fast(llama, device="cpu", activations=["keep", "full"]).describe() == {
        "weights": "stream, float32", "activations": "keep: 1 layers, full: 1 layers", "adapter": "none",
        "embeddings": "device", "graphs": "none", "kernels": "reference: Triton does not compile for cpu",
        "max_seq_tokens": "128",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_bdlora": {"a": 1}}, "use_bdlora"), ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"target_modules": ".*q_proj"}, "targets"),
        ({"peft_type": "IA3"}, "IA3"), ({"init_lora_weights": "pissa"}, "pissa"),
        ({"a_setting_of_2030": 3}, "a_setting_of_2030"), ({"layers_to_transform": [0]}, "layers_to_transform"),
    ],
)
def test_adapters_with_more_than_this_engine_has(
    llama: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    make_fast(llama).save_adapter(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=said) as caught:
        load_fast(llama, device="cpu").load_adapter(tmp_path)
    assert caught.value.next_step == "--set model.engine=reference"


def test_folders_that_hold_no_adapter_of_this_model(llama: Path, tmp_path: Path) -> None:
    model = load_fast(llama, device="cpu")
    with pytest.raises(ModelError, match="is a model"):
        model.load_adapter(llama)
    with pytest.raises(ModelError, match="no adapter_config"):
        model.load_adapter(tmp_path)
    other = make_family("llama with every bias", tmp_path / "other", num_hidden_layers=1, hidden_size=128)
    make_fast(other).save_adapter(tmp_path / "a")
    with pytest.raises(ModelError, match="tensors differ"):
        model.load_adapter(tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be read"):
        model.load_adapter(tmp_path / "a")
    weights.unlink()
    with pytest.raises(ModelError, match="no adapter_model"):
        model.load_adapter(tmp_path / "a")
