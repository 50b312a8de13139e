"""Capture of a CUDA graph that nothing in this process disturbs.

While a stream is captured, calls that could depend on its work end the capture, whoever makes them. Python's collector
is one of these: a cycle that holds another graph, or an event, is freed whenever enough objects have been made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from chulengo.model.allocator import uncollected


@contextlib.contextmanager
def captured(
    graph: torch.cuda.CUDAGraph, *, pool: Any = None, stream: torch.cuda.Stream | None = None
) -> Iterator[None]:
    """Captures what the block launches into a graph, without running it.

    Args:
        graph: a new one.
        pool: of the memory, another graph's; None: its own.
        stream: to capture on; None: PyTorch's own for that.

    Raises:
        OutOfMemoryError: no room for what the block launches, or for the graph. The capture's own end fails in the
            first case too, and says less.
    """
    torch.cuda.synchronize()
    pool = torch.cuda.graph_pool_handle() if pool is None and torch.cuda.is_available() else pool
    around = torch.cuda.current_stream() if torch.cuda.is_available() else None
    with uncollected():
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                yield
        except BaseException as error:
            if around is not None:
                _end_capture(pool, around)
            broken = isinstance(error, torch.AcceleratorError) and isinstance(error.__context__, torch.OutOfMemoryError)
            if broken and error.__context__ is not None:
                raise error.__context__ from None
            if isinstance(error, torch.AcceleratorError) and "out of memory" in str(error):
                raise torch.OutOfMemoryError(str(error)) from error  # for the graph itself, beside PyTorch's memory
            raise


def in_lanes(parts: Sequence[Callable[[], None]], lanes: int) -> None:
    """Runs parts that need nothing of each other: inside a capture side by side, else one after the other.

    Args:
        parts: what to run; in a capture without allocating.
        lanes: how many at once.
    """
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        for part in parts:
            part()
        return
    around = torch.cuda.current_stream()
    streams = [torch.cuda.Stream() for _ in range(lanes)]  # type: ignore[no-untyped-call]
    for index, stream in enumerate(streams):
        stream.wait_stream(around)
        with torch.cuda.stream(stream):
            for part in parts[index::lanes]:
                part()
    for stream in streams:
        around.wait_stream(stream)


def _end_capture(pool: Any, around: torch.cuda.Stream) -> None:
    """Does what PyTorch leaves undone where the end of a capture fails (2.11).

    This thread would stay on the capture's stream, and its memory would count as being filled for ever: the next one of
    its kind to be taken down would end the process.
    """
    torch.cuda.set_stream(around)
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # it had ended
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
