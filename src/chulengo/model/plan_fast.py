"""The plan of the fast engine: its memory by part, the time of its step, and the policies that use a device best.

Memory. Everything that stays is counted: quantised weights, the adapter with gradients, optimiser states and copies in
the compute dtype, the one buffer (or all matrices), and what each layer keeps by its policy. On top comes the moment
with the most temporaries: the backward of a layer (of one that is computed again, with all its inner tensors), or the
loss. The counts are those of `model/llama.py`, tensor by tensor.

Time. A sum of parts, each its operations or bytes over what the device does: matrix products (computed again where the
policy says so), attention, the products of A and B, dequantisation, everything element by element. The rates are
fractions of two numbers of the device, its sustained bf16 products and its copy speed; the fractions were read off
profiles of one H200 (benchmarks/LOG.md), so other cards are extrapolation.

The policies form one list, fastest first; the first that fits is taken. Between "selective" and "offload" the number
of layers that keep is chosen so that memory is filled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chulengo.model.plan_memory import (
    CUDA_CONTEXT_BYTES,
    DTYPE_BYTES,
    SLACK,
    WORKSPACE_BYTES,
    Plan,
    TrainingMemory,
)
from chulengo.model.plan_shapes import LINEAR_NAMES, ModelShape, linear_targets

CONTEXT = "CUDA context"
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight: code, 8-bit scale of 64, float32 scale of 256 of those
NF4_SINGLE_BYTES = 0.5 + 4 / 64
STATES_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0 + 8 / 256, "paged_adamw_8bit": 2.0 + 8 / 256, "paged_adamw_32bit": 8.0}
HEAD_CHUNK = 2048  # tokens whose logits exist at once
GRAPH_TOKENS = 2048  # up to here a step is bound by launches, and a graph pays (H200: 512 tokens 390 -> 65 ms)

# shares of the device's rates, from profiles on an H200 (680e12 and 4.28e12): see benchmarks/LOG.md
ATTENTION_SHARE = 0.57
ELEMENTWISE_SHARE = 0.8
FACTOR_SHARE = 0.8
DEQUANTISE_SHARE = 0.35


@dataclass(frozen=True, slots=True)
class Policies:
    """How the fast engine runs a model.

    Attributes:
        weights: stream or resident.
        activations: of each layer: keep, selective, full or offload.
        embeddings: device or host.
        graphs: whether a step is replayed as a CUDA graph.
    """

    weights: str
    activations: tuple[str, ...]
    embeddings: str = "device"
    graphs: bool = False

    def describe(self) -> str:
        """Returns the policies in words."""
        counts = {name: self.activations.count(name) for name in dict.fromkeys(self.activations)}
        kept = next(iter(counts)) if len(counts) == 1 else ", ".join(f"{name} in {n}" for name, n in counts.items())
        host = ", embeddings on the host" if self.embeddings == "host" else ""
        return f"weights {self.weights}, activations {kept}{host}{', graphs' if self.graphs else ''}"


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """What a device does when it does nothing else: bf16 products in FLOP/s, sustained, and copying in bytes/s."""

    product_flops: float
    copy_bytes: float


H200 = DeviceRates(680e12, 4.28e12)


def predict_fast(shape: ModelShape, settings: TrainingMemory, policies: Policies) -> Plan:
    """Returns the predicted memory of a training run of the fast engine, on a GPU or a CPU.

    Args:
        shape: of the model.
        settings: as for `plan_memory.predict_memory`; rows are taken as full.
        policies: how the engine runs it.
    """
    size, tokens = DTYPE_BYTES[settings.compute_dtype], settings.batch_size * settings.row_tokens
    targets = linear_targets(settings.targets) or LINEAR_NAMES
    trained = sum(shape.adapter_sizes(settings.rank, targets, False))
    linear = shape.num_layers * shape.layer_linear_weights
    nf4 = NF4_BYTES if settings.double_quant else NF4_SINGLE_BYTES
    held = nf4 if settings.quantization == "nf4" else size
    tables = shape.vocab * shape.hidden * (2 if policies.embeddings == "device" and not shape.tied else 1)
    small = shape.num_layers * shape.layer_other_weights + shape.hidden
    parts = {
        "quantised weights" if settings.quantization == "nf4" else "weights": int(linear * held),
        "embeddings, head, norms": size * (tables + small),
        "adapter and its copies": trained * (4 + size),
        "gradients": 4 * trained * (2 if policies.graphs else 1),
        "optimiser states": int(trained * STATES_BYTES[settings.optimizer]),
        "matrices": _matrices(shape, settings, policies, size),
        "kept by the layers": sum(_kept(shape, policy, size) for policy in policies.activations) * tokens,
    }
    moments = {
        "layers": {**parts, "one layer's backward": tokens * _backward(shape, policies.activations, size)},
        "loss": {**parts, "logits and loss": _loss(shape, tokens, size)},
    }
    for moment in moments.values():
        moment["workspace"] = WORKSPACE_BYTES if settings.device == "cuda" else 0
    peak = max(moments, key=lambda name: sum(moments[name].values()))
    beside = {}
    if settings.device == "cuda":
        beside = {CONTEXT: CUDA_CONTEXT_BYTES, SLACK: int(0.04 * sum(moments[peak].values()))}
    return Plan(
        moments=moments, moment=peak, beside=beside, num_parameters=shape.num_parameters, num_trainable=trained,
        device=settings.device, notes=(f"fast engine: {policies.describe()}",),
    )  # fmt: skip


def step_seconds(
    shape: ModelShape, settings: TrainingMemory, policies: Policies, rates: DeviceRates
) -> dict[str, float]:
    """Returns the predicted time of one micro-batch by part, in seconds, without evaluation and data.

    Args:
        shape: of the model.
        settings: of the run.
        policies: of the engine.
        rates: of the device.
    """
    tokens, layers = settings.batch_size * settings.row_tokens, shape.num_layers
    again = sum(policy in ("full", "offload") for policy in policies.activations) / layers
    linear = layers * shape.layer_linear_weights
    down = shape.linear("down_proj")
    recomputed = 1 - down[0] * down[1] / shape.layer_linear_weights
    flops = 2 * tokens * linear * (2 + again * recomputed)
    pairs = tokens * settings.row_tokens / 2 * shape.q_width * layers
    targets = linear_targets(settings.targets) or LINEAR_NAMES
    widths = sum(sum(shape.linear(name)) for name in targets)
    uses = (2 + again * recomputed) if policies.weights == "stream" else 1 / settings.gradient_accumulation
    size = DTYPE_BYTES[settings.compute_dtype]
    return {
        "products": flops / rates.product_flops,
        "attention": 4 * pairs * (3.5 + again) / (ATTENTION_SHARE * rates.product_flops),
        "head": 4 * tokens * shape.hidden * shape.vocab / rates.product_flops,
        "adapter": 2 * size * widths * tokens * layers / (FACTOR_SHARE * rates.copy_bytes),
        "dequantisation": (0.5 + size) * linear * uses / (DEQUANTISE_SHARE * rates.copy_bytes),
        "elementwise": tokens * layers * size * (22 * shape.hidden + 10 * shape.intermediate) * (1 + 0.35 * again)
        / (ELEMENTWISE_SHARE * rates.copy_bytes),
    }  # fmt: skip


def choose_policies(
    shape: ModelShape, settings: TrainingMemory, free_bytes: int, *, weights: str = "auto", activations: str = "auto"
) -> Policies | None:
    """Returns the fastest policies that fit, or None when none does.

    Args:
        shape: of the model.
        settings: of the run; `gradient_checkpointing` rules out keeping activations.
        free_bytes: of the device.
        weights: stream or resident insists.
        activations: keep, selective, full or offload insists.
    """
    for policies in _candidates(shape, settings, weights, activations):
        plan = predict_fast(shape, settings, policies)
        if sum(plan.moments[plan.moment].values()) + plan.beside.get(CONTEXT, 0) <= free_bytes:
            return policies
    return None


def _candidates(shape: ModelShape, settings: TrainingMemory, weights: str, activations: str) -> list[Policies]:
    layers, cuda = shape.num_layers, settings.device == "cuda"
    graphs = cuda and not settings.dropout and settings.batch_size * settings.row_tokens <= GRAPH_TOKENS
    kept = ["keep", "selective"] if not settings.gradient_checkpointing else []
    rows: list[tuple[str, tuple[str, ...], str]] = []
    for policy in kept:
        rows.append(("resident", (policy,) * layers, "device"))
    for policy in kept:
        rows.append(("stream", (policy,) * layers, "device"))
    lean = "offload" if cuda else "full"
    if kept:
        rows += [("stream", ("selective",) * n + (lean,) * (layers - n), "device") for n in range(layers - 1, 0, -1)]
    else:
        rows.append(("resident", ("full",) * layers, "device"))
    rows += [("stream", ("full",) * layers, "device"), ("stream", (lean,) * layers, "device")]
    if cuda and not shape.tied:
        rows.append(("stream", (lean,) * layers, "host"))
    found = [Policies(w, a, e, graphs) for w, a, e in rows]
    if activations != "auto":
        found = [
            Policies(p.weights, (activations,) * layers, p.embeddings, p.graphs)
            for p in (Policies(w, (), e, graphs) for w in ("resident", "stream") for e in ("device", "host"))
            if p.embeddings == "device" or (cuda and not shape.tied)
        ]
    return [policies for policies in found if weights in ("auto", policies.weights)]


def _matrices(shape: ModelShape, settings: TrainingMemory, policies: Policies, size: int) -> int:
    if policies.weights == "resident":
        return size * shape.num_layers * shape.layer_linear_weights
    groups = (LINEAR_NAMES[:3], LINEAR_NAMES[3:4], LINEAR_NAMES[4:6], LINEAR_NAMES[6:])
    return size * max(sum(math.prod(shape.linear(name)) for name in group) for group in groups)


def _kept(shape: ModelShape, policy: str, size: int) -> int:
    """Returns the bytes a token that one layer keeps: see the table at the top of `model/llama.py`."""
    hidden, q, kv, wide = shape.hidden, shape.q_width, shape.kv_width, shape.intermediate
    if policy == "offload":
        return 0
    if policy == "full":
        return size * hidden
    attention = size * (2 * q + 2 * kv) + 4 * shape.num_heads  # q, k, v, its output, a sum of exponentials a head
    if shape.query_key_norms:
        attention += size * (q + 2 * kv) + 4 * (shape.num_heads + shape.num_kv_heads)
    streams = size * 2 * hidden + 8
    selective = attention + streams + size * 2 * wide
    return selective + size * (2 * hidden + wide) if policy == "keep" else selective


def _backward(shape: ModelShape, activations: tuple[str, ...], size: int) -> int:
    """Returns the bytes a token of a layer's backward, the largest over the policies in use."""
    hidden, wide = shape.hidden, shape.intermediate
    most = 0
    for policy in set(activations):
        inner = size * (3 * hidden + 3 * wide + (0 if policy == "keep" else wide))
        if policy in ("full", "offload"):  # the layer's own tensors, made again, and its input
            inner += _kept(shape, "selective", size) + size * (2 * hidden + (2 * hidden if policy == "offload" else 0))
        most = max(most, inner)
    return most


def _loss(shape: ModelShape, tokens: int, size: int) -> int:
    return tokens * size * 4 * shape.hidden + min(tokens, HEAD_CHUNK) * shape.vocab * size


def predict_for(config_shape: ModelShape | None, settings: TrainingMemory, policies: Policies) -> Mapping[str, Any]:
    """Returns a plan and a step's time on an H200 as one JSON-able dictionary, for benchmarks."""
    assert config_shape is not None
    plan = predict_fast(config_shape, settings, policies)
    parts = step_seconds(config_shape, settings, policies, H200)
    return {"peak_bytes": plan.peak_bytes, "seconds": sum(parts.values()), "parts_s": parts}
