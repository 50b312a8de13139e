"""The processes of one run: which of them this is, sums over all of them, and what rank 0 tells the others.

torchrun starts every process with the same command and says in `RANK`, `LOCAL_RANK` and `WORLD_SIZE` which one it is;
that is torchrun's protocol, no setting of ours. Without those there is one process, and nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chulengo.errors import ChulengoError, TrainingError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process among those of a run. Every method is called by all of them or by none."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Returns the value, which now holds the sum over all ranks."""
        if self.world > 1:
            import torch

            torch.distributed.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, in order."""
        if self.world == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def share(self, value: Any) -> Any:
        """Returns rank 0's value."""
        if self.world == 1:
            return value
        import torch

        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def share_problem(self, problem: ChulengoError | None, what: str) -> None:
        """Raises on every rank when there is a problem on rank 0, there the problem itself.

        Args:
            problem: on rank 0 what went wrong, or None.
            what: what rank 0 could not do, for the message of the others.
        """
        has_problem = self.share(problem is not None)
        if problem is not None:
            raise problem
        if has_problem:
            raise TrainingError(f"Rank 0 could not {what}; its own message says why.")


def own_ranks() -> Ranks:
    """Returns which process this is, from torchrun's variables."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Gives the ranks of this run, connected; the connection ends with the block that made it."""
    ranks = own_ranks()
    if ranks.world == 1:
        yield ranks
        return
    import torch

    made = not torch.distributed.is_initialized()
    if made:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # objects and CPU tensors travel by gloo, gradients on GPUs by NCCL
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield ranks
    finally:
        if made and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
