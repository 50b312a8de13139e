"""The two engines through the door that `chulengo train` uses: one run, two loops, the same numbers.

Besides the weights and the choice of rows the engines share nothing: transformers' trainer over peft and bitsandbytes
on one side, our own loop over our own model on the other. So one is the oracle of the other, for the loss as for
accumulation, clipping, schedule, AdamW, evaluation and what is saved.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import tiny_models
from chulengo.config import load_config
from chulengo.errors import ConfigError, TrainingError
from chulengo.model import factor_gradients, llama
from chulengo.model.fast import load_fast
from chulengo.model.linear_group import LinearGroup
from chulengo.model.load import load_base
from chulengo.model.session import open_session
from chulengo.train.finetune import RunResult, finetune
from chulengo.train.metrics import MetricsFile
from training_kit import assert_equal_tensors, make_llama, make_model, make_rows, train, trained_tensors

# float32: rounding differs by 1e-7 a step and is carried on; measured 1e-5 after 100 steps, and 5e-5 where rank-
# stabilised scaling makes every step 8 times as large
CLOSE = 1e-4
ROWS, VALIDATION = make_rows(24), make_rows(6, seed=1)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products this small only make threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_model_folder(tmp_path_factory.mktemp("tiny") / "llama", max_position_embeddings=512)


def ran(model: Path, data: Path, out: Path, engine: str, *more: str, said: list[str] | None = None) -> RunResult:
    settings = [
        f"model.name={model}", f"model.engine={engine}", "model.cpu_threads=1", f"data.train={data}",
        "data.num_rows=240", "data.validation_fraction=0.1", "training.max_seq_tokens=320", "training.overlong=drop",
        "training.batch_size=2", "training.gradient_accumulation=2",
        "training.eval_every_steps=50", "training.learning_rate=1e-3", f"out={out}", *more,
    ]  # fmt: skip
    return finetune(load_config(None, settings), message=(said if said is not None else []).append)


def apart(left: RunResult, right: RunResult) -> float:
    """Returns the largest relative difference of a loss, over all training and validation rows of two runs."""
    pairs = zip(*(MetricsFile(run.paths.metrics).rows() for run in (left, right)), strict=True)
    differences = []
    for a, b in pairs:
        same = ("kind", "step", "tokens", "supervised_tokens", "learning_rate")
        assert [a.get(key) for key in same] == [b.get(key) for key in same]
        differences.append(abs(a["loss"] - b["loss"]) / b["loss"])
    return max(differences)


@pytest.mark.parametrize(
    ("more", "bound"),
    [
        (("training.max_steps=100",), CLOSE),
        (("training.max_steps=30", "training.batching=packed", "model.quantization=none", "lora.rslora=true",
          "training.weight_decay=0.1", "training.schedule=linear", "training.max_grad_norm=0.3"), CLOSE),
        # 8-bit states are one tensor's here, and those of small tensors in 32 bits there: 8e-5
        (("training.max_steps=30", "training.optimizer=paged_adamw_8bit"), 5e-4),
        (("training.max_steps=30", "lora.dora=true", "training.weight_decay=0.1"), CLOSE),
    ],
    ids=["nf4", "packed", "8-bit", "dora"],
)  # fmt: skip
def test_one_trajectory_of_real_rows(
    tiny: Path, shared_data: Path, tmp_path: Path, more: tuple[str, ...], bound: float
) -> None:
    data = next((shared_data / "guanaco-llama2-1k").rglob("*.parquet"))
    fast, reference = (ran(tiny, data, tmp_path / engine, engine, *more) for engine in ("fast", "reference"))
    difference = apart(fast, reference)
    print(f"largest difference of a loss: {difference:.1e}")
    assert difference < bound
    rows = MetricsFile(fast.paths.metrics).rows()
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3, "something was learnt"


def test_one_trajectory_of_a_trained_model(shared_data: Path, tmp_path: Path) -> None:
    data = next((shared_data / "guanaco-llama2-1k").rglob("*.parquet"))
    fast, reference = (
        ran(shared_data / "stories260K", data, tmp_path / engine, engine, "training.max_steps=100",
            "training.batch_size=1", "training.gradient_accumulation=1", "training.max_seq_tokens=480")
        for engine in ("fast", "reference")
    )  # fmt: skip
    assert apart(fast, reference) < CLOSE


def test_dora_is_trained_by_the_fast_engine(tiny: Path, tiny_data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result = ran(tiny, tiny_data, tmp_path / "run", "auto", "lora.dora=true", "training.max_steps=6", said=said)
    assert [line for line in said if "engine: fast" in line and "adapter folded" in line]
    ids = torch.tensor([[1, 5, 9, 200, 77, 3]])
    fast = load_fast(tiny, device="cpu")
    fast.load_adapter(result.paths.adapter)
    with torch.no_grad():
        base = load_base(tiny, device="cpu")
        plain = peft.PeftModel.from_pretrained(base, str(result.paths.adapter)).eval()(ids).logits[0]
    expected = fast.logits(ids[0].tolist())
    # W' is rounded where PEFT rounds two products: 1.5e-5 here, 6e-6 of folded LoRA after the same steps
    assert float((plain - expected).norm() / expected.norm()) < 2e-5
    magnitudes = [name for name in load_file(result.paths.adapter / "adapter_model.safetensors") if "magnitude" in name]
    assert len(magnitudes) == 7 * len(fast.weights.layers)


def test_a_wrong_engine_is_seen(tiny: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = factor_gradients._add_product

    def wrong(factors: Any, left: Any, product: Any, scale: float) -> None:
        right(factors, left, product, 1.01 * scale)

    reference = ran(tiny, tiny_data, tmp_path / "reference", "reference", "training.max_grad_norm=0")
    monkeypatch.setattr(factor_gradients, "_add_product", wrong)
    fast = ran(tiny, tiny_data, tmp_path / "fast", "fast", "training.max_grad_norm=0")
    norms = [
        [row["grad_norm"] for row in MetricsFile(run.paths.metrics).rows() if row["kind"] == "train"]
        for run in (fast, reference)
    ]
    # AdamW forgets the size of a gradient, so the losses hardly show it; the norms do
    assert norms[0] == pytest.approx([1.01 * norm for norm in norms[1]], rel=1e-3)


def test_what_is_saved(tiny: Path, tiny_data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result = ran(tiny, tiny_data, tmp_path / "run", "fast", "lora.dropout=0.1", said=said)
    folder, ids = result.paths.adapter, torch.tensor([[1, 5, 9, 200, 77, 3]])
    fast = load_fast(tiny, device="cpu")
    fast.load_adapter(folder)
    expected = fast.logits(ids[0].tolist())
    with torch.no_grad():
        plain = peft.PeftModel.from_pretrained(load_base(tiny, device="cpu"), str(folder)).eval()(ids).logits[0]
        session = open_session(None, str(tmp_path / "run"), device="cpu", engine="reference").model(ids).logits[0]
        alone = load_base(tiny, device="cpu")(ids).logits[0]
    assert torch.equal(plain, session)
    assert float((plain - expected).norm() / expected.norm()) < 1e-5
    assert float((plain - alone).norm() / alone.norm()) > 0.01
    assert not list(result.paths.root.rglob("README.md"))
    manifest = json.loads(result.paths.manifest.read_text())
    config = load_config(result.paths.config, saved=True)
    assert (config.model.engine, config.model.weights_policy, config.model.activations_policy) == (
        "fast", "resident", "keep",
    )  # fmt: skip
    assert manifest["engine"]["name"] == "fast"
    assert manifest["engine"]["adapter"] == "separate"
    assert [line for line in said if "engine: fast · weights resident, float32" in line]


def test_packed_is_unpacked(tmp_path: Path) -> None:
    # every row in every step, so that packs and rows are the same steps
    folder, found = make_llama(tmp_path / "llama"), []
    for batching in ("padded", "group_by_length", "packed"):
        model = make_model(folder, engine="fast")
        _, rows = train(
            model, tmp_path / batching, ROWS, VALIDATION, batching=batching, batch_size=len(ROWS),
            gradient_accumulation=1, max_steps=12, learning_rate=1e-3, keep_best=False,
        )
        found.append(([row["loss"] for row in rows], trained_tensors(model)))
    for losses, tensors in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-6)
        for name, value in found[0][1].items():
            assert float((value - tensors[name]).norm()) < 1e-4 * float(value.norm()), name


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_policies_do_not_change_a_bit(tmp_path: Path, dropout: float) -> None:
    folder, found = make_llama(tmp_path / "llama"), []
    policies = [("stream", "keep"), ("resident", "keep"), ("resident", "full"), ("stream", "selective")]
    for weights, activations in policies:
        model = load_fast(folder, device="cpu", weights=weights, activations=activations)
        model.attach_lora(rank=4, alpha=8.0, dropout=dropout, seed=1)
        _, rows = train(model, tmp_path / f"{weights}-{activations}", ROWS, VALIDATION, epochs=3.0)
        found.append(([row["loss"] for row in rows], trained_tensors(model)))
    for losses, tensors in found[1:]:
        assert losses == found[0][0]
        assert_equal_tensors(tensors, found[0][1])


def test_matrices_are_folded_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(make_llama(tmp_path / "llama"), engine="fast")
    refolds: list[bool] = []
    right = type(model).nll

    def counted(self: Any, batch: Any, *, refold: bool = True) -> Any:
        refolds.append(refold)
        return right(self, batch, refold=refold)

    monkeypatch.setattr(type(model), "nll", counted)
    train(model, tmp_path / "run", ROWS, batch_size=2, gradient_accumulation=3, max_steps=4)
    assert refolds == [True, False, False] * 4


def test_products_in_fp8_train_alike(tmp_path: Path) -> None:
    """A model that was really pretrained learns as much as with exact products; its adapter is of the same kind."""
    said: list[str] = []
    data = resources.files("chulengo.nano") / "demo" / "train.jsonl"
    short = ("training.max_steps=12", "training.eval_every_steps=6", "training.learning_rate=3e-3", "lora.rank=4")
    eighth = ran(Path("nano"), Path(str(data)), tmp_path / "fp8", "fast", "model.weights_policy=fp8", *short, said=said)
    exact = ran(Path("nano"), Path(str(data)), tmp_path / "exact", "fast", *short)
    assert [line for line in said if "engine: fast · weights resident-fp8" in line]
    assert 1e-6 < apart(eighth, exact) < 0.1
    assert eighth.tuned_loss is not None
    assert exact.tuned_loss is not None
    assert exact.base_loss is not None
    learnt = exact.base_loss - exact.tuned_loss
    assert learnt > 3
    assert abs(eighth.tuned_loss - exact.tuned_loss) < 0.05 * learnt  # found: 0.012
    files = [load_file(run.paths.adapter / "adapter_model.safetensors") for run in (eighth, exact)]
    assert {name: value.shape for name, value in files[0].items()} == {
        name: value.shape for name, value in files[1].items()
    }
    assert json.loads(eighth.paths.manifest.read_text())["engine"]["adapter"] == "separate"


def test_a_factor_that_no_gradient_reaches_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = llama.add_factor_gradients

    def wrong(*arguments: Any) -> None:
        (group,) = (each for each in arguments if isinstance(each, LinearGroup))
        if "layers.1.mlp.down_proj" not in group.names[0]:
            right(*arguments)

    monkeypatch.setattr(llama, "add_factor_gradients", wrong)
    model = make_model(make_llama(tmp_path / "llama"), engine="fast")
    with pytest.raises(TrainingError, match=r"2 trainable tensor.*layers\.1\.mlp\.down_proj"):
        train(model, tmp_path / "run", ROWS)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("lora={dora: true, dropout: 0.1}", "lora.dora is true"), ("lora.train_head=true", "lora.train_head is true"),
        ("model.quantization=fp4", "model.quantization is fp4"), ("model.attention=eager", "model.attention is eager"),
    ],
)  # fmt: skip
def test_what_is_not_covered(tiny: Path, tiny_data: Path, tmp_path: Path, setting: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ran(tiny, tiny_data, tmp_path / "fast", "fast", setting)
    assert reason in str(caught.value)
    assert "--set model.engine=reference" in str(caught.value)
    assert not (tmp_path / "fast").exists()
    said: list[str] = []
    result = ran(tiny, tiny_data, tmp_path / "auto", "auto", setting, "training.max_steps=2", said=said)
    lines = [line for line in said if line.startswith("engine: reference")]
    assert len(lines) == 1
    assert reason in lines[0]
    assert load_config(result.paths.config, saved=True).model.engine == "reference"
    assert json.loads(result.paths.manifest.read_text())["engine"]["reason"] in lines[0]


def test_the_reference_engine_gives_no_reason_when_asked_for(tiny: Path, tiny_data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    ran(tiny, tiny_data, tmp_path / "run", "reference", "training.max_steps=2", said=said)
    assert said[0] == "engine: reference (transformers, peft, bitsandbytes)"


def test_one_type_for_everything(tiny: Path, tiny_data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result = ran(
        tiny, tiny_data, tmp_path / "run", "auto", "training.precision=bf16", "training.max_steps=2", said=said
    )
    assert load_config(result.paths.config, saved=True).model.compute_dtype == "bfloat16"
    assert "engine: fast · weights resident, bfloat16" in said[0]
    for settings, reason in (
        (["model.compute_dtype=float16"], "Products would be in float16"),
        (["model.compute_dtype=bfloat16", "training.precision=float32"], "mix two types"),
    ):
        with pytest.raises(ConfigError, match=reason):
            ran(tiny, tiny_data, tmp_path / "other", "fast", *settings)


@pytest.mark.slow
def test_two_processes_write_one_run(tiny: Path, tiny_data: Path, tmp_path: Path) -> None:
    more = ["training.max_steps=8", "training.eval_every_steps=4", "model.device=cpu", "lora.dropout=0"]
    one = ran(tiny, tiny_data, tmp_path / "one", "fast", *more, "training.batch_size=4")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = [
        "model.cpu_threads=1", "data.num_rows=240", "data.validation_fraction=0.1", "training.max_seq_tokens=320",
        "training.overlong=drop", "training.batch_size=2", "training.gradient_accumulation=2",
        "training.learning_rate=1e-3", *more,
    ]  # fmt: skip
    words = ["train", "--engine", "fast", "--model", tiny, "--data", tiny_data, "--out", tmp_path / "two"]
    sets = [word for each in settings for word in ("--set", each)]
    command = [sys.executable, "-m", "chulengo", *map(str, words), *sets]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}  # fmt: skip
    processes = [
        subprocess.Popen(
            command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert said[1][0] == "", "rank 0 speaks"
    rows = MetricsFile(tmp_path / "two" / "metrics.jsonl").rows()
    expected = MetricsFile(one.paths.metrics).rows()
    assert [(row["kind"], row["step"]) for row in rows] == [(row["kind"], row["step"]) for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-6)
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "two" / "run.lock").exists()
