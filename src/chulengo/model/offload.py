"""States that wait in the host's memory between a layer's forward and its backward.

A layer that is computed again in full keeps one tensor, its input: 64 MB for 8,192 tokens of Llama 2 7B, 2 GB over all
layers, which is a third of everything a lean run holds. A layer's products take ten times as long as its input takes
over PCIe, so the copies cost nothing when they overlap: out, on a stream of their own, while the next layer computes;
in, one layer ahead of the backward. The host's memory is pinned and used again by every step.

A state on its way out is held until the next layer's comes, one layer later, and the main stream waits for its copy
then. Leaving that to the allocator (`record_stream`) would keep every block until a captured graph ends.

Without a GPU there is nothing to move: the tensors are kept as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor


class HostStates:
    """Keeps one tensor a layer on the host; what was put last is wanted first."""

    def __init__(self, device: torch.device) -> None:
        """Holds nothing yet."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pinned: dict[int, Tensor] = {}
        self._leaving: tuple[Tensor, torch.cuda.Event] | None = None
        self._coming: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
        self._kept: dict[int, Tensor] = {}

    def put(self, index: int, state_TD: Tensor) -> None:
        """Takes a layer's state; the caller may drop it."""
        if self._stream is None:
            self._kept[index] = state_TD
            return
        self._let_go()
        self._stream.wait_stream(torch.cuda.current_stream(state_TD.device))
        with torch.cuda.stream(self._stream):
            self._buffer(index, state_TD).copy_(state_TD, non_blocking=True)
            self._leaving = state_TD, self._stream.record_event()
        self._kept[index] = self._buffer(index, state_TD)

    def take(self, index: int, device: torch.device) -> Tensor:
        """Returns the state of a layer on `device`, and sends for the one before it."""
        if self._stream is None:
            return self._kept.pop(index)
        self._let_go()
        if index not in self._coming:
            self._send_for(index, device)
        state_TD, arrived = self._coming.pop(index)
        torch.cuda.current_stream(device).wait_event(arrived)
        if index - 1 in self._kept:
            self._send_for(index - 1, device)
        return state_TD

    def _let_go(self) -> None:
        if self._leaving is not None:
            state_TD, whole = self._leaving
            torch.cuda.current_stream(state_TD.device).wait_event(whole)
            self._leaving = None

    def _send_for(self, index: int, device: torch.device) -> None:
        assert self._stream is not None
        host = self._kept.pop(index)
        state_TD = torch.empty(host.shape, dtype=host.dtype, device=device)
        # the allocator may give memory that work still queued on the main stream reads
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            state_TD.copy_(host, non_blocking=True)
            self._coming[index] = state_TD, self._stream.record_event()

    def _buffer(self, index: int, like: Tensor) -> Tensor:
        held = self._pinned.get(index)
        if held is None or held.numel() < like.numel() or held.dtype != like.dtype:
            held = torch.empty(like.numel(), dtype=like.dtype, pin_memory=True)
            self._pinned[index] = held
        return held[: like.numel()].view(like.shape)
