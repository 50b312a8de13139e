"""What the fast engine covers, as far as a configuration says: asked by the run and, without torch, by the plan.

The reasons come from the engine's own checks (`read_llama_shape`, `lora_settings`), so that there is one list of what
it covers; what is looked at here is what those cannot see: settings that are the reference engine's alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chulengo.errors import ChulengoError, ConfigError
from chulengo.model.covered import dtype_not_covered, setting_not_covered, size_not_covered
from chulengo.model.llama_shape import REFERENCE, read_llama_shape
from chulengo.model.lora_settings import lora_settings

DTYPE_OF = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # precision -> dtype of products


def why_not_covered(
    model_config: Mapping[str, Any], *, lora: Mapping[str, Any], longest_row: int, plan: Mapping[str, Any],
    kind: str, has_bf16: bool, weights_policy: str = "auto",
) -> str | None:
    """Returns a sentence that says what the fast engine does not cover, or None when it covers everything.

    Args:
        model_config: content of the model's `config.json`.
        lora: the arguments of `attach_lora`, but for the seed.
        longest_row: in tokens.
        plan: the settings that decide memory, as `model.plan.training_memory` takes them.
        kind: of the device: cuda or cpu.
        has_bf16: whether it has bfloat16.
        weights_policy: of section `model`: in FP8 the adapter is not folded in.
    """
    try:
        shape = read_llama_shape(model_config, max_seq_tokens=longest_row)
        adapter = lora_settings(**lora)
    except ChulengoError as error:
        allowed = f" (there: {error.allowed})" if error.allowed else ""
        return f"{error.given}{allowed}"
    reason = setting_not_covered(quantization=plan["quantization"], attention=plan["attention"])
    if reason is not None:
        return reason
    dtype = fast_dtype(plan["compute_dtype"], plan["precision"], kind, has_bf16=has_bf16)
    if dtype is None:
        return (
            f"Products in {plan['compute_dtype']} under training.precision {plan['precision']} mix two types "
            "(there: one for everything)."
        )
    reason = dtype_not_covered(dtype, kind)
    if reason is None and kind == "cuda":
        quantized, fp8 = plan["quantization"] == "nf4", weights_policy.endswith("fp8")
        reason = size_not_covered(shape.sizes, adapter, quantized=quantized, fp8=fp8)
    return reason


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
