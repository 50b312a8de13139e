"""What a replayed graph is given, on a CPU: a graph that computes its loss again from the tensors it was captured with.

That CUDA's graphs do so is tested on a GPU, in tests/kernels/test_llama_fused.py.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chulengo.data.batches import collate_packed
from chulengo.model import step_graph
from chulengo.model.fast import FastModel
from chulengo.model.packed_inputs import pack_batch
from chulengo.model.step_graph import StepGraphs, filled
from fast_models import LORA, make_family, make_fast, randomise
from training_kit import VOCAB, make_rows

BATCH = pack_batch(collate_packed([make_rows(3, longest=9)], pad_id=0))
BATCHES = [replace(BATCH, ids_T=(BATCH.ids_T + number) % VOCAB) for number in range(4)]  # one graph serves all


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family("qwen 3", tmp_path_factory.mktemp("qwen"), num_hidden_layers=2)


class RepeatedLoss:
    """Stands in for a CUDA graph: `replay` computes what was captured again, from whatever its tensors hold now."""

    def __init__(self, graphs: StepGraphs) -> None:
        self.graphs = graphs
        self.arguments: tuple[Any, ...] = ()

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        gradient = self.graphs._gradient
        assert gradient is not None
        gradient.zero_()
        with torch.enable_grad(), self.graphs._flat.gradients_in(gradient):
            nll = self.graphs._loss(*self.arguments)
            nll.backward()
        (captured,) = (each for each in self.graphs._captured.values() if each.graph is self)  # type: ignore[comparison-overlap]
        captured.nll.copy_(nll.detach())


@pytest.fixture
def graphed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FastModel:
    model = make_fast(folder, lora={"dropout": 0.3})
    assert model._flat is not None
    graphs = model._graphs = StepGraphs(model._flat, model._loss)
    made: list[RepeatedLoss] = []

    def new_graph() -> RepeatedLoss:
        made.append(RepeatedLoss(graphs))
        return made[-1]

    @contextlib.contextmanager
    def capture(graph: RepeatedLoss, pool: Any = None, stream: Any = None) -> Any:
        right = graphs._loss

        def noted(*arguments: Any) -> Tensor:
            graph.arguments = arguments
            return right(*arguments)

        graphs._loss = noted
        yield
        graphs._loss = right

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return model


def trained(model: FastModel) -> list[Tensor]:
    """Returns the loss and the gradient of several micro-steps over batches of one size."""
    randomise(model.named_parameters())
    model.train()
    found = []
    for step in range(6):
        model.clear_gradients()
        nll, _ = model.nll(BATCHES[step % len(BATCHES)])
        (nll / 7).backward()
        (flat,) = model.trainable_parameters()
        found += [nll.detach(), flat.grad.clone()]  # type: ignore[union-attr]
    return found


def test_a_replay_draws_the_masks_of_its_own_step(folder: Path, graphed: FastModel) -> None:
    plain = make_fast(folder, lora={"dropout": 0.3})
    expected, found = trained(plain), trained(graphed)
    assert graphed._graphs is not None
    assert len(graphed._graphs._captured) == 1
    assert graphed._graphs.serial == 6
    for value, own in zip(expected, found, strict=True):
        torch.testing.assert_close(own, value, rtol=1e-4, atol=1e-5)
    assert plain.micro_step == graphed.micro_step == 6
    assert LORA["seed"] == graphed.dropout_seed


def test_a_replay_with_the_masks_of_the_captured_step_is_seen(
    folder: Path, graphed: FastModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained(make_fast(folder, lora={"dropout": 0.3}))
    right = StepGraphs.nll

    def stale(self: StepGraphs, inputs: Any, embedded: Any, seed_1: Tensor) -> Tensor:
        for captured in self._captured.values():  # what would happen if nobody copied the number
            seed_1 = captured.optional[1]  # type: ignore[assignment]
        return right(self, inputs, embedded, seed_1)

    monkeypatch.setattr(StepGraphs, "nll", stale)
    found = trained(graphed)
    assert not torch.allclose(found[-2], expected[-2], rtol=1e-4)


def test_graphs_are_few(folder: Path, graphed: FastModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graph, "MOST_GRAPHS", 1)
    larger = pack_batch(collate_packed([make_rows(80, longest=9)], pad_id=0))
    sizes = [len(filled(each, 128).ids_T) for each in (BATCH, larger)]
    assert sizes[0] < sizes[1]
    plain = make_fast(folder, lora={"dropout": 0.3})
    found = []
    for model in (plain, graphed):
        randomise(model.named_parameters())
        model.train()
        losses = []
        for batch in (larger, BATCH, larger, BATCH, BATCH, larger, BATCH):
            nll, _ = model.nll(batch)
            nll.backward()
            losses.append(nll.detach())
        found.append((*losses, model.trainable_parameters()[0].grad))
    assert graphed._graphs is not None
    assert [key[0] for key in graphed._graphs._captured] == sizes[1:]
    for value, own in zip(*found, strict=True):
        torch.testing.assert_close(own, value, rtol=1e-4, atol=1e-4)


def test_where_there_is_no_room_for_a_graph_none_is_needed(
    folder: Path, graphed: FastModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained(make_fast(folder, lora={"dropout": 0.3}))
    tries: list[int] = []

    @contextlib.contextmanager
    def no_room(*given: Any, **named: Any) -> Any:
        tries.append(1)
        yield
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "graph", no_room)
    assert graphed._graphs is not None
    forgotten: list[int] = []
    graphed._graphs._broken_off = lambda: forgotten.append(1)
    with pytest.warns(UserWarning, match="no room for more than 0 CUDA graphs"):
        found = trained(graphed)
    assert (len(tries), len(forgotten), len(graphed._graphs._captured)) == (1, 1, 0)
    for value, own in zip(expected, found, strict=True):
        torch.testing.assert_close(own, value, rtol=1e-4, atol=1e-5)


def test_graphs_of_as_many_tokens_read_embeddings_from_one_place(
    graphed: FastModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = graphed._graphs
    assert graphs is not None
    embedded_TD = graphed.weights.embedding_VD[BATCH.ids_T]
    made, empty_like = [], torch.empty_like

    def noted(like: Tensor) -> Tensor:
        made.extend([1] if like is embedded_TD else [])
        return empty_like(like)

    monkeypatch.setattr(torch, "empty_like", noted)
    for targets in range(3, 0, -1):  # three sizes, each captured at its second batch
        inputs = replace(BATCH, place_N=BATCH.place_N[:targets], target_N=BATCH.target_N[:targets])
        for _ in range(2):
            graphs.nll(inputs, embedded_TD, torch.ones(1, dtype=torch.int64))
    places = {captured.optional[0].data_ptr() for captured in graphs._captured.values()}  # type: ignore[union-attr]
    assert (len(graphs._captured), len(places), len(made)) == (3, 1, 1)


def test_the_first_batch_leaves_no_nodes_behind(graphed: FastModel) -> None:
    """Its loss may be held while the second batch is captured: on a GPU a node of it would break the capture."""
    graphed.train()
    held, _ = graphed.nll(BATCHES[0])
    names, nodes = set(), [held.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.add(type(node).__name__)
            nodes += [each for each, _ in node.next_functions]
    assert names == {"_ReplayedBackward", "AccumulateGrad"}  # of the flat parameter, which no layer reads
    held.backward()
    (flat,) = graphed.trainable_parameters()
    assert flat.grad is graphed._graphs._gradient  # one gradient, not two  # type: ignore[union-attr]


def test_graphs_do_not_outlive_what_they_read(folder: Path) -> None:
    """Switching a folded adapter off and on frees the matrices and copies that a captured step reads."""
    model = make_fast(folder)
    model._uses_graphs = True
    model.attach_lora(**LORA)
    before = model._graphs
    with model.disable_adapter():
        pass
    assert before is not None
    assert isinstance(model._graphs, StepGraphs)
    assert model._graphs is not before


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, found: list[bool]) -> Tensor:
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Any:
        ctx.found.append(torch._C._is_multithreading_enabled())
        return dx, None


def test_every_backward_runs_on_the_calling_thread(graphed: FastModel) -> None:
    """What a library makes for each thread has to be there before a capture, for the thread that captures."""
    graphs, found = graphed._graphs, []
    assert graphs is not None
    right = graphs._loss
    graphs._loss = lambda *given: _Noted.apply(right(*given), found)  # type: ignore[no-untyped-call]
    graphed.train()
    for batch in BATCHES[:2]:  # the first time, and captured
        graphed.nll(batch)[0].backward()
    assert found[:2] == [False, False]
    assert torch._C._is_multithreading_enabled()
