"""The table of contents of the kernels: one function for each operation, the choice of its implementation, autograd.

`backend="auto"` means the fused kernel for tensors on a CUDA device with Triton installed, and plain PyTorch
otherwise. "fused" and "reference" insist. A fused kernel that does not apply to its arguments raises `KernelError`
with the reason; it never hands over to the other one by itself. `describe()` says what "auto" picks here and why.

    rms_norm                  y, h = norm(x + residual) * w, x + residual
    rope                      rotary embedding of queries and keys
    swiglu, swiglu_packed     silu(gate) * up
    dropout                   x / (1 - p) or 0 by a mask that is computed from a seed and a place
    column_dot                dot products of two matrices' columns: the gradient of DoRA's magnitudes
    dequantize_nf4            NF4 -> 16 or 32 bits, an adapter folded in on request
    dequantize_nf4_fp8        NF4 -> e4m3, in either of the two layouts that products want
    linear_cross_entropy      summed loss of the supervised tokens, logits in chunks
    packed_attention          causal attention over packed sequences: PyTorch's own, both ways
    fp8                       rows of e4m3 with a scale each, made by the kernel that makes the values; adapter columns
                              beside them; their product. No wrappers: `model/fp8_products.py` calls the module

Each is a thin autograd wrapper (or none, where nothing differentiable goes in) around `forward` and `backward` of
`reference/<op>.py` or `fused/<op>.py`, whose docstrings hold the formulas. Code that writes a longer backward by hand
calls those two itself: `implementation(op, x)` is the module that runs.

Legend: T tokens, D model features, I intermediate features, N and K heads or features, H head size, V vocabulary,
O and I out and in features of a weight, R rank.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chulengo.kernels.applies import need
from chulengo.kernels.reference.nf4 import NF4Weight

BACKENDS = ("auto", "fused", "reference")
OPERATIONS = ("rms_norm", "rope", "swiglu", "dropout", "column_dot", "nf4", "linear_cross_entropy", "attention", "fp8")


class OpChoice(NamedTuple):
    """What runs for one operation, and why."""

    op: str
    backend: str
    why: str


def choose(device: torch.device | str, backend: str = "auto") -> tuple[str, str]:
    """Returns "fused" or "reference" for tensors on `device`, and the reason in words.

    Raises:
        KernelError: an unknown backend, or "fused" without Triton.
    """
    need(backend in BACKENDS, f"The backend is '{backend}'.", allowed=", ".join(BACKENDS))
    has_triton = importlib.util.find_spec("triton") is not None
    if backend == "fused":
        need(has_triton, "Triton is not installed.", next_step="pip install 'chulengo[gpu]', or backend='reference'")
        return "fused", "asked for"
    if backend == "reference":
        return "reference", "asked for"
    if torch.device(device).type != "cuda":
        return "reference", f"Triton does not compile for {torch.device(device).type}"
    if not has_triton:
        return "reference", "Triton is not installed (pip install 'chulengo[gpu]')"
    flash_3 = importlib.util.find_spec("flash_attn_interface") is not None
    return "fused", f"CUDA device and Triton present{', FlashAttention 3 installed' if flash_3 else ''}"


def describe(device: torch.device | str | None = None) -> list[OpChoice]:
    """Returns what "auto" picks for each operation on `device` (None: cuda if there is one), with the reason."""
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    backend, why = choose(place)
    rows = [OpChoice(op, backend, why) for op in OPERATIONS]
    if place.type == "cuda" and backend == "fused" and torch.cuda.get_device_capability(place) < (8, 9):
        rows[-1] = OpChoice("fp8", "reference", "e4m3 needs compute capability 8.9; products in FP8 do too")
    return rows


def implementation(op: str, x: Tensor, backend: str = "auto") -> ModuleType:
    """Returns `reference/<op>.py` or `fused/<op>.py`, whichever runs for `x`: their `forward` and `backward`."""
    return _module(op, x.device.type, backend)


@functools.cache  # asked some 1,500 times a step
def _module(op: str, device: str, backend: str) -> ModuleType:
    return importlib.import_module(f"chulengo.kernels.{choose(device, backend)[0]}.{op}")


def _rows(gradient: Tensor) -> Tensor:
    """Returns `gradient` with a contiguous last dimension: autograd may hand in an expanded or transposed one."""
    return gradient if gradient.stride(-1) == 1 or gradient.shape[-1] <= 1 else gradient.contiguous()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, module: ModuleType
    ) -> Any:
        y_TD, sum_TD, rstd_T = module.forward(x_TD, residual_TD, weight_D, eps)
        ctx.save_for_backward(sum_TD, weight_D, rstd_T)
        ctx.module = module
        ctx.set_materialize_grads(False)
        return (y_TD, sum_TD) if residual_TD is not None else y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor | None, dsum_TD: Tensor | None = None) -> Any:
        sum_TD, weight_D, rstd_T = ctx.saved_tensors
        if dy_TD is None:
            return dsum_TD, dsum_TD, None, None, None
        dx_TD, dweight_D = ctx.module.backward(
            _rows(dy_TD), None if dsum_TD is None else _rows(dsum_TD), sum_TD, weight_D, rstd_T,
            weight_gradient=ctx.needs_input_grad[2],
        )  # fmt: skip
        return dx_TD, dx_TD if ctx.needs_input_grad[1] else None, dweight_D, None, None


def rms_norm(
    x_TD: Tensor, weight_D: Tensor, eps: float, *, residual_TD: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Returns rms_norm(x + residual) * weight, and the sum x + residual (x itself without a residual), both [T, D].

    Args:
        x_TD: float32, bfloat16 or float16.
        weight_D: in the dtype of x; its gradient is made only if it requires one.
        eps: added to the mean square.
        residual_TD: the residual stream.
        backend: "auto", "fused" or "reference".
    """
    module = implementation("rms_norm", x_TD, backend)
    result = _RMSNorm.apply(x_TD, residual_TD, weight_D, eps, module)  # type: ignore[no-untyped-call]
    return (result[0], result[1]) if residual_TD is not None else (result, x_TD)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_TNH: Tensor, k_TKH: Tensor, cos_SP: Tensor, sin_SP: Tensor, position_T: Tensor, module: ModuleType
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_SP, sin_SP, position_T)
        ctx.module = module
        turned: tuple[Tensor, Tensor] = module.forward(q_TNH, k_TKH, cos_SP, sin_SP, position_T)
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_TNH: Tensor, dk_TKH: Tensor) -> Any:
        dq_TNH, dk_TKH = ctx.module.backward(_rows(dq_TNH), _rows(dk_TKH), *ctx.saved_tensors)
        return dq_TNH, dk_TKH, None, None, None, None


