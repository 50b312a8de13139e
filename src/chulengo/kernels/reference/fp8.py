"""Products in float8 (e4m3): rows with a scale each, alone and behind the operations that make them.

    scale_t = max_k |x_tk| / 448          x8_tk = round_e4m3(x_tk * (448 / max_k |x_tk|))

448 is e4m3's largest number, so the row's largest value uses the whole range; `x8 * scale` gives x back to about
2.5 % rms. One scale a row (https://arxiv.org/abs/2209.05433 has one a tensor) is what `torch._scaled_mm` takes as
[T, 1], and it keeps an outlier token from costing the others.

Values are those that the unfused operation would have written, in its 16-bit dtype: quantising in the kernel that
makes them is another schedule of the same computation, and gives the same bytes as doing it afterwards.

A row of zeros has scale 2**-60 / 448 and stays zeros.

An adapter rides in columns beside the values, so that one product computes x Wᵀ + s (x Aᵀ) Bᵀ:

    [x8 | h8] [W8 | B8]ᵀ,     h8_ts = round(h_ts s / (c_s scale_t)),     B8_os = round(B_os c_s / scale_o)

h = x Aᵀ is a product in e4m3 too. Any c_s gives the same product but for rounding and the ends of e4m3's range;
`copy_adapter` says which one is taken, and why; `kernels/columns.py` how many columns there are.

Legend: T tokens, K features (D behind the norm, I behind SwiGLU), O out features, S columns of an adapter, W features
and columns together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chulengo.kernels.applies import need
from chulengo.kernels.reference import rms_norm, rope, swiglu
from chulengo.kernels.reference.nf4 import E4M3_LARGEST

SMALLEST_AMAX = 2.0**-60  # its reciprocal is a normal float32


class ColumnTable(NamedTuple):
    """Which value of a source stands in which rows of each column, int32 [S] each.

    Column s holds source[row, column[s]] in the rows first[s] <= row < last[s], and zeros elsewhere.
    """

    first_S: Tensor
    last_S: Tensor
    column_S: Tensor


def quantize_rows(x_TK: Tensor, columns: int = 0) -> tuple[Tensor, Tensor]:
    """Returns x in float8_e4m3fn [T, K + columns] and scales, float32 [T, 1]; the columns are not written.

    Args:
        x_TK: float32, bfloat16 or float16.
        columns: room for an adapter behind each row.
    """
    need(x_TK.dim() == 2, f"x has shape {tuple(x_TK.shape)}.", allowed="[T, K]")
    rows_TW = torch.empty((x_TK.shape[0], x_TK.shape[1] + columns), dtype=torch.float8_e4m3fn, device=x_TK.device)
    wide_TK = x_TK.float()
    if wide_TK.numel() == 0:
        return rows_TW, torch.ones(x_TK.shape[0], 1, device=x_TK.device)
    amax_T1 = wide_TK.abs().amax(1, keepdim=True).clamp(min=SMALLEST_AMAX)
    # PyTorch takes a number over a tensor as that number times a reciprocal: rounded twice, unlike a kernel's division
    factor_T1 = torch.full_like(amax_T1, E4M3_LARGEST) / amax_T1
    # clamped, because 448 / amax * amax may round to just above 448; NaN stays NaN
    rows_TW[:, : x_TK.shape[1]] = _e4m3(wide_TK * factor_T1)
    return rows_TW, amax_T1 / torch.full_like(amax_T1, E4M3_LARGEST)


def rms_norm_rows(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, columns: int = 0, *, keep: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Returns `quantize_rows` of rms_norm's y, then y [T, D] if it is to be kept, the sum [T, D] and rstd [T]."""
    y_TD, sum_TD, rstd_T = rms_norm.forward(x_TD, residual_TD, weight_D, eps)
    return *quantize_rows(y_TD, columns), y_TD if keep else None, sum_TD, rstd_T


