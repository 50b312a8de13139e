"""Rows in e4m3: the fused kernels give the reference's bytes, the round trip is as near as e4m3 allows."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from measure import errors, mutant, normal
from torch import Tensor

from chulengo.kernels.reference import fp8 as reference
from chulengo.kernels.reference import rms_norm, swiglu

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(4, 64), (1, 1), (3, 100), (2, 1030)]
EPS = 1e-5


@pytest.fixture
def fused() -> ModuleType:
    pytest.importorskip("triton")
    from chulengo.kernels.fused import fp8

    return fp8


def rows(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Rows of very different size, one of them zero, inside a wider tensor."""
    values = normal(shape[0], shape[1] + 8, dtype=torch.float32, device=device, seed=seed)
    values *= torch.logspace(-3, 3, shape[0], device=device)[:, None] if shape[0] > 1 else 1.0
    if shape[0] > 2:
        values[1] = 0
    return values.to(dtype)[:, : shape[1]]


def different(got: Tensor, want: Tensor) -> float:
    return (got.view(torch.uint8) != want.view(torch.uint8)).float().mean().item()


def faults(module: ModuleType, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[str]:
    x, residual = rows(shape, dtype, device, 1), rows(shape, dtype, device, 2)
    weight = normal(shape[1], dtype=dtype, device=device, seed=3)
    pairs = {
        "plain": (module.quantize_rows(x), reference.quantize_rows(x)),
        "norm": (module.rms_norm_rows(x, residual, weight, EPS), reference.rms_norm_rows(x, residual, weight, EPS)),
        "norm alone": (module.rms_norm_rows(x, None, weight, EPS), reference.rms_norm_rows(x, None, weight, EPS)),
        "swiglu": (module.swiglu_rows(x, residual), reference.swiglu_rows(x, residual)),
    }
    found = []
    for name, (got, want) in pairs.items():
        # exp and rsqrt differ in the last bit between libraries, so a value may cross a rounding edge, no more
        share = different(got[0], want[0])
        if share > (0 if name == "plain" else 0.01):
            found.append(f"{name}: {share:.2%} of the bytes differ")
        found += [
            f"{name}: part {i} is off by {errors(g, w)[0]:.1e}"
            for i, (g, w) in enumerate(zip(got[1:], want[1:], strict=True))
            if not errors(g, w)[0] < (1e-6 if dtype == torch.float32 else 4e-3)
        ]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_is_the_reference(shape, dtype, device, fused) -> None:  # type: ignore[no-untyped-def]
    assert not faults(fused, shape, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(dtype: torch.dtype) -> None:
    x = rows((5, 512), dtype, torch.device("cpu"), 1)
    rows8, scale = reference.quantize_rows(x)
    assert rows8.float().abs().amax(1)[[0, 2, 3, 4]].eq(448).all(), "the largest value does not use the range"
    for row, back in zip(x, rows8.float() * scale, strict=True):
        assert errors(back, row)[0] < 0.03
    assert not rows8[1].float().any(), "a row of zeros"


def test_fusing_changes_nothing() -> None:
    x, residual = (rows((4, 96), torch.bfloat16, torch.device("cpu"), seed) for seed in (1, 2))
    weight = torch.ones(96, dtype=torch.bfloat16)
    y, _, _ = rms_norm.forward(x, residual, weight, EPS)
    pairs = [
        (reference.rms_norm_rows(x, residual, weight, EPS)[:2], reference.quantize_rows(y)),
        (reference.swiglu_rows(x, residual), reference.quantize_rows(swiglu.forward(x, residual))),
    ]
    for got, want in pairs:
        assert different(got[0], want[0]) == 0
        assert torch.equal(got[1], want[1])


def test_no_tokens(device: torch.device, fused: ModuleType) -> None:
    for module in (reference, fused):
        rows8, scale = module.quantize_rows(torch.empty(0, 16, device=device))
        assert rows8.shape == (0, 16)
        assert scale.shape == (0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(("tl.div_rn(LARGEST, amax)", "tl.div_rn(LARGEST, amax) * 2"), id="range exceeded twice"),
        pytest.param(("tl.div_rn(amax, LARGEST)", "amax"), id="scale not divided"),
        pytest.param(("tl.abs(value)", "value"), id="largest instead of largest magnitude"),
        pytest.param(("/ num_features + eps", "/ BLOCK_K + eps"), id="mean over the padded row"),
        pytest.param(("gate * tl.sigmoid(gate) * up", "tl.maximum(gate, 0.0) * up"), id="relu for silu"),
    ],
)
def test_named_wrong_kernels_fail(edit, dtype, device, fused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert faults(mutant(fused, [edit], tmp_path), (3, 100), dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8192, 4096), (1001, 11008), (77, 14336)])
def test_large(shape, dtype, fused) -> None:  # type: ignore[no-untyped-def]
    assert not faults(fused, shape, dtype, torch.device("cuda"))


@pytest.mark.gpu
def test_through_scaled_mm() -> None:
    fused = pytest.importorskip("chulengo.kernels.fused.fp8")
    x, w = (normal(512, 1024, dtype=torch.bfloat16, device=torch.device("cuda"), seed=s) for s in (1, 2))
    (x8, xs), (w8, ws) = fused.quantize_rows(x), fused.quantize_rows(w)
    y = torch._scaled_mm(x8, w8.t(), xs, ws.t(), out_dtype=torch.bfloat16)
    assert errors(y, x.double() @ w.double().t())[0] < 0.05
