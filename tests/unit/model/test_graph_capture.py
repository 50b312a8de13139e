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


class _EndFails(contextlib.AbstractContextManager[None]):
    def __exit__(self, *error: object) -> None:
        raise torch.AcceleratorError("capturing stream has unjoined work")


@pytest.mark.parametrize(
    ("inside", "said"), [(torch.OutOfMemoryError("no room"), "no room"), (RuntimeError("wrong"), "unjoined")]
)
def test_no_room_is_not_hidden_by_the_end(
    given: list[Any], monkeypatch: pytest.MonkeyPatch, inside: Exception, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: _EndFails())
    with pytest.raises(RuntimeError, match=said), captured("a graph"):  # type: ignore[arg-type]
        raise inside
    assert gc.isenabled()


@pytest.mark.gpu
def test_no_room_in_a_capture() -> None:
    side = torch.cuda.Stream()

    def work() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.ones(8, device="cuda")
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    with pytest.raises(torch.OutOfMemoryError), captured(torch.cuda.CUDAGraph()):
        work()
    assert float(torch.ones(3, device="cuda").sum()) == 3
