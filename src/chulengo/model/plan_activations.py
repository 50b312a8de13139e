"""Bytes that one layer of the reference engine keeps from its forward to its backward pass.

Not fitted: counted. Every tensor that autograd saves was listed with `torch.autograd.graph.saved_tensors_hooks` on a
GPU (torch 2.11, transformers 5.17, peft 0.21.2, bitsandbytes 0.50.2), and each term below is one of them. For Llama 2
7B, NF4, bf16 the sum is 170,344 bytes a token and layer, which is what the allocator showed too. Where a term was
measured and its cause not traced, the comment says so.

Symbols: H hidden, I intermediate, Q and K the widths of queries and keys, S row length, r rank; c bytes of the compute
dtype; s bytes of the stream between layers (c, or 4 when norms and embeddings were upcast to fp32).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chulengo.model.plan_shapes import ModelShape

FP32 = 4


@dataclass(frozen=True, slots=True)
class ActivationSettings:
    """What decides which tensors a layer saves."""

    row_tokens: int  # S
    rank: int
    targets: tuple[str, ...]
    quantization: str
    compute_bytes: int  # c
    stream_bytes: int  # s
    autocast: bool
    attention: str
    masked: bool  # an attention mask is passed: rows of different length, or packs
    dropout: bool
    dora: bool


def layer_token_bytes(shape: ModelShape, a: ActivationSettings) -> int:
    """Returns the bytes that one layer saves for each token."""
    c = a.compute_bytes
    norms = 2 * FP32 * shape.hidden + 2 * FP32  # RMSNorm computes in fp32: its input so, and 1/rms
    if shape.query_key_norms:
        norms += FP32 * (shape.q_width + shape.kv_width)
    mlp_width = a.stream_bytes if a.quantization in ("nf4", "fp4") else c  # Linear4bit returns its input's dtype
    mlp = 3 * mlp_width * shape.intermediate  # gate, silu(gate), up
    if a.quantization == "int8":
        mlp += c * shape.intermediate  # measured (MatMul8bitLt keeps its input); not traced further
    adapter = _adapter_inputs(shape, a) + a.rank * len(a.targets) * (c if a.autocast else FP32)
    if a.dora:  # measured: 338 kB a token for 7B, within 1 % of 8 bytes for every output
        adapter += 8 * sum(shape.linear(name)[1] for name in a.targets)
    return norms + _attention_bytes(shape, a) + mlp + adapter


def layer_cast_bytes(shape: ModelShape, a: ActivationSettings) -> int:
    """Returns the bytes of one layer's adapter in the compute dtype, which autocast makes and keeps until it ends."""
    if not a.autocast or a.compute_bytes == FP32:
        return 0
    return a.compute_bytes * a.rank * sum(sum(shape.linear(name)) for name in a.targets)


def layer_backward_bytes(shape: ModelShape, a: ActivationSettings, num_tokens: int) -> int:
    """Returns the largest temporary of one layer's backward pass.

    The MLP's: two gradients of its inner width at once, and one dequantised weight. With eager attention the gradients
    of the scores are larger. Measured only where it decides the peak (fp32 with recompute: this is 5 % of a peak high).
    """
    width = max(a.stream_bytes, a.compute_bytes)
    mlp = 2 * width * shape.intermediate * num_tokens
    scores = (FP32 + a.compute_bytes) * shape.num_heads * a.row_tokens * num_tokens if a.attention == "eager" else 0
    dequantised = a.compute_bytes * shape.hidden * shape.intermediate if a.quantization != "none" else 0
    return max(mlp, scores) + dequantised


def kept_despite_recompute(shape: ModelShape, a: ActivationSettings) -> int:
    """Returns the bytes a token and layer that recomputation does not free.

    MatMul8bitLt keeps its inputs outside of autograd's reach, so gradient checkpointing cannot drop them: measured
    68.6 kB a token and layer for 7B, which is 6 H + 4 I bytes in bf16.
    """
    return a.compute_bytes * (3 * shape.hidden + 2 * shape.intermediate) if a.quantization == "int8" else 0


def _attention_bytes(shape: ModelShape, a: ActivationSettings) -> int:
    c, q, kv = a.compute_bytes, shape.q_width, shape.kv_width
    if a.masked and a.attention == "sdpa":
        kv = q  # with a mask, transformers repeats keys and values for every query head before the product
    if a.attention == "eager":
        copies = 1 if c == FP32 else 2  # the softmax in fp32, and its cast
        scores = FP32 * shape.num_heads * a.row_tokens + (c * shape.num_heads * a.row_tokens if copies == 2 else 0)
        return c * (2 * q + 2 * q) + scores
    mask = c * a.row_tokens if a.masked and a.attention == "sdpa" else 0  # one S x S slice for each row and layer
    return c * (2 * q + 2 * kv) + FP32 * shape.num_heads + mask


def _adapter_inputs(shape: ModelShape, a: ActivationSettings) -> int:
    """Bytes a token of the inputs that the A matrices save; several targets share one input unless each casts it."""
    c = a.compute_bytes
    width = c if a.autocast else FP32  # without autocast PEFT casts to the adapter's own fp32
    inputs = {name: shape.linear(name)[0] for name in a.targets}
    if a.dropout:  # every target its own dropped copy, and a mask of one byte
        return sum((width + 1) * size for size in inputs.values())
    casts = a.quantization == "none" or (a.autocast and a.stream_bytes != c) or (not a.autocast and c != FP32)
    if casts and c != FP32:
        shared_output = {"o_proj"} if a.autocast and a.quantization != "none" else set()
        return sum(width * size for name, size in inputs.items() if name not in shared_output)
    return width * _distinct(shape, a.targets)


def _distinct(shape: ModelShape, targets: Sequence[str]) -> int:
    """Width of the different inputs; that of o_proj is the attention's output, which attention saves anyway."""
    first = shape.hidden if {"q_proj", "k_proj", "v_proj"} & set(targets) else 0
    second = shape.hidden if {"gate_proj", "up_proj"} & set(targets) else 0
    return first + second + (shape.intermediate if "down_proj" in targets else 0)
