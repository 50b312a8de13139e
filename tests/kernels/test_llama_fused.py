"""The fast engine's model on the fused kernels: a layer's hand-written backward with each of them in its place.

Without a GPU they run in Triton's interpreter and attention, which is FlashAttention, is the reference's.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from chulengo.data.batches import collate_packed
from chulengo.errors import ModelError
from chulengo.model.packed_inputs import pack_batch
from fast_models import distance, gradients, make_family, make_fast, randomise
from training_kit import make_rows

HAS_CUDA = torch.cuda.is_available()
DTYPES = ["bfloat16"] if HAS_CUDA else ["float32", "bfloat16"]  # FlashAttention has no float32
ROWS = make_rows(2, longest=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(
        "qwen 3", tmp_path_factory.mktemp("qwen"), num_hidden_layers=2, hidden_size=32, intermediate_size=64,
        num_attention_heads=4,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def attention(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if not HAS_CUDA:
        from chulengo.kernels.fused import attention as flash
        from chulengo.kernels.reference import attention as plain

        monkeypatch.setattr(flash, "packed_attention", plain.packed_attention)


def outcome(folder: Path, *, lora: dict[str, Any], **settings: Any) -> dict[str, torch.Tensor]:
    model = make_fast(folder, device="cuda" if HAS_CUDA else "cpu", lora=lora, **settings)
    randomise(model.named_parameters())
    model.train()
    nll, found = gradients(model, pack_batch(collate_packed([ROWS], pad_id=0)).to(model.device))
    return found | {"loss": nll}


@pytest.mark.parametrize("lora", [{}, {"dropout": 0.2}, {"dora": True}], ids=["folded", "dropout", "dora"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_near_the_reference_kernels(folder: Path, dtype: str, lora: dict[str, Any]) -> None:
    usual, found = (outcome(folder, compute_dtype=dtype, backend=b, lora=lora) for b in ("reference", "fused"))
    most = 1e-5 if dtype == "float32" else 3e-2
    wrong = {name: distance(found[name], value) for name, value in usual.items()}
    assert max(wrong.values()) <= most, wrong


@pytest.mark.parametrize(
    "lora", [{"form": "folded"}, {"form": "separate"}, {"dropout": 0.2}], ids=["folded", "separate", "dropout"]
)
def test_recomputing_is_keeping(folder: Path, lora: dict[str, Any]) -> None:
    kept = outcome(folder, compute_dtype="bfloat16", backend="fused", lora=lora)
    again = outcome(folder, compute_dtype="bfloat16", backend="fused", lora=lora, activations=["full", "selective"])
    assert [name for name, value in kept.items() if not torch.equal(value, again[name])] == []


def test_fp8_on_the_fused_kernels(folder: Path) -> None:
    """The same whatever is kept; in the interpreter, where products and attention are the reference's, near that."""
    shared: dict[str, Any] = {"compute_dtype": "bfloat16", "lora": {"targets": ("q_proj", "down_proj")}}
    usual = outcome(folder, backend="reference", weights="stream-fp8", **shared)
    kept = outcome(folder, backend="fused", weights="resident-fp8", **shared)
    again = outcome(folder, backend="fused", weights="stream-fp8", activations=["full", "selective"], **shared)
    assert [name for name, value in kept.items() if not torch.equal(value, again[name])] == []
    wrong = {name: distance(kept[name], value) for name, value in usual.items()}
    assert max(wrong.values()) <= (0.5 if HAS_CUDA else 0.01), wrong


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [{}, {"dropout": 0.2}, {"dora": True}], ids=["folded", "dropout", "dora"])
@pytest.mark.parametrize("steps", [(1, 1, 3, 2), (3, 1, 1, 2)], ids=["alone first", "accumulated first"])
@pytest.mark.parametrize("activations", ["keep", "full", "offload", "offload-attention"])
def test_graphs_replay_the_step(
    folder: Path, activations: str, lora: dict[str, Any], steps: tuple[int, ...]
) -> None:
    settings = {"device": "cuda", "compute_dtype": "bfloat16", "activations": activations}
    plain, graphed = (
        make_fast(folder, **settings, graphs=graphs, lora=lora) for graphs in (False, True)
    )
    batches = [pack_batch(collate_packed([make_rows(3, seed=seed, longest=9)], pad_id=0)) for seed in range(5)]
    for model in (plain, graphed):
        randomise(model.named_parameters())
        model.train()
    for accumulated in steps:  # without a graph, captured, and replayed, over gradients that are its own or are not
        found = []
        for model in (plain, graphed):
            total = torch.zeros((), device="cuda")
            for batch in batches[:accumulated]:
                nll = model.nll(batch)[0]
                (nll / 7).backward()
                total = total + nll.detach()
            (flat,) = model.trainable_parameters()
            found.append({"loss": total, "gradient": flat.grad.clone()})
            with torch.no_grad():
                flat.sub_(flat.grad, alpha=1e-3)
            flat.grad = None
        assert distance(found[1]["loss"], found[0]["loss"]) <= 1e-3
        assert distance(found[1]["gradient"], found[0]["gradient"]) <= 2e-2
    first = graphed.nll(batches[0])[0]
    graphed.nll(batches[1])
    with pytest.raises(ModelError, match="overwritten"):
        first.backward()


