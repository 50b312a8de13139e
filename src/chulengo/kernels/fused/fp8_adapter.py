"""The columns that an adapter has beside rows in float8, and the small products that fill them.

Formulas in `reference/fp8.py`; `fused/fp8.py` offers all of it.

Legend: T tokens, K features, O out features, I in features, R rank, S columns of an adapter, W features and columns
together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chulengo.kernels.applies import need, need_rows
from chulengo.kernels.columns import num_columns
from chulengo.kernels.fused.e4m3 import to_e4m3
from chulengo.kernels.fused.launch import need_launchable, shared_bytes
from chulengo.kernels.reference.fp8 import SMALLEST_AMAX, AdapterCopies, ColumnTable
from chulengo.kernels.reference.nf4 import E4M3_LARGEST

COLUMN_ROWS = 16  # rows of a program that writes an adapter's columns
ADAPTER_BLOCK = 4096
LOW_ROWS, LOW_PIECE, LOW_WARPS, LOW_STAGES = 64, 128, 4, 5  # of the small product; of eleven choices the fastest
LOW_SOURCES = 256  # ranks of a program, at most: 512 need 360 KiB of shared memory, and an H200 has 227


@triton.jit(do_not_specialize=["num_rows"])
def _columns(source_ptr, factor_ptr, scale_ptr, first_ptr, last_ptr, column_ptr, rows_ptr, num_rows, num_sources,
             stride_row, stride_column, stride_rows, TABLE: tl.constexpr, LARGEST: tl.constexpr, COLUMNS: tl.constexpr,
             BLOCK_T: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    s = tl.arange(0, COLUMNS)
    used = s < num_sources
    inside = (row < num_rows)[:, None] & used[None, :]
    column = s
    if TABLE:
        column = tl.load(column_ptr + s, mask=used, other=0)
        first = tl.load(first_ptr + s, mask=used, other=0)
        last = tl.load(last_ptr + s, mask=used, other=0)
        inside = inside & (row[:, None] >= first[None, :]) & (row[:, None] < last[None, :])
    place = row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    value = tl.load(source_ptr + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(factor_ptr + s, mask=used, other=0.0)
    scale = tl.load(scale_ptr + row, mask=row < num_rows, other=1.0)
    # (source * factor / scale).to(e4m3), clamped
    scaled = tl.div_rn(value * factor[None, :], tl.broadcast_to(scale[:, None], (BLOCK_T, COLUMNS)))
    tl.store(rows_ptr + row.to(tl.int64)[:, None] * stride_rows + s[None, :], to_e4m3(scaled, LARGEST),
             mask=(row < num_rows)[:, None] & (s >= 0)[None, :])  # fmt: skip


@triton.jit
def _adapter(a_ptr, b_ptr, first_ptr, last_ptr, column_ptr, scale_o_ptr, scale_i_ptr, factors_ptr, a8_ptr, a_scale_ptr,
             b8_ptr, b_scale_ptr, lora_scale, num_in, num_out, num_sources, stride_a, stride_b, SMALLEST: tl.constexpr,
             LARGEST: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    first, last, column = tl.load(first_ptr + s), tl.load(last_ptr + s), tl.load(column_ptr + s)
    sum_a = tl.zeros((BLOCK,), tl.float32)
    most_a = tl.zeros((BLOCK,), tl.float32)
    scaled_a = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_in, BLOCK):
        i = start + tl.arange(0, BLOCK)
        a = tl.abs(tl.load(a_ptr + s * stride_a + i, mask=i < num_in, other=0.0).to(tl.float32))
        sum_a += a
        most_a = tl.maximum(most_a, a)
        scaled_a = tl.maximum(scaled_a, a / tl.load(scale_i_ptr + i, mask=i < num_in, other=1.0))
    sum_b = tl.zeros((BLOCK,), tl.float32)
    most_b = tl.zeros((BLOCK,), tl.float32)
    scaled_b = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        b = tl.abs(tl.load(b_ptr + row.to(tl.int64) * stride_b + column, mask=row < last, other=0.0).to(tl.float32))
        sum_b += b
        most_b = tl.maximum(most_b, b)
        scaled_b = tl.maximum(scaled_b, b / tl.load(scale_o_ptr + row, mask=row < last, other=1.0))
    size = tl.abs(lora_scale)
    # c = min(|s| ||A_s||_1, 448 / max(|B| / scale)), and with A and B exchanged
    forward = tl.minimum(size * tl.sum(sum_a, 0), LARGEST / tl.maximum(tl.max(scaled_b, 0), SMALLEST))
    forward = tl.maximum(forward, SMALLEST)
    backward = tl.minimum(size * tl.sum(sum_b, 0), LARGEST / tl.maximum(tl.max(scaled_a, 0), SMALLEST))
    backward = tl.maximum(backward, SMALLEST)
    tl.store(factors_ptr + s, lora_scale / forward)
    tl.store(factors_ptr + num_sources + s, forward)
    tl.store(factors_ptr + 2 * num_sources + s, lora_scale / backward)
    tl.store(factors_ptr + 3 * num_sources + s, backward)
    # A and Bt as rows of e4m3
    amax = tl.maximum(tl.max(most_a, 0), SMALLEST)
    tl.store(a_scale_ptr + s, tl.div_rn(amax, LARGEST))
    for start in range(0, num_in, BLOCK):
        i = start + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + s * stride_a + i, mask=i < num_in, other=0.0).to(tl.float32)
        tl.store(a8_ptr + s * num_in + i, to_e4m3(a * tl.div_rn(LARGEST, amax), LARGEST), mask=i < num_in)
    amax = tl.maximum(tl.max(most_b, 0), SMALLEST)
    tl.store(b_scale_ptr + s, tl.div_rn(amax, LARGEST))
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        b = tl.load(b_ptr + row.to(tl.int64) * stride_b + column, mask=row < last, other=0.0).to(tl.float32)
        scaled = to_e4m3(b * tl.div_rn(LARGEST, amax), LARGEST)
        tl.store(b8_ptr + s * num_out + row, scaled, mask=row < last)


@triton.jit(do_not_specialize=["num_rows"])
def _low(rows_ptr, scale_ptr, copy_ptr, copy_scale_ptr, factor_ptr, low_ptr, num_rows, num_features, num_sources,
         stride_rows, LARGEST: tl.constexpr, COLUMNS: tl.constexpr, SOURCES: tl.constexpr, BLOCK_T: tl.constexpr,
         BLOCK_K: tl.constexpr):  # fmt: skip
    """x Aᵀ, and its columns; the work is reading x. A program has SOURCES ranks, so x is read again beyond them."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_in = row < num_rows
    place = row.to(tl.int64)[:, None] * stride_rows
    s = tl.program_id(1) * SOURCES + tl.arange(0, SOURCES)
    sum_ts = tl.zeros((BLOCK_T, SOURCES), tl.float32)
    for start in range(0, num_features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(rows_ptr + place + k[None, :], mask=row_in[:, None] & (k < num_features)[None, :], other=0.0)
        a = tl.load(copy_ptr + s[:, None] * num_features + k[None, :],
                    mask=(s < num_sources)[:, None] & (k < num_features)[None, :], other=0.0)  # fmt: skip
        sum_ts = tl.dot(x, tl.trans(a), sum_ts)
    scale = tl.load(scale_ptr + row, mask=row_in, other=1.0)
    copy_scale = tl.load(copy_scale_ptr + s, mask=s < num_sources, other=0.0)
    low = (sum_ts * scale[:, None] * copy_scale[None, :]).to(low_ptr.dtype.element_ty)
    tl.store(low_ptr + row.to(tl.int64)[:, None] * num_sources + s[None, :], low,
             mask=row_in[:, None] & (s < num_sources)[None, :])  # fmt: skip
    factor = tl.load(factor_ptr + s, mask=s < num_sources, other=0.0)
    column = tl.div_rn(low.to(tl.float32) * factor[None, :], tl.broadcast_to(scale[:, None], (BLOCK_T, SOURCES)))
    tl.store(rows_ptr + place + num_features + s[None, :], to_e4m3(column, LARGEST),
             mask=row_in[:, None] & (s < COLUMNS)[None, :])  # fmt: skip
    # what no program has: each has filled its own
    for start in range(SOURCES * tl.num_programs(1), COLUMNS, SOURCES):
        nothing = tl.zeros((BLOCK_T, SOURCES), tl.float32).to(tl.float8e4nv)
        behind = place + num_features + start + tl.arange(0, SOURCES)[None, :]
        tl.store(rows_ptr + behind, nothing, mask=row_in[:, None] & (s >= 0)[None, :])


def set_columns(
    rows_TW: torch.Tensor, scale_T1: torch.Tensor, start: int, source_TS: torch.Tensor, factor_S: torch.Tensor,
    table: ColumnTable | None = None,
) -> None:  # fmt: skip
    """Writes an adapter's columns. See `reference.fp8.set_columns`."""
    need_launchable(rows_TW)
    need_rows("rows", rows_TW)
    columns = rows_TW.shape[1] - start
    need(columns == triton.next_power_of_2(columns), f"There are {columns} columns.", allowed="a power of two")
    places = (factor_S,) * 3 if table is None else tuple(table)
    if rows_TW.numel():
        grid = (triton.cdiv(rows_TW.shape[0], COLUMN_ROWS),)
        _columns[grid](source_TS, factor_S, scale_T1, *places, rows_TW[:, start:], rows_TW.shape[0], len(factor_S),
                       source_TS.stride(0), source_TS.stride(1), rows_TW.stride(0), TABLE=table is not None,
                       LARGEST=E4M3_LARGEST, COLUMNS=columns, BLOCK_T=COLUMN_ROWS, num_warps=4)  # fmt: skip


def rank_product(
    rows_TW: torch.Tensor, scale_T1: torch.Tensor, copy_SK: torch.Tensor, copy_scale_S1: torch.Tensor,
    factor_S: torch.Tensor, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Returns x Aᵀ, or dy B, and writes its columns. See `reference.fp8.rank_product`.

    On an H200, 8,192 tokens of Llama 2 7B at rank 16, average of a layer's eight: 33 us, where cuBLAS takes 30 and the
    columns behind it 6 more, and reading x alone would take 16.
    """
    need_launchable(rows_TW)
    need_rows("rows", rows_TW)
    num_rows, num_features, ranks = rows_TW.shape[0], copy_SK.shape[1], len(factor_S)
    columns = rows_TW.shape[1] - num_features
    need(columns == num_columns(ranks), f"There are {columns} columns.", allowed="`num_columns` of the ranks")
    low_TS = torch.empty((num_rows, ranks), dtype=dtype, device=rows_TW.device)
    if rows_TW.numel():
        sources = min(LOW_SOURCES, max(16, triton.next_power_of_2(ranks)))
        stages = min(LOW_STAGES, shared_bytes(rows_TW) // ((LOW_ROWS + sources) * LOW_PIECE))
        _low[(triton.cdiv(num_rows, LOW_ROWS), triton.cdiv(ranks, sources))](
            rows_TW, scale_T1, copy_SK, copy_scale_S1, factor_S, low_TS, num_rows, num_features, ranks,
            rows_TW.stride(0), LARGEST=E4M3_LARGEST, COLUMNS=columns, SOURCES=sources, BLOCK_T=LOW_ROWS,
            BLOCK_K=LOW_PIECE, num_warps=LOW_WARPS, num_stages=stages,
        )  # fmt: skip
    return low_TS


def copy_adapter(
    a_SI: torch.Tensor, b_OR: torch.Tensor, table: ColumnTable, scale_O1: torch.Tensor, scale_I1: torch.Tensor,
    lora_scale: float, out: AdapterCopies,
) -> None:  # fmt: skip
    """Writes an adapter's copies. See `reference.fp8.copy_adapter`."""
    need_launchable(a_SI)
    for name, x in (("A", a_SI), ("B", b_OR)):
        need_rows(name, x)
    if len(a_SI):
        _adapter[(len(a_SI),)](a_SI, b_OR, *table, scale_O1, scale_I1, *out, lora_scale, a_SI.shape[1], len(b_OR),
                               len(a_SI), a_SI.stride(0), b_OR.stride(0), SMALLEST=SMALLEST_AMAX, LARGEST=E4M3_LARGEST,
                               BLOCK=ADAPTER_BLOCK, num_warps=8)  # fmt: skip
