"""What is said of numbers that are not finite: where the batch is, whose fault it can be, and what may help."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from chulengo.errors import TrainingError
from chulengo.train.guards import check_finite
from chulengo.train.ranks import Ranks


def told(folder: Path, **changes: Any) -> TrainingError:
    batch = {"input_ids": torch.ones(1, 2, dtype=torch.int64), "sources": ["rows.jsonl:3"]}
    given: dict[str, Any] = {
        "step": 1, "batches": [batch], "folder": folder, "precision": "bf16", "ranks": Ranks(0, 1),
    }  # fmt: skip
    with pytest.raises(TrainingError) as caught:
        check_finite([math.nan], 1.0, **given | changes)
    return caught.value


def test_before_an_update_it_is_the_model(tmp_path: Path) -> None:
    error = told(tmp_path)
    assert "base model's own" in error.given
    assert "weights" in str(error.next_step)
    assert "--set training.precision=float32" in str(error.next_step)
    assert "learning_rate" not in str(error.next_step)
    assert "rows" not in str(error.next_step)
    assert "float32" not in str(told(tmp_path, precision="float32").next_step)


def test_after_an_update_it_may_be_rows_or_rate(tmp_path: Path) -> None:
    error = told(tmp_path, step=7)
    assert "base model" not in error.given
    assert "look at those rows" in str(error.next_step)
    assert "training.learning_rate or --set training.precision=float32" in str(error.next_step)
    assert "float32" not in str(told(tmp_path, step=7, precision="float32").next_step)


def test_each_rank_saves_its_own_batch(tmp_path: Path) -> None:
    for rank in (0, 1):
        batch = {"input_ids": torch.ones(1, 2, dtype=torch.int64), "sources": [f"row {rank}"]}
        assert f"bad_batch-step3-rank{rank}" in told(tmp_path, step=3, ranks=Ranks(rank, 2), batches=[batch]).given
    for rank in (0, 1):
        saved = json.loads((tmp_path / f"bad_batch-step3-rank{rank}" / "batch.json").read_text())
        assert saved["rows"] == [f"row {rank}"]
    assert (tmp_path / "bad_batch-step1").is_dir() is False
    told(tmp_path)
    assert (tmp_path / "bad_batch-step1").is_dir()
