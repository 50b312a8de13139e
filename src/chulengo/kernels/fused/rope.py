"""Rotary embedding of queries and keys in one launch. Formulas in `reference/rope.py`.

One program a token: it looks its cos and sin row up once and turns all query and key heads with it. Bound by bytes:
4 a feature in bfloat16 (read, written); the tables are 1/N of that. The backward is the same kernel with -sin; it takes
v's gradient along to its place in the stacked ones, which PyTorch's copy of such rows does at a third of the speed.
A pair is read and written by one thread, so `out` may be the input itself.

Legend: T tokens, N query heads, K key heads, H head features, P = H/2 pairs, S positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chulengo.kernels.applies import need_rows, need_same
from chulengo.kernels.fused.launch import need_float, need_launchable, row_block
from chulengo.kernels.reference.rope import check

MOST_HEADS = 32  # heads turned at once; 32 of 128 features are 16 pairs a thread


@triton.jit
def _turn(x_ptr, out_ptr, cos, sin, num_heads, num_pairs, stride_head, out_stride_head, HEADS: tl.constexpr,
          PAIRS: tl.constexpr):  # fmt: skip
    """Turns all heads of one token; a' = a cos - b sin, b' = b cos + a sin."""
    p = tl.arange(0, PAIRS)
    for start in range(0, num_heads, HEADS):
        head = start + tl.arange(0, HEADS)
        inside = (head < num_heads)[:, None] & (p < num_pairs)[None, :]
        place = head[:, None] * stride_head + p[None, :]
        a = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + place + num_pairs, mask=inside, other=0.0).to(tl.float32)
        dtype = out_ptr.dtype.element_ty
        out_place = head[:, None] * out_stride_head + p[None, :]
        tl.store(out_ptr + out_place, (a * cos[None, :] - b * sin[None, :]).to(dtype), mask=inside)
        tl.store(out_ptr + out_place + num_pairs, (b * cos[None, :] + a * sin[None, :]).to(dtype), mask=inside)


@triton.jit
def _copy(x_ptr, out_ptr, num_heads, num_pairs, stride_head, out_stride_head, HEADS: tl.constexpr,
          PAIRS: tl.constexpr):  # fmt: skip
    """Copies all heads of one token."""
    p = tl.arange(0, 2 * PAIRS)
    for start in range(0, num_heads, HEADS):
        head = start + tl.arange(0, HEADS)
        inside = (head < num_heads)[:, None] & (p < 2 * num_pairs)[None, :]
        place, out_place = (head * stride_head)[:, None], (head * out_stride_head)[:, None]
        x = tl.load(x_ptr + place + p[None, :], mask=inside)
        tl.store(out_ptr + out_place + p[None, :], x, mask=inside)


@triton.jit
def _rotate(q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, position_ptr, v_ptr, v_out_ptr, num_query_heads,
            num_key_heads, num_pairs, stride_q, stride_q_head, stride_k, stride_k_head, out_stride_q, out_stride_q_head,
            out_stride_k, out_stride_k_head, stride_cos, stride_sin, stride_v, stride_v_head, out_stride_v,
            out_stride_v_head, DIRECTION: tl.constexpr, COPIES: tl.constexpr, QUERY_HEADS: tl.constexpr,
            KEY_HEADS: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + token).to(tl.int64)
    p = tl.arange(0, PAIRS)
    inside = p < num_pairs
    cos = tl.load(cos_ptr + position * stride_cos + p, mask=inside, other=0.0)
    sin = DIRECTION * tl.load(sin_ptr + position * stride_sin + p, mask=inside, other=0.0)
    _turn(q_ptr + token * stride_q, q_out_ptr + token * out_stride_q, cos, sin, num_query_heads, num_pairs,
          stride_q_head, out_stride_q_head, QUERY_HEADS, PAIRS)  # fmt: skip
    _turn(k_ptr + token * stride_k, k_out_ptr + token * out_stride_k, cos, sin, num_key_heads, num_pairs,
          stride_k_head, out_stride_k_head, KEY_HEADS, PAIRS)  # fmt: skip
    if COPIES:
        _copy(v_ptr + token * stride_v, v_out_ptr + token * out_stride_v, num_key_heads, num_pairs, stride_v_head,
              out_stride_v_head, KEY_HEADS, PAIRS)  # fmt: skip


def _launch(
    q_TNH, k_TKH, cos_SP, sin_SP, position_T, out, direction: float, copied=None
) -> tuple[torch.Tensor, torch.Tensor]:
    check(q_TNH, k_TKH, cos_SP, sin_SP, position_T, out)
    need_launchable(q_TNH)
    need_float("q", q_TNH)
    q_out, k_out = out if out is not None else (torch.empty_like(x, memory_format=torch.contiguous_format)
                                                for x in (q_TNH, k_TKH))  # fmt: skip
    for name, tensor in (("q", q_TNH), ("k", k_TKH), ("cos", cos_SP), ("sin", sin_SP), ("positions", position_T),
                         ("the result's q", q_out), ("the result's k", k_out)):  # fmt: skip
        need_rows(name, tensor)
    v_TKH, v_out = copied if copied is not None else (k_TKH, k_out)
    if copied is not None:
        need_same("v's gradient", v_TKH, "k's", k_TKH)
        need_same("its place", v_out, "v's gradient", v_TKH)
        need_rows("v's gradient", v_TKH)
        need_rows("its place", v_out)
    num_tokens, num_query_heads, head_size = q_TNH.shape
    num_key_heads = k_TKH.shape[1]
    if num_tokens:
        _rotate[(num_tokens,)](
            q_TNH, k_TKH, q_out, k_out, cos_SP, sin_SP, position_T, v_TKH, v_out, num_query_heads, num_key_heads,
            head_size // 2, *q_TNH.stride()[:2], *k_TKH.stride()[:2], *q_out.stride()[:2], *k_out.stride()[:2],
            cos_SP.stride(0), sin_SP.stride(0), *v_TKH.stride()[:2], *v_out.stride()[:2],
            DIRECTION=direction, COPIES=copied is not None,
            QUERY_HEADS=min(MOST_HEADS, triton.next_power_of_2(num_query_heads)),
            KEY_HEADS=min(MOST_HEADS, triton.next_power_of_2(num_key_heads)), PAIRS=row_block(head_size // 2),
            num_warps=4,
        )  # fmt: skip
    return q_out, k_out


def forward(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, cos_SP: torch.Tensor, sin_SP: torch.Tensor, position_T: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns q and k turned by their positions. See `reference.rope.forward`."""
    return _launch(q_TNH, k_TKH, cos_SP, sin_SP, position_T, out, 1.0)


def backward(
    dq_TNH: torch.Tensor, dk_TKH: torch.Tensor, cos_SP: torch.Tensor, sin_SP: torch.Tensor, position_T: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor] | None = None, copied: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients turned back, and copies v's beside them. See `reference.rope.backward`."""
    return _launch(dq_TNH, dk_TKH, cos_SP, sin_SP, position_T, out, -1.0, copied)
