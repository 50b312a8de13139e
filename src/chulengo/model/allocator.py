"""How PyTorch's allocator is used, so that little of a GPU is held and not used.

The allocator keeps what was freed for the next tensor of that size. What it cannot hand out again lies between tensors
that stay: 0.67 GiB after Llama 2 7B had been quantised, 12 % of all that a lean training holds, and a CUDA graph, whose
memory is its own, can take none of it. Two things are done about that, both before there is anything to keep apart:

- Segments grow (`expandable_segments`), so that one of each kind is enough and blocks of any size fit behind each
  other. It is an environment variable that PyTorch reads when it first looks at a GPU.
- What stays as long as the model does (weights, kept matrices) has memory of its own, `OwnMemory`: in the rest
  everything goes, and the allocator can give all of it back. So have graphs, for all of which one such memory does.

While such a memory is filled, or a graph is captured, no other one may be taken down: PyTorch ends the process then
(torch 2.11). Python's collector would do it, wherever it finds a model that is garbage; so it rests (`uncollected`).
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
GROWING = "expandable_segments:True"


def let_segments_grow() -> None:
    """Asks PyTorch, which must not have looked at a GPU yet, for growing segments, unless the user has set it up.

    Not on Windows, where it has none, nor under it (WSL), where drivers fail at them.
    """
    if _can_grow() and not any(name in os.environ for name in VARIABLES):
        os.environ[VARIABLES[0]] = GROWING


def segments_grow() -> bool:
    """Returns whether they grow in this process, once it has been through `let_segments_grow`."""
    given = [os.environ[name] for name in VARIABLES if name in os.environ]
    return GROWING in given[0] if given else _can_grow()


def _can_grow() -> bool:
    return sys.platform == "linux" and "microsoft" not in os.uname().release.lower()


@contextmanager
def uncollected() -> Iterator[None]:
    """Lets Python's collector rest inside the block."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class OwnMemory:
    """Memory of one device that no other tensors share. On a CPU it is like any other."""

    def __init__(self, device: torch.device) -> None:
        """Takes no memory yet."""
        self._index = 0
        self._pool: torch.cuda.MemPool | None = None
        if device.type == "cuda":
            import torch

            self._index = torch.cuda.current_device() if device.index is None else device.index
            with torch.cuda.device(self._index):
                self._pool = torch.cuda.MemPool()

    @property
    def pool(self) -> Any:
        """What a CUDA graph takes as its pool; None on a CPU."""
        return None if self._pool is None else self._pool.id

    def made(self, make: Callable[[], Tensor]) -> Tensor:
        """Returns a tensor that stays, made there.

        While this memory grows, PyTorch does not give up what it keeps of all other; so where there is no room, that is
        asked for, and the tensor made again.

        Args:
            make: allocates it.
        """
        if self._pool is None:
            return make()
        import torch

        try:
            with self.held():
                return make()
        except torch.OutOfMemoryError:
            torch.cuda.synchronize(self._index)
            torch.cuda.empty_cache()
        with self.held():
            return make()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Puts there what this thread allocates on the device inside the block."""
        if self._pool is None:
            yield
            return
        import torch

        with uncollected(), torch.cuda.use_mem_pool(self._pool, self._index):
            yield

    def keep(self, tensor: Tensor) -> Tensor:
        """Returns a tensor that stays, moved there; one of another device as it is."""
        if self._pool is None or tensor.device.type != "cuda":
            return tensor
        return self.made(tensor.clone)
