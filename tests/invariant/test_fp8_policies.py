"""Products in FP8: the same whatever is kept, near the products in 16 bits, and what is wrong is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chulengo.data.batches import collate_packed
from chulengo.errors import ConfigError
from chulengo.kernels.reference import fp8
from chulengo.model.fast import FastModel
from chulengo.model.fp8_products import Fp8Group, Fp8Matrices, HandedRows, Rows
from fast_models import distance, gradients, make_fast, randomise
from training_kit import assert_equal_tensors, make_rows

ROWS = make_rows(6, seed=4)
BATCH = collate_packed([ROWS[:3], ROWS[3:]], pad_id=0)
FAMILIES = ["llama with every bias", "qwen 3"]
MIXED = ["keep", "selective", "full", "offload"]
SOME = {"targets": ("down_proj", "k_proj")}


def model_of(path: Path, *, lora: dict[str, Any] | None = None, size: float = 0.02, **settings: Any) -> FastModel:
    model = make_fast(path, lora=lora, **settings)
    randomise(model.named_parameters(), size=size)
    model.train()
    return model


def outcome(model: FastModel) -> dict[str, Tensor]:
    nll, found = gradients(model, BATCH)
    return found | {"loss": nll}


@pytest.mark.parametrize("lora", [{}, SOME], ids=["all maps", "some maps"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_policies_are_the_same_computation(
    family_folder: Callable[[str], Path], family: str, dtype: str, lora: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"compute_dtype": dtype, "lora": lora}
    kept = outcome(model_of(family_folder(family), weights="resident-fp8", **settings))
    for weights, policy in (("stream-fp8", "keep"), ("stream-fp8", "full"), ("resident-fp8", "selective"),
                            ("stream-fp8", ["keep", "selective", "full", "offload"]),
                            ("resident-fp8", "offload-attention")):  # fmt: skip
        model = model_of(family_folder(family), weights=weights, activations=policy, **settings)
        assert_equal_tensors(kept, outcome(model))


@pytest.mark.parametrize("activations", ["keep", "selective", "full", "offload", "offload-attention", MIXED], ids=str)
def test_gradients_are_handed_down_in_e4m3(
    family_folder: Callable[[str], Path], activations: str | list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the gradients of the down maps' outputs only the last layer's, which no layer makes, is rounded afterwards."""
    settings: dict[str, Any] = {"weights": "resident-fp8", "activations": activations, "compute_dtype": "bfloat16"}
    model = model_of(family_folder(FAMILIES[0]), **settings)
    passes, rounded, right, make_pass = [], [], Fp8Matrices.rows, model._run

    def noted_rows(self: Fp8Matrices, x_TK: Tensor, group: Fp8Group) -> Rows:
        rounded.append(group)
        return right(self, x_TK, group)

    def noted_pass(*arguments: Any, **more: Any) -> Any:
        passes.append(make_pass(*arguments, **more))
        return passes[-1]

    monkeypatch.setattr(Fp8Matrices, "rows", noted_rows)
    monkeypatch.setattr(model, "_run", noted_pass)
    found = outcome(model)
    downs = [layer.down.fp8 for layer in model.weights.layers]
    assert [group for group in rounded if group in downs] == downs[-1:]
    assert [each.handed._kept for each in passes] == [None]
    monkeypatch.setattr(HandedRows, "take", lambda self, x_TK, columns: None)
    rounded.clear()
    assert_equal_tensors(found, outcome(model))
    assert [group for group in rounded if group in downs] == downs[::-1]


def test_handed_rows_are_those_of_one_tensor() -> None:
    x = torch.ones(2, 16)
    rows = Rows(torch.empty(2, 16 + 8), torch.empty(2, 1))
    for taken, columns, found in ((x, 8, rows), (x, 0, None), (x.clone(), 8, None), (x.detach(), 8, None)):
        handed = HandedRows()
        assert handed.take(x, 8) is None
        handed.put(x, rows)
        assert handed.take(taken, columns) is found
        assert handed.take(x, 8) is None  # once, whatever was asked for


