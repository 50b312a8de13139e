from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from chulengo.cli.main import main
from chulengo.config import load_config
from chulengo.model.gpu_limit import limit_gpu_memory, limit_of
from chulengo.model.plan import device_memory
from chulengo.model.plan_memory import CUDA_CONTEXT_BYTES
from chulengo.model.plan_speed import H200

GIB = 1 << 30
CONFIG = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A GPU of 140 GiB, of which 100 are free; returns what its allocator was told."""
    told = {"share": 1.0}
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda, "mem_get_info", lambda place: (100 * GIB, 140 * GIB))
    monkeypatch.setattr(cuda, "get_device_properties", lambda place: SimpleNamespace(total_memory=140 * GIB))
    monkeypatch.setattr(cuda, "get_device_name", lambda place: "Some GPU")
    monkeypatch.setattr(cuda, "get_device_capability", lambda place: (9, 0))
    monkeypatch.setattr(cuda, "get_per_process_memory_fraction", lambda place: told["share"])
    monkeypatch.setattr(cuda, "set_per_process_memory_fraction", lambda share, place: told.update(share=share))
    return told


@pytest.fixture
def seven_b(tmp_path: Path) -> Path:
    """A folder with the config of Llama 2 7B and no weights."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_the_allocator_gets_what_the_context_leaves(card: dict[str, float]) -> None:
    limit_gpu_memory("auto", 8 * GIB)
    assert card["share"] * 140 * GIB == pytest.approx(8 * GIB - CUDA_CONTEXT_BYTES, abs=1)
    assert limit_of(torch.device("cuda", 0)) == 8 * GIB
    found = device_memory("cuda")
    assert (found.free_bytes, found.total_bytes) == (8 * GIB, 8 * GIB)
    assert "limited to 8.00 GiB" in found.name


def test_what_others_hold_is_not_free(card: dict[str, float]) -> None:
    limit_gpu_memory("cuda:0", 120 * GIB)
    assert device_memory("cuda").free_bytes == 100 * GIB


def test_without_a_limit_nothing_is_set(card: dict[str, float]) -> None:
    limit_gpu_memory("auto", None)
    assert card["share"] == 1.0
    assert device_memory("cuda").name == "Some GPU"
    assert device_memory("cuda").free_bytes == 100 * GIB


def test_plan_and_train_keep_to_it_and_choose_as_for_a_smaller_card(
    card: dict[str, float], seven_b: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from chulengo.kernels import ops
    from chulengo.train import bench
    from chulengo.train.engine import choose_engine
    from chulengo.train.finetune import engine_for, plan_settings, wanted_policies

    monkeypatch.setattr(bench, "measured_rates", lambda place: H200)
    monkeypatch.setattr(ops, "choose", lambda *_: ("fused", "here"))
    limited = ["model.gpu_memory_limit=8GiB", "training.max_seq_tokens=2048", "training.batching=packed"]
    words = ["plan", "--model", str(seven_b), "--json", *(w for key in limited[1:] for w in ("--set", key))]
    assert main([*words, "--device-memory", "8GiB"]) == 0
    smaller = json.loads(capsys.readouterr().out)
    assert main(words) == 0
    whole = json.loads(capsys.readouterr().out)
    assert main([*words, "--set", limited[0]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["policies"] == smaller["policies"] != whole["policies"]
    assert found["device"]["free_bytes"] == 8 * GIB
    assert main([*words, "--device-memory", "24GiB", "--set", limited[0]]) == 0
    assert json.loads(capsys.readouterr().out)["policies"] == smaller["policies"]

    card["share"] = 1.0
    config = load_config(None, limited)
    inputs = SimpleNamespace(model_config=CONFIG, max_seq_tokens=2048, validation=None, train=SimpleNamespace(
        rows=[SimpleNamespace(ids=[0] * 2048, encoder_ids=None)]))  # fmt: skip
    choice = engine_for(config, inputs)  # type: ignore[arg-type]
    assert choice.found is not None
    assert choice.found.policies.to_dict() == smaller["policies"]
    assert card["share"] < 8 / 140
    # and without it, with the rest as it is, the whole card is taken
    card["share"] = 1.0
    free = choose_engine(
        "auto", CONFIG, policies=wanted_policies(config), longest_row=2048, plan=plan_settings(config, 2048),
        device="auto", lora={"rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": ("all-linear",), "rslora": False,
                             "dora": False, "train_head": False, "train_embeddings": False},
    )  # fmt: skip
    assert free.found is not None
    assert free.found.policies.to_dict() == whole["policies"]


def test_a_limit_above_the_card(card: dict[str, float], seven_b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(seven_b), "--set", "model.gpu_memory_limit=200GiB"]) == 2
    said = capsys.readouterr().err
    assert "Some GPU has 140.00 GiB" in said
    assert "chulengo plan --device-memory 200GiB" in said
    assert card["share"] == 1.0


def test_a_limit_without_a_gpu(
    seven_b: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", "--model", str(seven_b), "--set", "model.gpu_memory_limit=8GiB"]) == 2
    assert "model.gpu_memory_limit is 8.00 GiB, and this run is on a CPU" in capsys.readouterr().err
    assert main(["generate", "--prompt", "x", "--set", "model.gpu_memory_limit=8GiB"]) == 2
    assert "this run is on a CPU" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["8 XB", "1GiB", "0"])
def test_what_is_no_limit(seven_b: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    assert main(["plan", "--model", str(seven_b), "--set", f'model.gpu_memory_limit="{value}"']) == 2
    assert "model.gpu_memory_limit must be a size of at least 2GiB" in capsys.readouterr().err
    assert main(["plan", "--model", str(seven_b), "--set", "model.gpu_memory_limit=8GiB",
                 "--set", "model.device=cpu"]) == 2  # fmt: skip
    assert "model.gpu_memory_limit is of a GPU, but model.device is cpu" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_allocator_holds_it() -> None:
    limit_gpu_memory("cuda", 3 * GIB)
    try:
        assert device_memory("cuda").free_bytes == 3 * GIB
        torch.empty(GIB, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(3 * GIB, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
