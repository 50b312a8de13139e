"""The fast engine's policies change when things are computed, never what: bit for bit where operations are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chulengo.data.batches import IGNORE, collate_packed, collate_padded
from chulengo.errors import ConfigError, ModelError
from chulengo.kernels.reference.dropout import mask
from chulengo.model import llama
from chulengo.model.dropout import MaskSeed, mask_seed, step_seed
from chulengo.model.factor_gradients import one_behind_the_other
from chulengo.model.fast import FastModel
from chulengo.model.loss import supervised_nll
from chulengo.model.packed_inputs import PackedInputs, pack_batch
from chulengo.model.step_graph import filled
from fast_models import (
    LORA,
    distance,
    gradients,
    make_fast,
    make_reference,
    randomise,
    reference_factors,
)
from training_kit import assert_equal_tensors, make_rows

ROWS = make_rows(6, seed=4)
BATCH = collate_packed([ROWS[:3], ROWS[3:]], pad_id=0)


def model_of(path: Path, *, lora: dict[str, Any] | None = None, **settings: Any) -> FastModel:
    model = make_fast(path, lora=lora, **settings)
    randomise(model.named_parameters())
    model.train()
    return model


def outcome(model: FastModel, batch: Any = BATCH) -> dict[str, Tensor]:
    nll, found = gradients(model, batch)
    assert found.keys() == model.named_parameters().keys()
    return found | {"loss": nll}


LORAS = [
    pytest.param({"form": "folded"}, id="folded"), pytest.param({"form": "separate"}, id="separate"),
    pytest.param({"dropout": 0.2}, id="dropout"), pytest.param({"dora": True}, id="dora"),
    pytest.param({"targets": ("down_proj", "k_proj"), "form": "folded"}, id="some maps"),
]  # fmt: skip


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama with shared key heads", "qwen 3"])
def test_recomputing_is_keeping(family_folder: Any, family: str, dtype: str, lora: dict[str, Any]) -> None:
    settings = {"compute_dtype": dtype, "lora": lora}
    kept = outcome(model_of(family_folder(family), **settings))
    mixed = ["keep", "offload-attention", "full", "offload"]
    for policy in ("selective", "full", "offload", "offload-attention", mixed):
        assert_equal_tensors(kept, outcome(model_of(family_folder(family), activations=policy, **settings)))


@pytest.mark.parametrize("policy", ["offload", "offload-attention"])
def test_states_of_another_batch_are_not_taken(family_folder: Any, policy: str) -> None:
    """They are kept by layer: a second forward puts its own in the place of the first one's."""
    model = model_of(family_folder("qwen 2"), activations=policy)
    first, second = (model.nll(pack_batch(BATCH))[0] for _ in range(2))
    with pytest.raises(ModelError, match="before the next one"):
        first.backward()
    model.clear_gradients()
    second.backward()  # its own are there
    kept = gradients(model_of(family_folder("qwen 2")), BATCH)[1]
    assert_equal_tensors(kept, {name: value.grad for name, value in model.named_parameters().items()})


def test_embeddings_on_the_host_are_the_same(family_folder: Any) -> None:
    expected = outcome(model_of(family_folder("llama 3 rope")))
    assert_equal_tensors(expected, outcome(model_of(family_folder("llama 3 rope"), embeddings="host")))
    with pytest.raises(ConfigError, match="the same table"):
        model_of(family_folder("qwen 2"), embeddings="host")


def test_a_recomputation_that_differs_is_seen(family_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = outcome(model_of(family_folder("qwen 3")))
    right = llama.ops.implementation("swiglu", torch.zeros(1)).backward

    def wrong(*args: Any, product_TI: Tensor | None = None, **more: Any) -> None:
        right(*args, product_TI=product_TI, **more)
        if product_TI is not None:
            product_TI *= 1 + 1e-6

    monkeypatch.setattr(llama.ops.implementation("swiglu", torch.zeros(1)), "backward", wrong)
    with pytest.raises(AssertionError):
        assert_equal_tensors(kept, outcome(model_of(family_folder("qwen 3"), activations="selective")))


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resident_is_stream(family_folder: Any, dtype: str, quantization: str, lora: dict[str, Any]) -> None:
    settings = {"compute_dtype": dtype, "lora": lora, "quantization": quantization}
    models = [model_of(family_folder("qwen 2"), weights=policy, **settings) for policy in ("stream", "resident")]
    for step in range(2):
        first, second = (outcome(model) for model in models)
        assert_equal_tensors(first, second)
        for model in models:
            # through .data, which leaves no trace in a tensor's version, as bitsandbytes' optimisers write
            for number, parameter in enumerate(model.named_parameters().values()):
                parameter.data.add_(0.01 * (number % 3 + step + 1))


def test_resident_matrices_follow_the_adapter_only_when_told(family_folder: Any) -> None:
    model = model_of(family_folder("qwen 2"), weights="resident")
    before, _ = model.nll(BATCH)
    for parameter in model.trainable_parameters():
        parameter.data.mul_(2)
    assert torch.equal(model.nll(BATCH, refold=False)[0], before)
    assert not torch.equal(model.nll(BATCH)[0], before)


def test_stream_holds_one_matrix(family_folder: Any) -> None:
    model = model_of(family_folder("qwen 2"))
    outcome(model)
    sizes = [sum(group.widths) * group.in_features for group in model.weights.groups()]
    assert model._matrices._buffer is not None
    assert model._matrices._buffer.numel() == max(sizes)
    assert all(group.resident_OI is None for group in model.weights.groups())


def close(found: dict[str, Tensor], expected: dict[str, Tensor], most: float = 1e-5) -> None:
    wrong = {name: distance(found[name], value) for name, value in expected.items()}
    assert max(wrong.values()) <= most, wrong


@pytest.mark.parametrize("form", ["folded", "separate"])
def test_packed_is_unpacked(family_folder: Any, form: str) -> None:
    model = model_of(family_folder("llama 3 rope"), lora={"form": form})
    alone = [outcome(model, collate_padded([row], pad_id=0)) for row in ROWS]
    expected = {name: torch.stack([part[name] for part in alone]).sum(0) for name in alone[0]}
    for batch in (
        collate_padded(ROWS, pad_id=0), BATCH, collate_packed([ROWS], pad_id=0),
        collate_packed([ROWS[:1], ROWS[1:]], pad_id=0, flatten=True),
    ):  # fmt: skip
        close(outcome(model, batch), expected)
    wrong = pack_batch(collate_packed([ROWS], pad_id=0))
    joined = PackedInputs(
        wrong.ids_T, wrong.position_T, wrong.cu_seqlens[[0, -1]], len(wrong.ids_T), wrong.place_N, wrong.target_N,
        wrong.num_targets,
    )
    model.shape = model_of(family_folder("llama 3 rope"), max_seq_tokens=512).shape
    seeing_each_other = outcome(model, joined)
    with pytest.raises(AssertionError):
        close(seeing_each_other, expected)


def test_filled_up_to_static_shapes(family_folder: Any) -> None:
    model = model_of(family_folder("mistral"))
    filled = pack_batch(BATCH, max_sequences=20, max_targets=300)
    close(outcome(model, filled), outcome(model), 1e-6)
    assert model.nll(filled)[1] == model.nll(BATCH)[1]


def test_filled_up_to_few_sizes(family_folder: Any) -> None:
    model = model_of(family_folder("mistral"), max_seq_tokens=100)
    expected = outcome(model)
    inputs = pack_batch(BATCH)
    larger = filled(inputs, 100)
    assert len(larger.ids_T) % 256 == 0 < len(larger.ids_T) - len(inputs.ids_T)
    assert int(larger.position_T.max()) < 100
    assert int(torch.diff(larger.cu_seqlens).max()) <= larger.max_seqlen == 100
    close(outcome(model, larger), expected, 1e-6)


def test_batches_of_one_size_are_filled_up_to_one_shape() -> None:
    """With nearly every token a target too, of which there is another number in each batch."""
    shapes = set()
    for tokens in range(7200, 8192, 13):
        mask = torch.ones((2, tokens - 3100), dtype=torch.int64)
        mask[1, 3100:] = 0
        labels = mask.masked_fill(mask == 0, IGNORE)
        labels[:, 0] = IGNORE
        inputs = pack_batch({"input_ids": mask, "labels": labels, "attention_mask": mask})
        assert (len(inputs.ids_T), inputs.num_targets) == (tokens, tokens - 2)
        larger = filled(inputs, 4096)
        shapes.add((len(larger.ids_T), len(larger.cu_seqlens), larger.max_seqlen, len(larger.target_N)))
    assert {shape[0] for shape in shapes} == {8192}
    assert len(shapes) <= 2


def test_one_flat_tensor_is_all_factors(family_folder: Any) -> None:
    model = model_of(family_folder("qwen 2"))
    (flat,) = model.trainable_parameters()
    named, order = model.named_parameters(), model.trainable_names()
    assert sorted(order) == sorted(named)
    for owners in ([flat], list(named.values())):
        model.nll(BATCH)[0].backward()
        once = flat.grad.clone()
        model.nll(BATCH)[0].backward()
        assert torch.equal(flat.grad, 2 * once)
        assert torch.equal(flat.grad, torch.cat([named[name].grad.flatten() for name in order]))
        for owner in owners:
            owner.grad = None
    with torch.no_grad():
        flat.fill_(0.5)
    assert all((p == 0.5).all() for p in named.values())


def test_the_a_of_a_group_have_gradients_that_are_one_matrix(family_folder: Any) -> None:
    model = model_of(family_folder("qwen 2"))
    model.nll(BATCH)[0].backward()
    (flat,) = model.trainable_parameters()
    for group in model.weights.groups():
        own = [pair.a_RI.grad for pair in group.factors if pair is not None]
        gradients = [gradient for gradient in own if gradient is not None]
        whole = one_behind_the_other(gradients)
        assert whole is not None
        assert torch.equal(whole, torch.cat(gradients))
        assert whole.untyped_storage().data_ptr() == flat.grad.untyped_storage().data_ptr()
        if len(gradients) > 1:
            assert one_behind_the_other(gradients[::-1]) is None
            assert one_behind_the_other([gradients[0], gradients[1].clone()]) is None
    assert one_behind_the_other([torch.zeros(2, 8)[:, :4]]) is None, "rows that do not follow each other"
    memory = bytearray(64)
    neighbours = [torch.frombuffer(memory, dtype=torch.float32, offset=start, count=8).view(2, 4) for start in (0, 32)]
    assert one_behind_the_other(neighbours) is None, "of two owners, though one follows the other"


def test_accumulated_is_whole(family_folder: Any) -> None:
    model = model_of(family_folder("qwen 2"), weights="resident")
    expected = outcome(model, collate_padded(ROWS, pad_id=0))
    for parameter in model.trainable_parameters():
        parameter.grad = None
    for number, start in enumerate(range(0, 6, 2)):
        model.nll(collate_padded(ROWS[start : start + 2], pad_id=0), refold=number == 0)[0].backward()
    close({name: p.grad for name, p in model.named_parameters().items() if p.grad is not None},
          {name: value for name, value in expected.items() if name != "loss"})  # fmt: skip


@pytest.mark.parametrize("activations", ["keep", "full", "offload-attention"])
@pytest.mark.parametrize("lora", LORAS)
def test_gradients_are_made_where_they_belong(family_folder: Any, lora: dict[str, Any], activations: str) -> None:
    """Factors without a gradient get one, factors that are not trained get none, and autograd sees none of them."""
    model = model_of(family_folder("qwen 2"), lora=lora, activations=activations)
    expected = outcome(model)
    named = model.named_parameters()
    frozen = [name for number, name in enumerate(named) if number % 3 == 1]
    for name in frozen:
        named[name].requires_grad_(False)
    model.micro_step = 0  # the same masks
    nll, _ = model.nll(BATCH)
    for value in named.values():
        value.grad = None
    trained = {name: value for name, value in named.items() if name not in frozen}
    assert torch.autograd.grad(nll, list(trained.values()), allow_unused=True) == (None,) * len(trained)
    assert all(named[name].grad is None for name in frozen)
    found = {name: value.grad for name, value in trained.items() if value.grad is not None}
    assert_equal_tensors(found, {name: expected[name] for name in trained})


class MaskOf(nn.Module):
    """PEFT's dropout of one map, with the mask that the fast engine takes."""

    def __init__(self, dropout: float, seed: MaskSeed, index: int) -> None:
        super().__init__()
        self.dropout, self.seed, self.index = dropout, seed, index

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        kept = mask(*flat.shape, self.dropout, self.seed.step_1, self.seed.place(self.index))
        return (flat * kept / (1 - self.dropout)).view(x.shape)


def test_dropout_is_that_of_peft_with_the_same_masks(family_folder: Any) -> None:
    path, lora = family_folder("qwen 3"), {"dropout": 0.3}
    model, reference = model_of(path, lora=lora), make_reference(path, **lora)
    factors = reference_factors(reference)
    randomise(factors)
    step_1 = step_seed(model.dropout_seed, model.micro_step, model.device)
    modules = dict(reference.named_modules())
    for layer in model.weights.layers:
        for place, group in enumerate(layer.groups):
            for index, name in enumerate(group.names):
                drops = MaskOf(0.3, mask_seed(step_1, layer.index, place), index)
                modules[f"base_model.model.{name}"].lora_dropout["default"] = drops
    reference.train()
    batch = collate_padded([max(ROWS, key=lambda row: len(row.ids))], pad_id=0)
    exact, _ = supervised_nll(reference, batch)
    exact.backward()
    close(outcome(model, batch), {name: value.grad for name, value in factors.items()} | {"loss": exact.detach()})


def test_masks_of_steps(family_folder: Any) -> None:
    model = model_of(family_folder("qwen 2"), lora={"dropout": 0.2})
    first, second = model.nll(BATCH)[0], model.nll(BATCH)[0]
    assert not torch.equal(first, second)
    model.micro_step = 0
    assert torch.equal(model.nll(BATCH)[0], first)
    model.train(False)
    assert torch.equal(model.nll(BATCH)[0], model.nll(BATCH)[0])
    without = model_of(family_folder("qwen 2"), lora={"form": "separate"})
    assert torch.equal(model.nll(BATCH)[0], without.nll(BATCH)[0])
    assert LORA["seed"] == model.dropout_seed


def test_every_map_has_a_place_of_its_own(family_folder: Any) -> None:
    model = model_of(family_folder("qwen 2"))
    step_1 = step_seed(0, 0, model.device)
    places = [
        mask_seed(step_1, layer.index, number).place(index)
        for layer in model.weights.layers for number, group in enumerate(layer.groups)
        for index in range(len(group.names))
    ]  # fmt: skip
    assert len(set(places)) == len(places) == 4 * 7
    numbers = [int(step_seed(seed, step, model.device)) for seed in range(30) for step in range(30)]
    assert len(set(numbers)) == 900
