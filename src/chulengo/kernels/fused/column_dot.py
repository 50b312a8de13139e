"""Dot products of columns, both matrices read once. Formula in `reference/column_dot.py`.

Bound by bytes: 4 a value in bfloat16, where plain PyTorch moves about 20. A program sums ROWS rows of BLOCK_O columns
and writes one row of partial sums; a small sum over those follows, so the order of additions is always the same.

Legend: T tokens, O columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chulengo.kernels.applies import need_rows
from chulengo.kernels.fused.launch import need_float, need_launchable
from chulengo.kernels.reference.column_dot import check

ROWS, BLOCK_T, BLOCK_O = 256, 8, 512


@triton.jit(do_not_specialize=["num_rows"])
def _partial(x_ptr, y_ptr, bias_ptr, out_ptr, num_rows, num_columns, stride_x, stride_y, HAS_BIAS: tl.constexpr,
             ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr):  # fmt: skip
    column = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    column_in = column < num_columns
    total = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column_in, other=0.0).to(tl.float32)
    for start in range(0, ROWS, BLOCK_T):
        row = (tl.program_id(1) * ROWS + start + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = (row < num_rows)[:, None] & column_in[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_x + column[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row[:, None] * stride_y + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y -= bias[None, :]
        # x * (y - bias)
        total += x * y
    tl.store(out_ptr + tl.program_id(1) * num_columns + column, tl.sum(total, axis=0), mask=column_in)


def forward(x_TO: torch.Tensor, y_TO: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the dot product of each column, float32 [O]. See `reference.column_dot.forward`."""
    check(x_TO, y_TO, bias_O)
    need_launchable(x_TO)
    need_float("x", x_TO)
    need_rows("x", x_TO)
    need_rows("y", y_TO)
    bias = x_TO if bias_O is None else bias_O
    need_rows("the bias", bias)
    num_rows, num_columns = x_TO.shape
    parts = triton.cdiv(num_rows, ROWS)
    partial = torch.empty((parts, num_columns), dtype=torch.float32, device=x_TO.device)
    if partial.numel():
        _partial[(triton.cdiv(num_columns, BLOCK_O), parts)](
            x_TO, y_TO, bias, partial, num_rows, num_columns, x_TO.stride(0), y_TO.stride(0),
            HAS_BIAS=bias_O is not None, ROWS=ROWS, BLOCK_T=BLOCK_T, BLOCK_O=BLOCK_O, num_warps=4,
        )  # fmt: skip
    return partial.sum(0)
