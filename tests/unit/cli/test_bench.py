"""`chulengo bench train`: the engines are compared before they are timed, and rows say what was measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chulengo.cli.main import main
from chulengo.errors import ChulengoError, ConfigError
from chulengo.model.plan import DeviceMemory
from chulengo.model.plan_fast import Policies
from chulengo.model.plan_policies import Wanted
from chulengo.train import bench, engine

SMALL = ["bench", "train", "--batch-size", "1", "--seq-tokens", "16", "--steps", "2", "--warm-up", "1"]
SMALL += ["--device", "cpu"]


def test_a_row_for_each_engine_and_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    for _ in range(2):
        assert main([*SMALL, "--out", str(out), "--activations", "full"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["engine"] for row in rows] == ["fast", "reference", "limit"] * 2
    fast, reference, limit = rows[:3]
    assert fast["first_loss"] == pytest.approx(reference["first_loss"], abs=1e-4)
    assert fast["activations"] == "full"
    assert reference["gradient_checkpointing"] == "true"
    assert fast["step_s"]["p20"] <= fast["step_s"]["p50"] <= fast["step_s"]["p80"]
    assert fast["tokens_per_s"] == pytest.approx(16 / fast["step_s"]["p50"])
    assert limit["tokens_per_s"] == pytest.approx(16 / sum(limit["parts_s"].values()))
    assert fast["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "fast over reference:" in printed
    assert "of the limit" in printed


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--engines", "fast", "--no-limit", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["engine"] == "fast"


def test_engines_that_differ_are_not_timed() -> None:
    def times(loss: float) -> bench.StepTimes:
        return bench.StepTimes((1.0,), loss, None)

    policies = Policies("stream", ("keep",))
    usual = bench.StepSettings(torch.device("cpu"), 1, 16, 4, "nf4", torch.float32, policies, False, 1, 0)
    eighth = replace(usual, policies=replace(policies, weights="stream-fp8"))
    bench.check_same_loss({"fast": times(2.0), "reference": times(2.0005)}, usual)
    bench.check_same_loss({"fast": times(2.0), "reference": times(2.01)}, eighth)
    for losses in ((2.0, math.nan), (math.nan, 2.0), (math.nan, math.nan), (math.inf, math.inf)):
        with pytest.raises(ChulengoError, match=r"not finite: fast (nan|inf|2)"):
            bench.check_same_loss({"fast": times(losses[0]), "reference": times(losses[1])}, usual)
    with pytest.raises(ChulengoError, match="not finite: fast nan"):
        bench.check_same_loss({"fast": times(math.nan)}, usual)
    with pytest.raises(ChulengoError, match=r"fast 2\.0"):
        bench.check_same_loss({"fast": times(2.0), "reference": times(2.01)}, usual)
    with pytest.raises(ChulengoError, match=r"up to 0\.1 nats"):
        bench.check_same_loss({"fast": times(2.0), "reference": times(2.2)}, eighth)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--seq-tokens", "100000"], "--seq-tokens is 100000"), (["--steps", "0"], "--steps is 0"),
        (["--engines", "slow"], "--engines is 'slow'"), (["--rank", "0"], "--rank is 0"),
        (["--dtype", "float16"], "--engines reference"), (["--embeddings", "host"], "leave --embeddings away"),
        (["--graphs", "always"], "leave --graphs away"),
    ],
)  # fmt: skip
def test_bad_input(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *given]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("where", ["nowhere/rows.jsonl", "file/rows.jsonl", "."])
def test_an_out_that_cannot_be_written_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(bench, "time_fast", lambda *arguments: pytest.fail("measured"))
    assert main([*SMALL, "--out", str(tmp_path / where)]) == 2
    said = capsys.readouterr().err
    assert "cannot be written" in said
    assert "Traceback" not in said


def test_rows_are_appended_and_a_check_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.jsonl"

    def stops(*_: object) -> None:
        raise ChulengoError("The end.")

    monkeypatch.setattr(bench, "time_fast", stops)
    assert main([*SMALL, "--out", str(out)]) == 2
    assert not out.exists()
    out.write_text("{}\n")
    assert main([*SMALL, "--out", str(out)]) == 2
    assert out.read_text() == "{}\n"


SEVEN_B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.mark.parametrize(
    ("gib", "batch", "tokens", "weights", "kinds", "graphs", "recompute"),
    [
        (139, 4, 2048, "resident", {"keep"}, False, False), (139, 1, 512, "resident", {"keep"}, True, False),
        (24, 4, 2048, "stream", {"selective", "offload-attention"}, False, True),
    ],
)  # fmt: skip
def test_what_train_would_run_is_measured(
    monkeypatch: pytest.MonkeyPatch, gib: int, batch: int, tokens: int, weights: str, kinds: set[str], graphs: bool,
    recompute: bool,
) -> None:  # fmt: skip
    memory = DeviceMemory("Some GPU", "cuda", gib << 30, gib << 30)
    for module in (engine, bench):
        monkeypatch.setattr(module, "device_memory", lambda device: memory)
    monkeypatch.setattr(engine, "resolve_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(engine, "resolve_dtype", lambda name, place: torch.bfloat16)
    monkeypatch.setattr(engine, "resolve_precision", lambda name, place: "bf16")
    monkeypatch.setattr(engine.ops, "choose", lambda place: ("fused", "here"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (9, 0))

    def planned(wanted: Wanted, rank: int = 16) -> tuple[engine.EngineChoice, bool]:
        return bench.plan_bench(
            SEVEN_B, wanted, batch_size=batch, seq_tokens=tokens, rank=rank, quantization="nf4", dtype=torch.bfloat16,
            device=torch.device("cuda", 0), fast=True,
        )

    choice, again = planned(Wanted())
    assert choice.found is not None
    policies = choice.found.policies
    assert (policies.weights, set(policies.activations), policies.graphs) == (weights, kinds, graphs)
    assert again == recompute
    choice, again = planned(Wanted("stream", "full", "host", "never"))
    assert choice.found is not None
    assert choice.found.policies == Policies("stream", ("full",) * 32, "host", False)
    assert again
    assert planned(Wanted("fp8"))[0].settings()["weights_policy"].endswith("fp8")
    with pytest.raises(ConfigError, match="rank is 256") as caught:
        planned(Wanted(), rank=256)
    assert caught.value.next_step == "--engines reference"


def test_no_memory_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "time_reference", no_room)
    assert main([*SMALL]) == 2
    assert "The reference engine has no room for this step." in capsys.readouterr().err
