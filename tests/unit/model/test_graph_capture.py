"""Python's collector rests during a capture, and works again after it, whatever happened."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from chulengo.model.allocator import OwnMemory
from chulengo.model.graph_capture import captured, in_lanes


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


@pytest.mark.parametrize("capturing", [True, False])
def test_every_part_runs_once_and_is_waited_for(monkeypatch: pytest.MonkeyPatch, capturing: bool) -> None:
    log: list[tuple[str, str]] = []
    names = iter("abc")

    class Stream:
        def __init__(self) -> None:
            self.name = next(names)

        def wait_stream(self, other: Any) -> None:
            log.append((self.name, f"waits for {other.name}"))

    lane = around = Stream()

    @contextlib.contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        nonlocal lane
        lane = chosen
        yield
        lane = around

    for name, value in (("is_available", lambda: True), ("is_current_stream_capturing", lambda: capturing),
                        ("current_stream", lambda: around), ("Stream", Stream), ("stream", stream)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    in_lanes([lambda part=part: log.append((lane.name, part)) for part in "123"], 2)  # type: ignore[misc]
    if not capturing:
        assert log == [("a", "1"), ("a", "2"), ("a", "3")]
        return
    # what was before the lanes is before each of them, and what comes after waits for both
    assert log == [("b", "waits for a"), ("b", "1"), ("b", "3"), ("c", "waits for a"), ("c", "2"),
                   ("a", "waits for b"), ("a", "waits for c")]  # fmt: skip


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


@pytest.mark.parametrize("had_ended", [False, True])
def test_what_a_failed_end_leaves_is_mended(
    given: list[Any], monkeypatch: pytest.MonkeyPatch, had_ended: bool
) -> None:
    done: list[Any] = []

    def end(device: int, pool: Any) -> None:
        if had_ended:
            raise RuntimeError("not currently recording")
        done.append(("ended", device, pool))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "around")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_stream", done.append)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(
        torch._C, "_cuda_releasePool", lambda *pool: done.append(("released", *pool)), raising=False
    )
    with captured("a graph"):  # type: ignore[arg-type]
        pass
    assert done == []
    with pytest.raises(ValueError, match="inside"), captured("a graph"):  # type: ignore[arg-type]
        raise ValueError("inside")
    assert done == ["around"] + ([] if had_ended else [("ended", 2, (7, 0)), ("released", 2, (7, 0))])


@pytest.mark.gpu
def test_no_room_in_a_capture() -> None:
    """Nor is the process the worse for it: the stream is the one before, and memory of its own can go."""
    around, side = torch.cuda.current_stream(), torch.cuda.Stream()

    def work() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.ones(8, device="cuda")
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    with pytest.raises(torch.OutOfMemoryError), captured(torch.cuda.CUDAGraph()):
        work()
    assert torch.cuda.current_stream() == around
    lasting = OwnMemory(torch.device("cuda"))
    kept = lasting.keep(torch.ones(3, device="cuda"))
    assert float(kept.sum()) == 3
    del lasting, kept
    gc.collect()
    torch.cuda.empty_cache()
