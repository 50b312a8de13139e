"""Python's collector rests during a capture, and works again after it, whatever happened."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from chulengo.model.graph_capture import captured


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []

    @contextlib.contextmanager
    def graph(*arguments: Any, **named: Any) -> Iterator[None]:
        found.append((arguments, named))
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: found.append("waited"))
    return found


def test_nothing_is_collected_inside(given: list[Any]) -> None:
    assert gc.isenabled()
    with captured("a graph", pool=3):  # type: ignore[arg-type]
        assert not gc.isenabled()
    assert gc.isenabled()
    assert given == ["waited", (("a graph",), {"pool": 3, "stream": None})]


def test_an_error_does_not_leave_it_off(given: list[Any]) -> None:
    with pytest.raises(RuntimeError, match="inside"), captured("a graph"):  # type: ignore[arg-type]
        raise RuntimeError("inside")
    assert gc.isenabled()


def test_who_had_it_off_keeps_it_off(given: list[Any]) -> None:
    gc.disable()
    try:
        with captured("a graph"):  # type: ignore[arg-type]
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
