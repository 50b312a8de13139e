"""The rehearsal of a training step, run for real on a CPU: it leaves the model, gradients and random states alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chulengo.data.batches import collate_packed
from chulengo.model.fast import FastModel
from chulengo.model.rehearsal import few_tokens, rehearse
from fast_models import gradients, make_fast, randomise
from training_kit import assert_equal_tensors, make_rows

MIXED = ["keep", "selective", "full", "offload"]
CASES: list[dict[str, Any]] = [
    {}, {"weights": "resident"}, {"lora": {"form": "separate"}}, {"lora": {"dropout": 0.2}}, {"lora": {"dora": True}},
    {"weights": "stream-fp8"}, {"weights": "resident-fp8"}, {"embeddings": "host"},
]  # fmt: skip


def model_of(folder: Path, settings: dict[str, Any]) -> FastModel:
    model = make_fast(folder, activations=MIXED, **settings)
    randomise(model.named_parameters())
    model.train()
    return model


def rehearsed(model: FastModel) -> None:
    inputs = few_tokens(model.shape.max_seq_tokens)
    seed_1 = torch.zeros(1, dtype=torch.int64)
    rehearse(model.weights, model._run(inputs, seed_1, model._embedded(inputs)), model._activations)


def kept(model: FastModel) -> dict[str, Any]:
    """Returns what a step may leave in a model."""
    parts: list[object] = []
    for group in model._groups:
        parts += [group.resident_OI, group.copies, group.fp8, *group.weights]
        if group.fp8 is not None:
            parts += [group.fp8.forward_OW, group.fp8.backward_IW, group.fp8.adapter]
    gradients = [value.grad for value in (*model.trainable_parameters(), *model.named_parameters().values())]
    matrices = model._matrices
    buffers = matrices._buffer, None if matrices.fp8 is None else matrices.fp8._buffer
    host = model._host_states
    assert host is not None
    return {
        "groups": [id(part) for part in parts], "gradients": gradients,
        "buffers": buffers, "host": (dict(host._kept), dict(host._pinned)), "micro_step": model.micro_step,
        "memory": model._step_memory, "refreshing": model._refreshing, "random": torch.random.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_leaves_no_trace(family_folder: Callable[[str], Path], settings: dict[str, Any]) -> None:
    folder, batch = family_folder("llama with every bias"), collate_packed([make_rows(3)], pad_id=0)
    usual, model = model_of(folder, settings), model_of(folder, settings)
    before = kept(model)
    rehearsed(model)
    assert kept(model) == before
    for _ in range(2):
        (nll, found), (other_nll, other) = gradients(usual, batch), gradients(model, batch)
        assert_equal_tensors(found | {"loss": nll}, other | {"loss": other_nll})
        rehearsed(model)  # also between steps
    assert usual.micro_step == model.micro_step


def test_prepares_nothing_without_a_gpu(family_folder: Callable[[str], Path]) -> None:
    assert make_fast(family_folder("qwen 3")).prepare() == 0


@pytest.mark.parametrize("most", [1, 2, 7, 4096])
def test_few_tokens_fit_the_model(most: int) -> None:
    inputs = few_tokens(most)
    assert inputs.max_seqlen <= most
    assert inputs.num_targets == len(inputs.ids_T) - len(inputs.cu_seqlens) + 1
