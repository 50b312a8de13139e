"""Decoding on the fused kernels: against full forwards, and replayed graphs against plain steps.

Without a GPU the kernels run in Triton's interpreter and attention over prompts, which is FlashAttention, is the
reference's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chulengo.generate.engine import Prompt, complete_all
from chulengo.generate.settings import GenerationSettings
from chulengo.model import decode
from chulengo.model.fast import FastModel
from chulengo.model.session import open_session
from fast_models import distance, make_family, make_fast, randomise
from training_kit import VOCAB

HAS_CUDA = torch.cuda.is_available()
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
FORMS = [("folded", "resident"), ("folded", "stream"), ("separate", "resident")]


@pytest.fixture(scope="module", params=["qwen 3", "llama with shared key heads"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(request.param, tmp_path_factory.mktemp("family"), **SMALL)


@pytest.fixture(autouse=True)
def attention(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if not HAS_CUDA:
        from chulengo.kernels.fused import attention as flash
        from chulengo.kernels.reference import attention as plain

        monkeypatch.setattr(flash, "packed_attention", plain.packed_attention)


def prompts(*lengths: int) -> list[list[int]]:
    numbers = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB, (length,), generator=numbers).tolist() for length in lengths]


def on_gpu(folder: Path, form: str, weights: str) -> FastModel:
    model = make_fast(folder, device="cuda", compute_dtype="bfloat16", weights=weights, lora={"form": form})
    randomise(model.named_parameters())
    return model


def plain(model: FastModel) -> decode.FastDecoding:
    """Returns a decoding without graphs."""
    decoding = model.decoding()
    decoding._graphs = False
    return decoding


def test_near_the_reference_kernels(folder: Path) -> None:
    device, dtype, most = ("cuda", "bfloat16", 3e-2) if HAS_CUDA else ("cpu", "float32", 1e-5)
    found = []
    for backend in ("reference", "fused"):
        model = make_fast(folder, device=device, compute_dtype=dtype, backend=backend)
        randomise(model.named_parameters())
        decoding = plain(model)
        found.append(torch.cat([decoding.start(prompts(3, 7)), decoding.step([1, 2]), decoding.step([3, 4])]))
    assert distance(found[1], found[0]) <= most


@pytest.mark.gpu
@pytest.mark.parametrize(("form", "weights"), FORMS)
def test_replayed_steps_are_the_full_forward(
    folder: Path, form: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "PLACE_STEP", 16)  # grows twice and more: captured again
    model = on_gpu(folder, form, weights)
    rows = prompts(2, 9, 30, 14)
    decoding = model.decoding()
    logits = decoding.start(rows)
    most_graphs = 0
    for number in range(30):
        ends = torch.tensor([len(row) for row in rows], device="cuda").cumsum(0) - 1
        assert distance(logits, model.logits(rows)[ends]) <= 3e-2
        if number == 20:
            decoding.keep([3, 1])
            rows, logits = [rows[3], rows[1]], logits[[3, 1]]
        tokens = logits.argmax(-1).tolist()
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        logits = decoding.step(tokens)
        most_graphs = max(most_graphs, decoding._memory.num_graphs)
    assert most_graphs >= 2  # of the steps' sizes since the memory last grew


@pytest.mark.gpu
@pytest.mark.parametrize(("form", "weights"), FORMS)
def test_a_replay_is_the_plain_step(folder: Path, form: str, weights: str) -> None:
    model = on_gpu(folder, form, weights)
    graphed, usual = model.decoding(), plain(model)
    for decoding in (graphed, usual):
        decoding.start(prompts(5, 40, 21))
    for number in range(12):
        tokens = [number, 3 * number + 1, 7]
        assert distance(graphed.step(tokens), usual.step(tokens)) <= 1e-2
    assert (graphed._memory.num_graphs, usual._memory.num_graphs) == (1, 0)
    for mine, theirs in zip(graphed._memory._caches, usual._memory._caches, strict=True):
        assert distance(mine, theirs) <= 1e-2


@pytest.mark.gpu
def test_the_next_batch_replays_the_graphs_of_the_last(folder: Path) -> None:
    model = on_gpu(folder, "folded", "resident")
    usual = plain(on_gpu(folder, "folded", "resident"))
    for number, rows in enumerate((prompts(20, 3), prompts(9, 15), prompts(1, 2))):
        decoding = model.decoding()
        assert distance(decoding.start(rows), usual.start(rows)) <= 1e-2
        for step in range(4):
            assert distance(decoding.step([step, 50]), usual.step([step, 50])) <= 1e-2
        assert decoding._memory.num_graphs == 1
        if number == 0:
            graph = decoding._memory._captured[2, decode.PLACE_STEP].graph
        assert decoding._memory._captured[2, decode.PLACE_STEP].graph is graph
        del decoding


@pytest.mark.gpu
def test_nothing_in_a_step_waits_for_the_device(folder: Path) -> None:
    decoding = plain(on_gpu(folder, "folded", "resident"))
    decoding.start(prompts(5, 9))
    decoding.step([1, 2])
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            decoding._advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_answers_through_the_engine(folder: Path) -> None:
    # greedy answers of a batch that rows leave are those of steps by full forwards, but where two tokens are as likely
    model = on_gpu(folder, "folded", "resident")
    asked = [Prompt(tuple(row), frozenset(), lambda ids: "") for row in prompts(4, 25, 11, 60, 2)]
    answers = complete_all(model, asked, GenerationSettings(max_new_tokens=40), 5)
    for prompt, answer in zip(asked, answers, strict=True):
        assert len(answer.ids) == 40
        logits = model.logits([*prompt.ids, *answer.ids])[len(prompt.ids) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(answer.ids, device="cuda")[:, None])[:, 0]
        assert (logits.amax(-1) - chosen).max() <= 0.2 * logits.std()


@pytest.mark.gpu
def test_a_session_and_its_base(tmp_path: Path) -> None:
    import tiny_models as tiny

    base = tiny.write_model_folder(tmp_path / "base")
    adapter = tiny.write_adapter(base, tmp_path / "adapter")
    for quantization, form in (("nf4", "folded"), ("none", "separate")):
        session = open_session(None, str(adapter), device="cuda", quantization=quantization)
        assert session.engine == "fast"
        assert (session.model.describe()["adapter"], session.model.dtype) == (form, torch.bfloat16)
        ids = [1, 20, 30, 40]
        with session.side("tuned") as model:
            tuned = model.logits(ids)
        with session.side("base") as model:
            bare = model.logits(ids)
        with session.side("tuned") as model:
            assert torch.equal(model.logits(ids), tuned)
        alone = open_session(str(base), device="cuda", quantization=quantization)
        assert torch.equal(alone.model.logits(ids), bare)
        assert distance(tuned, bare) > 1e-2
