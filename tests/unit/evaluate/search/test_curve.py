"""The sample-size curve: sizes, the verdict's rule on known cases, and going on."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from chulengo.errors import ConfigError
from chulengo.evaluate.search.curve import (
    EXACT_MATCH,
    LOSS,
    T_95,
    Point,
    curve_dict,
    judge,
    open_runs,
    read_sizes,
    run_curve,
)

IDENTITY = {"format": "x", "config": {"a.b": 1}, "hashes": {"data": "1"}}


def points(*sizes: tuple[int, list[float]]) -> list[Point]:
    return [Point(rows, tuple(values)) for rows, values in sizes]


def test_sizes() -> None:
    assert read_sizes("1000, 100,all", 5000) == [100, 1000, 5000]
    assert read_sizes("1_000", 5000) == [1000]
    for text, said in (("100,10k", "'10k' is no number"), ("0", "no number"), ("-5", "no number"), ("", "no number"),
                       ("100,100", "twice"), ("5000,all", "twice")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            read_sizes(text, 5000)
    with pytest.raises(ConfigError) as refused:
        read_sizes("100,10000,20000", 5000)
    assert "Sizes of 10,000, 20,000" in str(refused.value)
    assert "--sample-sizes 100,all" in str(refused.value)


def test_worked_case() -> None:
    # 100 -> 400 rows are two doublings; gains of 0.3, 0.2, 0.1 a doubling: mean 0.2, s = 0.1, t = 4.303
    found = judge(points((10, [9.0, 9.0, 9.0]), (100, [2.0, 2.0, 2.0]), (400, [1.4, 1.6, 1.8])), LOSS)
    assert found.gain == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.2 - 4.303 * 0.1 / math.sqrt(3), 0.2 + 4.303 * 0.1 / math.sqrt(3)))
    assert found.answer == "not clear", "the interval reaches below 0"


@pytest.mark.parametrize(
    ("before", "after", "answer"),
    [
        ([2.00, 2.01, 1.99], [1.80, 1.81, 1.79], "yes"),
        ([2.00, 2.01, 1.99], [1.999, 2.008, 1.989], "no"),
        ([2.00, 2.01, 1.99], [1.90, 2.05, 1.97], "not clear"),
        ([2.00, 2.01, 1.99], [2.20, 2.21, 2.19], "no"),  # more data made it worse
        ([2.00], [1.5], "unknown"),
    ],
)
def test_the_answer(before: list[float], after: list[float], answer: str) -> None:
    found = judge(points((100, before), (200, after)), LOSS)
    assert found.answer == answer
    if found.interval is not None:
        low, high = found.interval
        assert low - 1e-9 <= statistics.fmean(before) - statistics.fmean(after) <= high + 1e-9


def test_what_counts_as_worth_it() -> None:
    curve = points((100, [2.00, 2.01, 1.99]), (200, [1.95, 1.9605, 1.9395]))  # 0.05 a doubling
    assert [judge(curve, LOSS, worth).answer for worth in (0.01, 0.049, 0.2)] == ["yes", "not clear", "no"]
    assert "perplexity −4.9 %" in judge(curve, LOSS).text
    assert judge(curve[:1], LOSS).answer == "unknown"


def test_exact_match_counts_upwards() -> None:
    curve = points((100, [0.50, 0.51, 0.49]), (200, [0.60, 0.61, 0.59]))
    found = judge(curve, EXACT_MATCH)
    assert found.answer == "yes"
    assert "exact match rises by 10 percentage points a doubling" in found.text
    assert judge(curve, LOSS).answer == "no"


@pytest.mark.parametrize("value", [0.0, 1.0, 0.25])
def test_a_metric_that_never_moves_says_nothing(value: float) -> None:
    found = judge(points((10, [0.1, 0.2, 0.3]), (100, [value] * 3), (200, [value] * 3)), EXACT_MATCH)
    assert (found.answer, found.interval) == ("unknown", None)
    assert f"exact match is {value:g} in every run with 100 and 200 rows" in found.text
    assert judge(points((100, [0.0] * 3), (200, [0.0, 0.0, 0.001])), EXACT_MATCH).answer == "no"
    assert judge(points((100, [0.0] * 3), (200, [1.0] * 3)), EXACT_MATCH).answer == "yes"


def test_one_point_is_one() -> None:
    said = judge(points((100, [0.50, 0.51, 0.49]), (200, [0.51, 0.52, 0.50])), EXACT_MATCH).text
    assert "rises by 1 percentage point a doubling" in said
    assert "the 1 percentage point that" in said or "and 1 percentage point would" in said


def test_quantiles_of_t() -> None:
    scipy = pytest.importorskip("scipy.stats")
    for degrees, value in enumerate(T_95, 1):
        assert value == pytest.approx(scipy.t.ppf(0.975, degrees), abs=5e-4)


def test_it_goes_on_where_it_was_left(tmp_path: Path) -> None:
    path, asked = tmp_path / "curve.jsonl", list[tuple[int, int]]()

    def run(rows: int, repeat: int) -> dict[str, float]:
        if len(asked) == 4:
            asked.append((0, 0))
            raise KeyboardInterrupt
        asked.append((rows, repeat))
        return {LOSS: 3 - math.log10(rows) + repeat / 100}

    with pytest.raises(KeyboardInterrupt):
        run_curve(path, IDENTITY, [10, 100, 1000], 2, run)
    assert asked[:4] == [(10, 0), (100, 0), (1000, 0), (10, 1)], "a whole curve first"
    with path.open("a") as file:
        file.write('{"kind": "run", "rows": 100, "rep')  # killed in the middle of a line
    known: list[bool] = []
    found = run_curve(path, IDENTITY, [10, 100, 1000], 2, run, on_end=lambda *said: known.append(said[-1]))
    assert asked[5:] == [(100, 1), (1000, 1)]
    assert known == [True] * 4 + [False] * 2
    assert found == {LOSS: [Point(r, (3 - math.log10(r), 3 - math.log10(r) + 0.01)) for r in (10, 100, 1000)]}
    more = run_curve(path, IDENTITY, [10, 30, 100, 1000], 2, run)
    assert asked[7:] == [(30, 0), (30, 1)], "a size between: only that is run"
    assert len(more[LOSS]) == 4


def test_another_curve_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    assert open_runs(path, IDENTITY) == {}
    assert open_runs(path, IDENTITY) == {}
    with pytest.raises(ConfigError, match=r"belongs to another curve:\n  - a\.b was 1, now 2"):
        open_runs(path, IDENTITY | {"config": {"a.b": 2}})
    path.write_text('{"kind": "train", "step": 1}\n')
    with pytest.raises(ConfigError, match="not written by"):
        open_runs(path, IDENTITY)


def test_json() -> None:
    curves = {
        LOSS: points((100, [2.0, 2.1]), (200, [1.9, 1.7])),
        EXACT_MATCH: points((100, [0.1, 0.2]), (200, [0.3, 0.3])),
    }
    verdicts = {metric: judge(each, metric) for metric, each in curves.items()}
    found: dict[str, Any] = json.loads(json.dumps(curve_dict(curves, verdicts, equal="epochs")))
    assert found["metric"] == LOSS
    point = {"rows": 200, "value": pytest.approx(1.8), "low": 1.7, "high": 1.9, "values": [1.9, 1.7]}
    assert found["points"][1] == point
    assert [each["metric"] for each in found["curves"]] == [LOSS, EXACT_MATCH]
    assert found["verdict"]["answer"] in ("yes", "no", "not clear")
