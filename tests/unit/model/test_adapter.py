from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from chulengo.data.batches import collate_padded
from chulengo.errors import ConfigError, ModelError
from chulengo.model.adapter import (
    attach_lora,
    enable_gradient_checkpointing,
    fully_trained,
    load_adapter,
    restore_adapter,
    save_adapter,
    trainable_in_fp32,
)
from chulengo.model.load import load_base
from chulengo.model.loss import supervised_nll
from training_kit import assert_equal_tensors, make_llama, make_model, make_rows, make_t5, trained_tensors

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("tied"), tied=True)


def targets_of(model: Any) -> set[str]:
    return {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if ".lora_A" in name}


def test_all_linear_leaves_out_the_head(llama: Path) -> None:
    model = make_model(llama)
    assert targets_of(model) == LINEAR
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert len(trainable) == 2 * 7 * 2
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_named_targets_and_unknown_ones(llama: Path) -> None:
    assert targets_of(make_model(llama, targets=("q_proj", "v_proj"))) == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError) as caught:
        make_model(llama, targets=("q_proj", "v_prj"))
    assert "v_prj" in caught.value.given
    assert "gate_proj" in str(caught.value)
    assert "v_proj" in str(caught.value.next_step)
    with pytest.raises(ConfigError):
        make_model(llama, targets=("all-linear", "q_proj"))


def test_initialisation_follows_the_seed_and_leaves_the_global_state(llama: Path) -> None:
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    first = make_model(llama, seed=5)
    assert torch.equal(torch.rand(1), expected)
    assert_equal_tensors(trained_tensors(first), trained_tensors(make_model(llama, seed=5)))
    other = trained_tensors(make_model(llama, seed=6))
    assert any(not torch.equal(v, other[k]) for k, v in trained_tensors(first).items())


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_scale(llama: Path, rslora: bool, scale: float) -> None:
    layer = make_model(llama, rslora=rslora).base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == scale


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_dora(llama: Path, quantization: str) -> None:
    model = make_model(llama, quantization=quantization, dora=True)
    assert sum("magnitude" in name for name in trained_tensors(model)) == 14


def gradient_names(model: Any) -> set[str]:
    nll, _ = supervised_nll(model, collate_padded(make_rows(2), pad_id=0))
    nll.backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ({"train_head": True}, {"lm_head"}), ({"train_embeddings": True}, {"embed_tokens"}),
        ({"train_head": True, "train_embeddings": True}, {"lm_head", "embed_tokens"}),
    ],
)
def test_head_and_embeddings_in_full(llama: Path, what: dict[str, bool], expected: set[str]) -> None:
    model = make_model(llama, **what)
    names = {n.split(".modules_to_save")[0].rsplit(".", 1)[-1] for n in gradient_names(model) if "modules_to_save" in n}
    assert names == expected


@pytest.mark.parametrize("what", [{"train_head": True}, {"train_embeddings": True}])
def test_tied_head_and_embeddings_are_trained_as_one(tied: Path, what: dict[str, bool], tmp_path: Path) -> None:
    model = make_model(tied, **what)
    full = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    assert len({p.data_ptr() for p in full}) == 1
    with torch.no_grad():
        full[0].mul_(1.5)
    ids = torch.arange(3, 9)[None]
    base = model.get_base_model()
    assert base.get_output_embeddings().weight.data_ptr() == full[0].data_ptr()
    save_adapter(model, tmp_path)
    again = load_adapter(load_base(tied, device="cpu"), tmp_path)
    model.eval()
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_plain_peft_loads_what_is_saved(llama: Path, tmp_path: Path, quantization: str) -> None:
    base = load_base(llama, quantization=quantization, device="cpu", name="org/base")
    model = attach_lora(base, rank=4, alpha=8, dropout=0.1, train_head=True)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert not [f for f in tmp_path.iterdir() if f.suffix in (".bin", ".pt")]
    fresh = load_base(llama, quantization=quantization, device="cpu")
    ids = torch.arange(3, 20)[None]
    before = fresh(ids).logits
    plain = peft.PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    model.eval()
    assert torch.equal(plain(ids).logits, model(ids).logits)
    assert not torch.equal(before, model(ids).logits)


def test_restore_is_bit_exact_and_refuses_another_adapter(llama: Path, tmp_path: Path) -> None:
    model = make_model(llama, dora=True)
    before = trained_tensors(model)
    save_adapter(model, tmp_path)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(3)
    restore_adapter(model, tmp_path)
    assert_equal_tensors(trained_tensors(model), before)
    with pytest.raises(ModelError, match="tensors differ"):
        restore_adapter(make_model(llama, rank=8), tmp_path)
    with pytest.raises(ModelError, match="tensors differ"):
        restore_adapter(make_model(llama, dora=True, targets=("q_proj",)), tmp_path)


