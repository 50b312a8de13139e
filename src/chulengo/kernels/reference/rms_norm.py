"""RMSNorm with the residual sum in front of it (https://arxiv.org/abs/1910.07467, eq. 4), forward and backward.

    h   = x + residual                          (h = x without a residual)
    n   = h * rstd,   rstd = 1 / sqrt(mean_d h_d^2 + eps)
    y   = n * w

Rounding follows Hugging Face's Llama: h is rounded to the input dtype, n is formed in float32 and rounded to it, and
the product with w is rounded again. The backward, with dn = dy * w:

    dh  = rstd * (dn - n * mean_d(dn * n)) + dh_from_above            dx = dresidual = dh
    dw  = sum_t dy * n

where `dh_from_above` is the gradient that reaches h along the residual stream. What is kept is h and one float32 a
token (rstd); n is formed again. The weight is frozen in LoRA training, so dw is made only on request.

Legend: T tokens, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chulengo.kernels.applies import need, need_same


def check(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor) -> None:
    """Raises `KernelError` unless the operands fit each other."""
    need(x_TD.dim() == 2, f"x has shape {tuple(x_TD.shape)}.", allowed="[T, D]", next_step="x.flatten(0, -2)")
    need(
        weight_D.shape == x_TD.shape[1:] and weight_D.dtype == x_TD.dtype,
        f"The weight is {tuple(weight_D.shape)} {weight_D.dtype} for x {tuple(x_TD.shape)} {x_TD.dtype}.",
        allowed="[D] in the dtype of x",
    )
    if residual_TD is not None:
        need_same("x", x_TD, "residual", residual_TD)


def forward(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y [T, D], the sum h [T, D] (x itself without a residual) and rstd, float32 [T].

    Args:
        x_TD: the branch's output, float32, bfloat16 or float16.
        residual_TD: the residual stream, or None.
        weight_D: in the dtype of x.
        eps: added to the mean square.
    """
    check(x_TD, residual_TD, weight_D)
    sum_TD = x_TD if residual_TD is None else x_TD + residual_TD
    wide_TD = sum_TD.float()
    rstd_T = torch.rsqrt(wide_TD.square().mean(1) + eps)
    return (wide_TD * rstd_T[:, None]).to(x_TD.dtype) * weight_D, sum_TD, rstd_T


def backward(
    dy_TD: Tensor,
    dsum_TD: Tensor | None,
    sum_TD: Tensor,
    weight_D: Tensor,
    rstd_T: Tensor,
    *,
    weight_gradient: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns dx (= dresidual) [T, D] in the dtype of h, and dw [D] in the dtype of w or None.

    Args:
        dy_TD: gradient of y.
        dsum_TD: gradient of h from the residual stream, or None.
        sum_TD: h, as the forward returned it.
        weight_D: the weight.
        rstd_T: as the forward returned it.
        weight_gradient: make dw.
    """
    normed_TD = sum_TD.float() * rstd_T[:, None]
    dnormed_TD = dy_TD.float() * weight_D.float()
    inner_T1 = (dnormed_TD * normed_TD).mean(1, keepdim=True)
    dx_TD = rstd_T[:, None] * (dnormed_TD - normed_TD * inner_T1)
    if dsum_TD is not None:
        dx_TD = dx_TD + dsum_TD.float()
    dweight_D = (dy_TD.float() * normed_TD).sum(0).to(weight_D.dtype) if weight_gradient else None
    return dx_TD.to(sum_TD.dtype), dweight_D
