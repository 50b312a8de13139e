"""Rows in float8 with a scale each, in the kernel that makes the values; adapter columns; the product.

Formulas in `reference/fp8.py`; the columns are in `fused/fp8_adapter.py`. For a norm, its backward, a rotation or
SwiGLU one program holds a whole row, so the largest magnitude is known before the first value is written: one pass.
Against quantising afterwards that saves reading the values twice. The 16-bit values are written too where they will be
read. SwiGLU's row is held in pieces, rounded to 16 bits: fewer registers, so that one program loads while another
computes (H200, 8,192 x 11,008: 121 us, the bytes alone 105; a row as one block 161, pieces computed again for a second
pass 228).

SwiGLU's backward makes rows too long to be held (22,016 gradients of Llama 2 7B): a program goes over its row in
pieces, writes the gradients, and reads them once more from the cache when the largest is known.

Legend: T tokens, K features (D behind the norm, I behind SwiGLU), O out features, S columns of an adapter, W features
and columns together.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from chulengo.kernels.applies import need, need_rows
from chulengo.kernels.fused.e4m3 import to_e4m3
from chulengo.kernels.fused.fp8_adapter import copy_adapter, rank_product, set_columns
from chulengo.kernels.fused.launch import need_float, need_launchable, row_block, row_warps
from chulengo.kernels.limits import LARGEST_FP8_ROW
from chulengo.kernels.reference import fp8 as reference
from chulengo.kernels.reference.fp8 import SMALLEST_AMAX
from chulengo.kernels.reference.nf4 import E4M3_LARGEST
from chulengo.kernels.reference.rms_norm import check as check_norm
from chulengo.kernels.reference.rope import check as check_rope
from chulengo.kernels.reference.swiglu import check as check_swiglu

__all__ = [
    "copy_adapter", "product", "quantize_rows", "rank_product", "rms_norm_backward_rows", "rms_norm_rows",
    "rope_backward_rows", "set_columns", "swiglu_backward_rows", "swiglu_rows", "unscaled_product",
]  # fmt: skip

PIECE, PIECE_WARPS = 4096, 16  # features of a piece of a long row; of 13 pairs the fastest on an H200
HELD_WARPS = 8  # of a row that is held in such pieces: 121 us, 148 by 16; whole rows took 161
ROPE_WARPS = 8


@triton.jit
def _store_row(value, inside, row, k, stride_rows, rows_ptr, scale_ptr, SMALLEST: tl.constexpr,
               LARGEST: tl.constexpr):  # fmt: skip
    """scale = amax / 448; x8 = (x * (448 / amax)).to(e4m3), clamped; `value` is float32 and 0 outside the row."""
    amax = tl.maximum(tl.max(tl.abs(value), 0), SMALLEST)
    scaled = value * tl.div_rn(LARGEST, amax)
    tl.store(rows_ptr + row * stride_rows + k, to_e4m3(scaled, LARGEST), mask=inside)
    tl.store(scale_ptr + row, tl.div_rn(amax, LARGEST))


@triton.jit
def _plain(x_ptr, rows_ptr, scale_ptr, num_features, stride_x, stride_rows, SMALLEST: tl.constexpr,
           LARGEST: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    inside = k < num_features
    x = tl.load(x_ptr + row * stride_x + k, mask=inside, other=0.0).to(tl.float32)
    _store_row(x, inside, row, k, stride_rows, rows_ptr, scale_ptr, SMALLEST, LARGEST)


@triton.jit
def _rms_norm(x_ptr, residual_ptr, weight_ptr, rows_ptr, scale_ptr, y_ptr, sum_ptr, rstd_ptr, eps, num_features,
              stride_x, stride_residual, stride_rows, HAS_RESIDUAL: tl.constexpr, KEEP: tl.constexpr,
              SMALLEST: tl.constexpr, LARGEST: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
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
    y = ((h * rstd).to(dtype).to(tl.float32) * weight).to(dtype)
    if KEEP:
        tl.store(y_ptr + row * num_features + k, y, mask=inside)
    _store_row(y.to(tl.float32), inside, row, k, stride_rows, rows_ptr, scale_ptr, SMALLEST, LARGEST)


@triton.jit
def _rms_norm_backward(dy_ptr, dsum_ptr, sum_ptr, weight_ptr, rstd_ptr, row_scale_ptr, column_scale_ptr, dx_ptr,
                       rows_ptr, scale_ptr, num_features, stride_dy, stride_dsum, stride_sum, stride_rows,
                       HAS_DSUM: tl.constexpr, HAS_SCALES: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr,
                       BLOCK_K: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    inside = k < num_features
    dtype = dx_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + k, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(sum_ptr + row * stride_sum + k, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * stride_dy + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALES:
        dy = dy * tl.load(row_scale_ptr + row) * tl.load(column_scale_ptr + k, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + row)
    normed = h * rstd
    dnormed = dy * weight
    # dx = rstd * (dn - n * mean(dn * n)) + dsum, rounded to the dtype
    inner = tl.sum(dnormed * normed, 0) / num_features
    dx = rstd * (dnormed - normed * inner)
    if HAS_DSUM:
        dx += tl.load(dsum_ptr + row * stride_dsum + k, mask=inside, other=0.0).to(tl.float32)
    dx = dx.to(dtype)
    tl.store(dx_ptr + row * num_features + k, dx, mask=inside)
    value = dx.to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(value), 0), SMALLEST)
    scaled = to_e4m3(value * tl.div_rn(LARGEST, amax), LARGEST)
    # of another shape, so that Triton does not give every load, and the sum, the layout that is best for bytes: the sum
    # then adds in the order of rms_norm's backward
    tl.store(rows_ptr + row * stride_rows + k[None, :], scaled[None, :], mask=inside[None, :])
    tl.store(scale_ptr + row, tl.div_rn(amax, LARGEST))


@triton.jit
def _swiglu(gate_ptr, up_ptr, rows_ptr, scale_ptr, product_ptr, num_features, stride_gate, stride_up, stride_rows,
            KEEP: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, BLOCK_K: tl.constexpr,
            PIECES: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK_K,), tl.float32)
    products = ()  # of 16 bits, in registers until the largest is known
    for piece in tl.static_range(PIECES):
        k = piece * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = k < num_features
        gate = tl.load(gate_ptr + row * stride_gate + k, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * stride_up + k, mask=inside, other=0.0).to(tl.float32)
        # (silu(gate) * up).to(dtype)
        product = (gate * tl.sigmoid(gate) * up).to(gate_ptr.dtype.element_ty)
        if KEEP:
            tl.store(product_ptr + row * num_features + k, product, mask=inside)
        largest = tl.maximum(largest, tl.abs(product.to(tl.float32)))
        products = products + (product,)  # noqa: RUF005 - Triton unpacks none
    amax = tl.maximum(tl.max(largest, 0), SMALLEST)
    tl.store(scale_ptr + row, tl.div_rn(amax, LARGEST))
    for piece in tl.static_range(PIECES):
        k = piece * BLOCK_K + tl.arange(0, BLOCK_K)
        scaled = products[piece].to(tl.float32) * tl.div_rn(LARGEST, amax)
        tl.store(rows_ptr + row * stride_rows + k, to_e4m3(scaled, LARGEST), mask=k < num_features)


@triton.jit
def _swiglu_backward(dproduct_ptr, gate_ptr, up_ptr, dboth_ptr, product_ptr, rows_ptr, scale_ptr, num_features,
                     stride_dproduct, stride_gate, stride_up, stride_dboth, stride_rows, WITH_PRODUCT: tl.constexpr,
                     SMALLEST: tl.constexpr, LARGEST: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dtype = dboth_ptr.dtype.element_ty
    largest = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, num_features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < num_features
        gate = tl.load(gate_ptr + row * stride_gate + k, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * stride_up + k, mask=inside, other=0.0).to(tl.float32)
        dproduct = tl.load(dproduct_ptr + row * stride_dproduct + k, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        # dgate = dp * u * s * (1 + g * (1 - s))
        dgate = (dproduct * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(dtype)
        # dup = dp * g * s
        dup = (dproduct * gate * sigmoid).to(dtype)
        tl.store(dboth_ptr + row * stride_dboth + k, dgate, mask=inside)
        tl.store(dboth_ptr + row * stride_dboth + num_features + k, dup, mask=inside)
        if WITH_PRODUCT:
            tl.store(product_ptr + row * num_features + k, (gate * sigmoid * up).to(dtype), mask=inside)
        largest = tl.maximum(largest, tl.maximum(tl.abs(dgate.to(tl.float32)), tl.abs(dup.to(tl.float32))))
    amax = tl.maximum(tl.max(largest, 0), SMALLEST)
    factor = tl.div_rn(LARGEST, amax)
    tl.store(scale_ptr + row, tl.div_rn(amax, LARGEST))
    tl.debug_barrier()  # what the other threads of this program wrote is read now
    for start in range(0, 2 * num_features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < 2 * num_features
        value = tl.load(dboth_ptr + row * stride_dboth + k, mask=inside, other=0.0).to(tl.float32)
        tl.store(rows_ptr + row * stride_rows + k, to_e4m3(value * factor, LARGEST), mask=inside)


@triton.jit
def _heads(x_ptr, num_heads, num_pairs, stride_head, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """Both halves of all heads of one token, float32 [HEADS, PAIRS]; which of them are there; their place in a row."""
    head, p = tl.arange(0, HEADS), tl.arange(0, PAIRS)
    inside = (head < num_heads)[:, None] & (p < num_pairs)[None, :]
    place = head[:, None] * stride_head + p[None, :]
    a = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + place + num_pairs, mask=inside, other=0.0).to(tl.float32)
    return a, b, inside, head[:, None] * (2 * num_pairs) + p[None, :]


@triton.jit
def _store_pair(a, b, inside, place, num_pairs, ptr, factor, EIGHTH: tl.constexpr, LARGEST: tl.constexpr):
    if EIGHTH:
        a, b = to_e4m3(a * factor, LARGEST), to_e4m3(b * factor, LARGEST)
    tl.store(ptr + place, a.to(ptr.dtype.element_ty), mask=inside)
    tl.store(ptr + place + num_pairs, b.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rope_backward(dq_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, position_ptr, dy_ptr, rows_ptr, scale_ptr,
                   num_query_heads, num_key_heads, num_pairs, stride_q, stride_q_head, stride_k, stride_k_head,
                   stride_v, stride_v_head, stride_cos, stride_sin, stride_dy, stride_rows, SMALLEST: tl.constexpr,
                   LARGEST: tl.constexpr, QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
                   PAIRS: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + token).to(tl.int64)
    p = tl.arange(0, PAIRS)
    cos = tl.load(cos_ptr + position * stride_cos + p, mask=p < num_pairs, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * stride_sin + p, mask=p < num_pairs, other=0.0)[None, :]
    dtype = dy_ptr.dtype.element_ty
    qa, qb, q_in, q_place = _heads(dq_ptr + token * stride_q, num_query_heads, num_pairs, stride_q_head, QUERY_HEADS,
                                   PAIRS)  # fmt: skip
    ka, kb, k_in, k_place = _heads(dk_ptr + token * stride_k, num_key_heads, num_pairs, stride_k_head, KEY_HEADS, PAIRS)
    va, vb, v_in, v_place = _heads(dv_ptr + token * stride_v, num_key_heads, num_pairs, stride_v_head, KEY_HEADS, PAIRS)
    # a' = a cos + b sin, b' = b cos - a sin, rounded to the dtype
    qc, qd = (qa * cos + qb * sin).to(dtype).to(tl.float32), (qb * cos - qa * sin).to(dtype).to(tl.float32)
    kc, kd = (ka * cos + kb * sin).to(dtype).to(tl.float32), (kb * cos - ka * sin).to(dtype).to(tl.float32)
    k_place += num_query_heads * 2 * num_pairs
    v_place += (num_query_heads + num_key_heads) * 2 * num_pairs
    most_q = tl.max(tl.max(tl.maximum(tl.abs(qc), tl.abs(qd)), 1), 0)
    most_k = tl.max(tl.max(tl.maximum(tl.abs(kc), tl.abs(kd)), 1), 0)
    most_v = tl.max(tl.max(tl.maximum(tl.abs(va), tl.abs(vb)), 1), 0)
    amax = tl.maximum(tl.maximum(most_q, tl.maximum(most_k, most_v)), SMALLEST)
    factor = tl.div_rn(LARGEST, amax)
    tl.store(scale_ptr + token, tl.div_rn(amax, LARGEST))
    dy_ptr += token * stride_dy
    rows_ptr += token * stride_rows
    _store_pair(qc, qd, q_in, q_place, num_pairs, dy_ptr, 1.0, False, LARGEST)
    _store_pair(kc, kd, k_in, k_place, num_pairs, dy_ptr, 1.0, False, LARGEST)
    _store_pair(va, vb, v_in, v_place, num_pairs, dy_ptr, 1.0, False, LARGEST)
    _store_pair(qc, qd, q_in, q_place, num_pairs, rows_ptr, factor, True, LARGEST)
    _store_pair(kc, kd, k_in, k_place, num_pairs, rows_ptr, factor, True, LARGEST)
    _store_pair(va, vb, v_in, v_place, num_pairs, rows_ptr, factor, True, LARGEST)


def _prepare(x_TK: torch.Tensor, num_features: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns empty rows [T, num_features + columns] and scales [T, 1]."""
    need(x_TK.dim() == 2, f"x has shape {tuple(x_TK.shape)}.", allowed="[T, K]")
    need_launchable(x_TK)
    need_float("x", x_TK)
    need_rows("x", x_TK)
    if x_TK.is_cuda:
        capability = torch.cuda.get_device_capability(x_TK.device)
        need(capability >= (8, 9), f"The device has compute capability {capability}.", allowed="8.9 and above for e4m3")
    shape = (x_TK.shape[0], num_features + columns)
    rows_TW = torch.empty(shape, dtype=torch.float8_e4m3fn, device=x_TK.device)
    return rows_TW, torch.empty((x_TK.shape[0], 1), dtype=torch.float32, device=x_TK.device)


