"""Configs that the fast engine covers, and those it refuses with the reference engine named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chulengo.errors import ModelError
from chulengo.model.llama_shape import read_llama_shape, rope_frequencies

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 256,
}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}


def test_defaults_are_those_of_transformers() -> None:
    shape = read_llama_shape(LLAMA)
    assert shape.norm_eps == 1e-6
    assert (shape.rope.kind, shape.rope.theta) == ("default", 10000.0)
    assert shape.max_seq_tokens == 256
    assert read_llama_shape(LLAMA, max_seq_tokens=1000).max_seq_tokens == 1000


@pytest.mark.parametrize(
    ("written", "head_dim"),
    [
        ({"rope_theta": 500000.0, "rope_scaling": LLAMA3}, 64),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}, 128),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4.0}}, 32), ({"rope_scaling": None}, 16),
    ],
)  # fmt: skip
def test_frequencies_are_those_of_transformers_to_the_bit(written: dict[str, Any], head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = {**LLAMA, **written, "head_dim": head_dim}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"})).inv_freq
    assert torch.equal(rope_frequencies(read_llama_shape(config).rope, head_dim), theirs)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "0.5"), ({"hidden_act": "gelu"}, "gelu"), ({"attention_dropout": 0.1}, "0.1"),
        ({"head_dim": 5}, "head size"),
        # a mistral config that does not say has a window of 4,096
        ({"model_type": "mistral", "max_position_embeddings": 32768}, "4,096"),
        ({"model_type": "mistral", "sliding_window": 128}, "last 128"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, "last 64"),
    ],
)  # fmt: skip
def test_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        read_llama_shape({**LLAMA, **changes})
    assert caught.value.next_step == "--set model.engine=reference"


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral", "sliding_window": None, "max_position_embeddings": 32768},
        {"model_type": "mistral", "sliding_window": 256},
        {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False},
        {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 64,
         "layer_types": ["full_attention", "full_attention"]},
    ],
)  # fmt: skip
def test_a_window_that_changes_nothing(changes: dict[str, Any]) -> None:
    read_llama_shape({**LLAMA, **changes})


def test_a_window_is_fine_for_sequences_inside_it() -> None:
    config = {**LLAMA, "model_type": "mistral", "max_position_embeddings": 32768}
    assert read_llama_shape(config, max_seq_tokens=4096).max_seq_tokens == 4096
    with pytest.raises(ModelError, match="4,097"):
        read_llama_shape(config, max_seq_tokens=4097)