def rms_norm_backward_rows(
    dy_TD: Tensor, dsum_TD: Tensor | None, sum_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, columns: int = 0, *,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns `quantize_rows` of the dx that rms_norm's backward gives, then dx itself, [T, D].

    Args:
        dy_TD: gradient of the norm.
        dsum_TD: as in `rms_norm.backward`, like what follows.
        sum_TD: h.
        weight_D: the weight.
        rstd_T: of the forward.
        columns: room for an adapter behind each row.
        scales: by which dy is to be multiplied, where it is an `unscaled_product`: [T, 1] and [D, 1].
    """
    if scales is not None:
        dy_TD = dy_TD.float() * scales[0] * scales[1].view(1, -1)
    dx_TD, _ = rms_norm.backward(dy_TD, dsum_TD, sum_TD, weight_D, rstd_T)
    return *quantize_rows(dx_TD, columns), dx_TD


def swiglu_rows(
    gate_TI: Tensor, up_TI: Tensor, columns: int = 0, *, keep: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns `quantize_rows` of silu(gate) * up, then the product [T, I] if it is to be kept."""
    product_TI = swiglu.forward(gate_TI, up_TI)
    return *quantize_rows(product_TI, columns), product_TI if keep else None


def swiglu_backward_rows(
    dproduct_TI: Tensor, gate_TI: Tensor, up_TI: Tensor, dboth_T2I: Tensor, product_TI: Tensor | None, columns: int = 0
) -> tuple[Tensor, Tensor]:
    """Writes swiglu's gradients into `dboth` (and silu(gate) * up into `product`); returns `quantize_rows` of dboth."""
    dgate_TI, dup_TI = dboth_T2I.chunk(2, dim=1)
    swiglu.backward(dproduct_TI, gate_TI, up_TI, dgate_TI=dgate_TI, dup_TI=dup_TI, product_TI=product_TI)
    return quantize_rows(dboth_T2I, columns)


def rope_backward_rows(
    dq_TNH: Tensor, dk_TKH: Tensor, dv_TKH: Tensor, cos_SP: Tensor, sin_SP: Tensor, position_T: Tensor,
    columns: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns `quantize_rows` of q's and k's gradients before their turn and v's, side by side; then these, [T, O]."""
    dq_TNH, dk_TKH = rope.backward(dq_TNH, dk_TKH, cos_SP, sin_SP, position_T)
    dy_TO = torch.cat([part.flatten(1) for part in (dq_TNH, dk_TKH, dv_TKH)], dim=1)
    return *quantize_rows(dy_TO, columns), dy_TO


def set_columns(
    rows_TW: Tensor, scale_T1: Tensor, start: int, source_TS: Tensor, factor_S: Tensor,
    table: ColumnTable | None = None,
) -> None:
    """Writes source * factor / scale, in e4m3, into the columns from `start` on; zeros where the source ends.

    Args:
        rows_TW: e4m3; as many columns as there are behind `start`.
        scale_T1: float32, of the rows.
        start: first column.
        source_TS: values, in any float dtype, of any strides.
        factor_S: float32, one for each column that holds values.
        table: which values stand where; None: those of the same place.
    """  # fmt: skip
    values_TS = source_TS.float()
    if table is not None:
        row_T1 = torch.arange(len(rows_TW), device=rows_TW.device)[:, None]
        inside_TS = (row_T1 >= table.first_S) & (row_T1 < table.last_S)
        values_TS = torch.where(inside_TS, values_TS[:, table.column_S.long()], 0.0)
    rows_TW[:, start:] = torch.zeros((), device=rows_TW.device).to(rows_TW.dtype)
    rows_TW[:, start : start + len(factor_S)] = _e4m3(values_TS * factor_S / scale_T1)


def rank_product(
    rows_TW: Tensor, scale_T1: Tensor, copy_SK: Tensor, copy_scale_S1: Tensor, factor_S: Tensor, dtype: torch.dtype
) -> Tensor:
    """Returns x Aᵀ (or dy B), [T, S] in `dtype`, and writes it into the columns of `rows`.

    Args:
        rows_TW: x, and room for the columns behind its K values.
        scale_T1: float32, of its rows.
        copy_SK: A, or Bᵀ, in e4m3, with zeros behind its S rows; see `AdapterCopies`.
        copy_scale_S1: float32, of its rows.
        factor_S: float32, of the columns.
        dtype: of the result.
    """
    num_features = copy_SK.shape[1]
    low_TS = product(rows_TW[:, :num_features], scale_T1, copy_SK, copy_scale_S1, dtype)[:, : len(factor_S)]
    set_columns(rows_TW, scale_T1, num_features, low_TS, factor_S)
    return low_TS


class AdapterCopies(NamedTuple):
    """What products in FP8 read of an adapter; written by `copy_adapter`.

    Attributes:
        factors_4S: float32, what `set_columns` multiplies by: for h and B in the forward, u = dy B and A behind it.
        a8_SI: e4m3, A; h = x Aᵀ is a product with it. Rows in multiples of 16, as products want, the last ones zeros.
        a_scale_S1: float32, of its rows.
        b8_SO: e4m3, Bᵀ with each map's part in its columns and zeros elsewhere, for u = dy B; rows likewise.
        b_scale_S1: float32, of its rows.
    """

    factors_4S: Tensor
    a8_SI: Tensor
    a_scale_S1: Tensor
    b8_SO: Tensor
    b_scale_S1: Tensor


def empty_copies(ranks: int, in_features: int, out_features: int, device: torch.device) -> AdapterCopies:
    """Returns copies to write into, for adapters of this many ranks together."""
    rows = -(-ranks // 16) * 16

    def rows_of(width: int) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros((rows, width), dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        return zeros, torch.ones((rows, 1), device=device)

    return AdapterCopies(torch.zeros((4, ranks), device=device), *rows_of(in_features), *rows_of(out_features))


def copy_adapter(
    a_SI: Tensor, b_OR: Tensor, table: ColumnTable, scale_O1: Tensor, scale_I1: Tensor, lora_scale: float,
    out: AdapterCopies,
) -> None:  # fmt: skip
    """Writes an adapter's copies.

    With h_s <= max|x| ||A_s||_1 and the row's scale max|x| / 448, c_s = s ||A_s||_1 is the least that never lets h8
    leave the range, whatever x is; a typical h8 is then near 2, in the middle of e4m3's range. B8 may not leave it
    either, so c_s is at most 448 / max_o(|B_os| / scale_o). Where that is smaller, as for an adapter that has grown
    large, h8 is larger, and clamped at 448: for Llama 2 7B's shape, alpha twice the rank and values of B of 0.1 that
    is at 7 times its rms. The same with the parts of A and B exchanged for u = dy B and A.

    Args:
        a_SI: A of all maps, stacked.
        b_OR: B of all maps, stacked.
        table: of B.
        scale_O1: float32, of W's rows.
        scale_I1: float32, of W's columns.
        lora_scale: factor of B A.
        out: written.
    """
    row_O1 = torch.arange(len(b_OR), device=b_OR.device)[:, None]
    inside_OS = (row_O1 >= table.first_S) & (row_O1 < table.last_S)
    b_OS = torch.where(inside_OS, b_OR.float()[:, table.column_S.long()], 0.0)
    size_SI, size_OS = a_SI.float().abs(), b_OS.abs()
    forward_S = _between(abs(lora_scale) * size_SI.sum(1), (size_OS / scale_O1).amax(0))
    backward_S = _between(abs(lora_scale) * size_OS.sum(0), (size_SI / scale_I1.view(1, -1)).amax(1))
    out.factors_4S.copy_(torch.stack([lora_scale / forward_S, forward_S, lora_scale / backward_S, backward_S]))
    for rows8, scale_S1, values in ((out.a8_SI, out.a_scale_S1, a_SI), (out.b8_SO, out.b_scale_S1, b_OS.t())):
        made8, made_scale = quantize_rows(values)
        rows8[: len(values)], scale_S1[: len(values)] = made8, made_scale


def _between(least_S: Tensor, largest_S: Tensor) -> Tensor:
    most_S = torch.full_like(largest_S, E4M3_LARGEST) / largest_S.clamp(min=SMALLEST_AMAX)
    return torch.minimum(least_S, most_S).clamp(min=SMALLEST_AMAX)


def product(x8_TW: Tensor, scale_T1: Tensor, w8_OW: Tensor, scale_O1: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns (x8 * scale) (w8 * scale)ᵀ, [T, O] in `dtype`, accumulated in float32."""
    return ((x8_TW.float() @ w8_OW.float().t()) * scale_T1 * scale_O1.view(1, -1)).to(dtype)


def unscaled_product(x8_TW: Tensor, w8_OW: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x8 w8ᵀ, [T, O] in `dtype`, accumulated in float32: a product whose reader multiplies by the scales."""
    return (x8_TW.float() @ w8_OW.float().t()).to(dtype)


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn)
