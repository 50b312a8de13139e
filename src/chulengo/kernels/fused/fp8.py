"""Rows in float8 with a scale each, in the kernel that makes the values. Formulas in `reference/fp8.py`.

One program holds a whole row, so the largest magnitude is known before the first value is written: one pass. Against
quantising afterwards, the norm saves writing y (2 bytes) and reading it twice (4), the product likewise.

Legend: T tokens, K features (D behind the norm, I behind SwiGLU).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chulengo.kernels.applies import need, need_rows
from chulengo.kernels.fused.launch import need_float, need_launchable, row_block, row_warps
from chulengo.kernels.reference.fp8 import SMALLEST_AMAX
from chulengo.kernels.reference.nf4 import E4M3_LARGEST
from chulengo.kernels.reference.rms_norm import check as check_norm
from chulengo.kernels.reference.swiglu import check as check_swiglu

LARGEST_ROW = 32768


@triton.jit
def _store_row(value, inside, row, k, num_features, rows_ptr, scale_ptr, SMALLEST: tl.constexpr,
               LARGEST: tl.constexpr):  # fmt: skip
    """scale = amax / 448; x8 = (x * (448 / amax)).to(e4m3), clamped; `value` is float32 and 0 outside the row."""
    amax = tl.maximum(tl.max(tl.abs(value), 0), SMALLEST)
    scaled = value * tl.div_rn(LARGEST, amax)
    scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
    tl.store(rows_ptr + row * num_features + k, scaled.to(tl.float8e4nv), mask=inside)
    tl.store(scale_ptr + row, tl.div_rn(amax, LARGEST))


@triton.jit
def _plain(x_ptr, rows_ptr, scale_ptr, num_features, stride_x, SMALLEST: tl.constexpr, LARGEST: tl.constexpr,
           BLOCK_K: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    inside = k < num_features
    x = tl.load(x_ptr + row * stride_x + k, mask=inside, other=0.0).to(tl.float32)
    _store_row(x, inside, row, k, num_features, rows_ptr, scale_ptr, SMALLEST, LARGEST)


@triton.jit
def _rms_norm(x_ptr, residual_ptr, weight_ptr, rows_ptr, scale_ptr, sum_ptr, rstd_ptr, eps, num_features, stride_x,
              stride_residual, HAS_RESIDUAL: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr,
              BLOCK_K: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    inside = k < num_features
    dtype = x_ptr.dtype.element_ty
    h = tl.load(x_ptr + row * stride_x + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        # h = x + residual, rounded to the input dtype
        h += tl.load(residual_ptr + row * stride_residual + k, mask=inside, other=0.0).to(tl.float32)
        h = h.to(dtype).to(tl.float32)
        tl.store(sum_ptr + row * num_features + k, h.to(dtype), mask=inside)
    # rstd = rsqrt(mean(h^2) + eps)
    rstd = tl.rsqrt(tl.sum(h * h, 0) / num_features + eps)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + k, mask=inside, other=0.0).to(tl.float32)
    # y = (h * rstd).to(dtype) * weight, rounded to the dtype as the norm alone rounds it
    y = ((h * rstd).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
    _store_row(y, inside, row, k, num_features, rows_ptr, scale_ptr, SMALLEST, LARGEST)


@triton.jit
def _swiglu(gate_ptr, up_ptr, rows_ptr, scale_ptr, num_features, stride_gate, stride_up, SMALLEST: tl.constexpr,
            LARGEST: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    inside = k < num_features
    gate = tl.load(gate_ptr + row * stride_gate + k, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + k, mask=inside, other=0.0).to(tl.float32)
    # (silu(gate) * up).to(dtype)
    product = (gate * tl.sigmoid(gate) * up).to(gate_ptr.dtype.element_ty).to(tl.float32)
    _store_row(product, inside, row, k, num_features, rows_ptr, scale_ptr, SMALLEST, LARGEST)


def _prepare(x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, object]]:
    """Returns the empty rows, the empty scales [T, 1] and the constants of a launch."""
    need(x_TK.dim() == 2, f"x has shape {tuple(x_TK.shape)}.", allowed="[T, K]")
    need_launchable(x_TK)
    need_float("x", x_TK)
    need_rows("x", x_TK)
    if x_TK.is_cuda:
        capability = torch.cuda.get_device_capability(x_TK.device)
        need(capability >= (8, 9), f"The device has compute capability {capability}.", allowed="8.9 and above for e4m3")
    rows_TK = torch.empty(x_TK.shape, dtype=torch.float8_e4m3fn, device=x_TK.device)
    scale_T1 = torch.ones((x_TK.shape[0], 1), dtype=torch.float32, device=x_TK.device)
    block = row_block(x_TK.shape[1], LARGEST_ROW)
    constants = {"SMALLEST": SMALLEST_AMAX, "LARGEST": E4M3_LARGEST, "BLOCK_K": block, "num_warps": row_warps(block)}
    return rows_TK, scale_T1, constants


def quantize_rows(x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x in float8_e4m3fn [T, K] and scales [T, 1]. See `reference.fp8.quantize_rows`."""
    rows_TK, scale_T1, constants = _prepare(x_TK)
    if x_TK.numel():
        _plain[(x_TK.shape[0],)](x_TK, rows_TK, scale_T1, x_TK.shape[1], x_TK.stride(0), **constants)
    return rows_TK, scale_T1


def rms_norm_rows(
    x_TD: torch.Tensor, residual_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns e4m3 rows and scales of the norm, the sum and rstd. See `reference.fp8.rms_norm_rows`."""
    check_norm(x_TD, residual_TD, weight_D)
    rows_TD, scale_T1, constants = _prepare(x_TD)
    rstd_T = torch.empty(x_TD.shape[0], dtype=torch.float32, device=x_TD.device)
    sum_TD, residual = x_TD, x_TD
    if residual_TD is not None:
        need_rows("residual", residual_TD)
        sum_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
        residual = residual_TD
    if x_TD.numel():
        _rms_norm[(x_TD.shape[0],)](x_TD, residual, weight_D, rows_TD, scale_T1, sum_TD, rstd_T, eps, x_TD.shape[1],
                                    x_TD.stride(0), residual.stride(0), HAS_RESIDUAL=residual_TD is not None,
                                    **constants)  # fmt: skip
    return rows_TD, scale_T1, sum_TD, rstd_T


def swiglu_rows(gate_TI: torch.Tensor, up_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns e4m3 rows and scales of silu(gate) * up. See `reference.fp8.swiglu_rows`."""
    check_swiglu(gate_TI, up_TI)
    rows_TI, scale_T1, constants = _prepare(gate_TI)
    need_rows("up", up_TI)
    if gate_TI.numel():
        _swiglu[(gate_TI.shape[0],)](gate_TI, up_TI, rows_TI, scale_T1, gate_TI.shape[1], gate_TI.stride(0),
                                     up_TI.stride(0), **constants)  # fmt: skip
    return rows_TI, scale_T1
