"""The memory of the fast engine by part, for given policies.

Everything that stays is counted: quantised weights, the adapter with gradients, optimiser states and copies in the
compute dtype, the one buffer (or all matrices), and what each layer keeps by its policy. On top comes the moment with
the most temporaries: the backward of a layer (of one that is computed again, with all its inner tensors), or the loss.
The counts are those of `model/llama.py`, tensor by tensor; against 26 measured settings on one H200 (7B, 13B and 70B,
4 to 51 GiB) they are off by 1 % at most.

What a step takes is in `plan_speed.py`, which policies to take in `plan_policies.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from chulengo.kernels.columns import num_columns
from chulengo.model.allocator import segments_grow
from chulengo.model.plan_memory import (
    CONTEXT,
    CUDA_CONTEXT_BYTES,
    DTYPE_BYTES,
    GRAPHS,
    SLACK,
    WORKSPACE_BYTES,
    Plan,
    TrainingMemory,
    gib,
)
from chulengo.model.plan_shapes import LINEAR_NAMES, ModelShape, linear_targets
from chulengo.model.step_sizes import GRAPH_BYTES, filled_up, num_graphs

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight: code, 8-bit scale of 64, float32 scale of 256 of those
NF4_SINGLE_BYTES = 0.5 + 4 / 64
STATES_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0 + 8 / 256, "paged_adamw_8bit": 2.0 + 8 / 256, "paged_adamw_32bit": 8.0}
GROUPS = (LINEAR_NAMES[:3], LINEAR_NAMES[3:4], LINEAR_NAMES[4:6], LINEAR_NAMES[6:])  # maps with one input
RECOMPUTED = ("full", "offload", "offload-attention")  # policies under which a layer is computed again
HEAD_CHUNK = 2048  # tokens whose logits exist at once
# What the allocator holds beyond what is in use. The least that runs on an H200 had to leave it, with growing segments:
# 0.39 and 0.50 GiB of 5.6 in use, 0.41 of 13.6, 0.74 of 37, each with the next lower limit tried too low. With segments
# of fixed sizes 0.67 GiB of 5.6 was too little, and 1.2 of 13.6 enough.
LEAST_HELD, HELD_SHARE, FIXED_HELD_SHARE = 400 << 20, 0.01, 0.08


@dataclass(frozen=True, slots=True)
class Policies:
    """How the fast engine runs a model.

    Attributes:
        weights: stream, resident, stream-fp8 or resident-fp8.
        activations: of each layer: keep, selective, full, offload or offload-attention.
        embeddings: device or host.
        graphs: whether a step is replayed as a CUDA graph.
    """

    weights: str
    activations: tuple[str, ...]
    embeddings: str = "device"
    graphs: bool = False

    @property
    def fp8(self) -> bool:
        """Whether products are in FP8."""
        return self.weights.endswith("fp8")

    def describe(self) -> str:
        """Returns the policies in words."""
        counts = self.to_dict()["activations"]
        several = ", ".join(f"{name} in {n} layer{'s' * (n > 1)}" for name, n in counts.items())
        kept = next(iter(counts)) if len(counts) == 1 else several
        host = ", embeddings on the host" if self.embeddings == "host" else ""
        return f"weights {self.weights}, activations {kept}{host}{', graphs' if self.graphs else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the policies as a JSON-able dict; of the activations, how many layers have which."""
        counts = {name: self.activations.count(name) for name in dict.fromkeys(self.activations)}
        return {
            "weights": self.weights, "activations": counts, "embeddings": self.embeddings, "graphs": self.graphs,
        }  # fmt: skip


def step_tokens(settings: TrainingMemory, policies: Policies) -> int:
    """Returns the tokens that a micro-batch of full rows goes through the layers with: a graph's is filled up."""
    tokens = settings.batch_size * settings.row_tokens
    return filled_up(tokens) if policies.graphs else tokens


def graphs_of(settings: TrainingMemory, policies: Policies) -> int:
    """Returns how many graphs a run may have: its batches differ in size."""
    packed = settings.mean_tokens is None
    return num_graphs(step_tokens(settings, policies), packed=packed) if policies.graphs else 0


def weights_are_matrices(settings: TrainingMemory, policies: Policies) -> bool:
    """Returns whether products take the weights as they are: not quantised, and the adapter is not folded in."""
    return settings.quantization == "none" and bool(settings.dropout) and not policies.fp8


def predict_fast(shape: ModelShape, settings: TrainingMemory, policies: Policies) -> Plan:
    """Returns the predicted memory of a training run of the fast engine on a GPU.

    Args:
        shape: of the model.
        settings: as for `plan_memory.predict_memory`; rows are taken as full.
        policies: how the engine runs it.
    """
    size, tokens = DTYPE_BYTES[settings.compute_dtype], step_tokens(settings, policies)
    targets = linear_targets(settings.targets) or LINEAR_NAMES
    trained = sum(shape.adapter_sizes(settings.rank, targets, settings.dora))
    linear = shape.num_layers * shape.layer_linear_weights
    nf4 = NF4_BYTES if settings.double_quant else NF4_SINGLE_BYTES
    held = nf4 if settings.quantization == "nf4" else size
    tables = shape.vocab * shape.hidden * (2 if policies.embeddings == "device" and not shape.tied else 1)
    small = shape.num_layers * shape.layer_other_weights + shape.hidden
    parts = {
        "quantised weights" if settings.quantization == "nf4" else "weights": int(linear * held),
        "embeddings, head, norms": size * (tables + small),
        "adapter and its copies": trained * (4 + size + (2 if policies.fp8 else 0))
        + _rescaling(shape, settings, targets, size),
        # those of a graph's one batch are the step's, unless others are added to them
        "gradients": 4 * trained * (2 if policies.graphs and settings.gradient_accumulation > 1 else 1),
        "optimiser states": int(trained * STATES_BYTES[settings.optimizer]),
        "matrices": _matrices(shape, settings, policies, size),
        "kept by the layers": sum(_kept(shape, each, size, settings.dora) for each in policies.activations) * tokens,
    }
    if policies.weights == "resident-fp8":
        # the weights wait in the host's memory, whose copies took their place one after the other before any step
        del parts["quantised weights" if settings.quantization == "nf4" else "weights"]
    backward = tokens * _backward(shape, policies.activations, size, settings, fp8=policies.fp8)
    moments = {
        "layers": {**parts, "one layer's backward": backward},
        "loss": {**parts, "logits and loss": _loss(shape, tokens, size)},
    }
    for moment in moments.values():
        moment["workspace"] = WORKSPACE_BYTES if settings.device == "cuda" else 0
    peak = max(moments, key=lambda name: sum(moments[name].values()))
    beside = {}
    if settings.device == "cuda":
        beside = {CONTEXT: CUDA_CONTEXT_BYTES, SLACK: _held(shape, tokens * size, sum(moments[peak].values()))}
        beside |= {GRAPHS: GRAPH_BYTES * graphs_of(settings, policies)} if policies.graphs else {}
    pinned = pinned_bytes(shape, settings, policies) if settings.device == "cuda" else 0
    notes = (f"states of layers take {gib(pinned)} of the host's memory, pinned",) if pinned else ()
    return Plan(
        moments=moments, moment=peak, beside=beside, num_parameters=shape.num_parameters, num_trainable=trained,
        device=settings.device, host_bytes=pinned, notes=notes,
    )  # fmt: skip


def _held(shape: ModelShape, column_bytes: int, used: int) -> int:
    """Returns what the allocator is left: holes as large as the largest matrix and activation, and a share of all.

    Args:
        shape: of the model.
        column_bytes: of one feature of all tokens.
        used: bytes in use.
    """
    block = 2 * shape.intermediate * (column_bytes + 2 * shape.hidden)
    fixed = 0 if segments_grow() else block + int(FIXED_HELD_SHARE * used)
    return max(LEAST_HELD, block) + int(HELD_SHARE * used) + fixed


def _matrices(shape: ModelShape, settings: TrainingMemory, policies: Policies, size: int) -> int:
    if weights_are_matrices(settings, policies):
        return 0
    if policies.weights == "resident":
        return size * shape.num_layers * shape.layer_linear_weights
    if not policies.fp8:
        return size * max(sum(math.prod(shape.linear(name)) for name in group) for group in GROUPS)
    copies = []  # bytes of both copies of each group, an adapter's columns with them
    for group in GROUPS:
        inputs, outputs = shape.linear(group[0])[0], sum(shape.linear(name)[1] for name in group)
        columns = num_columns(len(group) * settings.rank)
        copies.append((outputs * (inputs + columns), inputs * (outputs + columns)))
    if policies.weights == "resident-fp8":
        return shape.num_layers * sum(map(sum, copies))
    return max(map(max, copies))


