"""The same rows a step give the same training, however a step is cut into micro-batches, ranks or packs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from chulengo.data.batches import collate_packed, collate_padded
from chulengo.model.loss import supervised_nll
from training_kit import assert_equal_tensors, make_llama, make_model, make_rows, train, trained_tensors


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


ROWS = make_rows(35)  # 4 full steps of 8 and one of 3
RUN: dict[str, Any] = {"epochs": 2.0, "learning_rate": 1e-3, "warmup_steps": 1, "max_grad_norm": 1.0}


def run(
    llama: Path, out: Path, batch_size: int, accumulation: int, *, engine: str = "reference", **changes: Any
) -> tuple[list[float], Any]:
    model = make_model(llama, engine=engine)
    _, rows = train(
        model, out, ROWS, batch_size=batch_size, gradient_accumulation=accumulation, **{**RUN, **changes}
    )
    return [row["loss"] for row in rows], trained_tensors(model)


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    for name, value in left.items():
        error = float((value - right[name]).norm() / value.norm())
        assert error < 1e-3, (name, error)


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("batching", ["padded", "group_by_length", "packed"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 8), (2, 4), (4, 2)])
def test_accumulation(
    llama: Path, tmp_path: Path, batching: str, batch_size: int, accumulation: int, engine: str
) -> None:
    whole, expected = run(llama, tmp_path / "8x1", 8, 1, batching=batching, engine=engine)
    split, tensors = run(llama, tmp_path / "split", batch_size, accumulation, batching=batching, engine=engine)
    assert split == pytest.approx(whole, abs=2e-5)
    assert_close(expected, tensors)


def gradients(model: Any, batches: list[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
    total, count = 0.0, 0
    model.zero_grad()
    for batch in batches:
        nll, tokens = supervised_nll(model, batch)
        nll.backward()
        total, count = total + float(nll.detach()), count + tokens
    return total / count, {n: p.grad.clone() / count for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("flatten", [False, True])
def test_packed_is_unpacked(llama: Path, attention: str, flatten: bool) -> None:
    model = make_model(llama)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    model.get_base_model().set_attn_implementation(attention)
    rows = make_rows(9)
    alone, expected = gradients(model, [collate_padded([row], pad_id=0) for row in rows])
    packs = [rows[:2], rows[2:3], rows[3:7], rows[7:]]
    packed, found = gradients(model, [collate_packed(packs, pad_id=0, flatten=flatten)])
    assert packed == pytest.approx(alone, rel=1e-6)
    for name, value in expected.items():
        assert float((value - found[name]).norm()) <= 2e-5 * float(value.norm()), name
    # the test can fail: without position restarts rows see each other
    wrong = collate_packed(packs, pad_id=0, flatten=flatten)
    wrong["position_ids"] = torch.arange(wrong["input_ids"].shape[1])[None].expand_as(wrong["input_ids"])
    assert gradients(model, [wrong])[0] != pytest.approx(alone, rel=1e-3)


def test_recomputing_is_keeping(llama: Path, tmp_path: Path) -> None:
    kept, expected = run(llama, tmp_path / "a", 4, 2)
    recomputed, tensors = run(llama, tmp_path / "b", 4, 2, gradient_checkpointing=True)
    assert kept == recomputed
    assert_equal_tensors(expected, tensors)


RANK = """
import json, sys
from pathlib import Path
from training_kit import make_model, make_rows, train, trained_tensors
import torch
llama, out, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
model = make_model(llama, engine=settings.pop("engine"))
outcome, rows = train(model, out, make_rows(35), make_rows(7, seed=1), **settings)
import os
if os.environ["RANK"] == "0":
    losses = [(r["kind"], r["step"], r["loss"]) for r in rows]
    torch.save({"losses": losses, "tensors": trained_tensors(model)}, out / "r.pt")
else:
    assert not rows
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("batching", ["group_by_length", "packed"])
def test_two_ranks(llama: Path, tmp_path: Path, batching: str, engine: str) -> None:
    changes = {**RUN, "batching": batching}
    model = make_model(llama, engine=engine)
    _, rows = train(
        model, tmp_path / "one", ROWS, make_rows(7, seed=1), batch_size=8, gradient_accumulation=1, **changes
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = json.dumps({**changes, "batch_size": 2, "gradient_accumulation": 2, "engine": engine})
    processes = []
    for rank in range(2):
        env = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
        }
        (tmp_path / "two").mkdir(exist_ok=True)
        command = [sys.executable, "-c", RANK, str(llama), str(tmp_path / "two"), settings]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors[-3000:]
    found = torch.load(tmp_path / "two" / "r.pt", weights_only=True)
    assert [tuple(x[:2]) for x in found["losses"]] == [(r["kind"], r["step"]) for r in rows]
    assert [x[2] for x in found["losses"]] == pytest.approx([r["loss"] for r in rows], abs=2e-5)
    assert_close(trained_tensors(model), found["tensors"])
