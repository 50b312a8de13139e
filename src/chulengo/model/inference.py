"""Which engine answers, and the fast engine's model as it answers.

`auto` means the fast engine wherever it computes what was asked for, and the reference engine otherwise, with the
reason; `fast` where it does not apply is an error with the same reason. It is asked before a weight is loaded.

Two choices, made here and said by `describe()`:

Weights. A step of decoding multiplies one token a row, so it takes as long as its weights take to be read; writing all
matrices out of NF4 at each step would move more than twice those bytes. They are resident where they fit beside the
weights and a cache of `CACHE_TOKENS` tokens, on the device and in what the adapter's training took of a GPU: who
trained in little memory had a reason. Else they are streamed; or as the user says. Weights that are not quantised are
resident by themselves; maps that share an input are put into one matrix, of which they become parts, so nothing is
there twice.

Form of the adapter. Folded into NF4 weights on a GPU, where it costs nothing in a step, and is what training
multiplied by; switching it off and on writes the matrices again, which on a GPU takes as long as a step of training
spends on it. Separate on a CPU, where writing them is slow, and for weights that are not quantised: folding would need
a copy of them all, and has no better rounding there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from chulengo.errors import ChulengoError, ConfigError, DoesNotFitError
from chulengo.kernels import ops
from chulengo.model.covered import dtype_not_covered, setting_not_covered, size_not_covered
from chulengo.model.decode import cache_bytes
from chulengo.model.fast import FastModel, load_fast
from chulengo.model.folder import context_tokens
from chulengo.model.llama_shape import REFERENCE, LlamaShape, read_llama_shape
from chulengo.model.load import resolve_device, resolve_dtype
from chulengo.model.lora import WEIGHTS_FILE, adapter_settings
from chulengo.model.plan import device_memory, gib

RESULT_FILE = "result.json"  # of a run folder, beside the adapter's
CACHE_TOKENS = 8192
NF4_BYTES = 0.57  # of a weight: half a byte and its share of a float32 scale for 64


def why_not_fast(
    config: dict[str, Any], adapter: Path | None, *, quantization: str, compute_dtype: str, attention: str,
    device: str, adds_adapter: bool,
) -> str | None:
    """Returns a sentence that says what the fast engine does not cover here, or None when it covers everything.

    Args:
        config: content of the model's `config.json`.
        adapter: its folder, or None.
        quantization: of the frozen weights.
        compute_dtype: float32, bfloat16, float16 or auto.
        attention: transformers' implementation that was asked for.
        device: auto, cpu, cuda or cuda:N.
        adds_adapter: a further adapter will be put on the loaded base.

    Raises:
        ConfigError: a device or dtype that is not there.
    """
    place = resolve_device(device)
    dtype = resolve_dtype(compute_dtype, place)
    try:
        shape = read_llama_shape(config)
        settings = None if adapter is None else adapter_settings(adapter)
    except ChulengoError as error:
        return f"{error.given}{f' (there: {error.allowed})' if error.allowed else ''}"
    stored = config.get("quantization_config")
    kind = "none" if not isinstance(stored, dict) else stored.get("bnb_4bit_quant_type", stored.get("quant_method"))
    reason = setting_not_covered(quantization=quantization, attention=attention)
    reasons: list[tuple[bool, str]] = [
        (kind not in ("none", "nf4"), f"The weights are stored as {kind} (there: nf4, 16 and 32 bits)."),
        (adds_adapter, "A further adapter is put on the loaded base (there: only the one it is opened with)."),
        (adapter is not None and _has_other_tensors(adapter), f"The adapter {adapter} has more than A and B of maps."),
        (context_tokens(config) is None, "The model's config.json does not say how long a sequence may be."),
    ]
    reason = reason or next((sentence for applies, sentence in reasons if applies), None)
    reason = reason or dtype_not_covered(str(dtype).removeprefix("torch."), place.type)
    if reason is None and place.type == "cuda":
        backend, why = ops.choose(place)
        reason = size_not_covered(shape.sizes, settings, quantized=quantization == "nf4")
        return f"Its kernels do not run here: {why}." if backend != "fused" else reason
    return reason


def _has_other_tensors(adapter: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(adapter / WEIGHTS_FILE), "pt") as file:
            return not all(".lora_" in name for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False  # whoever reads it says what is wrong with it


def choose_engine(wanted: str, reason: str | None) -> tuple[str, str | None]:
    """Returns the engine that answers, and a line for the user where `auto` cannot have the fast one.

    Args:
        wanted: auto, fast or reference.
        reason: of `why_not_fast`.

    Raises:
        ConfigError: `fast` was asked for and does not apply.
    """
    if wanted == "reference" or reason is None:
        return "fast" if wanted != "reference" else "reference", None
    if wanted == "fast":
        raise ConfigError(f"model.engine is fast, which does not cover this. {reason}", next_step=REFERENCE)
    return "reference", f"engine: reference; the fast one does not cover this. {reason}"


def load_to_answer(
    folder: Path, adapter: Path | None, *, quantization: str, double_quant: bool, compute_dtype: str, device: str,
    name: str, vocab_size: int, weights: str,
) -> FastModel:
    """Returns the fast engine's model with its adapter, frozen, in evaluation mode.

    Args:
        folder: of the base.
        adapter: its folder, or None.
        quantization: nf4 or none.
        double_quant: quantise the block scales too.
        compute_dtype: float32, bfloat16 or auto.
        device: auto, cpu, cuda or cuda:N.
        name: of the base.
        vocab_size: ids that the tokenizer can produce.
        weights: stream or resident, see `choose_weights`.

    Raises:
        ModelError: the files do not hold this model, or this adapter.
        DoesNotFitError: the device has not enough memory.
    """
    place = resolve_device(device)
    is_quantized = quantization != "none"
    try:
        model = load_fast(
            folder, quantization=quantization, double_quant=double_quant, compute_dtype=compute_dtype, device=device,
            name=name, vocab_size=vocab_size, weights=weights,
        )
        if adapter is not None:
            model.load_adapter(adapter, form="auto" if is_quantized and place.type == "cuda" else "separate")
    except torch.OutOfMemoryError as error:
        raise DoesNotFitError(
            f"The weights of {name} do not fit on {place}.", next_step="--quantization nf4, or a smaller model"
        ) from error
    model.eval()
    return model


def choose_weights(
    wanted: str, config: dict[str, Any], adapter: Path | None, *, quantization: str, compute_dtype: str, device: str
) -> tuple[str, str | None]:
    """Returns stream or resident, and a line for the user where less memory was taken than there is.

    Args:
        wanted: stream, resident, or anything else for the choice that is made here.
        config: content of the base's `config.json`.
        adapter: its folder, or None.
        quantization: nf4 or none.
        compute_dtype: float32, bfloat16 or auto.
        device: auto, cpu, cuda or cuda:N.
    """
    if wanted in ("stream", "resident") and quantization != "none":
        return wanted, None
    place = resolve_device(device)
    shape, dtype = read_llama_shape(config), resolve_dtype(compute_dtype, place)
    found = weights_policy(shape, quantization, dtype, device_memory(str(place)).free_bytes)
    limit = trained_bytes(adapter) if place.type == "cuda" else None
    if found == "stream" or limit is None or weights_policy(shape, quantization, dtype, limit) == "resident":
        return found, None
    said = f"weights are streamed, to take no more memory than the adapter's training ({gib(limit)})"
    return "stream", f"{said}; --set model.weights_policy=resident answers faster"


def trained_bytes(adapter: Path | None) -> int | None:
    """Returns the most memory that the training of an adapter in its run folder took of a GPU; None: not known."""
    file = None if adapter is None else adapter.parent / RESULT_FILE
    if file is None or not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # of no run of ours, or not whole: whoever shows it says so
    # what was planned is only recorded of a GPU
    known = isinstance(found, dict) and found.get("planned_peak_bytes") is not None
    return found["peak_bytes"] if known and isinstance(found.get("peak_bytes"), int) else None


def weights_policy(shape: LlamaShape, quantization: str, dtype: torch.dtype, free_bytes: int) -> str:
    """Returns resident where all matrices fit beside the weights and a cache of `CACHE_TOKENS` tokens, else stream.

    Args:
        shape: of the model.
        quantization: nf4 or none.
        dtype: of products.
        free_bytes: what may be taken of the device, before the weights are loaded.
    """
    if quantization == "none":
        return "resident"
    sizes = shape.sizes
    linear = sizes.num_layers * sizes.layer_linear_weights
    others = sizes.num_parameters - linear
    needed = linear * (NF4_BYTES + dtype.itemsize) + others * dtype.itemsize + cache_bytes(sizes, dtype, CACHE_TOKENS)
    return "resident" if needed <= free_bytes else "stream"
