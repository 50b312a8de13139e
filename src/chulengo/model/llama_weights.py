"""The weights of a decoder of the Llama family as a plain structure, under Hugging Face's names.

Quantised, or not, are the seven linear maps of each layer. Embeddings, norms, biases and the head are held in the
compute dtype (as `model.load` holds them); a tied head is the embeddings' own tensor.

Legend: D model features, H head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from chulengo.model.allocator import OwnMemory
from chulengo.model.linear_group import LinearGroup
from chulengo.model.llama_shape import LlamaShape
from chulengo.model.nf4_weights import StoredTensors

# maps that read the same input, in the order in which transformers has them
GROUPS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")), ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")), ("mlp", ("down_proj",)),
)  # fmt: skip


@dataclass(slots=True, eq=False)
class LlamaLayer:
    """One decoder layer. `q_norm_H` and `k_norm_H` are Qwen 3's norms of each head."""

    index: int
    input_norm_D: Tensor
    after_norm_D: Tensor
    q_norm_H: Tensor | None
    k_norm_H: Tensor | None
    qkv: LinearGroup
    o: LinearGroup
    gate_up: LinearGroup
    down: LinearGroup

    @property
    def groups(self) -> tuple[LinearGroup, LinearGroup, LinearGroup, LinearGroup]:
        """The linear maps, in the order of `GROUPS`."""
        return self.qkv, self.o, self.gate_up, self.down

    def parameters(self) -> list[nn.Parameter]:
        """Returns the adapter's A and B of all maps, in order."""
        return [factor for group in self.groups for factor in group.parameters()]


@dataclass(slots=True, eq=False)
class LlamaWeights:
    """All weights of a model."""

    embedding_VD: Tensor
    layers: list[LlamaLayer]
    final_norm_D: Tensor
    head_VD: Tensor

    def groups(self) -> Iterator[LinearGroup]:
        """Yields the groups of linear maps of all layers, in order."""
        for layer in self.layers:
            yield from layer.groups


def load_llama_weights(
    folder: Path, shape: LlamaShape, *, quantize: bool, double_quant: bool, dtype: torch.dtype, device: torch.device,
    embeddings_on_host: bool = False, lasting: OwnMemory | None = None,
) -> LlamaWeights:
    """Returns the weights of a folder on a device, linear maps quantised to NF4 on the way when `quantize`.

    Args:
        folder: as `model.folder.resolve_model` returns it.
        shape: of its config.
        quantize: quantise what the files have not quantised.
        double_quant: quantise the block scales too.
        dtype: compute dtype.
        device: where the weights go.
        embeddings_on_host: leave the embeddings in the host's memory.
        lasting: where weights go on the device; None: where all other tensors are.

    Raises:
        ModelError: the files do not hold exactly this model, or a quantised weight is not finite.
    """
    sizes = shape.sizes
    stored = StoredTensors(
        folder, dtype=dtype, device=device, quantize=quantize, double_quant=double_quant, lasting=lasting
    )
    with stored:
        place = torch.device("cpu") if embeddings_on_host else None
        embedding_VD = stored.plain("model.embed_tokens.weight", (sizes.vocab, sizes.hidden), device=place)
        layers = [read_layer(stored, shape, index) for index in range(sizes.num_layers)]
        final_norm_D = stored.plain("model.norm.weight", (sizes.hidden,))
        head_VD = embedding_VD
        if sizes.tied:
            stored.skip("lm_head.weight")
        else:
            head_VD = stored.plain("lm_head.weight", (sizes.vocab, sizes.hidden))
        stored.check_all_read()
        stored.check_finite()
    return LlamaWeights(embedding_VD, layers, final_norm_D, head_VD)


def read_layer(stored: StoredTensors, shape: LlamaShape, index: int) -> LlamaLayer:
    """Returns one layer, of weights that `stored` gives by name."""
    sizes, path = shape.sizes, f"model.layers.{index}"
    hidden, head = (sizes.hidden,), (sizes.head_dim,)
    q_norm = k_norm = None
    if sizes.query_key_norms:
        q_norm = stored.plain(f"{path}.self_attn.q_norm.weight", head)
        k_norm = stored.plain(f"{path}.self_attn.k_norm.weight", head)
    qkv, o, gate_up, down = (
        _group(stored, shape, tuple(f"{path}.{block}.{name}" for name in names)) for block, names in GROUPS
    )
    return LlamaLayer(
        index, stored.plain(f"{path}.input_layernorm.weight", hidden),
        stored.plain(f"{path}.post_attention_layernorm.weight", hidden), q_norm, k_norm, qkv, o, gate_up, down,
    )  # fmt: skip


def _group(stored: StoredTensors, shape: LlamaShape, names: tuple[str, ...]) -> LinearGroup:
    sizes = shape.sizes
    short = [name.rsplit(".", 1)[-1] for name in names]
    in_out = [sizes.linear(name) for name in short]
    weights, joined_OI = stored.linears([f"{name}.weight" for name in names], [(outs, ins) for ins, outs in in_out])
    if short[0] in ("gate_proj", "down_proj"):
        biased = sizes.mlp_bias
    else:
        biased = sizes.attention_bias == "qkvo" or (sizes.attention_bias == "qkv" and short[0] == "q_proj")
    bias_O = None
    if biased:
        bias_O = torch.cat(
            [stored.plain(f"{name}.bias", (outs,)) for name, (_, outs) in zip(names, in_out, strict=True)]
        )
    return LinearGroup(names, weights, bias_O, [None] * len(names), joined_OI=joined_OI)
