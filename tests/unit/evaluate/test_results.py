from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from chulengo.errors import ChulengoError
from chulengo.evaluate.results import Score, wilson_interval, write_results

Z2 = 1.959963984540054**2


@pytest.mark.parametrize("trials", [1, 10, 1000])
def test_wilson_interval_at_the_ends(trials: int) -> None:
    # the equation below has these closed solutions when every trial failed or succeeded
    assert wilson_interval(0, trials) == (0.0, pytest.approx(Z2 / (trials + Z2), rel=1e-12))
    assert wilson_interval(trials, trials) == (pytest.approx(trials / (trials + Z2), rel=1e-12), 1.0)


def test_wilson_interval_solves_its_equation() -> None:
    # the bounds are the p at which (share - p)^2 = z^2 p (1 - p) / n
    low, high = wilson_interval(37, 120)
    assert low < 37 / 120 < high
    for bound in (low, high):
        assert (37 / 120 - bound) ** 2 == pytest.approx(Z2 * bound * (1 - bound) / 120, rel=1e-9)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_nonsense(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="trials"):
        wilson_interval(successes, trials)


def test_a_score_carries_its_definition() -> None:
    score = Score("x", "x/1", "what it is", 0.5, 2, (0.1, 0.9), {"n": 1}, ({"source": "a"}, {"source": "b"}))
    assert score.to_dict() == {
        "name": "x", "version": "x/1", "definition": "what it is", "value": 0.5, "num_items": 2,
        "interval_95": [0.1, 0.9], "details": {"n": 1}, "items": [{"source": "a"}, {"source": "b"}],
    }
    assert "items" not in score.to_dict(with_items=False)


def test_results_are_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "r.json"
    write_results(file, {"a": "é"})
    assert json.loads(file.read_text(encoding="utf-8")) == {"a": "é"}
    with pytest.raises(ValueError):
        write_results(file, {"a": float("nan")})
    with pytest.raises(ChulengoError, match=r"half of a surrogate pair \(\\ud800\) .* after '.*\"a\": \"é'"):
        write_results(file, {"a": "é\ud800"})
    assert json.loads(file.read_text(encoding="utf-8")) == {"a": "é"}
    assert os.listdir(file.parent) == ["r.json"]


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ChulengoError, match="cannot be written"):
        write_results(tmp_path / "file" / "r.json", {})
    assert os.listdir(tmp_path) == ["file"]