def _constants(num_features: int, piece: int = LARGEST_FP8_ROW, warps: int = 0) -> dict[str, object]:
    block = min(piece, row_block(num_features, LARGEST_FP8_ROW))
    warps = warps or row_warps(block)
    return {"SMALLEST": SMALLEST_AMAX, "LARGEST": E4M3_LARGEST, "BLOCK_K": block, "num_warps": warps}


def quantize_rows(x_TK: torch.Tensor, columns: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x in float8_e4m3fn [T, K + columns] and scales [T, 1]. See `reference.fp8.quantize_rows`."""
    rows_TW, scale_T1 = _prepare(x_TK, x_TK.shape[1], columns)
    if x_TK.numel():
        _plain[(x_TK.shape[0],)](x_TK, rows_TW, scale_T1, x_TK.shape[1], x_TK.stride(0), rows_TW.stride(0),
                                 **_constants(x_TK.shape[1]))  # fmt: skip
    return rows_TW, scale_T1


def rms_norm_rows(
    x_TD: torch.Tensor, residual_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float, columns: int = 0, *,
    keep: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns e4m3 rows and scales of the norm, its y, the sum and rstd. See `reference.fp8.rms_norm_rows`."""
    check_norm(x_TD, residual_TD, weight_D)
    rows_TW, scale_T1 = _prepare(x_TD, x_TD.shape[1], columns)
    rstd_T = torch.empty(x_TD.shape[0], dtype=torch.float32, device=x_TD.device)
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device) if keep else None
    sum_TD, residual = x_TD, x_TD
    if residual_TD is not None:
        need_rows("residual", residual_TD)
        sum_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
        residual = residual_TD
    if x_TD.numel():
        _rms_norm[(x_TD.shape[0],)](x_TD, residual, weight_D, rows_TW, scale_T1, sum_TD if y_TD is None else y_TD,
                                    sum_TD, rstd_T, eps, x_TD.shape[1], x_TD.stride(0), residual.stride(0),
                                    rows_TW.stride(0), HAS_RESIDUAL=residual_TD is not None, KEEP=keep,
                                    **_constants(x_TD.shape[1]))  # fmt: skip
    return rows_TW, scale_T1, y_TD, sum_TD, rstd_T


