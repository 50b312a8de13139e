"""Random models of every family, their reference (transformers + peft), and how far the fast engine is from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chulengo.data.batches import collate_padded
from chulengo.kernels.reference import nf4
from chulengo.model.adapter import attach_lora
from chulengo.model.fast import FastModel, load_fast
from chulengo.model.load import load_base
from chulengo.model.loss import supervised_nll
from training_kit import VOCAB, make_rows

LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0, "seed": 1}
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
# family -> (its class in transformers, what differs from COMMON)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with shared key heads": ("Llama", {}),
    "llama with every bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5}),
    "llama 3 rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "mistral": ("Mistral", {"sliding_window": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen 2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen 3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


def make_family(family: str, folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Writes a random model of 4 layers; norms and biases are random too, so that leaving one out shows."""
    import transformers

    kind, differs = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **differs, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 1:
                value.copy_(torch.randn(value.shape) * 0.3 + (0.0 if name.endswith("bias") else 1.0))
    model.to(dtype).save_pretrained(folder)
    return folder


def make_reference(folder: Path, *, nf4_weights: bool = True, **lora: Any) -> Any:
    """Returns transformers' model with PEFT's adapter; the weights are plain, those that NF4 stands for if asked.

    Not bitsandbytes' own layers: on a CPU their dequantisation is wrong where a row is not whole blocks of 64.
    """
    base = load_base(folder, quantization="none", device="cpu", compute_dtype="float32")
    if nf4_weights:
        with torch.no_grad():
            for name, value in base.named_parameters():
                if value.dim() == 2 and ".layers." in name:
                    value.copy_(nf4.dequantize(nf4.quantize(value), torch.float32))
    return attach_lora(base, **{**LORA, **lora})


def make_fast(folder: Path, *, lora: dict[str, Any] | None = None, **settings: Any) -> FastModel:
    """Returns the fast engine's model with a fresh adapter, on the CPU in float32 unless said otherwise."""
    model = load_fast(folder, **{"device": "cpu", "compute_dtype": "float32", **settings})
    model.attach_lora(**{**LORA, **(lora or {})})
    return model


def reference_factors(reference: Any) -> dict[str, Tensor]:
    """Returns the reference's trainable tensors under the names of PEFT's files."""
    named = reference.named_parameters()
    # PEFT's files name a magnitude without the module that holds it
    named = ((name.replace("magnitude_vector.default.weight", "magnitude_vector"), value) for name, value in named)
    return {name.replace(".default", ""): value for name, value in named if value.requires_grad}


def randomise(*models: dict[str, Tensor], size: float = 0.05, seed: int = 0) -> None:
    """Gives the same random values to the adapters of all models, so that B is not 0."""
    with torch.no_grad():
        for number, name in enumerate(sorted(models[0])):
            noise = torch.randn(models[0][name].shape, generator=torch.Generator().manual_seed(seed + number)) * size
            for model in models:
                if name.endswith("magnitude_vector"):  # near the norm that it begins as
                    model[name].mul_((1 + 4 * noise).to(model[name].device))
                else:
                    model[name].copy_(noise)


def distance(value: Tensor, exact: Tensor) -> float:
    """Returns the relative L2 error."""
    value, exact = value.detach().double(), exact.detach().double()
    return float((value - exact).norm() / exact.norm())


def gradients(model: FastModel, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the summed loss and the gradient of every adapter tensor."""
    named = model.named_parameters()
    for value in named.values():
        value.grad = None
    nll, _ = model.nll(batch)
    nll.backward()
    return nll.detach(), {name: value.grad for name, value in named.items() if value.grad is not None}


def errors(model: FastModel, reference: Any) -> dict[str, float]:
    """Returns the relative L2 error of the logits, the loss and every adapter gradient against the reference."""
    factors = reference_factors(reference)
    randomise(model.named_parameters(), factors)
    rows = make_rows(5, seed=3)
    batch = collate_padded(rows, pad_id=0)
    with torch.no_grad():
        exact = torch.cat([reference(torch.tensor([row.ids])).logits[0] for row in rows])
    found = {"logits": distance(model.logits([row.ids for row in rows]), exact)}
    for value in factors.values():
        value.grad = None
    exact_nll, count = supervised_nll(reference, batch)
    exact_nll.backward()
    nll, own = gradients(model, batch)
    assert own.keys() == factors.keys()
    assert model.nll(batch)[1] == count
    found["loss"] = distance(nll, exact_nll)
    return found | {name: distance(own[name], value.grad) for name, value in factors.items()}
