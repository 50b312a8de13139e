"""The parameters of a Llama-family model, counted from its `config.json` alone.

Llama 1 to 3, Mistral, Qwen 2 and Qwen 3 share one layout: embeddings, layers of seven linear maps and two norms, a
final norm, a head. What differs is named here (biases, norms of queries and keys, defaults of missing keys). Any
other `model_type` gets no shapes: a wrong count is worse than none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# model_type -> what transformers assumes for keys that the config leaves out
FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32, "attention_bias": "qkv"},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "query_key_norms": True},
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that memory depends on."""

    model_type: str
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    attention_bias: str  # "", "qkv" or "qkvo"
    mlp_bias: bool
    query_key_norms: bool

    @property
    def q_width(self) -> int:
        """Width of the queries and of the attention's output."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values."""
        return self.num_kv_heads * self.head_dim

    def linear(self, name: str) -> tuple[int, int]:
        """Returns (inputs, outputs) of one of a layer's seven linear maps."""
        h, i, q, kv = self.hidden, self.intermediate, self.q_width, self.kv_width
        return {
            "q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h),
            "gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h),
        }[name]  # fmt: skip

    @property
    def layer_linear_weights(self) -> int:
        """Weights in the seven linear maps of one layer, without biases: what is quantised."""
        return sum(inputs * outputs for inputs, outputs in map(self.linear, LINEAR_NAMES))

    @property
    def layer_other_weights(self) -> int:
        """Norms and biases of one layer."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.query_key_norms else 0)
        biased = {"": (), "qkv": LINEAR_NAMES[:3], "qkvo": LINEAR_NAMES[:4]}[self.attention_bias]
        biased = (*biased, *(LINEAR_NAMES[4:] if self.mlp_bias else ()))
        return norms + sum(self.linear(name)[1] for name in biased)

    @property
    def embedding_weights(self) -> int:
        """Weights of the embeddings and, unless tied, of the head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def num_parameters(self) -> int:
        """All parameters, a tied head counted once."""
        layers = self.num_layers * (self.layer_linear_weights + self.layer_other_weights)
        return layers + self.hidden + self.embedding_weights

    def adapter_sizes(self, rank: int, targets: Sequence[str], dora: bool) -> list[int]:
        """Returns the number of elements of every trainable LoRA tensor, for all layers."""
        one_layer = []
        for inputs, outputs in map(self.linear, targets):
            one_layer += [rank * inputs, rank * outputs] + ([outputs] if dora else [])
        return one_layer * self.num_layers


def read_shape(config: Mapping[str, Any]) -> ModelShape | None:
    """Returns the shape that a `config.json` describes, or None when the architecture is not one of the family."""
    family = FAMILY.get(str(config.get("model_type")))
    if family is None or any(config.get(key) is None for key in ("hidden_size", "intermediate_size", "vocab_size")):
        return None
    known = {**family, **{key: value for key, value in config.items() if value is not None}}
    heads, hidden = known.get("num_attention_heads", 32), known["hidden_size"]
    bias = known.get("attention_bias")
    if family.get("attention_bias"):  # qwen2 always has biases on q, k and v, and no key that says so
        bias = family["attention_bias"]
    return ModelShape(
        model_type=known["model_type"], hidden=hidden, intermediate=known["intermediate_size"],
        num_layers=known.get("num_hidden_layers", 32), num_heads=heads,
        num_kv_heads=known.get("num_key_value_heads", heads), head_dim=known.get("head_dim") or hidden // heads,
        vocab=known["vocab_size"], tied=bool(known.get("tie_word_embeddings", False)),
        attention_bias=bias if isinstance(bias, str) else ("qkvo" if bias else ""),
        mlp_bias=bool(known.get("mlp_bias", False)), query_key_norms=bool(family.get("query_key_norms", False)),
    )  # fmt: skip


def linear_targets(targets: Sequence[str]) -> tuple[str, ...] | None:
    """Returns which of the seven linear maps carry LoRA, or None when another module is named."""
    if "all-linear" in targets:
        return LINEAR_NAMES
    return tuple(n for n in LINEAR_NAMES if n in targets) if set(targets) <= set(LINEAR_NAMES) else None


def stored_shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor by name, from the headers of safetensors files; no tensor is read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes
