"""Gradients of LoRA's factors, reading each wide matrix as seldom as can be. Formulas in `reference/lora_gradients.py`.

All four products are skinny: one side is the rank. Their time is that of reading x [T, K] and dy [T, N]; cuBLAS reads
each twice and was measured at 2 to 3 times the reading time. Order matters: dB needs h = x Aᵀ of the same tokens, and
dA needs u = dy B, so one of x and dy must be read before the other. We read the narrow one twice and the wide one once:

    x narrow (q, k, v; gate, up):   1. h = x Aᵀ        2. u = dy B and dB = dyᵀ h together        3. dA = uᵀ x
    x wide   (down):                1. u = dy B        2. h = x Aᵀ and dA = uᵀ x together         3. dB = dyᵀ h

Every step is one kernel, `_pass`, over a wide matrix w [T, M]: "product" p = w S with S [M, R], "outer" g = wᵀ v with
v [T, R], or both from one read. A program owns a block of M columns and a share of the tokens. It keeps its part of g
in registers over all its tokens; its part of p concerns its columns only. Both parts are written to float32 buffers
[shares, …] and summed by a second, ordered step: no atomics, the same result every time. Adapters that share x are
stacked along R, so x is read once for all of them.

Legend: T tokens, K in features, N out features, M columns of the matrix that is read, R (stacked) rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from chulengo.kernels.applies import need, need_rows
from chulengo.kernels.fused.launch import need_float, need_launchable
from chulengo.kernels.reference.lora_gradients import check

LARGEST_RANK = 256  # stacked: the accumulator [BLOCK_M, R] has to stay in registers
BLOCK_T = 64
PROGRAMS = 528  # four for each of an H200's 132 multiprocessors; a constant, so that results do not depend on the card


@triton.jit
def _pass(wide_ptr, skinny_ptr, vector_ptr, product_ptr, outer_ptr, num_tokens, num_columns, rank, stride_wide,
          stride_skinny_m, stride_skinny_r, stride_vector, tokens_per_share, WITH_PRODUCT: tl.constexpr,
          WITH_OUTER: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
          RANK_BLOCK: tl.constexpr):  # fmt: skip
    block_m = tl.program_id(0)
    share = tl.program_id(1)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, RANK_BLOCK)
    m_in, r_in = m < num_columns, r < rank
    dtype = wide_ptr.dtype.element_ty
    if WITH_PRODUCT:
        skinny = tl.load(skinny_ptr + m[:, None] * stride_skinny_m + r[None, :] * stride_skinny_r,
                         mask=m_in[:, None] & r_in[None, :], other=0.0).to(dtype)  # fmt: skip
    outer = tl.zeros((BLOCK_M, RANK_BLOCK), dtype=tl.float32)
    first = share * tokens_per_share
    for start in range(first, tl.minimum(first + tokens_per_share, num_tokens), BLOCK_T):
        t = tl.cast(start + tl.arange(0, BLOCK_T), tl.int64)
        t_in = t < num_tokens
        wide = tl.load(wide_ptr + t[:, None] * stride_wide + m[None, :], mask=t_in[:, None] & m_in[None, :], other=0.0)
        if WITH_PRODUCT:
            # p[t, r] += sum_m w[t, m] S[m, r], this block's columns only
            product = tl.dot(wide, skinny, input_precision=PRECISION)
            place = (block_m.to(tl.int64) * num_tokens + t)[:, None] * rank + r[None, :]
            tl.store(product_ptr + place, product, mask=t_in[:, None] & r_in[None, :])
        if WITH_OUTER:
            # g[m, r] += sum_t w[t, m] v[t, r]
            vector = tl.load(vector_ptr + t[:, None] * stride_vector + r[None, :], mask=t_in[:, None] & r_in[None, :],
                             other=0.0)  # fmt: skip
            outer += tl.dot(tl.trans(wide), vector, input_precision=PRECISION)
    if WITH_OUTER:
        place = (share.to(tl.int64) * num_columns + m)[:, None] * rank + r[None, :]
        tl.store(outer_ptr + place, outer, mask=m_in[:, None] & r_in[None, :])


def _read(
    wide_TM: torch.Tensor, *, skinny_MR: torch.Tensor | None = None, vector_TR: torch.Tensor | None = None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Returns w S [T, R] in the dtype of w, and wᵀ v, float32 [M, R]; each where its factor is given. Reads w once."""
    num_tokens, num_columns = wide_TM.shape
    factor = skinny_MR if skinny_MR is not None else vector_TR
    rank = factor.shape[1]
    need(rank <= LARGEST_RANK, f"The stacked rank is {rank}.", allowed=f"at most {LARGEST_RANK}")
    rank_block = max(16, triton.next_power_of_2(rank))
    # 16 bits: three tiles of 32 KB in flight; 32 bits take three tensor-core passes and twice the room of everything
    half = wide_TM.element_size() == 2
    block_m = max(64, min(256, 16384 // rank_block)) if half else 64
    block_t = BLOCK_T if half else BLOCK_T // 2
    stages = 3 if half and rank_block <= 64 else 2 if rank_block <= 64 else 1
    blocks = triton.cdiv(num_columns, block_m)
    # shares of tokens: enough programs to fill the card, each with whole blocks of tokens
    shares = max(1, min(triton.cdiv(num_tokens, block_t), PROGRAMS // blocks))
    tokens_per_share = triton.cdiv(triton.cdiv(num_tokens, shares), block_t) * block_t
    shares = triton.cdiv(num_tokens, tokens_per_share)
    device = wide_TM.device
    product = outer = wide_TM
    if skinny_MR is not None:
        product = torch.empty((blocks, num_tokens, rank), dtype=torch.float32, device=device)
    if vector_TR is not None:
        outer = torch.empty((shares, num_columns, rank), dtype=torch.float32, device=device)
    skinny, vector = (factor if f is None else f for f in (skinny_MR, vector_TR))
    _pass[(blocks, shares)](
        wide_TM, skinny, vector, product, outer, num_tokens, num_columns, rank, wide_TM.stride(0), skinny.stride(0),
        skinny.stride(1), vector.stride(0), tokens_per_share, WITH_PRODUCT=skinny_MR is not None,
        WITH_OUTER=vector_TR is not None, PRECISION="tf32x3" if wide_TM.dtype == torch.float32 else "ieee",
        BLOCK_T=block_t, BLOCK_M=block_m, RANK_BLOCK=rank_block, num_warps=8, num_stages=stages,
    )  # fmt: skip
    return (
        product.sum(0).to(wide_TM.dtype) if skinny_MR is not None else None,
        outer.sum(0) if vector_TR is not None else None,
    )


def lora_gradients(
    x_TK: torch.Tensor,
    dys: Sequence[torch.Tensor],
    a_factors: Sequence[torch.Tensor],
    b_factors: Sequence[torch.Tensor],
    scale: float,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns dA [R, K] and dB [N, R] of each adapter. See `reference.lora_gradients.lora_gradients`."""
    check(x_TK, dys, a_factors, b_factors)
    need_launchable(x_TK)
    need_float("x", x_TK)
    for wide in (x_TK, *dys):
        need_rows("x or dy", wide)
    ranks = [a.shape[0] for a in a_factors]
    if x_TK.shape[0] == 0:
        return [torch.zeros_like(a) for a in a_factors], [torch.zeros_like(b) for b in b_factors]
    stacked_a_KR = torch.cat([a.detach() for a in a_factors]).t()
    if x_TK.shape[1] <= sum(dy.shape[1] for dy in dys):
        h_TR, _ = _read(x_TK, skinny_MR=stacked_a_KR)
        read = [
            _read(dy, skinny_MR=b.detach(), vector_TR=h)
            for dy, b, h in zip(dys, b_factors, h_TR.split(ranks, 1), strict=True)
        ]
        dbs = [db for _, db in read]
        _, da_KR = _read(x_TK, vector_TR=torch.cat([u for u, _ in read], 1))
    else:
        us = [_read(dy, skinny_MR=b.detach())[0] for dy, b in zip(dys, b_factors, strict=True)]
        h_TR, da_KR = _read(x_TK, skinny_MR=stacked_a_KR, vector_TR=torch.cat(us, 1))
        dbs = [_read(dy, vector_TR=h)[1] for dy, h in zip(dys, h_TR.split(ranks, 1), strict=True)]
    das = da_KR.t().split(ranks)
    return (
        [(scale * da).to(a.dtype) for da, a in zip(das, a_factors, strict=True)],
        [(scale * db).to(b.dtype) for db, b in zip(dbs, b_factors, strict=True)],
    )
