"""A share of a GPU: what a process may take, held by PyTorch's allocator and known to the plan.

Who shares a card, or wants to know what a smaller one would do, says `model.gpu_memory_limit`. The limit is of the
whole process, as nvidia-smi shows it, so the allocator gets what the CUDA context leaves of it. It is written down in
one place only, the allocator: the plan reads it back there (`limit_of`), so that no plan can count on memory that the
run will not get, and a cap that a program of one's own has set counts as well.

What the limit cannot hold is memory that does not come from the allocator: more than the usual context, CUDA graphs,
for which the plan leaves room, and bitsandbytes' paged optimiser states, which the driver moves to the host when the
card is full.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from chulengo.errors import ConfigError
from chulengo.model.plan_memory import CUDA_CONTEXT_BYTES, GIB, gib

if TYPE_CHECKING:
    import torch


def limit_gpu_memory(device: str, limit_bytes: int | None) -> None:
    """Holds this process to so much of a GPU's memory, from now to its end; None changes nothing.

    Args:
        device: auto, cpu, cuda or cuda:N.
        limit_bytes: of everything the process takes.

    Raises:
        ConfigError: a limit without a GPU, or above what the GPU has.
    """
    if limit_bytes is None:
        return
    import torch

    from chulengo.model.load import resolve_device

    place = resolve_device(device)
    if place.type != "cuda":
        raise ConfigError(
            f"model.gpu_memory_limit is {gib(limit_bytes)}, and this run is on a CPU.",
            next_step="leave it out, or: chulengo doctor, which says why no GPU is used",
        )
    total = torch.cuda.get_device_properties(place).total_memory
    if limit_bytes > total:
        raise ConfigError(
            f"model.gpu_memory_limit is {gib(limit_bytes)}, and {torch.cuda.get_device_name(place)} has {gib(total)}.",
            next_step=f"leave it out, or plan for another GPU: chulengo plan --device-memory {limit_bytes / GIB:g}GiB",
        )
    torch.cuda.set_per_process_memory_fraction((limit_bytes - CUDA_CONTEXT_BYTES) / total, place)


def limit_of(place: torch.device) -> int | None:
    """Returns what this process may take of a GPU, its context included, in bytes; None: all of it."""
    import torch

    share = torch.cuda.get_per_process_memory_fraction(place)
    if share >= 1:
        return None
    return round(share * torch.cuda.get_device_properties(place).total_memory) + CUDA_CONTEXT_BYTES


def give_back_memory() -> None:
    """Frees what nothing refers to any more, and gives the device what PyTorch keeps of it.

    Models hold themselves in cycles, which wait for the collector: one would still be there when the next is loaded.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a graph may still run in memory that goes now
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
