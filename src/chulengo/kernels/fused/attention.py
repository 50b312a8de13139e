"""Causal attention over packed sequences in one launch: PyTorch's `varlen_attn`, which is FlashAttention.

The formula is in `reference/attention.py`. No kernel of our own: FlashAttention 2 comes with PyTorch, and where
FlashAttention 3 is installed, `torch.nn.attention.activate_flash_attention_impl("FA3")` puts it behind the same call.
Forward and backward take 16-bit tensors only. It keeps q, k, v, the output and one float32 a token and head.

Legend: T tokens, N query heads, K key heads, H head features, S sequences.
"""

from __future__ import annotations

import inspect

import torch
from torch.nn.attention.varlen import varlen_attn

from chulengo.kernels.applies import need
from chulengo.kernels.reference.attention import check


def packed_attention(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    """Returns the attention's output [T, N, H], differentiable. See `reference.attention.packed_attention`."""
    check(q_TNH, k_TKH, v_TKH, cu_seqlens)
    reference = "backend='reference'"
    need(
        q_TNH.is_cuda, f"FlashAttention was asked for a tensor on {q_TNH.device}.", allowed="CUDA devices",
        next_step=reference,
    )
    half = q_TNH.dtype in (torch.float16, torch.bfloat16)
    need(half, f"q is {q_TNH.dtype}.", allowed="bfloat16 and float16 in FlashAttention", next_step=reference)
    head_size = q_TNH.shape[2]
    need(head_size <= 256 and head_size % 8 == 0, f"The head size is {head_size}.",
         allowed="multiples of 8 up to 256 in FlashAttention", next_step=reference)
    accepted = inspect.signature(varlen_attn).parameters
    need("window_size" in accepted, f"PyTorch {torch.__version__} has an older varlen_attn.", allowed="2.11 and above")
    # (-1, 0): every key up to the query's own place. Earlier versions take grouped heads without being told.
    options = {"enable_gqa": q_TNH.shape[1] != k_TKH.shape[1]} if "enable_gqa" in accepted else {}
    return varlen_attn(
        q_TNH, k_TKH, v_TKH, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0), **options
    )
