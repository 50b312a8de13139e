"""SwiGLU's product, element by element. Formulas in `reference/swiglu.py`.

Bound by bytes: forward 6 bytes a value in bfloat16 (two read, one written), backward 10, and 12 when it also writes
the product again. A program takes 1024 values of one row, 8 for each of its 128 threads: 16-byte accesses. Rows may be
farther apart than they are wide, so both halves of one [T, 2I] tensor are read where they lie.

Legend: T tokens, I intermediate features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chulengo.kernels.applies import need_rows, need_same
from chulengo.kernels.fused.launch import need_float, need_launchable
from chulengo.kernels.reference.swiglu import check

BLOCK_I = 1024


@triton.jit
def _forward(gate_ptr, up_ptr, product_ptr, num_features, stride_gate, stride_up, stride_product,
             BLOCK_I: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = i < num_features
    gate = tl.load(gate_ptr + row * stride_gate + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + i, mask=inside, other=0.0).to(tl.float32)
    # silu(gate) * up
    product = gate * tl.sigmoid(gate) * up
    tl.store(product_ptr + row * stride_product + i, product.to(product_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(dproduct_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, product_ptr, num_features, stride_dproduct,
              stride_gate, stride_up, stride_dgate, stride_dup, stride_product, WITH_PRODUCT: tl.constexpr,
              BLOCK_I: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = i < num_features
    gate = tl.load(gate_ptr + row * stride_gate + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + i, mask=inside, other=0.0).to(tl.float32)
    dproduct = tl.load(dproduct_ptr + row * stride_dproduct + i, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    # dgate = dp * u * s * (1 + g * (1 - s))
    dgate = dproduct * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    # dup = dp * g * s
    dup = dproduct * gate * sigmoid
    dtype = dgate_ptr.dtype.element_ty
    tl.store(dgate_ptr + row * stride_dgate + i, dgate.to(dtype), mask=inside)
    tl.store(dup_ptr + row * stride_dup + i, dup.to(dtype), mask=inside)
    if WITH_PRODUCT:
        tl.store(product_ptr + row * stride_product + i, (gate * sigmoid * up).to(dtype), mask=inside)


def _grid(x_TI: torch.Tensor) -> tuple[int, int]:
    return x_TI.shape[0], triton.cdiv(x_TI.shape[1], BLOCK_I)


def forward(gate_TI: torch.Tensor, up_TI: torch.Tensor) -> torch.Tensor:
    """Returns silu(gate) * up, [T, I]. See `reference.swiglu.forward`."""
    check(gate_TI, up_TI)
    need_launchable(gate_TI)
    need_float("gate", gate_TI)
    need_rows("gate", gate_TI)
    need_rows("up", up_TI)
    product_TI = torch.empty(gate_TI.shape, dtype=gate_TI.dtype, device=gate_TI.device)
    if product_TI.numel():
        _forward[_grid(gate_TI)](gate_TI, up_TI, product_TI, gate_TI.shape[1], gate_TI.stride(0), up_TI.stride(0),
                                 product_TI.stride(0), BLOCK_I=BLOCK_I, num_warps=4)  # fmt: skip
    return product_TI


def backward(
    dproduct_TI: torch.Tensor,
    gate_TI: torch.Tensor,
    up_TI: torch.Tensor,
    *,
    dgate_TI: torch.Tensor,
    dup_TI: torch.Tensor,
    product_TI: torch.Tensor | None = None,
) -> None:
    """Writes dgate, dup and, where given, the product. See `reference.swiglu.backward`."""
    need_launchable(gate_TI)
    written = product_TI if product_TI is not None else dup_TI
    for name, tensor in (("dproduct", dproduct_TI), ("gate", gate_TI), ("up", up_TI), ("dgate", dgate_TI),
                         ("dup", dup_TI), ("product", written)):  # fmt: skip
        need_rows(name, tensor)
        need_same(name, tensor, "gate", gate_TI)
    if gate_TI.numel():
        _backward[_grid(gate_TI)](dproduct_TI, gate_TI, up_TI, dgate_TI, dup_TI, written, gate_TI.shape[1],
                                  dproduct_TI.stride(0), gate_TI.stride(0), up_TI.stride(0), dgate_TI.stride(0),
                                  dup_TI.stride(0), written.stride(0), WITH_PRODUCT=product_TI is not None,
                                  BLOCK_I=BLOCK_I, num_warps=4)  # fmt: skip
