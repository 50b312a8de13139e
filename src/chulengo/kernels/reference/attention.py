"""Causal attention over packed sequences of different lengths: PyTorch's attention, once for each sequence.

Tokens of all sequences stand behind each other; sequence s is the rows cu[s] to cu[s+1]. For each of them

    y = softmax(q kᵀ / sqrt(H), keys up to the query's own place) v

and nothing passes between sequences. A query head n reads the key head n // (N / K) (grouped-query attention,
https://arxiv.org/abs/2305.13245): consecutive query heads share one.

The alternative is one call with a block-diagonal mask; it costs T*T/8 bytes and the products of all the pairs that the
mask then throws away, where this costs a call for each sequence. Gradients are autograd's own.

Legend: T tokens, N query heads, K key heads, H head features, S sequences.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from chulengo.kernels.applies import need, need_same


def check(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_seqlens: Tensor) -> None:
    """Raises `KernelError` unless the operands fit each other. That cu_seqlens ends at T is the caller's care."""
    need(
        q_TNH.dim() == 3 and k_TKH.dim() == 3 and q_TNH.shape[::2] == k_TKH.shape[::2],
        f"q is {tuple(q_TNH.shape)}, k is {tuple(k_TKH.shape)}.",
        allowed="q [T, N, H] and k [T, K, H]",
    )
    need_same("k", k_TKH, "v", v_TKH)
    need_same("q", q_TNH, "k", k_TKH, shape=False)
    need(
        q_TNH.shape[1] % k_TKH.shape[1] == 0,
        f"There are {q_TNH.shape[1]} query heads and {k_TKH.shape[1]} key heads.",
        allowed="a multiple",
    )
    need(
        cu_seqlens.dim() == 1 and len(cu_seqlens) >= 2 and cu_seqlens.dtype == torch.int32,
        f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}.",
        allowed="int32 [S + 1]: 0, then the end of each sequence",
    )


def packed_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Returns the attention's output [T, N, H], differentiable.

    Args:
        q_TNH: queries, already turned by their positions.
        k_TKH: keys, likewise.
        v_TKH: values.
        cu_seqlens: int32 [S + 1], from 0 to T; equal neighbours are empty sequences.
        max_seqlen: tokens of the longest sequence; not needed here.
    """
    check(q_TNH, k_TKH, v_TKH, cu_seqlens)
    ends = cu_seqlens.tolist()
    need(
        ends[0] == 0 and ends[-1] == q_TNH.shape[0],
        f"cu_seqlens goes from {ends[0]} to {ends[-1]} for {q_TNH.shape[0]} tokens.",
        allowed="0 to T",
    )
    parts = []
    for start, end in pairwise(ends):
        if start == end:
            continue
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (q_TNH, k_TKH, v_TKH))
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        parts.append(y[0].transpose(0, 1))
    return torch.cat(parts) if parts else torch.empty_like(q_TNH)
