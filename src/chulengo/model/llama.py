"""The fast engine's decoder: Llama, Mistral and Qwen over packed tokens, each layer's backward written by hand.

A layer, on the residual stream h (sums are made by the norm that reads them):

    x  = norm(h)         q, k, v = x Wqkvᵀ     (Qwen 3: q, k = norm of each head)     q, k = rope(q, k)
    a  = attention(q, k, v)                    within each packed sequence
    h' = h + a Woᵀ       x' = norm(h')         gate, up = x' Wgᵀ, x' Wuᵀ              p = silu(gate) up
    h" = h' + p Wdᵀ

Attention in the middle keeps what it needs by itself (q, k, v, a and a sum of exponentials). What surrounds it is two
autograd functions, before and after, so that what each keeps for its backward is decided here and not by what happens
to be an argument of some operation. Five policies, layer by layer:

    keep        h, x, h', x', gate, up, p
    selective   h, h', gate, up: the norms and SwiGLU are computed again, the products are not
    full        h alone: the layer up to gate and up is computed again; the last product, which nothing but the next
                layer needs, is not
    offload     as full, and h waits in the host's memory (`model.offload`)
    offload-attention   as offload, and what attention keeps beside q, k and v waits there too, and h': neither
                attention nor the map after it (but with DoRA's magnitudes) is computed again

Under the first two, maps with DoRA's magnitudes have their outputs kept as well (q and k before their turn).

For Llama 2 7B in bf16, with attention's share: 130, 92, 8, 0 and 0 KB a token and layer. All give the same gradients
bit for bit, since what is computed again is computed by the same operations from the same numbers. `torch.utils.
checkpoint` would do for `full`, but computes the last product again (22 % of a layer's weights), as a function cannot
stop in its middle; and for `selective` it looks at every operation of every step.

The gradients of A, B and magnitudes are added to their `grad` where they are made (`model.factor_gradients`), and
autograd sees none of them. So a backward must be `backward()`: `torch.autograd.grad` finds nothing for a factor, and
hooks of a factor's gradient are not called. Factors are arguments of the functions nevertheless, since that is what
makes the outputs of the first layer, whose input needs no gradient, differentiable.

The frozen weights never appear in autograd's graph: a backward asks `Matrices` for them again, which is what lets one
buffer serve all of them.

Legend: T tokens, D model features, N query heads, K key heads, H head size, I intermediate features, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chulengo.kernels import ops
from chulengo.model.dropout import MaskSeed, mask_seed
from chulengo.model.factor_gradients import add_factor_gradients
from chulengo.model.fp8_products import HandedRows, Rows, Scales
from chulengo.model.kept_attention import KeptAttention
from chulengo.model.linear_group import (
    LinearGroup,
    Matrices,
    input_gradient,
    multiply,
    rank_gradient,
    rank_input,
    unscaled_input_gradient,
)
from chulengo.model.llama_weights import LlamaLayer, LlamaWeights
from chulengo.model.offload import HostStates
from chulengo.model.packed_inputs import PackedInputs
from chulengo.model.plan_fast import RECOMPUTED

ACTIVATION_POLICIES = ("keep", "selective", "full", "offload", "offload-attention")

# (layer's index, q_TNH, k_TKH, v_TKH) -> [T, N, H]
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """What all layers of one forward and its backward share.

    Attributes:
        inputs: the tokens.
        cos_SP: float32 [positions, H/2].
        sin_SP: likewise.
        head_size: H.
        eps: of the norms.
        matrices: where weights come from.
        seed_1: of the dropout masks of this micro-step, int64 [1] on the device; None: no dropout.
        backend: of the kernels.
        host: where layers that are offloaded keep their states; None: no backward will follow.
        embedded_TD: the tokens' embeddings, where the table is on the host; None: it is on the device.
        attention: in the place of attention within the packed sequences, for tokens that attend to a cache; without
            gradients.
        handed: the gradient of a layer's input in e4m3, on its way to the layer below.
        serial: of this pass, another for each.
    """

    inputs: PackedInputs
    cos_SP: Tensor
    sin_SP: Tensor
    head_size: int
    eps: float
    matrices: Matrices
    seed_1: Tensor | None
    backend: str
    host: HostStates | None = None
    embedded_TD: Tensor | None = None
    attention: Attention | None = None
    handed: HandedRows = field(default_factory=HandedRows, init=False)
    serial: int = field(default_factory=itertools.count().__next__, init=False)

    def attend(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Returns attention within the packed sequences, [T, N, H]."""
        inputs = self.inputs
        return ops.packed_attention(
            q_TNH, k_TKH, v_TKH, inputs.cu_seqlens, inputs.max_seqlen, backend=self.backend
        )

    def seed_for(self, layer: LlamaLayer, group: int) -> MaskSeed | None:
        """Returns what the dropout masks of one group of maps are made of."""
        return None if self.seed_1 is None else mask_seed(self.seed_1, layer.index, group)


