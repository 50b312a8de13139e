"""Capture of a CUDA graph that nothing in this process disturbs.

While a stream is captured, calls that could depend on its work end the capture, whoever makes them. Python's collector
is one of these: a cycle that holds another graph, or an event, is freed whenever enough objects have been made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from chulengo.model.allocator import uncollected


@contextmanager
def captured(
    graph: torch.cuda.CUDAGraph, *, pool: Any = None, stream: torch.cuda.Stream | None = None
) -> Iterator[None]:
    """Captures what the block launches into a graph, without running it.

    Args:
        graph: a new one.
        pool: of the memory, another graph's; None: its own.
        stream: to capture on; None: PyTorch's own for that.

    Raises:
        OutOfMemoryError: no room for what the block launches. The capture's own end fails then too, and says less.
    """
    torch.cuda.synchronize()
    with uncollected():
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                yield
        except torch.AcceleratorError as error:
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            raise
