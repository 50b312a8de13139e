"""The time of the fast engine's step by part, from what the device does when it does nothing else.

Each part is its operations or bytes over a rate: matrix products (computed again where the policy says so), attention,
the products of A and B, dequantisation, everything element by element. The rates are shares of two numbers of the
device, its sustained bf16 products and its copy speed. The shares were read off profiles of one H200
(benchmarks/LOG.md), so other cards are extrapolation.

Beside the device works the host, which launches 80 kernels a layer and more. A step without a graph takes the longer of
the two: 2 x 1,024 tokens of Llama 2 7B are 0.12 s of work for an H200 and 0.20 s of launches. The alternative, their
sum, would be wrong for every large batch, where launches are hidden whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from chulengo.model.plan_fast import (
    RECOMPUTED,
    Policies,
    graphs_of,
    moved_bytes,
    step_tokens,
    weights_are_matrices,
)
from chulengo.model.plan_memory import DTYPE_BYTES, TrainingMemory
from chulengo.model.plan_shapes import LINEAR_NAMES, ModelShape, linear_targets

# shares of the device's rates, from profiles on an H200: see benchmarks/LOG.md
ATTENTION_SHARE = 0.57
ATTENTION_LONGER = 0.12  # more of it for every doubling of a row's length from 2,048 to 8,192 tokens
ELEMENTWISE_SHARE = 0.8
FACTOR_SHARE = 0.8
DEQUANTISE_SHARE = 0.35
# products in FP8: 167.6 ms instead of 313.4 for the maps of 8,192 tokens of Llama 2 7B, both run for a second; what is
# element by element also writes rows of a byte; NF4 to FP8 runs at a smaller share. The two in the middle were fitted
# to steps in FP8
FP8_PRODUCTS = 1.87
FP8_ELEMENTWISE = 1.15
FP8_DEQUANTISE_SHARE = 0.23
FP8_LAUNCHES = 1.2
# copies to the host while the device computes, fitted to steps of 4 x 2,048 tokens with two streams and attention's
# output moved (in FP8 0.10 s longer than the forward, in bf16 hidden); the way back has the longer backward
BUS_SHARE = 0.58
FORWARD_SHARE = 0.45  # of a step in which nothing is computed again; all of it again takes 0.78 of that
# host seconds a layer, forward and backward, of a step without a graph. The medians of steps of 32 layers that nothing
# else bounds were 0.20 and 0.22 s, 0.35 to 0.39 with layers computed again; in FP8 0.23, and 0.41, 0.44 and 0.51: hosts
# differ more than devices
LAUNCH_SECONDS = 6.6e-3
LAUNCHES_AGAIN = 0.6  # this share more where a layer is computed again


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """What a device does when it does nothing else.

    Attributes:
        product_flops: bf16 products, FLOP/s, sustained.
        copy_bytes: bytes/s read and written by a copy on the device.
        bus_bytes: bytes/s of a copy to pinned memory of the host, or from it.
        source: where the numbers are from, in words.
    """

    product_flops: float
    copy_bytes: float
    bus_bytes: float
    source: str


H200 = DeviceRates(680e12, 4.28e12, 55e9, "at the rates of one H200")


@dataclass(frozen=True, slots=True)
class StepTime:
    """The predicted time of one micro-batch, forward and backward.

    Attributes:
        parts: seconds; "waiting for launches" is what the host needs beyond the device's own time, "waiting for the
            host's memory" what copies to it and from it take beyond the forward and the backward.
        tokens: of the micro-batch, without those that a graph's is filled up with: they take time and teach nothing.
    """

    parts: Mapping[str, float]
    tokens: int

    @property
    def seconds(self) -> float:
        """Their sum."""
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as a JSON-able dict."""
        return {
            "seconds": self.seconds, "tokens": self.tokens, "tokens_per_s": self.tokens_per_s,
            "parts_s": dict(self.parts),
        }  # fmt: skip