@pytest.mark.gpu
def test_graphs_of_all_sizes_share_their_memory(tmp_path: Path) -> None:
    """The first batch of another size, its capture, and a validation take no more than the largest step did."""
    wide = make_family(
        "qwen 3", tmp_path, num_hidden_layers=4, hidden_size=512, intermediate_size=4096, num_attention_heads=8,
        max_position_embeddings=512,
    )  # fmt: skip
    model = make_fast(wide, device="cuda", compute_dtype="bfloat16", graphs=True)
    model.train()
    large, small = (
        pack_batch(collate_packed([make_rows(number, seed=1, longest=200)], pad_id=0)) for number in (50, 35)
    )
    assert len(large.ids_T) - len(small.ids_T) > 256

    def reserved(batch: Any, *, times: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(times):
            model.nll(batch)[0].backward()
        return torch.cuda.max_memory_reserved()

    before = torch.cuda.memory_allocated()
    most = reserved(large, times=3)
    assert most - before > 256 << 20, "enough to be seen"
    more = reserved(small, times=3)
    model.train(False)
    with torch.no_grad():
        model.nll(small)
    assert max(more, torch.cuda.max_memory_reserved()) - most <= 64 << 20


EQUAL_ROWS = """
import sys
from pathlib import Path
from chulengo.data.batches import collate_packed
from chulengo.data.renderer import RenderedRow
from chulengo.model.fast import load_fast
from chulengo.model.packed_inputs import pack_batch

model = load_fast(Path(sys.argv[1]), device="cuda", compute_dtype="bfloat16", activations=sys.argv[2], graphs=True)
model.attach_lora(rank=4, alpha=8)
model.train()
row = RenderedRow(ids=[3 + i % 90 for i in range(256)], trained=[True] * 256, source="a:1", turn_ends=[256])
batch = pack_batch(collate_packed([[row, row]], pad_id=0))
losses = []
for _ in range(3):
    nll, _ = model.nll(batch)
    nll.backward()
    losses.append(float(nll))
print(max(losses) - min(losses) <= 1e-3 * losses[0])
"""


@pytest.mark.gpu
@pytest.mark.parametrize("activations", ["keep", "offload-attention"])
def test_a_graph_of_equally_long_rows_in_a_fresh_process(tmp_path: Path, activations: str) -> None:
    """They go to cuDNN, which nothing has used before in that process, least of all the thread of the backward."""
    path = make_family("qwen 3", tmp_path, num_hidden_layers=2, max_position_embeddings=512, head_dim=64)
    done = subprocess.run(
        [sys.executable, "-c", EQUAL_ROWS, str(path), activations], capture_output=True, text=True, check=False
    )
    assert done.stdout.split()[-1:] == ["True"], done.stderr[-2000:]
