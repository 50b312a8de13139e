"""What the fast engine does not cover, as far as training and answering share it; asked without torch.

The limits of the fused kernels depend on how the adapter enters the products. Folded into NF4 weights (no dropout, or
DoRA), its rank is limited and the adapted maps' rows are whole words; separate, it meets plain products, which take
any. In FP8 rows are held whole.
"""

from __future__ import annotations

from collections.abc import Iterable

from chulengo.kernels import limits
from chulengo.model.lora_settings import LoraSettings
from chulengo.model.plan_shapes import LINEAR_NAMES, ModelShape


def setting_not_covered(*, quantization: str, attention: str) -> str | None:
    """Returns a sentence that says which setting is the reference engine's alone, or None.

    Args:
        quantization: of the frozen weights.
        attention: transformers' implementation that was asked for.
    """
    if quantization not in ("nf4", "none"):
        return f"model.quantization is {quantization} (there: nf4, none)."
    if attention != "sdpa":
        return f"model.attention is {attention}, which is transformers'."
    return None


def dtype_not_covered(dtype: str, kind: str) -> str | None:
    """Returns a sentence that says why products in this dtype are not covered on a cuda or cpu device, or None."""
    if dtype == "float16":
        return "Products would be in float16 (there: bfloat16, float32)."
    if kind == "cuda" and dtype == "float32":
        return "On a GPU it attends in 16 bits only, and float32 was asked for."
    return None


def size_not_covered(
    shape: ModelShape, adapter: LoraSettings | None, *, quantized: bool, fp8: bool = False
) -> str | None:
    """Returns a sentence that says which size the fused kernels do not take, or None when they take them all.

    Args:
        shape: of the model.
        adapter: its settings; None: there is none.
        quantized: the frozen weights are in NF4.
        fp8: products are in FP8.
    """
    head = shape.head_dim
    if head % limits.HEAD_STEP or head > limits.LARGEST_HEAD:
        return f"The head size is {head} (there: multiples of {limits.HEAD_STEP} up to {limits.LARGEST_HEAD})."
    if shape.hidden > limits.LARGEST_ROW:
        return f"hidden_size is {shape.hidden:,} (there: up to {limits.LARGEST_ROW:,})."
    maps = {name: shape.linear(name) for name in LINEAR_NAMES}
    largest = max(maps, key=lambda name: maps[name][0] * maps[name][1])
    if quantized and maps[largest][0] * maps[largest][1] >= limits.MOST_VALUES:
        return f"{largest} has {maps[largest][0] * maps[largest][1]:,} weights (there: fewer than 2**31 in NF4)."
    folded = adapter is not None and not fp8 and (adapter.dora or not adapter.dropout)
    if adapter is None or not quantized or not folded:
        return None
    return _not_folded(adapter, maps)


def _not_folded(adapter: LoraSettings, maps: dict[str, tuple[int, int]]) -> str | None:
    if adapter.rank > limits.LARGEST_RANK:
        return (
            f"The adapter's rank is {adapter.rank} (there: up to {limits.LARGEST_RANK}, where it is folded into NF4 "
            "weights)."
        )
    odd = _first(name for name in adapter.targets if maps[name][0] % limits.WORD_VALUES)
    if odd is not None:
        return (
            f"{odd} takes {maps[odd][0]:,} features (there: multiples of {limits.WORD_VALUES}, where an adapter is "
            "folded into NF4 weights)."
        )
    return None


def fp8_widths_not_covered(shape: ModelShape) -> str | None:
    """Returns the widths for which there are no products in FP8 on a GPU, such as "hidden_size of 1000", or None."""
    widths = {"hidden_size": shape.hidden, "query heads": shape.q_width, "key heads": shape.kv_width,
              "intermediate_size": shape.intermediate}  # fmt: skip
    return ", ".join(f"{name} of {size}" for name, size in widths.items() if size % limits.FP8_STEP) or None


def fp8_rows_not_covered(shape: ModelShape) -> str | None:
    """Returns a sentence that says which rows are too long to be made in FP8 on a GPU, or None."""
    rows = {
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "queries, keys and values together": shape.q_width + 2 * shape.kv_width,
    }
    long = _first(name for name, size in rows.items() if size > limits.LARGEST_FP8_ROW)
    return None if long is None else f"{long}: {rows[long]:,} features, and FP8 takes up to {limits.LARGEST_FP8_ROW:,}."


def _first(names: Iterable[str]) -> str | None:
    return next(iter(names), None)