def predict_step(
    shape: ModelShape, settings: TrainingMemory, policies: Policies, rates: DeviceRates
) -> StepTime:
    """Returns the predicted time of one micro-batch of full rows on a GPU, without evaluation and data.

    Args:
        shape: of the model.
        settings: of the run.
        policies: of the engine.
        rates: of the device.
    """
    tokens, layers = step_tokens(settings, policies), shape.num_layers
    again = sum(policy in RECOMPUTED for policy in policies.activations) / layers
    attention_kept = policies.activations.count("offload-attention") / layers
    linear = layers * shape.layer_linear_weights
    spared = {"down_proj": again, "o_proj": attention_kept}  # maps that are not computed again, but for their norms
    spared_weights = 0 if settings.dora else sum(math.prod(shape.linear(name)) * n for name, n in spared.items())
    recomputed = again - spared_weights / shape.layer_linear_weights
    flops = 2 * tokens * linear * (2 + recomputed)
    pairs = tokens * settings.row_tokens / 2 * shape.q_width * layers
    targets = linear_targets(settings.targets) or LINEAR_NAMES
    moved = _adapter_values(shape, settings, targets, again)
    # written at every use; or, folded, once an optimiser step; an adapter beside kept copies costs next to nothing
    once = 0.0 if policies.fp8 else 1 / settings.gradient_accumulation
    uses = (2 + recomputed) if policies.weights.startswith("stream") else once
    if weights_are_matrices(settings, policies):
        uses = 0
    if settings.dora:  # once an optimiser step every matrix is written for the norms of its rows
        uses += 1 / settings.gradient_accumulation
    size = DTYPE_BYTES[settings.compute_dtype]
    written = 1.5 / FP8_DEQUANTISE_SHARE if policies.fp8 else (0.5 + size) / DEQUANTISE_SHARE
    doublings = min(max(math.log2(settings.row_tokens / 2048), 0), 2)
    attention_flops = ATTENTION_SHARE * (1 + ATTENTION_LONGER * doublings) * rates.product_flops
    parts = {
        "products": flops / (rates.product_flops * (FP8_PRODUCTS if policies.fp8 else 1)),
        "attention": 4 * pairs * (3.5 + again - attention_kept) / attention_flops,
        "head": 4 * tokens * shape.hidden * shape.vocab / rates.product_flops,
        "adapter": size * moved * tokens * layers / (FACTOR_SHARE * rates.copy_bytes),
        "dequantisation": written * linear * uses / rates.copy_bytes,
        "elementwise": tokens * layers * size * (22 * shape.hidden + 10 * shape.intermediate) * (1 + 0.35 * again)
        / (ELEMENTWISE_SHARE * rates.copy_bytes) * (FP8_ELEMENTWISE if policies.fp8 else 1),
    }  # fmt: skip
    launches = 0.0 if policies.graphs else launch_seconds(policies)
    parts["waiting for launches"] = max(0.0, launches - sum(parts.values()))
    copied = moved_bytes(shape, settings, policies) / (BUS_SHARE * rates.bus_bytes)  # in each direction
    forward = FORWARD_SHARE * sum(parts.values()) / (1 + 0.78 * FORWARD_SHARE * again)
    parts["waiting for the host's memory"] = max(0.0, copied - forward)
    return StepTime(parts, settings.batch_size * settings.row_tokens)


def launch_seconds(policies: Policies) -> float:
    """Returns the time that the host takes to launch a micro-batch without a graph, or to capture one."""
    again = sum(policy in RECOMPUTED for policy in policies.activations)
    seconds = LAUNCH_SECONDS * (len(policies.activations) + LAUNCHES_AGAIN * again)
    return seconds * FP8_LAUNCHES if policies.fp8 else seconds


def run_seconds(
    shape: ModelShape, settings: TrainingMemory, policies: Policies, rates: DeviceRates, *, mean_tokens: int,
    micro_batches: int,
) -> float:  # fmt: skip
    """Returns the predicted time of a run on a GPU, without evaluation and saving.

    Of each size of a graph the first micro-batch runs without it, and the second is captured before it runs.

    Args:
        shape: of the model.
        settings: of the run.
        policies: of the engine.
        rates: of the device.
        mean_tokens: of a row, or of a pack.
        micro_batches: of the run.
    """
    usual = predict_step(shape, replace(settings, row_tokens=mean_tokens), policies, rates)
    captures = min(2 * graphs_of(settings, policies), micro_batches) * launch_seconds(policies)
    return micro_batches * usual.seconds + captures


def _adapter_values(shape: ModelShape, settings: TrainingMemory, targets: tuple[str, ...], again: float) -> float:
    """Returns how many values a token and layer the adapter's own kernels read and write.

    The gradients of A and B read inputs and outputs twice. What dropout and DoRA add is counted, not measured: dropped
    copies of the input (made, then multiplied, in the forward and twice as much in the backward), a sum into the output
    and one into the input's gradient; the output and its gradient once more.
    """
    inputs, outputs = (sum(shape.linear(name)[end] for name in targets) for end in (0, 1))
    values: float = 2 * (inputs + outputs)
    if settings.dropout:
        values += (3 * inputs + 2 * outputs) * (1 + again) + 8 * inputs
    if settings.dora:
        values += 2 * outputs
    return values
