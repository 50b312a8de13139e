"""DoRA (https://arxiv.org/abs/2402.09353): a trained magnitude for every row of a map, beside LoRA's direction.

    V = W + s B A        n = ||V|| row by row        g = m / n        y = x (g V)ᵀ + bias

m begins as the norm of W, so that g is 1 and nothing changes. The gradient takes n for a constant (section 4.3 of the
paper, and PEFT), so g V is LoRA with rows scaled by numbers that are known before the product:

    dx = dy (g V)      dB = s g dyᵀ (x Aᵀ)      dA = s (dy (g B))ᵀ x      dm = sum over tokens of dy (y - bias) / m

It therefore folds as LoRA does: W' = g V is written by the kernel that writes the matrix, rounded once; forward and dx
stay bare products, dA takes g B in place of B. What it costs: n once an optimiser step, which writes every matrix once
more (from its values in the compute dtype, summed in float32); and dm, which needs the map's output again. The layers
keep the outputs that they would not keep otherwise (q and k before their turn, o, down): the other way, a product more
for every map, is half as many products again as a step has.

Only folded, so not with dropout: PEFT's form of that, y = x Wᵀ + d(x) ((g - 1) W + g s B A)ᵀ, is two whole products
for every map, and the reference engine has it. A row of zeros has no direction and is an error; m = 0 in a step's
numbers makes dm NaN, which stops the run.

Legend: T tokens, O out features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chulengo.errors import ModelError


@dataclass(slots=True, eq=False)
class Rescaling:
    """What a step's products need of one map's magnitude; written in place, so that graphs see new values.

    Attributes:
        magnitude_O: m, float32.
        scale_O: g, float32.
        b_OR: g B in the compute dtype.
    """

    magnitude_O: Tensor
    scale_O: Tensor
    b_OR: Tensor

    def refresh(self, magnitude_O: Tensor, norm_O: Tensor, b_OR: Tensor) -> None:
        """Takes a new m, the norm of V's rows, and B."""
        self.magnitude_O.copy_(magnitude_O)
        torch.div(self.magnitude_O, norm_O, out=self.scale_O)
        self.b_OR.copy_(b_OR.float() * self.scale_O[:, None])


def empty_rescaling(b_OR: Tensor) -> Rescaling:
    """Returns room for a map whose B is this, not yet filled."""
    magnitude_O, scale_O = torch.empty((2, len(b_OR)), dtype=torch.float32, device=b_OR.device)
    return Rescaling(magnitude_O, scale_O, torch.empty_like(b_OR))


def row_norms(matrix_OI: Tensor) -> Tensor:
    """Returns the norm of each row, summed in float32 [O]."""
    norm_O: Tensor = torch.linalg.vector_norm(matrix_OI, dim=1, dtype=torch.float32)
    return norm_O


def check_norm(name: str, norm_O: Tensor) -> None:
    """Raises `ModelError` where a map has a row of zeros, whose direction is undefined."""
    if not bool((norm_O > 0).all()):
        raise ModelError(
            f"{name} has a row of zeros, which lora.dora would divide by.",
            next_step="leave it out of lora.targets, or lora.dora=false",
        )
