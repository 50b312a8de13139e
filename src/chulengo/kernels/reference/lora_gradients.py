"""Gradients of LoRA's two factors (https://arxiv.org/abs/2106.09685, section 4.1), for adapters that share an input.

    y_j = x W_jᵀ + s (x A_jᵀ) B_jᵀ

    h_j = x A_jᵀ          dB_j = s dy_jᵀ h_j
    u_j = dy_j B_j        dA_j = s u_jᵀ x

for j = q, k, v (or gate, up), which share x. dx is not made here: with the adapter folded into the weight it is one
product, dy (W + s B A). h may be given where the forward kept it; otherwise it is made again, which needs x and A only.

Legend: T tokens, K in features, N out features of one adapter, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from chulengo.kernels.applies import need


def check(x_TK: Tensor, dys: Sequence[Tensor], a_factors: Sequence[Tensor], b_factors: Sequence[Tensor]) -> None:
    """Raises `KernelError` unless every adapter fits x and its dy."""
    need(
        len(dys) == len(a_factors) == len(b_factors) > 0,
        f"There are {len(dys)} gradients, {len(a_factors)} A and {len(b_factors)} B.",
        allowed="as many of each, at least one",
    )
    need(x_TK.dim() == 2, f"x has shape {tuple(x_TK.shape)}.", allowed="[T, K]")
    for dy_TN, a_RK, b_NR in zip(dys, a_factors, b_factors, strict=True):
        rank = a_RK.shape[0]
        fits = (
            dy_TN.dim() == 2
            and dy_TN.shape[0] == x_TK.shape[0]
            and a_RK.shape == (rank, x_TK.shape[1])
            and b_NR.shape == (dy_TN.shape[1], rank)
        )
        need(
            fits,
            f"x is {tuple(x_TK.shape)}, dy {tuple(dy_TN.shape)}, A {tuple(a_RK.shape)}, B {tuple(b_NR.shape)}.",
            allowed="x [T, K], dy [T, N], A [R, K], B [N, R]",
        )
        need(dy_TN.dtype == x_TK.dtype, f"x is {x_TK.dtype}, dy is {dy_TN.dtype}.", allowed="one dtype")


def lora_gradients(
    x_TK: Tensor,
    dys: Sequence[Tensor],
    a_factors: Sequence[Tensor],
    b_factors: Sequence[Tensor],
    scale: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns dA [R, K] and dB [N, R] of each adapter, in the dtype of its factors.

    Args:
        x_TK: the shared input.
        dys: the gradient of each output, [T, N_j].
        a_factors: [R_j, K] each.
        b_factors: [N_j, R_j] each.
        scale: alpha / rank, or alpha / sqrt(rank).
    """
    check(x_TK, dys, a_factors, b_factors)
    da_factors, db_factors = [], []
    for dy_TN, a_RK, b_NR in zip(dys, a_factors, b_factors, strict=True):
        h_TR = x_TK @ a_RK.detach().to(x_TK.dtype).t()
        u_TR = dy_TN @ b_NR.detach().to(x_TK.dtype)
        da_factors.append((scale * (u_TR.t() @ x_TK)).to(a_RK.dtype))
        db_factors.append((scale * (dy_TN.t() @ h_TR)).to(b_NR.dtype))
    return da_factors, db_factors
