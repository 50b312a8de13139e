"""Rotary position embedding of queries and keys (https://arxiv.org/abs/2104.09864, eq. 34), Hugging Face's halves.

A head of H features is two halves (a, b); pair i = (a_i, b_i) turns by the angle t_i of its position:

    a' = a cos t - b sin t            b' = b cos t + a sin t

A rotation is orthogonal, so the gradient turns back: the same formula with -sin. Nothing of q and k need be kept.

Tables of cos and sin are float32 [S, H/2] (one column a pair, not repeated) and are looked up by each token's position,
so packed sequences start again at 0. The sum is formed in float32 and rounded once; Hugging Face rounds the tables
and both products to 16 bits first, which is why the two agree to that precision only.

Results go to new tensors, or to given ones, which may be the inputs themselves: a product's backward does not look at
its own output, and q and k are often views of one tensor in which v stands too.

Legend: T tokens, N query heads, K key heads, H head features, S positions in the tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chulengo.kernels.applies import need, need_same


def tables(
    num_positions: int, head_size: int, theta: float = 10000.0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Returns cos and sin, float32 [S, H/2], of position * theta**(-2i/H); unscaled frequencies."""
    frequency = 1.0 / theta ** (torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size)
    angle = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None] * frequency
    return angle.cos(), angle.sin()


def check(q_TNH: Tensor, k_TKH: Tensor, cos_SP: Tensor, sin_SP: Tensor, position_T: Tensor,
          out: tuple[Tensor, Tensor] | None = None) -> None:  # fmt: skip
    """Raises `KernelError` unless the operands fit each other. Positions beyond the tables are the caller's care."""
    need(
        q_TNH.dim() == 3 and k_TKH.dim() == 3 and q_TNH.shape[::2] == k_TKH.shape[::2],
        f"q is {tuple(q_TNH.shape)}, k is {tuple(k_TKH.shape)}.",
        allowed="q [T, N, H] and k [T, K, H]",
    )
    need_same("q", q_TNH, "k", k_TKH, shape=False)
    head_size = q_TNH.shape[2]
    need(head_size % 2 == 0, f"The head size is {head_size}.", allowed="even sizes")
    for name, table in (("cos", cos_SP), ("sin", sin_SP)):
        need(
            table.dtype == torch.float32 and table.dim() == 2 and table.shape[1] * 2 == head_size,
            f"{name} is {tuple(table.shape)} {table.dtype} for heads of {head_size}.",
            allowed=f"float32 [S, {head_size // 2}]",
        )
    need(
        position_T.shape == q_TNH.shape[:1] and position_T.dtype in (torch.int32, torch.int64),
        f"Positions are {tuple(position_T.shape)} {position_T.dtype} for {q_TNH.shape[0]} tokens.",
        allowed="int32 or int64 [T]",
    )
    for name, given, wanted in zip(("q", "k"), out or (), (q_TNH, k_TKH), strict=False):
        need_same(f"the result's {name}", given, name, wanted)


def forward(
    q_TNH: Tensor, k_TKH: Tensor, cos_SP: Tensor, sin_SP: Tensor, position_T: Tensor,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns q and k turned by their positions, of the same shape and dtype.

    Args:
        q_TNH: queries.
        k_TKH: keys; fewer heads are fine.
        cos_SP: float32 [S, H/2].
        sin_SP: float32 [S, H/2].
        position_T: int32 or int64, below S.
        out: where the results go; may be q and k themselves. None: new tensors.
    """
    check(q_TNH, k_TKH, cos_SP, sin_SP, position_T, out)
    cos_T1P, sin_T1P = cos_SP[position_T.long()][:, None], sin_SP[position_T.long()][:, None]

    def turned(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos_T1P - b * sin_T1P, b * cos_T1P + a * sin_T1P), dim=-1).to(x.dtype)

    results = turned(q_TNH), turned(k_TKH)
    if out is None:
        return results
    return out[0].copy_(results[0]), out[1].copy_(results[1])


def backward(
    dq_TNH: Tensor, dk_TKH: Tensor, cos_SP: Tensor, sin_SP: Tensor, position_T: Tensor,
    out: tuple[Tensor, Tensor] | None = None, copied: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of q and k before the turn: the rotation by minus the angle.

    Args:
        dq_TNH: gradient of the turned queries.
        dk_TKH: of the turned keys.
        cos_SP: as in the forward.
        sin_SP: as in the forward.
        position_T: as in the forward.
        out: as in the forward.
        copied: v's gradient [T, K, H], and where it goes beside the others, of the same shape and dtype.
    """
    if copied is not None:
        source, place = copied
        need_same("v's gradient", source, "k's", dk_TKH)
        need_same("its place", place, "v's gradient", source)
        place.copy_(source)
    return forward(dq_TNH, dk_TKH, cos_SP, -sin_SP, position_T, out)
