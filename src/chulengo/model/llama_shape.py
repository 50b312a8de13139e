"""What the fast engine has to know of a model, from its `config.json`; what it does not cover is an error here.

Covered: Llama 1 to 3, Mistral, Qwen 2 and Qwen 3, which are one decoder: RMSNorm, rotary positions, grouped-query
attention, SwiGLU. They differ in biases, norms of queries and keys, a tied head and the scaling of rotary frequencies,
all of which the config says. Whatever would change a number and is not known here raises, naming the reference engine:
a model that is nearly right is worse than one that does not start.

A sliding attention window does nothing to sequences that are no longer than it. Mistral 7B v0.1 (window 4,096) is
therefore covered up to 4,096 tokens, and an error beyond.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chulengo.errors import ModelError
from chulengo.model.folder import context_tokens
from chulengo.model.plan_shapes import FAMILY, ModelShape, read_shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REFERENCE = "--set model.engine=reference"
DEFAULT_THETA = 10000.0
DEFAULT_EPS = 1e-6
# sliding_window of a config that does not say; Qwen applies it only with use_sliding_window
DEFAULT_WINDOW = {"mistral": 4096, "qwen2": 4096, "qwen3": 4096}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary frequencies, as a config gives them."""

    kind: str  # default, linear or llama3
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_tokens: int = 8192


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Everything about a model but its weights."""

    sizes: ModelShape
    norm_eps: float
    rope: Rope
    max_seq_tokens: int


def refuse(given: str, *, allowed: str | None = None) -> ModelError:
    """Returns the error for what the fast engine does not cover; it offers the reference engine."""
    return ModelError(given, allowed=allowed, next_step=REFERENCE)


def read_llama_shape(config: Mapping[str, Any], *, max_seq_tokens: int | None = None) -> LlamaShape:
    """Returns the shape of a model that the fast engine covers.

    Args:
        config: the content of `config.json`.
        max_seq_tokens: tokens of the longest sequence; None: the model's context.

    Raises:
        ModelError: something in the config that this engine does not compute.
    """
    kind = config["model_type"]
    sizes = read_shape(config)
    if sizes is None:
        raise refuse(f"The fast engine does not cover the architecture {kind!r}.", allowed=", ".join(sorted(FAMILY)))
    if sizes.num_heads % sizes.num_kv_heads:
        raise ModelError(f"{sizes.num_heads} query heads cannot share {sizes.num_kv_heads} key heads.")
    if sizes.head_dim % 2:
        raise refuse(f"The head size is {sizes.head_dim}.", allowed="even sizes")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise refuse(f"The activation is {config['hidden_act']!r}.", allowed="silu")
    if config.get("attention_dropout"):
        raise refuse(f"attention_dropout is {config['attention_dropout']}.", allowed="0")
    longest = max_seq_tokens or context_tokens(dict(config)) or 2048
    window = _window(config)
    if window is not None and longest > window:
        raise refuse(
            f"The model attends to the last {window:,} tokens only, and sequences may have {longest:,}.",
            allowed=f"training.max_seq_tokens up to {window:,}, where the window changes nothing",
        )
    return LlamaShape(sizes, float(config.get("rms_norm_eps") or DEFAULT_EPS), _rope(config), longest)


def rope_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Returns the angle a position of each pair of features, float32 [H/2], to the bit as transformers has it.

    llama3 (Llama 3.1, section 3.4.3 of https://arxiv.org/abs/2407.21783): wavelengths up to original/high stay, those
    from original/low on are stretched by `factor`, those between are interpolated.
    """
    import torch  # not above: a plan reads shapes without it

    frequency = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind != "llama3":
        return frequency
    wavelength = 2 * math.pi / frequency
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = (rope.original_tokens / wavelength - low) / (high - low)
    between = (1 - smooth) * frequency / rope.factor + smooth * frequency
    scaled = torch.where(wavelength > rope.original_tokens / low, frequency / rope.factor, between)
    return torch.where(wavelength < rope.original_tokens / high, frequency, scaled)


def rope_tables(shape: LlamaShape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of every position, float32 [max_seq_tokens, H/2], as `ops.rope` reads them."""
    import torch

    frequency = rope_frequencies(shape.rope, shape.sizes.head_dim)
    angle = torch.arange(shape.max_seq_tokens, dtype=torch.float32)[:, None] * frequency
    return angle.cos().to(device), angle.sin().to(device)


def _window(config: Mapping[str, Any]) -> int | None:
    kind = config["model_type"]
    window = config.get("sliding_window", DEFAULT_WINDOW.get(kind))
    if kind == "llama" or window is None:
        return None
    if kind.startswith("qwen"):
        layers = config.get("layer_types")
        if not config.get("use_sliding_window") or (layers and "sliding_attention" not in layers):
            return None
    return int(window)


def _rope(config: Mapping[str, Any]) -> Rope:
    # transformers 5 writes rope_parameters, with theta in it; before, rope_theta and rope_scaling
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = given.get("rope_type", given.get("type", "default"))
    theta = given.get("rope_theta") or config.get("rope_theta") or DEFAULT_THETA
    partial = given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise refuse(f"Only a share of {partial} of each head is turned by its position.", allowed="1.0")
    if kind == "default":
        return Rope("default", float(theta))
    if kind == "linear":
        return Rope("linear", float(theta), factor=float(given["factor"]))
    if kind == "llama3":
        original = given.get("original_max_position_embeddings") or config["max_position_embeddings"]
        return Rope(
            "llama3", float(theta), float(given["factor"]), float(given["low_freq_factor"]),
            float(given["high_freq_factor"]), int(original),
        )  # fmt: skip
    raise refuse(f"The rotary positions are scaled by {kind!r}.", allowed="default, linear, llama3")