def test_folders_that_hold_no_adapter(llama: Path, tmp_path: Path) -> None:
    base = load_base(llama, device="cpu")
    with pytest.raises(ModelError, match="is a model"):
        load_adapter(base, llama)
    with pytest.raises(ModelError, match="no adapter_config"):
        load_adapter(base, tmp_path)
    save_adapter(make_model(llama), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be put"):
        load_adapter(load_base(llama, device="cpu"), tmp_path)
    weights.unlink()
    with pytest.raises(ModelError, match="no adapter_model"):
        load_adapter(base, tmp_path)


def test_adapter_of_another_model(llama: Path, tmp_path: Path) -> None:
    save_adapter(make_model(llama), tmp_path / "a")
    other = make_llama(tmp_path / "other", hidden_size=128)
    with pytest.raises(ModelError, match="base model"):
        load_adapter(load_base(other, device="cpu"), tmp_path / "a")


def test_encoder_decoder_adapter(tmp_path: Path) -> None:
    model = make_model(make_t5(tmp_path / "t5"))
    names = gradient_names_t5(model)
    assert any("encoder" in n for n in names)
    assert any("decoder" in n for n in names)
    save_adapter(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"


EMBEDDINGS = "shared = encoder.embed_tokens = decoder.embed_tokens"
HEAD = "lm_head (32,768 weights)"
BOTH, ONE = f"{EMBEDDINGS} (32,768 weights)", f"{EMBEDDINGS} = {HEAD}"


@pytest.mark.parametrize(
    ("untied", "what", "expected"),
    [
        (True, {"train_head": True}, HEAD), (True, {"train_embeddings": True}, BOTH),
        (True, {"train_head": True, "train_embeddings": True}, f"{BOTH}; {HEAD}"),
        (False, {"train_head": True}, ONE), (False, {"train_embeddings": True}, ONE),
    ],
)
def test_encoder_decoder_head_and_embeddings(
    untied: bool, what: dict[str, bool], expected: str, tmp_path: Path
) -> None:
    base = make_t5(tmp_path / "t5", untied=untied)
    model = make_model(base, quantization="none", **what)
    assert fully_trained(model) == f"Trained in full: {expected}"
    full = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    assert len(full) == expected.count("weights"), "each matrix is one parameter, whatever its names"
    assert set(full) <= gradient_names_t5(model)
    with torch.no_grad():
        for parameter in full.values():
            parameter.mul_(1.5)
    save_adapter(model, tmp_path / "a")
    ids = torch.arange(3, 9)[None]
    wanted = model.eval()(input_ids=ids, decoder_input_ids=ids).logits
    fresh = load_base(base, quantization="none", device="cpu")
    before = fresh(input_ids=ids, decoder_input_ids=ids).logits
    plain = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "a")).eval()
    assert torch.equal(plain(input_ids=ids, decoder_input_ids=ids).logits, wanted)
    assert not torch.equal(before, wanted)
    ours = load_adapter(load_base(base, quantization="none", device="cpu"), tmp_path / "a", trainable=True)
    assert fully_trained(ours) == fully_trained(model)
    restore_adapter(ours, tmp_path / "a")
    assert torch.equal(ours.eval()(input_ids=ids, decoder_input_ids=ids).logits, wanted)
    with ours.disable_adapter():
        assert torch.equal(ours(input_ids=ids, decoder_input_ids=ids).logits, before)


def test_nothing_is_trained_in_full(llama: Path) -> None:
    assert fully_trained(make_model(llama)) is None
    assert fully_trained(make_model(llama, train_head=True)) == "Trained in full: lm_head (32,768 weights)"


def gradient_names_t5(model: Any) -> set[str]:
    nll, _ = supervised_nll(model, collate_padded(make_rows(2, encoder=True), pad_id=0))
    nll.backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_recomputing_gives_the_same_gradients(llama: Path) -> None:
    def gradients(recompute: bool) -> dict[str, torch.Tensor]:
        model = make_model(llama, dropout=0.1)
        if recompute:
            enable_gradient_checkpointing(model)
        torch.manual_seed(4)
        model.train()
        nll, _ = supervised_nll(model, collate_padded(make_rows(3), pad_id=0))
        nll.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    assert_equal_tensors(gradients(False), gradients(True))


def test_narrow_trainable_tensors_are_fp32_inside_and_narrow_again_after(llama: Path) -> None:
    base = load_base(llama, quantization="none", compute_dtype="bfloat16", device="cpu")
    model = attach_lora(base, rank=2, alpha=4, train_head=True)
    head = next(p for n, p in model.named_parameters() if "lm_head.modules_to_save" in n)
    with trainable_in_fp32(model):
        assert head.dtype == torch.float32
    assert head.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n)
