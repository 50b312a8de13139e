"""The pictures: every kind of trial, the bytes, and searches that have nothing to show yet."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from chulengo.evaluate.search import plots
from chulengo.evaluate.search.curve import EXACT_MATCH, LOSS, Point, judge
from chulengo.evaluate.search.plots import plot_curve, plot_search
from chulengo.evaluate.search.space import dimension
from chulengo.evaluate.search.study import Trial

SPACE = (dimension("training.learning_rate", "1e-5..1e-1:log", "float"), dimension("lora.rank", "4,8", "int"),
         dimension("training.schedule", "linear,constant_with_warmup", "other"),
         dimension("lora.dropout", "0..0.5", "float"))  # fmt: skip


def trial(number: int, state: str, value: float | None, *points: float) -> Trial:
    params = {"training.learning_rate": 10 ** (-1 - number / 3), "lora.rank": 4 if number % 2 else 8,
              "training.schedule": "linear", "lora.dropout": number / 20}  # fmt: skip
    return Trial(number, params, value, state, points=dict(enumerate(points, 1)))


def texts(svg: Path) -> str:
    assert ET.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    return svg.read_text()


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "new" / "a.png", tmp_path / "new" / "a.svg"


def test_search(pictures: tuple[Path, Path]) -> None:
    trials = [
        trial(0, "complete", 2.0, 3.0, 2.0), trial(1, "pruned", None, 5.0), trial(2, "failed", None),
        trial(3, "failed", None, float("inf")), trial(4, "complete", 0.05, 0.4, 0.05),
        trial(5, "interrupted", None, 1.0),
    ]  # fmt: skip
    plot_search(trials, SPACE, *pictures, title="nano & co <1>")
    png, svg = pictures
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(png.read_bytes()[16:20], "big") == 2160
    assert "complete" in texts(svg) or "<path" in texts(svg)
    first = [path.read_bytes() for path in pictures]
    plot_search(trials, SPACE, *pictures, title="nano & co <1>")
    assert [path.read_bytes() for path in pictures] == first, "the same trials, the same bytes"
    plot_search(trials[:4], SPACE, *pictures, title="nano & co <1>")
    assert [path.read_bytes() for path in pictures] != first


@pytest.mark.parametrize("trials", [[], [trial(0, "failed", None)], [trial(0, "complete", 1.0)]])
def test_little_to_show(pictures: tuple[Path, Path], trials: list[Trial]) -> None:
    plot_search(trials, SPACE, *pictures)
    assert all(path.stat().st_size > 1000 for path in pictures)


def test_curve(pictures: tuple[Path, Path]) -> None:
    curves = {
        LOSS: [Point(100, (2.0, 2.1, 2.05)), Point(1000, (1.5, 1.52, 1.55)), Point(10000, (1.4, 1.41, 1.4))],
        EXACT_MATCH: [Point(100, (0.0, 0.1, 0.0)), Point(1000, (0.4, 0.5, 0.4)), Point(10000, (0.6, 0.6, 0.7))],
    }
    plot_curve(curves, {metric: judge(points, metric) for metric, points in curves.items()}, *pictures, title="nano")
    png, svg = pictures
    assert int.from_bytes(png.read_bytes()[16:20], "big") == 1600
    texts(svg)


def test_curve_of_one_size(pictures: tuple[Path, Path]) -> None:
    plot_curve({LOSS: [Point(100, (2.0,))]}, {LOSS: judge([Point(100, (2.0,))], LOSS)}, *pictures)
    assert pictures[0].stat().st_size > 1000


@pytest.mark.parametrize("values", [(0.0, 0.0), (1.0, 1.0), (0.97, 1.0), (0.2, 0.25)])
def test_a_share_ends_at_0_and_1(values: tuple[float, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limits = []

    def look(figure: Any, *_: object) -> None:
        limits.extend(axes.get_ylim() for axes in figure.axes)

    monkeypatch.setattr(plots, "_save", look)
    curve = [Point(100, (values[0],) * 2), Point(200, (values[1],) * 2)]
    plot_curve({EXACT_MATCH: curve}, {EXACT_MATCH: judge(curve, EXACT_MATCH)}, tmp_path / "a", tmp_path / "b")
    low, high = limits[0]
    assert low == 0
    assert max(values) <= high <= 1
    assert high > 0
