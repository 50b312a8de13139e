from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chulengo.errors import TrainingError
from chulengo.train.metrics import MetricsFile, smoothed


def _row(step: int, **more: float) -> dict[str, object]:
    return {"kind": "train", "step": step, "loss": 1.0 / step, **more}


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.rows() == []
    rows = [_row(1), _row(2, grad_norm=0.25), {"kind": "validation", "step": 2, "loss": 1.5, "perplexity": 4.48}]
    for row in rows:
        file.append(row)
    assert MetricsFile(file.path).rows() == rows  # without close: each row is out at once


def test_not_finite_numbers_are_valid_json_and_come_back(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.append({"step": 1, "loss": math.nan, "x": [math.inf, -math.inf]})

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    json.loads(file.path.read_text(), parse_constant=refuse)
    (row,) = file.rows()
    assert math.isnan(row["loss"])
    assert row["x"] == [math.inf, -math.inf]


def test_a_torn_last_line_is_skipped_and_repaired(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert MetricsFile(path).rows() == [{"step": 1}]
    file = MetricsFile(path)
    file.append({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_last_line_that_only_lacks_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert [row["step"] for row in MetricsFile(path).rows()] == [1, 2]
    MetricsFile(path).append({"step": 3})
    assert [row["step"] for row in MetricsFile(path).rows()] == [1, 2, 3]


def test_a_torn_multibyte_character_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"note": "\xc3')
    assert MetricsFile(path).rows() == [{"step": 1}]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{oops\n{"step": 3}\n')
    with pytest.raises(TrainingError, match="line 2 is not JSON"):
        MetricsFile(path).rows()


def test_truncation_drops_later_steps_only_and_appending_goes_on(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    for step in range(1, 8):
        file.append(_row(step))
    file.append({"kind": "validation", "step": 5, "loss": math.nan})
    assert file.truncate_after(5) == 2
    file.append(_row(6))
    assert [row["step"] for row in file.rows()] == [1, 2, 3, 4, 5, 5, 6]
    assert math.isnan(file.rows()[5]["loss"])
    assert MetricsFile(tmp_path / "none.jsonl").truncate_after(3) == 0


def test_a_killed_writer_loses_no_whole_row(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    code = (
        "import sys\nfrom pathlib import Path\nfrom chulengo.train.metrics import MetricsFile\n"
        "f = MetricsFile(Path(sys.argv[1]))\nfor s in range(10**9):\n    f.append({'step': s})\n"
        "    if s == 500: print('go', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = [row["step"] for row in MetricsFile(path).rows()]
    assert steps == list(range(len(steps)))
    assert len(steps) > 500


def test_smoothing_by_hand() -> None:
    # 2, then (0.5*2 + 4) / 1.5, then nothing new for nan, then (0.5*5 + 1) / 1.75
    assert smoothed([2.0, 4.0, math.nan, 1.0], 0.5) == pytest.approx([2.0, 10 / 3, 10 / 3, 2.0])
    assert all(math.isnan(value) for value in smoothed([math.nan]))
