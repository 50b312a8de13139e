"""Cross-entropy and its gradient over one chunk of logits, in place. Formulas in `reference/linear_cross_entropy.py`.

One program a token walks its V logits twice: first a running maximum and sum (https://arxiv.org/abs/1805.02867,
algorithm 3), then exp(z - logsumexp) - onehot over the same addresses. The second walk finds them in L2 (a row of
32,000 is 64 KB), so device memory moves 4 bytes a logit in bfloat16, and no [N, V] tensor in float32 ever exists.
The products around it are PyTorch's.

Legend: N tokens, D features, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from chulengo.kernels.applies import need_rows
from chulengo.kernels.fused.launch import need_float, need_launchable
from chulengo.kernels.reference import linear_cross_entropy as reference

BLOCK_V = 4096


@triton.jit
def _nll_and_gradient(logits_ptr, target_ptr, nll_ptr, vocabulary, stride, IGNORE: tl.constexpr,
                      BLOCK_V: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    start_ptr = logits_ptr + row * stride
    dtype = logits_ptr.dtype.element_ty
    # logsumexp(z): m = max(m, z); total = total * exp(m_before - m) + sum exp(z - m), one (m, total) a lane
    most = tl.full((BLOCK_V,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for start in range(0, vocabulary, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        inside = v < vocabulary
        z = tl.load(start_ptr + v, mask=inside, other=float("-inf")).to(tl.float32)
        above = tl.maximum(most, z)
        # a lane that has seen nothing yet has -inf - -inf
        total = tl.where(above == float("-inf"), 0.0, total * tl.exp(most - above) + tl.exp(z - above))
        most = above
    largest = tl.max(most, 0)
    log_sum = largest + tl.log(tl.sum(total * tl.exp(most - largest), 0))
    known = (target >= 0) & (target < vocabulary)
    # loss = logsumexp(z) - z[target]
    z_target = tl.load(start_ptr + target, mask=known, other=0.0).to(tl.float32)
    outside = tl.where(target == IGNORE, 0.0, float("nan"))
    tl.store(nll_ptr + row, tl.where(known, log_sum - z_target, outside))
    # every lane has read its logits, the target's among them, before any is overwritten
    tl.debug_barrier()
    for start in range(0, vocabulary, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        inside = v < vocabulary
        z = tl.load(start_ptr + v, mask=inside, other=float("-inf")).to(tl.float32)
        # dz = softmax(z) - onehot(target)
        gradient = tl.exp(z - log_sum) - tl.where(v == target, 1.0, 0.0)
        tl.store(start_ptr + v, tl.where(known, gradient, 0.0).to(dtype), mask=inside)


def nll_and_gradient_(logits_CV: torch.Tensor, target_C: torch.Tensor) -> torch.Tensor:
    """Returns the loss of each token [C]; `logits_CV` becomes its gradient. See the reference's function."""
    need_launchable(logits_CV)
    need_float("logits", logits_CV)
    need_rows("logits", logits_CV)
    nll_C = torch.empty(logits_CV.shape[0], dtype=torch.float32, device=logits_CV.device)
    block = min(BLOCK_V, triton.next_power_of_2(logits_CV.shape[1]))
    if logits_CV.shape[0]:
        _nll_and_gradient[(logits_CV.shape[0],)](
            logits_CV, target_C.contiguous(), nll_C, logits_CV.shape[1], logits_CV.stride(0), IGNORE=reference.IGNORE,
            BLOCK_V=block, num_warps=8 if block >= 2048 else 4,
        )  # fmt: skip
    return nll_C


forward = partial(reference.forward, nll_and_gradient_=nll_and_gradient_)
