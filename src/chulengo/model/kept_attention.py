"""Attention whose backward is given back what its forward had saved, by others.

A layer that is computed again would run attention's forward twice, only to have its output and its sums of
exponentials once more. Both can wait elsewhere instead (`model/offload.py`), while q, k and v, which are larger
together and are computed again anyway, are put in their place when the backward comes. Which tensors an attention
saves is its own affair (`kernels/fused/attention.py` chooses between two): hooks on what it hands to autograd take them
away and bring them back, and nothing of it is called by a private name.

    forward     attention(q, k, v) with a graph of its own: q, k and v are noted by their place, the rest is given out
    backward    the rest comes back, q, k and v are those computed again, and the same node runs

Legend: T tokens, N query heads, K key heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

SMALL = 4096  # elements: lengths of sequences and the like stay where they are

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _View:
    """How a saved tensor lies in the memory of one that it is a view of: of an input, or of what was given out."""

    source: int
    is_input: bool
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


@dataclass(eq=False)
class _Exchange:
    """What goes in and out while attention, or its backward, runs.

    The hooks hold this and not the `KeptAttention`, whose edge leads to them: a cycle through C++ is never collected.
    """

    inputs: Sequence[Tensor] = ()  # q, k, v
    given_out: list[Tensor] = field(default_factory=list)
    gradients: tuple[Tensor, ...] = ()

    def clear(self) -> None:
        self.inputs, self.given_out, self.gradients = (), [], ()

    def take(self, saved: Tensor) -> Tensor | _View:
        if saved.numel() <= SMALL and not saved.is_floating_point():
            return saved
        return self.found(saved) or self.add(saved)

    def give(self, saved: Tensor | _View) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        return saved.of((self.inputs if saved.is_input else self.given_out)[saved.source])

    def found(self, saved: Tensor) -> _View | None:
        for is_input, sources in ((True, self.inputs), (False, self.given_out)):
            for index, source in enumerate(sources):
                offset = int(saved.storage_offset()) - int(source.storage_offset())
                if _same_memory(saved, source) and _reaches(source, offset):
                    return _View(index, is_input, saved.size(), saved.stride(), offset)
        return None

    def add(self, saved: Tensor) -> _View:
        saved = saved.detach()
        if _extent(saved) != saved.numel():
            saved = saved.contiguous()
        view = _View(len(self.given_out), False, saved.size(), saved.stride(), 0)
        self.given_out.append(saved.as_strided((saved.numel(),), (1,)))
        return view


@dataclass(slots=True, eq=False)
class KeptAttention:
    """One call of attention between its forward and its backward."""

    _exchange: _Exchange = field(default_factory=_Exchange)
    _edge: GradientEdge | None = None
    _strides: tuple[tuple[int, ...], ...] = ()  # of q, k, v
    _output: _View | None = None

    def forward(
        self, attention: Attention, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns attention's output [T, N, H], and the tensors to be kept for `again`, each one piece of memory."""
        exchange = self._exchange
        exchange.inputs = (q_TNH, k_TKH, v_TKH)
        self._strides = tuple(each.stride() for each in exchange.inputs)
        try:
            with torch.enable_grad(), saved_tensors_hooks(exchange.take, exchange.give):
                start = torch.empty(0, requires_grad=True)
                a_TNH = attention(*_Start.apply(start, exchange, *exchange.inputs))  # type: ignore[no-untyped-call]
            self._edge = get_gradient_edge(a_TNH)
            a_TNH = a_TNH.detach()
            self._output = exchange.found(a_TNH) or exchange.add(a_TNH)
            return a_TNH, tuple(exchange.given_out)
        finally:
            exchange.clear()

    def again(self, kept: Sequence[Tensor], q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Returns the output [T, N, H] without computing it, differentiable once by q, k and v as computed again."""
        assert self._strides == (q_TNH.stride(), k_TKH.stride(), v_TKH.stride()), "laid out as in `forward`"
        a_TNH: Tensor = _Again.apply(self, kept, q_TNH, k_TKH, v_TKH)  # type: ignore[no-untyped-call]
        return a_TNH

    def _output_of(self, kept: Sequence[Tensor]) -> Tensor:
        assert self._output is not None, "after `forward`"
        return self._output.of(kept[self._output.source])

    def _backward(self, da_TNH: Tensor, kept: Sequence[Tensor], sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
        assert self._edge is not None, "once, after `forward`"
        exchange, edge, self._edge = self._exchange, self._edge, None
        exchange.inputs, exchange.given_out = sources, list(kept)
        try:
            torch.autograd.backward(edge, da_TNH)
            return exchange.gradients
        finally:
            exchange.clear()


def _same_memory(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


def _reaches(x: Tensor, offset: int) -> bool:
    """Returns whether the element `offset` places behind the first of `x` [T, ...] is one of `x`, not between rows."""
    return 0 <= offset < _extent(x) and (x.dim() == 1 or offset % x.stride(0) < _extent(x[0]))


def _extent(x: Tensor) -> int:
    """Returns over how many elements of its memory a tensor reaches."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.size(), x.stride(), strict=True)) if x.numel() else 0


class _Start(torch.autograd.Function):
    """q, k, v as attention's graph begins; their gradients go to the exchange. Holds none of them."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, exchange: _Exchange, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(each.view_as(each) for each in inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.exchange.gradients = gradients
        return None, None, None, None, None


class _Again(torch.autograd.Function):
    """Attention's output from what was kept; its backward runs the node of the first forward."""

    @staticmethod
    def forward(ctx: Any, call: KeptAttention, kept: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        ctx.call, ctx.kept = call, kept
        ctx.save_for_backward(*inputs)
        return call._output_of(kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da_TNH: Tensor) -> Any:
        dq, dk, dv = ctx.call._backward(da_TNH, ctx.kept, ctx.saved_tensors)
        ctx.kept = ()
        return None, None, dq, dk, dv
