"""Which dropout mask a map of the fast engine takes in a micro-step: a number of the step, and a place in the model.

`kernels/reference/dropout.py` makes the mask of both and of nothing else, so no random state is kept or put back: a
layer that computes its activations again gets the same mask, and so does a run that resumes, on one process or two.

The number of a step is a hash of (run's seed, micro-step) and lies on the device, where kernels read it. A CUDA graph
that was captured with one step's tensor draws the masks of another step once that tensor holds its number.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

MAPS, GROUPS = 4, 4  # more than a group has maps (3), as many as a layer has groups


class MaskSeed(NamedTuple):
    """The masks of one group of maps in one micro-step: the step's number, int64 [1], and the group's place."""

    step_1: Tensor
    group: int

    def place(self, index: int) -> int:
        """Returns the place of one of the group's maps in the model."""
        return self.group * MAPS + index


def mask_seed(step_1: Tensor, layer: int, group: int) -> MaskSeed:
    """Returns the masks of a layer's group of maps, counted from 0."""
    return MaskSeed(step_1, layer * GROUPS + group)


def step_seed(seed: int, micro_step: int, device: torch.device) -> Tensor:
    """Returns the number of a micro-step, int64 [1] on the device; near numbers give unrelated ones.

    Filled, not copied: a copy from the host's pageable memory waits for all that the device has to do.
    """
    digest = hashlib.blake2b(f"{seed},{micro_step}".encode(), digest_size=7).digest()
    return torch.full((1,), int.from_bytes(digest, "little"), dtype=torch.int64, device=device)
