"""What `load_fast` is asked for, checked before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chulengo.errors import ConfigError, ModelError
from chulengo.model import llama
from chulengo.model.llama_shape import refuse


def quantizes(config: dict[str, Any], quantization: str) -> bool:
    """Returns whether weights are quantised while they are loaded, for nf4 or none asked for."""
    if quantization not in ("nf4", "none"):
        raise ConfigError(
            f"model.quantization is {quantization!r}.", allowed="nf4, none in the fast engine",
            next_step="--set model.engine=reference",
        )
    stored = config.get("quantization_config")
    if not isinstance(stored, dict):
        return quantization == "nf4"
    kind = stored.get("bnb_4bit_quant_type") if stored.get("load_in_4bit") else None
    if stored.get("quant_method") != "bitsandbytes" or kind != "nf4":
        raise refuse(
            f"The weights are already quantised ({stored.get('quant_method')}{f', {kind}' if kind else ''}).",
            allowed="bitsandbytes nf4, or 16- and 32-bit weights",
        )
    if quantization != "nf4":
        raise ModelError("The weights are already quantised to nf4.", next_step="--set model.quantization=nf4")
    return False


def layer_policies(activations: str | Sequence[str], num_layers: int) -> tuple[str, ...]:
    """Returns the activations policy of each layer, given one for all or one for each."""
    policies = (activations,) * num_layers if isinstance(activations, str) else tuple(activations)
    unknown = sorted(set(policies) - set(llama.ACTIVATION_POLICIES))
    if unknown or len(policies) != num_layers:
        raise ConfigError(
            f"The activation policies are {', '.join(unknown) or f'{len(policies)} for {num_layers} layers'}.",
            allowed=f"{', '.join(llama.ACTIVATION_POLICIES)}: one, or one for each layer",
        )
    return policies
