"""Dropout whose mask is computed where it is used. Formulas, and why Philox, in `reference/dropout.py`.

Bound by bytes: 4 a value in bfloat16, 6 where it adds to a sum, and no mask is written or read. Random numbers cost
about 14 lane-instructions a value (seven rounds for eight of them), which an H200 has beside those bytes. A program
takes BLOCK_E counters of one row and with them eight contiguous pieces of it, an eighth of the row apart.

The seed is read from memory, so that a CUDA graph draws other masks at each replay.

Legend: T tokens, I features, E an eighth of the features, rounded up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chulengo.kernels.applies import need_rows, need_same
from chulengo.kernels.fused.launch import need_float, need_launchable
from chulengo.kernels.reference.dropout import ROUNDS, VALUES, check, threshold

BLOCK_E = 256


@triton.jit
def _piece(x_ptr, sum_ptr, number, column, inside, factor, threshold, ADD: tl.constexpr):  # fmt: skip
    """Writes x * factor, or what is there + x * factor, where `number` says that a value is kept."""
    x = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(number.to(tl.int32) >= threshold, x * factor, 0.0)
    if ADD:
        value += tl.load(sum_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(sum_ptr + column, value.to(sum_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["place", "threshold"])
def _drop(x_ptr, sum_ptr, seed_ptr, place, threshold, factor, num_features, eighth, stride_x, stride_sum,
          ROUNDS: tl.constexpr, ADD: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    zero = tl.zeros_like(e)
    words = tl.philox(tl.load(seed_ptr), e, zero + row, zero + place, zero, ROUNDS)
    x_ptr += row.to(tl.int64) * stride_x
    sum_ptr += row.to(tl.int64) * stride_sum
    for w in tl.static_range(4):
        for half in tl.static_range(2):
            column = (2 * w + half) * eighth + e
            # (word & 65535, word >> 16)[half] >= threshold
            number = (words[w] >> (16 * half)) & 0xFFFF
            inside = (e < eighth) & (column < num_features)
            _piece(x_ptr, sum_ptr, number, column, inside, factor, threshold, ADD)


def _launch(x_TI, sum_TI, factor, dropout, seed_1, place, *, add):
    check(x_TI, seed_1, dropout)
    need_launchable(x_TI)
    need_float("x", x_TI)
    need_rows("x", x_TI)
    need_rows("the sum", sum_TI)
    num_rows, num_features = x_TI.shape
    if x_TI.numel():
        eighth = triton.cdiv(num_features, VALUES)
        # one rounding of a product and one of a sum, as plain PyTorch has them: no fused multiply-add
        _drop[(num_rows, triton.cdiv(eighth, BLOCK_E))](
            x_TI, sum_TI, seed_1, place, threshold(dropout), factor / (1 - dropout), num_features, eighth,
            x_TI.stride(0), sum_TI.stride(0), ROUNDS=ROUNDS, ADD=add, BLOCK_E=BLOCK_E, num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip


def forward(x_TI: torch.Tensor, dropout: float, seed_1: torch.Tensor, place: int) -> torch.Tensor:
    """Returns d(x), [T, I] in the dtype of x. See `reference.dropout.forward`."""
    y_TI = torch.empty(x_TI.shape, dtype=x_TI.dtype, device=x_TI.device)
    _launch(x_TI, y_TI, 1.0, dropout, seed_1, place, add=False)
    return y_TI


def add_(
    sum_TI: torch.Tensor, x_TI: torch.Tensor, factor: float, dropout: float, seed_1: torch.Tensor, place: int
) -> None:
    """Adds `factor * d(x)` to `sum_TI`, rounded once. See `reference.dropout.add_`."""
    need_same("the sum", sum_TI, "x", x_TI)
    _launch(x_TI, sum_TI, factor, dropout, seed_1, place, add=True)