def rope(
    q_TNH: Tensor, k_TKH: Tensor, cos_SP: Tensor, sin_SP: Tensor, position_T: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Returns q and k turned by the angles of their positions, as new tensors.

    Args:
        q_TNH: queries.
        k_TKH: keys; fewer heads are fine.
        cos_SP: float32 [S, H/2]; see `reference.rope.tables`.
        sin_SP: float32 [S, H/2].
        position_T: int32 or int64, each below S; starts again at 0 in every packed sequence.
        backend: "auto", "fused" or "reference".
    """
    module = implementation("rope", q_TNH, backend)
    arguments = (q_TNH, k_TKH, cos_SP, sin_SP, position_T, module)
    turned: tuple[Tensor, Tensor] = _Rope.apply(*arguments)  # type: ignore[no-untyped-call]
    return turned


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor, module: ModuleType) -> Tensor:
        ctx.save_for_backward(gate_TI, up_TI)
        ctx.module = module
        product_TI: Tensor = module.forward(gate_TI, up_TI)
        return product_TI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dproduct_TI: Tensor) -> Any:
        gate_TI, up_TI = ctx.saved_tensors
        dgate_TI = torch.empty(gate_TI.shape, dtype=gate_TI.dtype, device=gate_TI.device)
        dup_TI = torch.empty_like(dgate_TI)
        ctx.module.backward(_rows(dproduct_TI), gate_TI, up_TI, dgate_TI=dgate_TI, dup_TI=dup_TI)
        return dgate_TI, dup_TI, None


class _SwiGLUPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both_T2I: Tensor, module: ModuleType) -> Tensor:
        ctx.save_for_backward(both_T2I)
        ctx.module = module
        product_TI: Tensor = module.forward(*both_T2I.chunk(2, dim=1))
        return product_TI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dproduct_TI: Tensor) -> Any:
        (both_T2I,) = ctx.saved_tensors
        dboth_T2I = torch.empty(both_T2I.shape, dtype=both_T2I.dtype, device=both_T2I.device)
        dgate_TI, dup_TI = dboth_T2I.chunk(2, dim=1)
        ctx.module.backward(_rows(dproduct_TI), *both_T2I.chunk(2, dim=1), dgate_TI=dgate_TI, dup_TI=dup_TI)
        return dboth_T2I, None


def swiglu(gate_TI: Tensor, up_TI: Tensor, *, backend: str = "auto") -> Tensor:
    """Returns silu(gate) * up, [T, I]."""
    module = implementation("swiglu", gate_TI, backend)
    product_TI: Tensor = _SwiGLU.apply(gate_TI, up_TI, module)  # type: ignore[no-untyped-call]
    return product_TI


def swiglu_packed(both_T2I: Tensor, *, backend: str = "auto") -> Tensor:
    """Returns silu(gate) * up, [T, I], of one tensor that holds gate in its first I columns and up in the others."""
    shape = tuple(both_T2I.shape)
    need(both_T2I.dim() == 2 and shape[1] % 2 == 0, f"gate and up are {shape}.", allowed="[T, 2I]")
    module = implementation("swiglu", both_T2I, backend)
    product_TI: Tensor = _SwiGLUPacked.apply(both_T2I, module)  # type: ignore[no-untyped-call]
    return product_TI


def dropout(x_TI: Tensor, share: float, seed_1: Tensor, place: int, *, backend: str = "auto") -> Tensor:
    """Returns x / (1 - share) where it is kept and 0 elsewhere, [T, I]. Not differentiable.

    Its gradient is the same map of the gradient, with the same seed and place; `add_` of the implementation adds it.

    Args:
        x_TI: float32, bfloat16 or float16.
        share: of the values that become 0.
        seed_1: int64 [1] on the device of x.
        place: of the mask, 0 up to 2**31: every place has a mask of its own.
        backend: "auto", "fused" or "reference".
    """
    y_TI: Tensor = implementation("dropout", x_TI, backend).forward(x_TI, share, seed_1, place)
    return y_TI


def column_dot(x_TO: Tensor, y_TO: Tensor, bias_O: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Returns the sum over tokens of x * (y - bias), float32 [O]. Not differentiable.

    Args:
        x_TO: float32, bfloat16 or float16.
        y_TO: likewise.
        bias_O: taken off y; None: nothing is.
        backend: "auto", "fused" or "reference".
    """
    dot_O: Tensor = implementation("column_dot", x_TO, backend).forward(x_TO, y_TO, bias_O)
    return dot_O


def dequantize_nf4(
    weight: NF4Weight,
    dtype: torch.dtype = torch.bfloat16,
    *,
    lora_a_RI: Tensor | None = None,
    lora_b_OR: Tensor | None = None,
    lora_scale: float = 1.0,
    row_scale_O: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Returns the weight [O, I] in `dtype`, plus `lora_scale * B A` where given, rounded once. Not differentiable.

    Args:
        weight: an NF4 weight in bitsandbytes' layout; `reference.nf4` makes, reads and writes them.
        dtype: float32, bfloat16 or float16.
        lora_a_RI: [R, I] or None.
        lora_b_OR: [O, R] or None.
        lora_scale: factor of B A.
        row_scale_O: float32, factors of the rows of the sum; only with an adapter.
        out: contiguous [O, I] of `dtype` to write into: one buffer can serve every weight.
        backend: "auto", "fused" or "reference".
    """
    module = implementation("nf4", weight.packed, backend)
    result: Tensor = module.dequantize(
        weight, dtype, lora_a_RI=lora_a_RI, lora_b_OR=lora_b_OR, lora_scale=lora_scale, row_scale_O=row_scale_O,
        out=out,
    )
    return result


def dequantize_nf4_fp8(
    weight: NF4Weight, scale: Tensor, out: Tensor, *, transposed: bool, backend: str = "auto"
) -> None:
    """Writes the weight in e4m3, [O, I] scaled by row, or [I, O] scaled by column of W. Not differentiable.

    Args:
        weight: an NF4 weight.
        scale: float32 [O, 1], or [I, 1] when transposed, from `reference.nf4.fp8_scales`.
        out: e4m3, the last dimension contiguous; rows may lie further apart than they are long.
        transposed: which of the two.
        backend: "auto", "fused" or "reference".
    """
    implementation("nf4", weight.packed, backend).dequantize_fp8(weight, scale, out, transposed=transposed)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, chunk_tokens: int, module: ModuleType
    ) -> Tensor:
        loss, dhidden_ND, dweight_VD = module.forward(
            hidden_ND,
            weight_VD,
            target_N,
            chunk_tokens=chunk_tokens,
            hidden_gradient=ctx.needs_input_grad[0],
            weight_gradient=ctx.needs_input_grad[1],
        )
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        result: Tensor = loss
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> Any:
        def scaled(gradient: Tensor | None) -> Tensor | None:
            if gradient is None:
                return None
            # as a one-element vector the factor stays float32; as a scalar it would be rounded to 16 bits first
            return torch.mul(gradient, dloss.float().view(1, 1), out=torch.empty_like(gradient))

        dhidden_ND, dweight_VD = ctx.saved_tensors
        return scaled(dhidden_ND), scaled(dweight_VD), None, None, None


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, *, chunk_tokens: int = 2048, backend: str = "auto"
) -> Tensor:
    """Returns the summed negative log-likelihood of the targets, float32 []; divide by the number of tokens yourself.

    Args:
        hidden_ND: states of the supervised tokens only, gathered; N may be 0.
        weight_VD: the head, frozen or not, in the dtype of hidden.
        target_N: int64; -100 is ignored, anything else outside [0, V) makes the loss NaN.
        chunk_tokens: tokens whose logits exist at once.
        backend: "auto", "fused" or "reference".
    """
    module = implementation("linear_cross_entropy", hidden_ND, backend)
    arguments = (hidden_ND, weight_VD, target_N, chunk_tokens, module)
    loss: Tensor = _LinearCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


def packed_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, backend: str = "auto"
) -> Tensor:
    """Returns causal attention within each packed sequence, [T, N, H]; the gradients are PyTorch's own.

    Args:
        q_TNH: queries, already turned by their positions.
        k_TKH: keys, likewise; N is a multiple of K.
        v_TKH: values.
        cu_seqlens: int32 [S + 1] on the device of q, from 0 to T; equal neighbours are empty sequences.
        max_seqlen: at least the tokens of the longest sequence.
        backend: "auto", "fused" (FlashAttention through `torch.nn.attention.varlen`) or "reference".
    """
    module = implementation("attention", q_TNH, backend)
    y_TNH: Tensor = module.packed_attention(q_TNH, k_TKH, v_TKH, cu_seqlens, max_seqlen)
    return y_TNH
