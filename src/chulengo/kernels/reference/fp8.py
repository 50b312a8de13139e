"""Rows in float8 (e4m3) with a scale each, alone and behind the operations that make them.

    scale_t = max_k |x_tk| / 448          x8_tk = round_e4m3(x_tk * (1 / scale_t))

448 is e4m3's largest number, so the row's largest value uses the whole range; `x8 * scale` gives x back to about
2.5 % rms. One scale a row (https://arxiv.org/abs/2209.05433 has one a tensor) is what `torch._scaled_mm` takes as
[T, 1], and it keeps an outlier token from costing the others.

Values are those that the unfused operation would have written, in its 16-bit dtype: quantising in the kernel that
makes them is another schedule of the same computation, and gives the same bytes as doing it afterwards.

A row of zeros has scale 2**-60 / 448 and stays zeros.

Legend: T tokens, K features (D behind the norm, I behind SwiGLU).
"""

from __future__ import annotations

import torch
from torch import Tensor

from chulengo.kernels.applies import need
from chulengo.kernels.reference import rms_norm, swiglu
from chulengo.kernels.reference.nf4 import E4M3_LARGEST

SMALLEST_AMAX = 2.0**-60  # its reciprocal is a normal float32


def quantize_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x in float8_e4m3fn [T, K] and scales, float32 [T, 1].

    Args:
        x_TK: float32, bfloat16 or float16.
    """
    need(x_TK.dim() == 2, f"x has shape {tuple(x_TK.shape)}.", allowed="[T, K]")
    wide_TK = x_TK.float()
    if wide_TK.numel() == 0:
        return x_TK.to(torch.float8_e4m3fn), torch.ones(x_TK.shape[0], 1, device=x_TK.device)
    amax_T1 = wide_TK.abs().amax(1, keepdim=True).clamp(min=SMALLEST_AMAX)
    # PyTorch takes a number over a tensor as that number times a reciprocal: rounded twice, unlike a kernel's division
    factor_T1 = torch.full_like(amax_T1, E4M3_LARGEST) / amax_T1
    # clamped, because 448 / amax * amax may round to just above 448; NaN stays NaN
    scaled_TK = (wide_TK * factor_T1).clamp(-E4M3_LARGEST, E4M3_LARGEST)
    return scaled_TK.to(torch.float8_e4m3fn), amax_T1 / E4M3_LARGEST


def rms_norm_rows(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns `quantize_rows` of rms_norm's y (e4m3 [T, D], scales [T, 1]), the sum [T, D] and rstd [T]."""
    y_TD, sum_TD, rstd_T = rms_norm.forward(x_TD, residual_TD, weight_D, eps)
    return *quantize_rows(y_TD), sum_TD, rstd_T


def swiglu_rows(gate_TI: Tensor, up_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `quantize_rows` of silu(gate) * up: e4m3 [T, I], scales [T, 1]."""
    return quantize_rows(swiglu.forward(gate_TI, up_TI))