def _rescaling(shape: ModelShape, settings: TrainingMemory, targets: tuple[str, ...], size: int) -> int:
    """Returns the bytes of what `model/dora.py` holds of every map: m and g in float32, and g B."""
    if not settings.dora:
        return 0
    return shape.num_layers * sum(shape.linear(name)[1] for name in targets) * (8 + size * settings.rank)


def _kept(shape: ModelShape, policy: str, size: int, dora: bool) -> int:
    """Returns the bytes a token that one layer keeps: see the table at the top of `model/llama.py`."""
    hidden, q, kv, wide = shape.hidden, shape.q_width, shape.kv_width, shape.intermediate
    if policy.startswith("offload"):
        return 0
    if policy == "full":
        return size * hidden
    attention = size * (2 * q + 2 * kv) + 4 * shape.num_heads  # q, k, v, its output, a sum of exponentials a head
    if shape.query_key_norms:
        attention += size * (q + 2 * kv) + 4 * (shape.num_heads + shape.num_kv_heads)
    elif dora:  # q and k before their turn; v is one and the same
        attention += size * (q + kv)
    streams = size * (2 + 2 * dora) * hidden + 8  # with DoRA what o and down add to the stream too
    selective = attention + streams + size * 2 * wide
    return selective + size * (2 * hidden + wide) if policy == "keep" else selective


def _backward(
    shape: ModelShape, activations: tuple[str, ...], size: int, settings: TrainingMemory, *, fp8: bool
) -> int:
    """Returns the bytes a token of a layer's backward, the largest over the policies in use."""
    hidden, wide = shape.hidden, shape.intermediate
    # gradients of gate and up are in e4m3 too
    eighth = 2 * wide if fp8 else 0
    # one map's own input, or its gradient before it is added: the masks are computed and never stored
    dropped = size * wide if settings.dropout else 0
    most = 0
    for policy in set(activations):
        inner = size * (3 * hidden + 3 * wide + (0 if policy == "keep" else wide))
        if policy in RECOMPUTED:  # the layer's own tensors, made again, and its input
            inner += _kept(shape, "selective", size, settings.dora)
            inner += size * 2 * hidden
            if policy != "full":  # a layer's that leave, another's that come
                inner += size * hidden + sum(_moved(shape, policy, size))
            if not settings.dora:
                inner -= 2 * size * wide  # gradients of gate and up take the place of these
        most = max(most, inner)
    return most + dropped + eighth


def _moved(shape: ModelShape, policy: str, size: int) -> list[int]:
    """Returns the bytes a token of each tensor that one layer keeps in the host's memory, in elements of `size`."""
    if policy == "offload":
        return [size * shape.hidden]
    # both streams, attention's output, a sum of exponentials a head
    more = [size * shape.hidden] * 2 + [size * shape.q_width, 4 * shape.num_heads]
    return more if policy == "offload-attention" else []


def moved_bytes(shape: ModelShape, settings: TrainingMemory, policies: Policies) -> int:
    """Returns the bytes that go to the host in a forward, and come back in its backward."""
    size, tokens = DTYPE_BYTES[settings.compute_dtype], step_tokens(settings, policies)
    return tokens * sum(sum(_moved(shape, policy, size)) for policy in policies.activations)


def pinned_bytes(shape: ModelShape, settings: TrainingMemory, policies: Policies) -> int:
    """Returns the bytes of the host's memory that they take, pinned: each tensor a power of two."""
    size, tokens = DTYPE_BYTES[settings.compute_dtype], step_tokens(settings, policies)
    each = [tokens * own for policy in policies.activations for own in _moved(shape, policy, size)]
    return sum(1 << (number - 1).bit_length() for number in each)


def _loss(shape: ModelShape, tokens: int, size: int) -> int:
    return tokens * size * 4 * shape.hidden + min(tokens, HEAD_CHUNK) * shape.vocab * size