def summed_nll(weights: LlamaWeights, run: Pass, activations: Sequence[str]) -> Tensor:
    """Returns the summed negative log-likelihood of the targets, in nats, float32 [], differentiable.

    Args:
        weights: of the model.
        run: the inputs, with targets.
        activations: the policy of each layer.
    """
    # only states from which a target is predicted go on; their logits exist a chunk at a time
    normed_ND = final_states(weights, run, activations, run.inputs.place_N)
    return ops.linear_cross_entropy(normed_ND, weights.head_VD, run.inputs.target_N, backend=run.backend)


def logits(
    weights: LlamaWeights, run: Pass, activations: Sequence[str], place_N: Tensor | None = None
) -> Tensor:
    """Returns the logits after every token, [T, V], or after some, [N, V], in the compute dtype.

    Args:
        weights: of the model.
        run: the inputs.
        activations: the policy of each layer.
        place_N: of the tokens; None: all.
    """
    return final_states(weights, run, activations, place_N) @ weights.head_VD.t()


def final_states(
    weights: LlamaWeights, run: Pass, activations: Sequence[str], place_N: Tensor | None
) -> Tensor:
    """Returns what the head reads, [N, D]: the last norm of the states at `place_N`, None: of all."""
    h_TD = _stream(weights, run, activations)
    states_ND = h_TD if place_N is None else h_TD.index_select(0, place_N)
    normed_ND, _ = ops.rms_norm(states_ND, weights.final_norm_D, run.eps, backend=run.backend)
    return normed_ND


def decoder_layer(
    branch_TD: Tensor, residual_TD: Tensor | None, layer: LlamaLayer, run: Pass, policy: str
) -> tuple[Tensor, Tensor]:
    """Returns what a layer adds to the residual stream, and the stream before that, both [T, D].

    Args:
        branch_TD: what the layer before adds.
        residual_TD: the stream before that; None: `branch_TD` is the stream.
        layer: its weights.
        run: the pass.
        policy: what to keep for the backward.
    """
    if policy in RECOMPUTED:
        h_TD = branch_TD if residual_TD is None else branch_TD + residual_TD
        branch_TD, residual_TD = _FullRecompute.apply(  # type: ignore[no-untyped-call]
            h_TD, layer, run, policy, *layer.parameters()
        )
        return branch_TD, residual_TD
    attended_TD, h_TD = _attend(branch_TD, residual_TD, layer, run, policy == "keep")
    return _after_attention(attended_TD, h_TD, layer, run, policy == "keep", True)


def _stream(weights: LlamaWeights, run: Pass, activations: Sequence[str]) -> Tensor:
    branch_TD = run.embedded_TD
    if branch_TD is None:
        branch_TD = torch.nn.functional.embedding(run.inputs.ids_T, weights.embedding_VD)
    residual_TD = None
    for layer, policy in zip(weights.layers, activations, strict=True):
        branch_TD, residual_TD = decoder_layer(branch_TD, residual_TD, layer, run, policy)
    return branch_TD if residual_TD is None else branch_TD + residual_TD


