"""The dot product of each column of two matrices, which is the gradient of a factor of each column.

    dot[o] = sum over t of x[t, o] (y[t, o] - bias[o])

Products and sums in float32. With x the gradient of a map's output and y that output, dot / m is the gradient of DoRA's
magnitudes m (`model/dora.py`). `(x * y).sum(0)` would write the product, 16-bit and rounded, and read it again.

Legend: T tokens, O columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chulengo.kernels.applies import need, need_same

CHUNK_VALUES = 1 << 22  # products in float32 at once: 16 MiB


def check(x_TO: Tensor, y_TO: Tensor, bias_O: Tensor | None) -> None:
    """Raises `KernelError` unless the operands fit each other."""
    need(x_TO.dim() == 2, f"x has shape {tuple(x_TO.shape)}.", allowed="[T, O]")
    need_same("y", y_TO, "x", x_TO)
    if bias_O is not None:
        need(bias_O.shape == x_TO.shape[1:], f"The bias is {tuple(bias_O.shape)}.", allowed=f"[{x_TO.shape[1]}]")
        need_same("the bias", bias_O, "x", x_TO, shape=False)


def forward(x_TO: Tensor, y_TO: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Returns the dot product of each column, float32 [O].

    Args:
        x_TO: float32, bfloat16 or float16.
        y_TO: likewise.
        bias_O: taken off y; None: nothing is.
    """
    check(x_TO, y_TO, bias_O)
    total_O = torch.zeros(x_TO.shape[1], dtype=torch.float32, device=x_TO.device)
    rows = max(1, CHUNK_VALUES // max(1, len(total_O)))
    for x, y in zip(torch.split(x_TO, rows), torch.split(y_TO, rows), strict=True):
        product = y.float() if bias_O is None else y.float() - bias_O.float()
        total_O += (product * x).sum(0)
    return total_O
