"""Which engine trains a run, and with which policies: decided once, before a weight is loaded, and said.

`auto` means the fast engine wherever it computes what was asked for, and the reference engine otherwise, with the
reason. `fast` where it does not apply is an error with the same reason. The reasons come from the fast engine's own
checks (`read_llama_shape`, `lora_settings`), so that there is one list of what it covers; what is looked at here is
what those cannot see: settings that are the reference engine's alone.

Policies change when something is computed and how much memory that takes, never a number. `auto` keeps as much as
fits: first activations, since computing them again is a third of a step, then the matrices. What fits is judged by the
plan of the reference engine, which needs more than the fast one for the same rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chulengo.errors import ChulengoError, ConfigError
from chulengo.kernels import ops
from chulengo.model.llama_shape import REFERENCE, read_llama_shape
from chulengo.model.load import resolve_device, resolve_dtype, use_threads
from chulengo.model.lora import lora_settings
from chulengo.model.plan import device_memory, needed_bytes, predict_memory, training_memory
from chulengo.model.plan_shapes import read_shape
from chulengo.train.optimizer import resolve_precision

DTYPE_OF = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # precision -> dtype of products
PRECISION_OF = {name: precision for precision, name in DTYPE_OF.items()}


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """What trains a run.

    Attributes:
        engine: fast or reference.
        reason: why the fast engine does not apply; None when it does, or when the reference engine was asked for.
        compute_dtype: float32, bfloat16 or float16.
        precision: float32, bf16 or fp16.
        weights: stream or resident; auto for the reference engine.
        activations: keep, selective or full; auto for the reference engine.
    """

    engine: str
    reason: str | None
    compute_dtype: str
    precision: str
    weights: str = "auto"
    activations: str = "auto"


def choose_engine(
    wanted: str, model_config: Mapping[str, Any], *, weights: str, activations: str, lora: Mapping[str, Any],
    longest_row: int, plan: Mapping[str, Any], device: str,
) -> EngineChoice:
    """Returns the engine and its policies, every `auto` resolved.

    Args:
        wanted: auto, fast or reference.
        model_config: content of the model's `config.json`.
        weights: auto, stream or resident.
        activations: auto, keep, selective or full.
        lora: the arguments of `attach_lora`, but for the seed.
        longest_row: in tokens.
        plan: the settings that decide memory, as `model.plan.training_memory` takes them.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        ConfigError: `fast` was asked for and does not apply; a dtype or precision that the device does not have.
    """
    place = resolve_device(device)
    compute_dtype, precision = plan["compute_dtype"], plan["precision"]
    if wanted != "reference":
        reason = why_not_fast(model_config, lora=lora, longest_row=longest_row, plan=plan, place=place)
        if reason is None:
            name = str(_fast_dtype(compute_dtype, precision, place)).removeprefix("torch.")
            settings = {**plan, "compute_dtype": name, "precision": PRECISION_OF[name]}
            kept = _activations(activations, model_config, settings, place)
            held = _weights(weights, model_config, settings | {"gradient_checkpointing": kept == "full"}, place)
            return EngineChoice("fast", None, name, PRECISION_OF[name], held, kept)
        if wanted == "fast":
            raise ConfigError(f"model.engine is fast, which does not cover this run. {reason}", next_step=REFERENCE)
    else:
        reason = None
    dtype = str(resolve_dtype(compute_dtype, place)).removeprefix("torch.")
    return EngineChoice("reference", reason, dtype, resolve_precision(precision, place))


def why_not_fast(
    model_config: Mapping[str, Any], *, lora: Mapping[str, Any], longest_row: int, plan: Mapping[str, Any],
    place: torch.device,
) -> str | None:
    """Returns a sentence that says what the fast engine does not cover, or None when it covers everything."""
    try:
        read_llama_shape(model_config, max_seq_tokens=longest_row)
        lora_settings(**lora)
    except ChulengoError as error:
        allowed = f" (there: {error.allowed})" if error.allowed else ""
        return f"{error.given}{allowed}"
    if plan["quantization"] not in ("nf4", "none"):
        return f"model.quantization is {plan['quantization']} (there: nf4, none)."
    if plan["attention"] != "sdpa":
        return f"model.attention is {plan['attention']}, which is transformers'."
    dtype = _fast_dtype(plan["compute_dtype"], plan["precision"], place)
    if dtype is None:
        return (
            f"Products in {plan['compute_dtype']} under training.precision {plan['precision']} mix two types "
            "(there: one for everything)."
        )
    if dtype == torch.float16:
        return "float16 needs a loss scaler (there: bfloat16, float32)."
    if place.type == "cuda" and dtype == torch.float32:
        return "On a GPU it attends in 16 bits only, and float32 was asked for."
    if place.type == "cuda" and ops.choose(place)[0] != "fused":
        return f"Its kernels do not run here: {ops.choose(place)[1]}."
    return None


def load_model(
    choice: EngineChoice, folder: Path, *, lora: Mapping[str, Any], seed: int, quantization: str, double_quant: bool,
    device: str, attention: str, cpu_threads: int | None, longest_row: int, name: str, vocab_size: int,
) -> tuple[Any, dict[str, str]]:
    """Returns the engine's model with a fresh adapter, and what the manifest and the user are to know of it.

    Args:
        choice: of `choose_engine`.
        folder: of the base model.
        lora: the arguments of `attach_lora`, but for the seed.
        seed: of the adapter's beginning, and of dropout.
        quantization: of the frozen weights.
        double_quant: quantise the block scales too.
        device: auto, cpu, cuda or cuda:N.
        attention: of the reference engine.
        cpu_threads: of products on a CPU; None: PyTorch's choice.
        longest_row: in tokens.
        name: of the base, for the adapter's files.
        vocab_size: ids that the tokenizer can produce.
    """
    use_threads(cpu_threads)
    shared: dict[str, Any] = {
        "quantization": quantization, "double_quant": double_quant, "compute_dtype": choice.compute_dtype,
        "device": device, "name": name, "vocab_size": vocab_size,
    }  # fmt: skip
    if choice.engine == "fast":
        from chulengo.model.fast import load_fast

        model = load_fast(
            folder, **shared, max_seq_tokens=longest_row, weights=choice.weights, activations=choice.activations
        )
        # float32 is a CPU's, where the forms differ in rounding only: a step of the demo took 0.148 s of one core with
        # W + s B A written once a step, 0.133 with two products more
        model.attach_lora(**lora, seed=seed, form="separate" if choice.compute_dtype == "float32" else "auto")
        return model, {"name": "fast", **model.describe()}
    from chulengo.model.adapter import attach_lora, fully_trained
    from chulengo.model.load import load_base

    base = load_base(folder, **shared, attention=attention)
    adapted = attach_lora(base, **lora, seed=seed)
    facts = {"name": "reference", "weights": f"{quantization}, {choice.compute_dtype}", "attention": attention}
    more = {"reason": choice.reason, "trained in full": fully_trained(adapted)}
    return adapted, facts | {name: value for name, value in more.items() if value is not None}


def adapter_writer(model: Any) -> Callable[[Path], None]:
    """Returns the function that writes a model's adapter in PEFT's files."""
    from chulengo.model.adapter import save_adapter
    from chulengo.model.fast import FastModel

    return model.save_adapter if isinstance(model, FastModel) else functools.partial(save_adapter, model)


def describe_engine(facts: Mapping[str, str]) -> str:
    """Returns what tells the user which engine trains, how, what beside the adapter, and why it is not the fast one."""
    if facts["name"] == "fast":
        shown = ("weights", "activations", "adapter", "kernels")
        return "engine: fast · " + " · ".join(f"{name} {facts[name]}" for name in shown)
    why = f"; the fast one does not cover this run. {facts['reason']}" if "reason" in facts else ""
    full = f"\n{facts['trained in full']}" if "trained in full" in facts else ""
    return f"engine: reference (transformers, peft, bitsandbytes){why}{full}"


def _fast_dtype(compute_dtype: str, precision: str, place: torch.device) -> torch.dtype | None:
    """Returns the one dtype that both settings ask for, None when they ask for two."""
    if precision == "auto":
        return resolve_dtype(compute_dtype, place)
    wanted = DTYPE_OF[resolve_precision(precision, place)]
    return resolve_dtype(wanted, place) if compute_dtype in ("auto", wanted) else None


def _activations(
    wanted: str, model_config: Mapping[str, Any], plan: Mapping[str, Any], place: torch.device
) -> str:
    if wanted != "auto":
        return wanted
    if plan["gradient_checkpointing"]:
        return "full"
    return "keep" if _left(model_config, plan, place) >= 0 else "full"


def _weights(wanted: str, model_config: Mapping[str, Any], plan: Mapping[str, Any], place: torch.device) -> str:
    if wanted != "auto":
        return wanted
    shape = read_shape(model_config)
    assert shape is not None, "why_not_fast has read it"
    size = torch.finfo(getattr(torch, plan["compute_dtype"])).bits // 8
    matrices = shape.num_layers * shape.layer_linear_weights * size
    return "resident" if matrices <= _left(model_config, plan, place) else "stream"


def _left(model_config: Mapping[str, Any], plan: Mapping[str, Any], place: torch.device) -> int:
    """Returns the bytes that the plan leaves free on the device; negative when it does not fit."""
    memory = device_memory(str(place))
    return memory.free_bytes - needed_bytes(predict_memory(model_config, training_memory(device=memory, **plan)))