def _before_attention(
    branch_TD: Tensor, residual_TD: Tensor | None, layer: LlamaLayer, run: Pass, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns q [T, N, H], k and v [T, K, H], and the stream h [T, D]."""
    all_four: tuple[Tensor, Tensor, Tensor, Tensor] = _BeforeAttention.apply(  # type: ignore[no-untyped-call]
        branch_TD, residual_TD, layer, run, keep, *layer.qkv.parameters()
    )
    return all_four


def _attend(
    branch_TD: Tensor, residual_TD: Tensor | None, layer: LlamaLayer, run: Pass, keep: bool
) -> tuple[Tensor, Tensor]:
    """Returns attention's output [T, N*H] and the stream h [T, D]."""
    q_TNH, k_TKH, v_TKH, h_TD = _before_attention(branch_TD, residual_TD, layer, run, keep)
    if run.attention is not None:
        return run.attention(layer.index, q_TNH, k_TKH, v_TKH).flatten(1), h_TD
    return run.attend(q_TNH, k_TKH, v_TKH).flatten(1), h_TD


def _after_attention(
    attended_TD: Tensor, h_TD: Tensor, layer: LlamaLayer, run: Pass, keep: bool, last_product: bool,
    middle_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns p Wdᵀ (zeros that cost nothing without `last_product`) and h' (`middle_TD` where known), both [T, D]."""
    factors = [factor for group in (layer.o, layer.gate_up, layer.down) for factor in group.parameters()]
    both: tuple[Tensor, Tensor] = _AfterAttention.apply(  # type: ignore[no-untyped-call]
        attended_TD, h_TD, layer, run, keep, last_product, middle_TD, *factors
    )
    return both


def _heads(y_TO: Tensor, layer: LlamaLayer, head_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns views q [T, N, H], k and v [T, K, H] of the stacked product."""
    q, k, v = (part.view(part.shape[0], -1, head_size) for part in torch.split(y_TO, layer.qkv.widths, dim=1))
    return q, k, v


class _BeforeAttention(torch.autograd.Function):
    """(branch, residual) -> q, k (turned), v, and h = branch + residual.

    h is an output even where it is the input itself, so that both of its gradients are summed by the norm's backward,
    rounded once, whatever the policy.
    """

    @staticmethod
    def forward(
        ctx: Any, branch_TD: Tensor, residual_TD: Tensor | None, layer: LlamaLayer, run: Pass, keep: bool,
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        norm = ops.implementation("rms_norm", branch_TD, run.backend)
        rope = ops.implementation("rope", branch_TD, run.backend)
        rows, x_TD, h_TD, rstd_T = _normed(branch_TD, residual_TD, layer.input_norm_D, layer.qkv, run, keep)
        y_TO, low_TS = multiply(x_TD, layer.qkv, run.matrices, run.seed_for(layer, 0), rows)
        q, k, v = _heads(y_TO, layer, run.head_size)
        unturned_TO = y_TO if layer.q_norm_H is not None or layer.qkv.rescaled else None
        head_rstds: list[Tensor | None] = [None, None]
        if layer.q_norm_H is not None and layer.k_norm_H is not None:
            q, head_rstds[0] = _norm_heads(norm, q, layer.q_norm_H, run.eps)
            k, head_rstds[1] = _norm_heads(norm, k, layer.k_norm_H, run.eps)
        in_place = None if layer.q_norm_H is None and layer.qkv.rescaled else (q, k)  # else y itself would be turned
        q, k = rope.forward(q, k, run.cos_SP, run.sin_SP, run.inputs.position_T, out=in_place)
        ctx.save_for_backward(h_TD, rstd_T, x_TD if keep else None, low_TS, unturned_TO, *head_rstds)
        ctx.layer, ctx.run = layer, run
        return q, k, v, h_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_TNH: Tensor, dk_TKH: Tensor, dv_TKH: Tensor, dh_TD: Tensor) -> Any:
        h_TD, rstd_T, x_TD, low_TS, unturned_TO, q_rstd, k_rstd = ctx.saved_tensors
        layer, run = ctx.layer, ctx.run
        norm = ops.implementation("rms_norm", h_TD, run.backend)
        rope = ops.implementation("rope", h_TD, run.backend)
        seed = run.seed_for(layer, 0)
        if run.matrices.fp8 is not None and layer.q_norm_H is None:
            rows, dy_TO = _turned_back(dq_TNH, dk_TKH, dv_TKH, layer.qkv, run)
        else:
            dy_TO = dq_TNH.new_empty((h_TD.shape[0], sum(layer.qkv.widths)))
            dq, dk, dv = _heads(dy_TO, layer, run.head_size)
            turns = (run.cos_SP, run.sin_SP, run.inputs.position_T)
            rope.backward(dq_TNH, dk_TKH, *turns, out=(dq, dk), copied=(dv_TKH, dv))
            if layer.q_norm_H is not None:
                q, k, _ = _heads(unturned_TO, layer, run.head_size)
                dq.copy_(_norm_heads_backward(norm, dq, q, layer.q_norm_H, q_rstd))
                dk.copy_(_norm_heads_backward(norm, dk, k, layer.k_norm_H, k_rstd))
            rows = run.matrices.rows(dy_TO, layer.qkv)
        u_TS = rank_gradient(dy_TO, layer.qkv, run.matrices, seed, rows)
        if x_TD is None and layer.qkv.parameters():
            x_TD, _, _ = norm.forward(h_TD, None, layer.input_norm_D, run.eps)
        add_factor_gradients(x_TD, low_TS, dy_TO, u_TS, layer.qkv, run.matrices, seed, unturned_TO)
        if not ctx.needs_input_grad[0]:  # the embeddings are frozen: the first layer's input needs none
            return _only(ctx)
        dx_TD, scales = unscaled_input_gradient(dy_TO, u_TS, layer.qkv, run.matrices, seed, rows)
        # what the layer below adds has the same gradient, and its last map is as wide as this layer's
        norm_D = layer.input_norm_D
        dstream_TD, stream_rows = _normed_backward(dx_TD, scales, dh_TD, h_TD, norm_D, rstd_T, layer.down, run)
        if stream_rows is not None:
            run.handed.put(dstream_TD, stream_rows)
        return _only(ctx, dstream_TD, dstream_TD if ctx.needs_input_grad[1] else None)


class _AfterAttention(torch.autograd.Function):
    """(a, h) -> p Wdᵀ and h' = h + a Woᵀ."""

    @staticmethod
    def forward(
        ctx: Any, attended_TD: Tensor, h_TD: Tensor, layer: LlamaLayer, run: Pass, keep: bool, last_product: bool,
        middle_TD: Tensor | None, *factors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        rows = run.matrices.rows(attended_TD, layer.o)
        if middle_TD is None or layer.o.rescaled:
            o_TD, o_low_TS = multiply(attended_TD, layer.o, run.matrices, run.seed_for(layer, 1), rows)
            branch_TD, residual_TD = o_TD, h_TD
        else:
            o_TD, o_low_TS = None, rank_input(layer.o, run.matrices, rows)
            branch_TD, residual_TD = middle_TD, None
        rows, x_TD, h_TD, rstd_T = _normed(branch_TD, residual_TD, layer.after_norm_D, layer.gate_up, run, keep)
        both_T2I, both_low_TS = multiply(x_TD, layer.gate_up, run.matrices, run.seed_for(layer, 2), rows)
        rows, product_TI = _gated(both_T2I, layer.down, run, keep)
        if last_product:
            down_TD, down_low_TS = multiply(product_TI, layer.down, run.matrices, run.seed_for(layer, 3), rows)
        else:
            down_TD = h_TD.new_zeros(()).expand(h_TD.shape)
            down_low_TS = rank_input(layer.down, run.matrices, rows)
        kept = (x_TD, product_TI) if keep else (None, None)
        outputs = o_TD if layer.o.rescaled else None, down_TD if layer.down.rescaled else None
        # what was computed again for one backward is nobody else's: the gradients of gate and up take their place,
        # but where their own magnitudes need them
        ctx.overwrites = not last_product and not layer.gate_up.rescaled
        ctx.save_for_backward(
            attended_TD, h_TD, rstd_T, both_T2I, *kept, *outputs, o_low_TS, both_low_TS, down_low_TS
        )
        ctx.layer, ctx.run = layer, run
        return down_TD, h_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ddown_TD: Tensor, dh_TD: Tensor) -> Any:
        attended_TD, h_TD, rstd_T, both_T2I, x_TD, product_TI, o_TD, down_TD, *lows = ctx.saved_tensors
        layer, run = ctx.layer, ctx.run
        matrices = run.matrices
        norm = ops.implementation("rms_norm", h_TD, run.backend)
        o_seed, gate_up_seed, down_seed = (run.seed_for(layer, group) for group in (1, 2, 3))

        rows = None
        if matrices.fp8 is not None:
            rows = run.handed.take(ddown_TD, matrices.fp8_of(layer.down).columns)
        rows = rows or matrices.rows(ddown_TD, layer.down)
        u_TS = rank_gradient(ddown_TD, layer.down, matrices, down_seed, rows)
        dproduct_TI = input_gradient(ddown_TD, u_TS, layer.down, matrices, down_seed, rows)
        again_TI = None
        if product_TI is None and layer.down.parameters():
            again_TI = torch.empty_like(dproduct_TI)
        dboth_T2I = both_T2I if ctx.overwrites else torch.empty_like(both_T2I)
        rows = _gated_backward(dproduct_TI, both_T2I, dboth_T2I, again_TI, layer.gate_up, run)
        product_TI = product_TI if again_TI is None else again_TI
        add_factor_gradients(product_TI, lows[2], ddown_TD, u_TS, layer.down, matrices, down_seed, down_TD)
        del dproduct_TI, again_TI, product_TI
        if x_TD is None and layer.gate_up.parameters():
            x_TD, _, _ = norm.forward(h_TD, None, layer.after_norm_D, run.eps)
        u_TS = rank_gradient(dboth_T2I, layer.gate_up, matrices, gate_up_seed, rows)
        add_factor_gradients(x_TD, lows[1], dboth_T2I, u_TS, layer.gate_up, matrices, gate_up_seed, both_T2I)
        dx_TD, scales = unscaled_input_gradient(dboth_T2I, u_TS, layer.gate_up, matrices, gate_up_seed, rows)
        del dboth_T2I, rows
        dstream_TD, rows = _normed_backward(dx_TD, scales, dh_TD, h_TD, layer.after_norm_D, rstd_T, layer.o, run)
        u_TS = rank_gradient(dstream_TD, layer.o, matrices, o_seed, rows)
        add_factor_gradients(attended_TD, lows[0], dstream_TD, u_TS, layer.o, matrices, o_seed, o_TD)
        dattended_TD = None
        if ctx.needs_input_grad[0]:
            dattended_TD = input_gradient(dstream_TD, u_TS, layer.o, matrices, o_seed, rows)
        return _only(ctx, dattended_TD, dstream_TD)


class _FullRecompute(torch.autograd.Function):
    """h -> a whole layer; the backward computes the layer again, but for its last product and what was kept."""

    @staticmethod
    def forward(
        ctx: Any, h_TD: Tensor, layer: LlamaLayer, run: Pass, policy: str, *factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.layer, ctx.run, ctx.device = layer, run, h_TD.device
        ctx.host = run.host if policy != "full" else None
        ctx.attention = None
        if ctx.host is not None and policy == "offload-attention":
            q, k, v, _ = _before_attention(h_TD, None, layer, run, False)
            ctx.attention = KeptAttention()
            a_TNH, kept = ctx.attention.forward(run.attend, q, k, v)
            down_TD, middle_TD = _after_attention(a_TNH.flatten(1), h_TD, layer, run, False, True)
            # detached: the output itself will carry a graph
            ctx.host.put(layer.index, (h_TD, middle_TD.detach(), *kept), run.serial)
            return down_TD, middle_TD
        attended_TD, _ = _attend(h_TD, None, layer, run, False)
        if ctx.host is not None:
            ctx.host.put(layer.index, (h_TD,), run.serial)
        else:
            ctx.save_for_backward(h_TD)
        return _after_attention(attended_TD, h_TD, layer, run, False, True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ddown_TD: Tensor, dh_TD: Tensor) -> Any:
        layer, run = ctx.layer, ctx.run
        kept_TD, *others = ctx.saved_tensors if ctx.host is None else ctx.host.take(layer.index, ctx.device, run.serial)
        h_TD = kept_TD.detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad():
            middle_TD = None
            if ctx.attention is None:
                attended_TD, stream_TD = _attend(h_TD, None, layer, run, True)
            else:
                q, k, v, stream_TD = _before_attention(h_TD, None, layer, run, True)
                middle_TD, *kept = others
                attended_TD = ctx.attention.again(kept, q, k, v).flatten(1)
            # the last product is not computed again, but where its output is needed for its magnitudes
            outputs = _after_attention(attended_TD, stream_TD, layer, run, True, layer.down.rescaled, middle_TD)
        # not read from `h.grad`, for which autograd may copy it; the factors of the first layer, whose h needs no
        # gradient, lead through the same functions, and get theirs there
        wanted = [h_TD] if h_TD.requires_grad else [each for each in layer.parameters() if each.requires_grad]
        gradients = torch.autograd.grad(outputs, wanted, (ddown_TD, dh_TD), allow_unused=True)
        return _only(ctx, gradients[0])


def _norm_heads(norm: Any, x_TNH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the norm of each head [T, N, H], and rstd [T*N]."""
    y, _, rstd = norm.forward(x_TNH.flatten(0, 1), None, weight_H, eps)
    return y.view(x_TNH.shape), rstd


def _norm_heads_backward(norm: Any, dy_TNH: Tensor, x_TNH: Tensor, weight_H: Tensor, rstd: Tensor) -> Tensor:
    dx, _ = norm.backward(dy_TNH.flatten(0, 1), None, x_TNH.flatten(0, 1), weight_H, rstd)
    gradient: Tensor = dx.view(x_TNH.shape)
    return gradient


def _only(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Returns the gradients of a function's first arguments, None for the others: the factors have got theirs."""
    return (*gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients)))


def _normed(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, group: LinearGroup, run: Pass, keep: bool
) -> tuple[Rows | None, Tensor | None, Tensor, Tensor]:
    """Returns the norm in e4m3 where the group multiplies in it, the norm [T, D], the sum [T, D] and rstd [T].

    Where e4m3 is all that the product reads, the norm itself is None unless it is to be kept.
    """
    if run.matrices.fp8 is None:
        return None, *ops.implementation("rms_norm", x_TD, run.backend).forward(x_TD, residual_TD, weight_D, run.eps)
    columns = run.matrices.fp8_of(group).columns
    kernels = ops.implementation("fp8", x_TD, run.backend)
    rows, scale, *rest = kernels.rms_norm_rows(x_TD, residual_TD, weight_D, run.eps, columns, keep=keep)
    return Rows(rows, scale), *rest


def _normed_backward(
    dy_TD: Tensor, scales: Scales | None, dh_TD: Tensor, h_TD: Tensor, weight_D: Tensor, rstd_T: Tensor,
    group: LinearGroup, run: Pass,
) -> tuple[Tensor, Rows | None]:  # fmt: skip
    """Returns the gradient of the stream [T, D], and that in e4m3 where `group`, which has added to it, wants it."""
    if run.matrices.fp8 is None:
        norm = ops.implementation("rms_norm", h_TD, run.backend)
        return norm.backward(dy_TD, dh_TD, h_TD, weight_D, rstd_T)[0], None
    columns = run.matrices.fp8_of(group).columns
    kernels = ops.implementation("fp8", h_TD, run.backend)
    rows, scale, dstream_TD = kernels.rms_norm_backward_rows(
        dy_TD, dh_TD, h_TD, weight_D, rstd_T, columns, scales=scales
    )
    return dstream_TD, Rows(rows, scale)


def _turned_back(
    dq_TNH: Tensor, dk_TKH: Tensor, dv_TKH: Tensor, group: LinearGroup, run: Pass
) -> tuple[Rows, Tensor]:
    """Returns the gradients of q, k and v before their turn in e4m3, and in the compute dtype, [T, O]."""
    kernels = ops.implementation("fp8", dq_TNH, run.backend)
    columns = run.matrices.fp8_of(group).columns
    turns = (run.cos_SP, run.sin_SP, run.inputs.position_T)
    rows, scale, dy_TO = kernels.rope_backward_rows(dq_TNH, dk_TKH, dv_TKH, *turns, columns)
    return Rows(rows, scale), dy_TO


def _gated(both_T2I: Tensor, group: LinearGroup, run: Pass, keep: bool) -> tuple[Rows | None, Tensor | None]:
    """Returns silu(gate) * up in e4m3 where the group multiplies in it, and in 16 bits, [T, I], as `_normed` does."""
    gate_TI, up_TI = both_T2I.chunk(2, dim=1)
    if run.matrices.fp8 is None:
        return None, ops.implementation("swiglu", both_T2I, run.backend).forward(gate_TI, up_TI)
    columns = run.matrices.fp8_of(group).columns
    kernels = ops.implementation("fp8", both_T2I, run.backend)
    rows, scale, product_TI = kernels.swiglu_rows(gate_TI, up_TI, columns, keep=keep)
    return Rows(rows, scale), product_TI


def _gated_backward(
    dproduct_TI: Tensor, both_T2I: Tensor, dboth_T2I: Tensor, product_TI: Tensor | None, group: LinearGroup, run: Pass
) -> Rows | None:
    """Fills `dboth` and `product`; returns `dboth` in e4m3 where the group multiplies in it.

    `dboth` may be `both`: every value is read by the thread that writes its gradients, before it does.
    """
    gate_TI, up_TI = both_T2I.chunk(2, dim=1)
    if run.matrices.fp8 is None:
        dgate_TI, dup_TI = dboth_T2I.chunk(2, dim=1)
        swiglu = ops.implementation("swiglu", both_T2I, run.backend)
        swiglu.backward(dproduct_TI, gate_TI, up_TI, dgate_TI=dgate_TI, dup_TI=dup_TI, product_TI=product_TI)
        return None
    columns = run.matrices.fp8_of(group).columns
    kernels = ops.implementation("fp8", both_T2I, run.backend)
    rows, scale = kernels.swiglu_backward_rows(dproduct_TI, gate_TI, up_TI, dboth_T2I, product_TI, columns)
    return Rows(rows, scale)
