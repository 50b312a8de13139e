"""States that wait in the host's memory between a layer's forward and its backward.

A layer that is computed again in full keeps one tensor, its input: 64 MB for 8,192 tokens of Llama 2 7B, 2 GB over all
layers, which is a third of everything a lean run holds. A layer's products take ten times as long as its input takes
over PCIe, so the copies cost nothing when they overlap: out, on a stream of their own, while the next layer computes;
in, one layer ahead of the backward. Two more tensors of that size can go the same way in a layer's time
(`offload-attention`). The host's memory is pinned and used again by every step.

States on their way out are held until the next layer's come, one layer later, and the main stream waits for their copy
then. Leaving that to the allocator (`record_stream`) would keep every block until a captured graph ends.

The host's blocks are powers of two, as PyTorch pins them, and one that is outgrown is kept: a captured graph may hold
its address.

What a pass has put, its own backward takes: another pass's states in their place are an error. Without a GPU there is
nothing to move: the tensors are kept as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chulengo.errors import ModelError

Moving = tuple[tuple[Tensor, ...], torch.cuda.Event]


class HostStates:
    """Keeps the tensors of each layer on the host; what was put last is wanted first."""

    def __init__(self, device: torch.device) -> None:
        """Holds nothing yet."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pinned: dict[tuple[int, int], Tensor] = {}
        self._outgrown: list[Tensor] = []
        self._leaving: Moving | None = None
        self._coming: dict[int, Moving] = {}
        self._kept: dict[int, tuple[Tensor, ...]] = {}
        self._owners: dict[int, int] = {}  # which pass put a layer's states

    def put(self, index: int, states: Sequence[Tensor], serial: int) -> None:
        """Takes a layer's states, contiguous and always as many; the caller may drop them.

        Args:
            index: of the layer.
            states: what it keeps.
            serial: of the pass.
        """
        self._owners[index] = serial
        if self._stream is None:
            self._kept[index] = tuple(states)
            return
        self._let_go()
        broken_off = self._coming.pop(index, None)
        if broken_off is not None:
            # of a backward that did not end: its copy may still be written into memory that is free from here on
            torch.cuda.current_stream(states[0].device).wait_event(broken_off[1])
        hosts = tuple(self._buffer((index, place), state) for place, state in enumerate(states))
        self._stream.wait_stream(torch.cuda.current_stream(states[0].device))
        with torch.cuda.stream(self._stream):
            for host, state in zip(hosts, states, strict=True):
                host.copy_(state, non_blocking=True)
            self._leaving = tuple(states), self._stream.record_event()
        self._kept[index] = hosts

    def take(self, index: int, device: torch.device, serial: int) -> tuple[Tensor, ...]:
        """Returns the states of a layer on `device`, and sends for those of the one before it.

        Raises:
            ModelError: another pass has put its own in their place.
        """
        if self._owners.get(index) != serial:
            raise ModelError(
                "A backward came after another batch's forward, whose states are in the place of its own.",
                next_step="call backward for each batch before the next one, or: model.activations_policy=full",
            )
        if self._stream is None:
            return self._kept.pop(index)
        self._let_go()
        if index not in self._coming:
            self._send_for(index, device)
        states, arrived = self._coming.pop(index)
        torch.cuda.current_stream(device).wait_event(arrived)
        if index - 1 in self._kept and self._owners[index - 1] == serial:
            self._send_for(index - 1, device)
        return states

    def forget(self) -> None:
        """Drops the states of a pass that was broken off in a capture, whose events nobody can wait for."""
        self._leaving = None
        self._coming.clear()
        self._kept.clear()
        self._owners.clear()

    def _let_go(self) -> None:
        if self._leaving is not None:
            states, whole = self._leaving
            torch.cuda.current_stream(states[0].device).wait_event(whole)
            self._leaving = None

    def _send_for(self, index: int, device: torch.device) -> None:
        assert self._stream is not None
        hosts = self._kept.pop(index)
        states = tuple(torch.empty(host.shape, dtype=host.dtype, device=device) for host in hosts)
        # the allocator may give memory that work still queued on the main stream reads
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for state, host in zip(states, hosts, strict=True):
                state.copy_(host, non_blocking=True)
            self._coming[index] = states, self._stream.record_event()

    def _buffer(self, key: tuple[int, int], like: Tensor) -> Tensor:
        held = self._pinned.get(key)
        if held is None or held.numel() < like.numel() or held.dtype != like.dtype:
            if held is not None:
                self._outgrown.append(held)
            size = 1 << max(like.numel() - 1, 0).bit_length()
            held = self._pinned[key] = torch.empty(size, dtype=like.dtype, pin_memory=True)
        return held[: like.numel()].view(like.shape)