def rms_norm_backward_rows(
    dy_TD: torch.Tensor, dsum_TD: torch.Tensor | None, sum_TD: torch.Tensor, weight_D: torch.Tensor,
    rstd_T: torch.Tensor, columns: int = 0, *, scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns e4m3 rows and scales of the norm's dx, and dx. See `reference.fp8.rms_norm_backward_rows`."""
    num_rows, num_features = sum_TD.shape
    dx_TD = torch.empty((num_rows, num_features), dtype=sum_TD.dtype, device=sum_TD.device)
    rows_TW, scale_T1 = _prepare(dx_TD, num_features, columns)
    dsum = dy_TD if dsum_TD is None else dsum_TD
    for name, x in (("dy", dy_TD), ("dsum", dsum), ("sum", sum_TD)):
        need_rows(name, x)
    if num_rows:
        _rms_norm_backward[(num_rows,)](
            dy_TD, dsum, sum_TD, weight_D, rstd_T, *(scales or (rstd_T, rstd_T)), dx_TD, rows_TW, scale_T1,
            num_features, dy_TD.stride(0), dsum.stride(0), sum_TD.stride(0), rows_TW.stride(0),
            HAS_DSUM=dsum_TD is not None, HAS_SCALES=scales is not None, **_constants(num_features),
        )  # fmt: skip
    return rows_TW, scale_T1, dx_TD


def swiglu_rows(
    gate_TI: torch.Tensor, up_TI: torch.Tensor, columns: int = 0, *, keep: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns e4m3 rows and scales of silu(gate) * up, and the product. See `reference.fp8.swiglu_rows`."""
    check_swiglu(gate_TI, up_TI)
    num_features = gate_TI.shape[1]
    rows_TW, scale_T1 = _prepare(gate_TI, num_features, columns)
    need_rows("up", up_TI)
    product_TI = torch.empty(gate_TI.shape, dtype=gate_TI.dtype, device=gate_TI.device) if keep else None
    if gate_TI.numel():
        _swiglu[(gate_TI.shape[0],)](gate_TI, up_TI, rows_TW, scale_T1, rows_TW if product_TI is None else product_TI,
                                     num_features, gate_TI.stride(0), up_TI.stride(0), rows_TW.stride(0), KEEP=keep,
                                     PIECES=triton.cdiv(num_features, PIECE),
                                     **_constants(num_features, PIECE, HELD_WARPS))  # fmt: skip
    return rows_TW, scale_T1, product_TI


def swiglu_backward_rows(
    dproduct_TI: torch.Tensor, gate_TI: torch.Tensor, up_TI: torch.Tensor, dboth_T2I: torch.Tensor,
    product_TI: torch.Tensor | None, columns: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Writes `dboth` and `product`; returns e4m3 rows and scales of dboth. See `reference.fp8.swiglu_backward_rows`."""
    check_swiglu(gate_TI, up_TI)
    num_features = gate_TI.shape[1]
    rows_TW, scale_T1 = _prepare(dboth_T2I, 2 * num_features, columns)
    for name, x in (("dproduct", dproduct_TI), ("gate", gate_TI), ("up", up_TI)):
        need_rows(name, x)
    if product_TI is not None:
        need(product_TI.is_contiguous(), "`product` is not contiguous.")
    if gate_TI.numel():
        _swiglu_backward[(gate_TI.shape[0],)](
            dproduct_TI, gate_TI, up_TI, dboth_T2I, dboth_T2I if product_TI is None else product_TI, rows_TW, scale_T1,
            num_features, dproduct_TI.stride(0), gate_TI.stride(0), up_TI.stride(0), dboth_T2I.stride(0),
            rows_TW.stride(0), WITH_PRODUCT=product_TI is not None, **_constants(num_features, PIECE, PIECE_WARPS),
        )  # fmt: skip
    return rows_TW, scale_T1


def rope_backward_rows(
    dq_TNH: torch.Tensor, dk_TKH: torch.Tensor, dv_TKH: torch.Tensor, cos_SP: torch.Tensor, sin_SP: torch.Tensor,
    position_T: torch.Tensor, columns: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns e4m3 rows and scales of q's, k's and v's gradients, and these. See `reference.fp8.rope_backward_rows`."""
    check_rope(dq_TNH, dk_TKH, cos_SP, sin_SP, position_T)
    for name, x in (("dq", dq_TNH), ("dk", dk_TKH), ("dv", dv_TKH), ("cos", cos_SP), ("sin", sin_SP)):
        need_rows(name, x)
    num_tokens, num_query_heads, head_size = dq_TNH.shape
    num_key_heads = dk_TKH.shape[1]
    width = (num_query_heads + 2 * num_key_heads) * head_size
    dy_TO = torch.empty((num_tokens, width), dtype=dq_TNH.dtype, device=dq_TNH.device)
    rows_TW, scale_T1 = _prepare(dy_TO, width, columns)
    row_block(width, LARGEST_FP8_ROW)
    if num_tokens:
        _rope_backward[(num_tokens,)](
            dq_TNH, dk_TKH, dv_TKH, cos_SP, sin_SP, position_T, dy_TO, rows_TW, scale_T1, num_query_heads,
            num_key_heads, head_size // 2, *dq_TNH.stride()[:2], *dk_TKH.stride()[:2], *dv_TKH.stride()[:2],
            cos_SP.stride(0), sin_SP.stride(0), dy_TO.stride(0), rows_TW.stride(0), SMALLEST=SMALLEST_AMAX,
            LARGEST=E4M3_LARGEST, QUERY_HEADS=triton.next_power_of_2(num_query_heads),
            KEY_HEADS=triton.next_power_of_2(num_key_heads), PAIRS=row_block(head_size // 2), num_warps=ROPE_WARPS,
        )  # fmt: skip
    return rows_TW, scale_T1, dy_TO


def product(
    x8_TW: torch.Tensor, scale_T1: torch.Tensor, w8_OW: torch.Tensor, scale_O1: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Returns (x8 * scale) (w8 * scale)ᵀ, [T, O] in `dtype`: cuBLAS through `torch._scaled_mm`.

    With "fast" accumulation, whose sums keep fewer bits than float32 has; without it the product of gate and up takes
    1.28 ms instead of 1.13 (an H200, 8,192 tokens of Llama 2 7B).
    """
    if not x8_TW.is_cuda:  # the kernels around it are interpreted
        return reference.product(x8_TW, scale_T1, w8_OW, scale_O1, dtype)
    return torch._scaled_mm(
        x8_TW, w8_OW.t(), scale_a=scale_T1, scale_b=scale_O1.view(1, -1), out_dtype=dtype, use_fast_accum=True
    )


def unscaled_product(x8_TW: torch.Tensor, w8_OW: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns x8 w8ᵀ, [T, O] in `dtype`. See `reference.fp8.unscaled_product`.

    Where many features become few cuBLAS does this at less power than with scales for rows: 22,144 to 4,096 features
    1,315 TFLOP/s for a second instead of 1,268, the other way round 1,238 instead of 1,307 (an H200, 8,192 tokens).
    """
    if not x8_TW.is_cuda:
        return reference.unscaled_product(x8_TW, w8_OW, dtype)
    one = _one(x8_TW.device)
    return torch._scaled_mm(x8_TW, w8_OW.t(), scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=True)


@functools.cache
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones((), dtype=torch.float32, device=device)
