from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chulengo.train.plots import plot_losses, thinned, wants_log, without_lag


def _rows(count: int, nan_from: int | None = None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        loss = math.nan if nan_from and step >= nan_from else 1.0 + math.exp(-step / 10) + 0.1 * (step % 3)
        rows.append({"kind": "train", "step": step, "loss": loss, "learning_rate": 1e-4, "grad_norm": 1.0})
        if step % 10 == 0:
            rows.append({"kind": "validation", "step": step, "loss": 1.1 + abs(step - 20) / 50})
    return rows


def _texts(svg: Path) -> str:
    # glyphs are paths; the text stands in comments beside them
    return "\n".join(line.strip() for line in svg.read_text().splitlines() if line.lstrip().startswith("<!--"))


@pytest.mark.parametrize(
    "rows", [[], _rows(1), _rows(40), _rows(40, nan_from=25), _rows(3, nan_from=1), _rows(5000)],
    ids=["none", "one", "forty", "nan", "all-nan", "thousands"],
)  # fmt: skip
def test_any_number_of_points_gives_a_picture(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    png, svg = tmp_path / "plots" / "loss.png", tmp_path / "plots" / "loss.svg"
    plot_losses(rows, png, svg, title="nano on demo")
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (1600, 1000)
    assert svg.stat().st_size < 1_000_000
    assert "nano on demo" in _texts(svg)


def test_the_best_validation_point_and_the_first_nan_are_named(tmp_path: Path) -> None:
    plot_losses(_rows(40, nan_from=25), tmp_path / "a.png", tmp_path / "a.svg")
    texts = _texts(tmp_path / "a.svg")
    assert "best 1.1 (perplexity 3.004), step 20" in texts
    assert "not finite from step 25" in texts


def test_same_rows_same_bytes_also_in_another_process(tmp_path: Path) -> None:
    plot_losses(_rows(30), tmp_path / "a.png", tmp_path / "a.svg", title="t")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nfrom test_plots import _rows\nfrom chulengo.train.plots import plot_losses\n"
        f"plot_losses(_rows(30), Path({str(tmp_path)!r}) / 'b.png', Path({str(tmp_path)!r}) / 'b.svg', title='t')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_thinning_keeps_spikes_and_the_ends_of_the_range() -> None:
    values = [1.0] * 100_000
    values[54_321], values[77_777] = 9.0, math.nan
    steps, kept = thinned(list(range(100_000)), values)
    assert len(kept) <= 2000
    assert max(kept) == 9.0
    assert steps[kept.index(9.0)] == 54_321
    assert steps == sorted(steps)


def test_smoothing_has_no_lag_and_leaves_gaps() -> None:
    line = [float(i) for i in range(200)]
    smooth = without_lag(line)
    assert smooth[100] == pytest.approx(100.0, abs=0.5)  # a one-sided average would be 5 behind
    assert math.isnan(without_lag([1.0, math.nan, 1.0])[1])


def test_log_axis_only_when_it_helps() -> None:
    assert not wants_log([3.0, 1.0, 0.5])
    assert wants_log([3.0, 0.1])
    assert not wants_log([3.0, 0.0])
    assert not wants_log([math.nan])
