"""SwiGLU's product (https://arxiv.org/abs/2002.05202, eq. 6), forward and backward.

    s = sigmoid(g)          p = g s u                       (silu(g) = g s)
    du = dp g s             dg = dp u s (1 + g (1 - s))

Formed in float32 and rounded once. The backward can hand p back, so that a layer that recomputes need not keep it.
`gate` and `up` may be the two halves of one [T, 2I] tensor; the gradients then go into the halves of another.

Legend: T tokens, I intermediate features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chulengo.kernels.applies import need, need_same


def check(gate_TI: Tensor, up_TI: Tensor) -> None:
    """Raises `KernelError` unless gate and up fit each other."""
    need(gate_TI.dim() == 2, f"gate has shape {tuple(gate_TI.shape)}.", allowed="[T, I]")
    need_same("gate", gate_TI, "up", up_TI)


def forward(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """Returns silu(gate) * up, [T, I] in their dtype."""
    check(gate_TI, up_TI)
    gate = gate_TI.float()
    return (gate * torch.sigmoid(gate) * up_TI.float()).to(gate_TI.dtype)


def backward(
    dproduct_TI: Tensor,
    gate_TI: Tensor,
    up_TI: Tensor,
    *,
    dgate_TI: Tensor,
    dup_TI: Tensor,
    product_TI: Tensor | None = None,
) -> None:
    """Writes the gradients into `dgate_TI` and `dup_TI`, and the product into `product_TI` where given.

    Args:
        dproduct_TI: gradient of the product.
        gate_TI: as in the forward.
        up_TI: as in the forward.
        dgate_TI: written; may be a half of a wider tensor, and may be gate itself.
        dup_TI: written; likewise, up itself.
        product_TI: written where given: the forward's result again.
    """
    gate, up, dproduct = gate_TI.float(), up_TI.float(), dproduct_TI.float()
    sigmoid = torch.sigmoid(gate)
    dgate, dup = dproduct * up * sigmoid * (1 + gate * (1 - sigmoid)), dproduct * gate * sigmoid
    if product_TI is not None:
        product_TI.copy_(gate * sigmoid * up)
    dgate_TI.copy_(dgate)
    dup_TI.copy_(dup)
