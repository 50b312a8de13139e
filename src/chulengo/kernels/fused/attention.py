"""Causal attention over packed sequences: cuDNN's where they are equally long, FlashAttention's otherwise.

The formula is in `reference/attention.py`. No kernel of our own: both come with PyTorch. On an H200, 32 heads of 128,
4 x 2,048 tokens, forward and backward take 0.26 and 0.89 ms in cuDNN, 0.49 and 1.42 ms in FlashAttention 2; cuDNN
takes only a dense batch, since its variable-length form in PyTorch 2.11 gives infinite gradients. FlashAttention 3
has a package of its own; where that is there and the device is of its generation, PyTorch is told to use it behind the
same call. What that gains was not measured.
Forward and backward take 16-bit tensors only. Both keep q, k, v, the output and one float32 a token and head.

Legend: T tokens, N query heads, K key heads, H head features, S sequences.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import warnings

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from chulengo.kernels.applies import need
from chulengo.kernels.limits import HEAD_STEP, LARGEST_HEAD, REFERENCE_ENGINE
from chulengo.kernels.reference.attention import check

FLASH_3_PACKAGE, FLASH_3_MAJOR = "flash_attn_interface", 9  # major compute capability: Hopper alone
CUDNN_CAPABILITY = (9, 0)  # of the device: on older ones cuDNN has no advantage that was measured
CUDNN_HEAD_SIZE = 128


def packed_attention(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    """Returns the attention's output [T, N, H], differentiable. See `reference.attention.packed_attention`."""
    check(q_TNH, k_TKH, v_TKH, cu_seqlens)
    need(
        q_TNH.is_cuda, f"FlashAttention was asked for a tensor on {q_TNH.device}.", allowed="CUDA devices",
        next_step="backend='reference'",
    )
    half = q_TNH.dtype in (torch.float16, torch.bfloat16)
    need(half, f"q is {q_TNH.dtype}.", allowed="bfloat16 and float16 in FlashAttention",
         next_step=REFERENCE_ENGINE)
    head_size = q_TNH.shape[2]
    need(head_size <= LARGEST_HEAD and head_size % HEAD_STEP == 0, f"The head size is {head_size}.",
         allowed=f"multiples of {HEAD_STEP} up to {LARGEST_HEAD} in FlashAttention", next_step=REFERENCE_ENGINE)
    if _equally_long(q_TNH, cu_seqlens, max_seqlen) and _has_cudnn(q_TNH):
        return _dense(q_TNH, k_TKH, v_TKH, max_seqlen)
    use_flash_attention_3(q_TNH.device)
    accepted = inspect.signature(varlen_attn).parameters
    need("window_size" in accepted, f"PyTorch {torch.__version__} has an older varlen_attn.", allowed="2.11 and above")
    # (-1, 0): every key up to the query's own place. Earlier versions take grouped heads without being told.
    options = {"enable_gqa": q_TNH.shape[1] != k_TKH.shape[1]} if "enable_gqa" in accepted else {}
    return varlen_attn(
        q_TNH, k_TKH, v_TKH, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0), **options
    )


@functools.cache  # asked at every call; PyTorch is told for the whole process
def use_flash_attention_3(device: torch.device) -> bool:
    """Lets PyTorch attend by FlashAttention 3, where it is installed and runs; returns whether it does.

    Somebody's own choice of an implementation stays.
    """
    if importlib.util.find_spec(FLASH_3_PACKAGE) is None or _major(device) != FLASH_3_MAJOR:
        return False
    from torch.nn import attention

    try:
        if attention.current_flash_attention_impl() is None:
            attention.activate_flash_attention_impl("FA3")
        return attention.current_flash_attention_impl() == "FA3"
    except (RuntimeError, ValueError, ImportError, AttributeError) as error:  # another PyTorch, a broken package
        warnings.warn(f"{FLASH_3_PACKAGE} is installed, but not used for attention: {error}", stacklevel=2)
        return False


def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _equally_long(q_TNH: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> bool:
    # none is longer than max_seqlen, so this many tokens are only reached when all are as long; asks the host alone
    return q_TNH.shape[0] == (len(cu_seqlens) - 1) * max_seqlen


def _has_cudnn(q_TNH: torch.Tensor) -> bool:
    return (
        q_TNH.shape[2] <= CUDNN_HEAD_SIZE
        and torch.cuda.get_device_capability(q_TNH.device) >= CUDNN_CAPABILITY
        and torch.backends.cudnn.is_available()
        and not torch.are_deterministic_algorithms_enabled()
    )


def _dense(q_TNH, k_TKH, v_TKH, length: int) -> torch.Tensor:
    q, k, v = (x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (q_TNH, k_TKH, v_TKH))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2).reshape(q_TNH.shape)
