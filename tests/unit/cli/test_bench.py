"""`chulengo bench train`: the engines are compared before they are timed, and rows say what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chulengo.cli.main import main
from chulengo.errors import ChulengoError
from chulengo.train import bench

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

    usual = bench.StepSettings(torch.device("cpu"), 1, 16, 4, "nf4", torch.float32, "stream", "keep", 1, 0)
    eighth = replace(usual, weights="stream-fp8")
    bench.check_same_loss({"fast": times(2.0), "reference": times(2.0005)}, usual)
    bench.check_same_loss({"fast": times(2.0), "reference": times(2.01)}, eighth)
    with pytest.raises(ChulengoError, match=r"fast 2\.0"):
        bench.check_same_loss({"fast": times(2.0), "reference": times(2.01)}, usual)
    with pytest.raises(ChulengoError, match=r"up to 0\.1 nats"):
        bench.check_same_loss({"fast": times(2.0), "reference": times(2.2)}, eighth)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--seq-tokens", "100000"], "--seq-tokens is 100000"), (["--steps", "0"], "--steps is 0"),
        (["--engines", "slow"], "--engines is 'slow'"), (["--rank", "0"], "--rank is 0"),
    ],
)  # fmt: skip
def test_bad_input(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *given]) == 2
    assert said in capsys.readouterr().err
