"""What the fast engine covers, as far as a configuration says: asked by the run and, without torch, by the plan.

The reasons come from the engine's own checks (`read_llama_shape`, `lora_settings`), so that there is one list of what
it covers; what is looked at here is what those cannot see: settings that are the reference engine's alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chulengo.errors import ChulengoError, ConfigError
from chulengo.model.llama_shape import REFERENCE, read_llama_shape
from chulengo.model.lora_settings import lora_settings

DTYPE_OF = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # precision -> dtype of products


def why_not_covered(
    model_config: Mapping[str, Any], *, lora: Mapping[str, Any], longest_row: int, plan: Mapping[str, Any],
    kind: str, has_bf16: bool,
) -> str | None:
    """Returns a sentence that says what the fast engine does not cover, or None when it covers everything.

    Args:
        model_config: content of the model's `config.json`.
        lora: the arguments of `attach_lora`, but for the seed.
        longest_row: in tokens.
        plan: the settings that decide memory, as `model.plan.training_memory` takes them.
        kind: of the device: cuda or cpu.
        has_bf16: whether it has bfloat16.
    """
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
    dtype = fast_dtype(plan["compute_dtype"], plan["precision"], kind, has_bf16=has_bf16)
    if dtype is None:
        return (
            f"Products in {plan['compute_dtype']} under training.precision {plan['precision']} mix two types "
            "(there: one for everything)."
        )
    if dtype == "float16":
        return "float16 needs a loss scaler (there: bfloat16, float32)."
    if kind == "cuda" and dtype == "float32":
        return "On a GPU it attends in 16 bits only, and float32 was asked for."
    return None


def check_insisted(engine: str, weights_policy: str, reason: str) -> None:
    """Raises `ConfigError` where the user wants what the fast engine alone has, and it does not cover the run.

    Args:
        engine: auto, fast or reference.
        weights_policy: products in FP8 are another arithmetic, which must not be dropped in silence; the other policies
            change no number.
        reason: of `why_not_covered`.
    """
    if engine == "fast":
        raise ConfigError(f"model.engine is fast, which does not cover this run. {reason}", next_step=REFERENCE)
    if weights_policy.endswith("fp8"):
        raise ConfigError(
            f"model.weights_policy is {weights_policy}, which the fast engine alone has, and it does not cover this "
            f"run. {reason}",
            next_step="--set model.weights_policy=auto, for the reference engine's products in 16 or 32 bits",
        )


def fast_dtype(compute_dtype: str, precision: str, kind: str, *, has_bf16: bool) -> str | None:
    """Returns the one dtype that both settings ask for on a device, None when they ask for two."""
    if precision != "auto":
        wanted = DTYPE_OF[precision]
        return wanted if compute_dtype in ("auto", wanted) else None
    if compute_dtype != "auto":
        return compute_dtype
    return "float32" if kind != "cuda" else "bfloat16" if has_bf16 else "float16"
