"""What the streams of `HostStates` wait for, on streams that only take notes."""

from __future__ import annotations

import contextlib

import pytest
import torch

from chulengo.model.offload import HostStates


class Stream:
    """Notes what it is told to wait for."""

    def __init__(self, log: list[tuple[str, object]], name: str) -> None:
        self.log, self.name = log, name

    def wait_event(self, event: object) -> None:
        self.log.append((self.name, event))

    def wait_stream(self, other: Stream) -> None:
        self.log.append((self.name, other.name))

    def record_event(self) -> str:
        return "event"


@pytest.fixture
def log() -> list[tuple[str, object]]:
    return []


@pytest.fixture
def states(log: list[tuple[str, object]], monkeypatch: pytest.MonkeyPatch) -> HostStates:
    """Of two layers with one state each; its streams only take notes."""
    main = Stream(log, "main")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    made = HostStates(torch.device("cpu"))
    made._stream = Stream(log, "side")  # type: ignore[assignment]
    for layer in (0, 1):
        made._pinned[layer, 0] = torch.empty(8)
    return made


def test_a_block_of_a_backward_that_was_broken_off_is_not_free_before_its_copy(
    states: HostStates, log: list[tuple[str, object]]
) -> None:
    x = torch.ones(8)
    states._coming[1] = (x,), "on its way"  # type: ignore[assignment]
    states.put(0, [x], serial=2)
    assert log == [("side", "main")]
    states.put(1, [x], serial=2)
    assert ("main", "on its way") in log
    assert log.index(("main", "on its way")) < len(log) - 1 - log[::-1].index(("side", "main"))
    assert 1 not in states._coming


def test_nobody_waits_for_a_pass_that_was_broken_off_in_a_capture(
    states: HostStates, log: list[tuple[str, object]]
) -> None:
    x = torch.ones(8)
    states._coming |= dict.fromkeys((0, 1), ((x,), "captured"))  # type: ignore[dict-item]
    states._leaving = (x,), "captured"  # type: ignore[assignment]
    states._owners[1] = 1
    states.forget()
    for layer in (0, 1):
        states.put(layer, [x], serial=2)
    assert torch.equal(states.take(1, x.device, serial=2)[0], x)
    assert "captured" not in [event for _, event in log]