def test_copies_follow_the_adapter(family_folder: Callable[[str], Path]) -> None:
    """Kept copies hold the adapter of the last step until they are refreshed; streamed ones are made from it."""
    models = [model_of(family_folder("qwen 3"), weights=weights) for weights in ("stream-fp8", "resident-fp8")]
    for model in models:
        outcome(model)
        randomise(model.named_parameters(), seed=1000)
    first, second = (outcome(model) for model in models)
    assert_equal_tensors(first, second)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_near_the_products_in_float32(
    family_folder: Callable[[str], Path], family: str, quantization: str
) -> None:
    exact = outcome(model_of(family_folder(family), quantization=quantization))
    found = outcome(model_of(family_folder(family), quantization=quantization, weights="stream-fp8"))
    assert abs(float(found["loss"] / exact["loss"]) - 1) < 0.01
    wrong = {name: distance(found[name], value) for name, value in exact.items()}
    # these random models amplify rounding: with products in bfloat16 the median is 0.16 to 0.18 and the largest 0.32
    assert sorted(wrong.values())[len(wrong) // 2] < 0.3, wrong
    assert max(wrong.values()) < 0.5, wrong
    assert min(wrong.values()) > 1e-5, "these were not products in FP8"


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_an_adapter_left_out_is_seen(
    family_folder: Callable[[str], Path], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a large adapter, leaving its columns out of either product is far outside the bound."""
    path = family_folder("qwen 3")
    exact = outcome(model_of(path, size=0.15))
    right = fp8.copy_adapter

    def wrong(*arguments: Any) -> None:
        right(*arguments)
        arguments[-1].factors_4S[0 if part == "forward" else 2] = 0

    near = outcome(model_of(path, size=0.15, weights="resident-fp8"))
    monkeypatch.setattr(fp8, "copy_adapter", wrong)
    far = outcome(model_of(path, size=0.15, weights="resident-fp8"))
    errors = [sorted(distance(found[name], value) for name, value in exact.items()) for found in (near, far)]
    medians = [each[len(each) // 2] for each in errors]
    assert medians[0] < 0.3
    assert medians[1] > 2 * medians[0], medians


@pytest.mark.parametrize(
    ("lora", "said"), [({"dropout": 0.1}, "no adapter with dropout"), ({"form": "folded"}, "cannot take an adapter in")]
)
def test_what_does_not_go_is_refused(family_folder: Callable[[str], Path], lora: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        model_of(family_folder("qwen 3"), weights="stream-fp8", lora=lora)


def test_losses_fall_as_in_float32(family_folder: Callable[[str], Path]) -> None:
    def losses(**settings: Any) -> list[float]:
        model = make_fast(family_folder("llama with shared key heads"), **settings)
        model.train()
        optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=3e-3, weight_decay=0.0)
        found = []
        for _ in range(30):
            nll, count = model.nll(BATCH)
            (nll / count).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(nll.detach()) / count)
        return found

    usual, eighth = losses(), losses(weights="stream-fp8")
    assert usual[-1] < 0.8 * usual[0]
    assert max(abs(a - b) for a, b in zip(usual, eighth, strict=True)) < 0.1 * (usual[0] - usual[-1])


def test_a_refused_adapter_changes_nothing(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    path = family_folder("qwen 3")
    make_fast(path, lora={"dropout": 0.1}).save_adapter(tmp_path)
    model = model_of(path, weights="stream-fp8")
    before = outcome(model)
    with pytest.raises(ConfigError, match="no adapter with dropout"):
        model.load_adapter(tmp_path, trainable=True)
    assert_equal_tensors(before, outcome(model))


def test_copies_are_there_before_a_step(
    family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group at a time, and the weights wait in the host's memory, in copies that were made while kernels compiled."""
    waiting: list[list[int]] = []
    right = Fp8Group.leave_to_copies

    def noted(self: Fp8Group) -> None:
        waiting.append([id(weight) for weight in self.host_weights])
        right(self)

    monkeypatch.setattr(Fp8Group, "leave_to_copies", noted)
    model = model_of(family_folder("qwen 3"), weights="resident-fp8")
    # nobody asks for the gradient of what the first maps read, so theirs stay
    first, *others = model._groups
    assert first.num_kept == 1
    assert [group.num_kept for group in others] == [2] * len(others)
    assert all(waiting)
    assert [[id(weight) for weight in group.weights] for group in others] == waiting
    assert not any(group.host_weights for group in others)
    before = len(waiting)
    outcome(model)
    assert len(waiting) == before
    assert (first.num_kept, first.host_weights == []) == (1, False)


def test_weights_come_back_for_another_adapter(family_folder: Callable[[str], Path]) -> None:
    lora: dict[str, Any] = {"rank": 4, "alpha": 8, "seed": 3}
    fresh, used = (model_of(family_folder("qwen 3"), weights="resident-fp8") for _ in range(2))
    outcome(used)
    for model in (fresh, used):
        model.attach_lora(**lora)
        randomise(model.named_parameters(), seed=7)
    assert_equal_tensors(outcome(fresh), outcome(used))
