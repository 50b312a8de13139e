"""What the benchmarks conclude from their rows: a wrong verdict would be quoted."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SEVEN_B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark named by the test's parameter, as Python finds it when it is run as a script."""
    folder = Path(__file__).parents[3] / "benchmarks"
    if not folder.is_dir():
        pytest.skip("benchmarks are part of the checkout only")
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module(request.param)
    for name in ("cards", "commands", "fp8_gate", "two_gpus"):
        sys.modules.pop(name, None)


def scored(weights: str, losses: list[float]) -> list[dict[str, Any]]:
    """Rows of one policy: a common start, and the given loss of each seed at the end."""
    rows = [{"stage": "tune", "weights": weights, "seed": seed, "step": step, "own_loss": loss, "bf16_loss": loss}
            for seed, end in enumerate(losses) for step, loss in ((0, 3.0), (200, end))]  # fmt: skip
    return [*rows, {"stage": "tune", "weights": weights, "seed": 0, "step": "all", "train_losses": [3.0]}]


@pytest.mark.parametrize("script", ["fp8_gate"], indirect=True)
@pytest.mark.parametrize(("losses", "verdict"), [
    ([2.002, 2.004, 2.006], "mean +0.200 %, spread 0.100, seeds +0.100, +0.200, +0.300: gate of 0.3 % passed"),
    ([2.006, 2.008, 2.010], "mean +0.400 %, spread 0.100, seeds +0.300, +0.400, +0.500: gate of 0.3 % FAILED"),
    ([2.0, 2.0], "seeds +0.000, +0.000: too few seeds for the gate"),
])  # fmt: skip
def test_the_gate_of_fp8(script: Any, losses: list[float], verdict: str) -> None:
    said = script.report(scored("stream", [2.0, 2.0, 2.0]) + scored("resident-fp8", losses))
    assert verdict in said


@pytest.mark.parametrize("script", ["fp8_gate"], indirect=True)
def test_a_gate_without_a_trained_policy(script: Any) -> None:
    alone = script.report(scored("stream", [2.0, 2.0, 2.0]) + scored("resident-fp8", [])[:-1])
    assert "passed" not in alone
    assert "nothing was fine-tuned" in script.report([])


@pytest.mark.parametrize("script", ["cards"], indirect=True)
def test_the_largest_micro_batch_of_a_card(script: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SEVEN_B))
    given = argparse.Namespace(model=str(tmp_path), seq=2048, rank=16, optimizer="adamw_8bit", cpu=False)
    most = script.largest_batch(given, 8)
    assert 4 <= most < 16
    assert script.plan_of(given, 8, most)["fits"]
    over = script.plan_of(given, 8, most + 1)
    assert not over["fits"]
    assert script.plan_of(given, 8, most + 1, tuple(over["smallest_change"]))["fits"]
    assert script.largest_batch(given, 3) == 0


@pytest.mark.parametrize("script", ["two_gpus"], indirect=True)
def test_two_gpus_over_one(script: Any) -> None:
    def row(processes: int, speed: float) -> dict[str, Any]:
        return {"processes": processes, "tokens_per_s": speed, "tokens_per_s_p20_p50_p80": [0, speed, 0]}

    said = script.compared([row(1, 100.0), row(2, 190.0), row(1, 110.0), row(2, 198.0)], 2)
    assert "1.900, 1.800 in 2 pairs of runs; 1.848 by the median step" in said
    one, two = {"losses": [2.0, 1.9], "accumulation": 2}, {"losses": [2.0, 1.91], "processes": 2}
    assert "DIFFERENT, at most 5.2e-03" in script.same_losses(one, two)
    assert "the same, at most 0.0e+00" in script.same_losses(one, two | {"losses": [2.0, 1.9]})
