"""The sizes that the fused kernels take, at each limit and one beyond, by how the adapter enters the products."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chulengo.model.covered import dtype_not_covered, fp8_rows_not_covered, setting_not_covered, size_not_covered
from chulengo.model.lora_settings import LoraSettings
from chulengo.model.plan_shapes import LINEAR_NAMES, ModelShape

SHAPE = ModelShape("llama", 64, 128, 2, 4, 2, 16, 300, False, "", False, False)
FOLDED = LoraSettings(16, 32.0, 0.0, LINEAR_NAMES)
DROPPED = replace(FOLDED, dropout=0.1)
DORA = replace(FOLDED, dora=True)


def test_rank() -> None:
    for adapter in (FOLDED, DORA):
        assert size_not_covered(SHAPE, replace(adapter, rank=128), quantized=True) is None
        beyond = str(size_not_covered(SHAPE, replace(adapter, rank=129), quantized=True))
        assert "rank is 129 (there: up to 128" in beyond
    # where it is not folded into NF4 the rank is free
    large = replace(FOLDED, rank=512)
    assert size_not_covered(SHAPE, large, quantized=False) is None
    assert size_not_covered(SHAPE, large, quantized=True, fp8=True) is None
    assert size_not_covered(SHAPE, replace(DROPPED, rank=512), quantized=True) is None


def test_features_of_adapted_maps() -> None:
    odd = replace(SHAPE, intermediate=129)
    assert "down_proj takes 129 features (there: multiples of 8" in str(size_not_covered(odd, FOLDED, quantized=True))
    assert size_not_covered(replace(SHAPE, intermediate=136), FOLDED, quantized=True) is None
    assert size_not_covered(odd, replace(FOLDED, targets=("q_proj", "up_proj")), quantized=True) is None
    assert size_not_covered(odd, DROPPED, quantized=True) is None
    assert size_not_covered(odd, FOLDED, quantized=False) is None
    assert size_not_covered(odd, None, quantized=True) is None


@pytest.mark.parametrize("adapter", [FOLDED, DROPPED, None])
@pytest.mark.parametrize("quantized", [True, False])
def test_heads_and_norms(adapter: LoraSettings | None, quantized: bool) -> None:
    for taken in (8, 16, 256):
        assert size_not_covered(replace(SHAPE, head_dim=taken), adapter, quantized=quantized) is None
    for beyond in (4, 12, 250, 258, 264):
        said = str(size_not_covered(replace(SHAPE, head_dim=beyond), adapter, quantized=quantized))
        assert f"head size is {beyond} (there: multiples of 8 up to 256)" in said
    assert size_not_covered(replace(SHAPE, hidden=65536), adapter, quantized=quantized) is None
    assert "hidden_size is 65,544" in str(size_not_covered(replace(SHAPE, hidden=65544), adapter, quantized=quantized))


def test_values_of_a_weight() -> None:
    below, at = replace(SHAPE, hidden=2**15, intermediate=2**16 - 8), replace(SHAPE, hidden=2**15, intermediate=2**16)
    assert size_not_covered(below, FOLDED, quantized=True) is None
    assert "fewer than 2**31" in str(size_not_covered(at, FOLDED, quantized=True))
    assert size_not_covered(at, FOLDED, quantized=False) is None


@pytest.mark.parametrize(
    ("field", "sizes"), [("hidden", (32768, 32784)), ("intermediate", (32768, 32784)), ("num_heads", (2044, 2045))]
)
def test_rows_in_fp8(field: str, sizes: tuple[int, int]) -> None:
    taken, beyond = ({field: size} for size in sizes)  # 2,044 + 2 * 2 heads of 16 are 32,768 features
    assert fp8_rows_not_covered(replace(SHAPE, **taken)) is None
    assert "FP8 takes up to 32,768" in str(fp8_rows_not_covered(replace(SHAPE, **beyond)))


def test_settings_and_dtypes() -> None:
    assert setting_not_covered(quantization="nf4", attention="sdpa") is None
    assert "fp4" in str(setting_not_covered(quantization="fp4", attention="sdpa"))
    assert "eager" in str(setting_not_covered(quantization="none", attention="eager"))
    assert dtype_not_covered("float32", "cpu") is dtype_not_covered("bfloat16", "cuda") is None
    assert "16 bits only" in str(dtype_not_covered("float32", "cuda"))
    assert "float16" in str(dtype_not_covered("float16", "cuda"))
