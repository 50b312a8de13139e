"""RMSNorm with the residual sum, one program a row. Formulas in `reference/rms_norm.py`.

Forward reads x and residual and writes h and y; as separate operations it would read h once more. Backward reads dy,
dh_from_above and h, writes dx. Both are bound by bytes: 8 bytes a value in bfloat16, either way.

dw, when asked for, takes two stages without atomics, so that it is the same every time: each of a fixed number of
programs sums its rows in float32, and a second sum adds those partial rows in order.

Legend: T tokens, D features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chulengo.kernels.applies import need_rows
from chulengo.kernels.fused.launch import need_float, need_launchable, row_block, row_warps
from chulengo.kernels.reference.rms_norm import check

DWEIGHT_PROGRAMS = 264  # two for each of an H200's 132 multiprocessors


@triton.jit
def _forward(x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr, eps, num_features, stride_x, stride_residual,
             HAS_RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < num_features
    dtype = y_ptr.dtype.element_ty
    h = tl.load(x_ptr + row * stride_x + d, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        # h = x + residual, rounded to the input dtype
        h += tl.load(residual_ptr + row * stride_residual + d, mask=inside, other=0.0).to(tl.float32)
        h = h.to(dtype).to(tl.float32)
        tl.store(sum_ptr + row * num_features + d, h.to(dtype), mask=inside)
    # rstd = rsqrt(mean(h^2) + eps)
    rstd = tl.rsqrt(tl.sum(h * h, 0) / num_features + eps)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    # y = (h * rstd).to(dtype) * weight
    y = (h * rstd).to(dtype).to(tl.float32) * weight
    tl.store(y_ptr + row * num_features + d, y.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _backward(dy_ptr, dsum_ptr, sum_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, num_rows, num_features, stride_dy,
              stride_dsum, stride_sum, HAS_DSUM: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr,
              BLOCK_D: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    inside = d < num_features
    weight = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for row_number in range(program, num_rows, tl.num_programs(0)):
        row = tl.cast(row_number, tl.int64)
        h = tl.load(sum_ptr + row * stride_sum + d, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * stride_dy + d, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = h * rstd
        dnormed = dy * weight
        # dx = rstd * (dn - n * mean(dn * n)) + dsum
        inner = tl.sum(dnormed * normed, 0) / num_features
        dx = rstd * (dnormed - normed * inner)
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + row * stride_dsum + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * num_features + d, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if WEIGHT_GRADIENT:
            dweight += dy * normed
    if WEIGHT_GRADIENT:
        tl.store(partial_ptr + program * num_features + d, dweight, mask=inside)


def forward(
    x_TD: torch.Tensor, residual_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns y [T, D], h [T, D] (x itself without a residual), rstd [T]. See `reference.rms_norm.forward`."""
    check(x_TD, residual_TD, weight_D)
    need_launchable(x_TD)
    need_float("x", x_TD)
    need_rows("x", x_TD)
    num_rows, num_features = x_TD.shape
    y_TD = torch.empty((num_rows, num_features), dtype=x_TD.dtype, device=x_TD.device)
    rstd_T = torch.empty(num_rows, dtype=torch.float32, device=x_TD.device)
    sum_TD, residual = x_TD, x_TD
    if residual_TD is not None:
        need_rows("residual", residual_TD)
        sum_TD, residual = torch.empty_like(y_TD), residual_TD
    block = row_block(num_features)
    if num_rows:
        _forward[(num_rows,)](x_TD, residual, weight_D, y_TD, sum_TD, rstd_T, eps, num_features, x_TD.stride(0),
                              residual.stride(0), HAS_RESIDUAL=residual_TD is not None, BLOCK_D=block,
                              num_warps=row_warps(block))  # fmt: skip
    return y_TD, sum_TD, rstd_T


def backward(
    dy_TD: torch.Tensor,
    dsum_TD: torch.Tensor | None,
    sum_TD: torch.Tensor,
    weight_D: torch.Tensor,
    rstd_T: torch.Tensor,
    *,
    weight_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns dx (= dresidual) [T, D] and dw [D] or None. See `reference.rms_norm.backward`."""
    need_launchable(dy_TD)
    for name, tensor in (("dy", dy_TD), ("sum", sum_TD)):
        need_rows(name, tensor)
    dsum = dy_TD
    if dsum_TD is not None:
        need_rows("dsum", dsum_TD)
        dsum = dsum_TD
    num_rows, num_features = sum_TD.shape
    dx_TD = torch.empty((num_rows, num_features), dtype=sum_TD.dtype, device=sum_TD.device)
    programs = min(num_rows, DWEIGHT_PROGRAMS) if weight_gradient else num_rows
    partial_PD = torch.empty((programs, num_features) if weight_gradient else (1,), dtype=torch.float32,
                             device=sum_TD.device)  # fmt: skip
    block = row_block(num_features)
    if num_rows:
        _backward[(programs,)](dy_TD, dsum, sum_TD, weight_D, rstd_T, dx_TD, partial_PD, num_rows, num_features,
                               dy_TD.stride(0), dsum.stride(0), sum_TD.stride(0), HAS_DSUM=dsum_TD is not None,
                               WEIGHT_GRADIENT=weight_gradient, BLOCK_D=block, num_warps=row_warps(block))  # fmt: skip
    return dx_TD, partial_PD.sum(0).to(weight_D.dtype) if weight_gradient else None
