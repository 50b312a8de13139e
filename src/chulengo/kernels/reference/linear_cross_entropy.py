"""The head's product and the cross-entropy over it, in chunks of tokens, with the gradient made in the forward.

For a token with hidden state h and target t, over a vocabulary of V:

    z = W h          loss = logsumexp(z) - z_t          dz = softmax(z) - onehot(t)          dh = Wᵀ dz

The head is frozen in LoRA training, so dh needs nothing from later: each chunk's logits become dz in place and then
dh, and [chunk, V] is the only large buffer (2,048 tokens of Llama 2: 131 MB in bfloat16, instead of 1.6 GB in float32
for 8,192). Only tokens whose next token is supervised should come in at all: gather them first. The idea is that of
Liger (https://arxiv.org/abs/2410.10989, section 3.2) and of https://arxiv.org/abs/2411.09009.

Logits have the dtype of h, as Hugging Face's do; softmax is float32. dh is that of the *sum* of the losses, so its
size does not depend on how many tokens a batch has; the caller's division by the token count comes with the gradient
of the sum. The chunk is a number of tokens, never a share of free memory, so that results do not depend on that.

Legend: N tokens, D features, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chulengo.kernels.applies import need

IGNORE = -100


def check(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> None:
    """Raises `KernelError` unless the operands fit each other."""
    need(
        hidden_ND.dim() == 2 and weight_VD.dim() == 2 and hidden_ND.shape[1] == weight_VD.shape[1],
        f"hidden is {tuple(hidden_ND.shape)}, the head's weight is {tuple(weight_VD.shape)}.",
        allowed="[N, D] and [V, D]",
    )
    need(
        hidden_ND.dtype == weight_VD.dtype,
        f"hidden is {hidden_ND.dtype}, the head's weight is {weight_VD.dtype}.",
        allowed="one dtype",
    )
    need(
        target_N.shape == hidden_ND.shape[:1] and target_N.dtype == torch.int64,
        f"Targets are {tuple(target_N.shape)} {target_N.dtype} for {hidden_ND.shape[0]} tokens.",
        allowed="int64 [N]",
    )


def nll_and_gradient_(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    """Returns the loss of each token, float32 [C], and turns `logits_CV` into its gradient in place.

    A target of -100 has loss 0 and gradient 0. Any other target outside [0, V) has loss NaN, which stops a run.
    """
    wide_CV = logits_CV.float()
    log_sum_C = torch.logsumexp(wide_CV, dim=1)
    known_C = (target_C >= 0) & (target_C < logits_CV.shape[1])
    safe_C1 = torch.where(known_C, target_C, 0)[:, None]
    nll_C = log_sum_C - wide_CV.gather(1, safe_C1)[:, 0]
    gradient_CV = torch.exp(wide_CV - log_sum_C[:, None])
    gradient_CV.scatter_add_(1, safe_C1, -torch.ones_like(safe_C1, dtype=torch.float32))
    logits_CV.copy_(torch.where(known_C[:, None], gradient_CV, 0))
    outside_C = torch.where(target_C == IGNORE, 0.0, float("nan"))
    return torch.where(known_C, nll_C, outside_C)


def forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    chunk_tokens: int = 2048,
    hidden_gradient: bool = True,
    weight_gradient: bool = False,
    nll_and_gradient_: Callable[[Tensor, Tensor], Tensor] = nll_and_gradient_,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the summed loss (float32 []), and the gradients of it, dhidden [N, D] and dweight [V, D], or None.

    Args:
        hidden_ND: states of the supervised tokens; N may be 0.
        weight_VD: the head, in the dtype of hidden.
        target_N: int64; -100 is ignored.
        chunk_tokens: tokens whose logits are held at once.
        hidden_gradient: make dhidden (in the dtype of hidden).
        weight_gradient: make dweight: summed over chunks in float32, so it costs 4 bytes a weight while it runs.
        nll_and_gradient_: the softmax part; the fused kernel takes its place.
    """
    check(hidden_ND, weight_VD, target_N)
    need(chunk_tokens > 0, f"chunk_tokens is {chunk_tokens}.", allowed="1 and above")
    num_tokens = hidden_ND.shape[0]
    # summed in the order of the tokens at the end: the same number whatever the chunk
    nll_N = torch.zeros(num_tokens, dtype=torch.float32, device=hidden_ND.device)
    dhidden_ND = hidden_ND.detach().new_empty(hidden_ND.shape) if hidden_gradient else None
    dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if weight_gradient else None
    weight_VD = weight_VD.detach()
    for start in range(0, num_tokens, chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, num_tokens))
        hidden_CD = hidden_ND[rows].detach()
        logits_CV = hidden_CD @ weight_VD.t()
        nll_N[rows] = nll_and_gradient_(logits_CV, target_N[rows])
        if dhidden_ND is not None:
            torch.mm(logits_CV, weight_VD, out=dhidden_ND[rows])
        if dweight_VD is not None:
            dweight_VD += logits_CV.t() @ hidden_CD
    return nll_N.sum(), dhidden_ND, None if dweight_VD is None else dweight_VD.to(weight_VD.dtype)
