"""Dot products of columns: plain and fused against float64, and wrong kernels that fail."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from measure import faults, mutant, normal

from chulengo.kernels.applies import KernelError
from chulengo.kernels.reference import column_dot as reference

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(300, 64), (1, 1), (3, 600), (17, 100)]


@pytest.fixture
def fused() -> ModuleType:
    pytest.importorskip("triton")
    from chulengo.kernels.fused import column_dot

    return column_dot


def run(module: ModuleType, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, bias: bool) -> list[str]:
    """x and y are parts of wider matrices; the sums have rms near 1."""
    scale = shape[0] ** -0.5
    x = normal(shape[0], shape[1] + 16, dtype=dtype, device=device, seed=1, scale=scale)[:, 8 : 8 + shape[1]]
    y = normal(shape[0], shape[1] + 8, dtype=dtype, device=device, seed=2)[:, : shape[1]]
    b = normal(shape[1], dtype=dtype, device=device, seed=3, scale=0.5) if bias else None
    exact = (x.double() * (y.double() - (0 if b is None else b.double()))).sum(0)
    plain = (x.float() * (y.float() - (0 if b is None else b.float()))).sum(0)
    return faults({"dot": module.forward(x, y, b)}, {"dot": exact}, {"dot": plain})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_near_exact(shape, dtype, bias, device, fused) -> None:  # type: ignore[no-untyped-def]
    for module in (reference, fused):
        assert not run(module, shape, dtype, device, bias)


def test_in_pieces_and_of_nothing(monkeypatch: pytest.MonkeyPatch, device: torch.device, fused: ModuleType) -> None:
    monkeypatch.setattr(reference, "CHUNK_VALUES", 64 * 7)
    assert not run(reference, (300, 64), torch.float32, device, True)
    nothing = torch.zeros(0, 5, device=device)
    for module in (reference, fused):
        assert torch.equal(module.forward(nothing, nothing), torch.zeros(5, device=device))


def test_what_does_not_apply_is_named(device: torch.device, fused: ModuleType) -> None:
    x = torch.ones(4, 8, device=device)
    for module in (reference, fused):
        with pytest.raises(KernelError, match="one shape"):
            module.forward(x, x[:, :4])
        with pytest.raises(KernelError, match="The bias is"):
            module.forward(x, x, x[0, :4])
    with pytest.raises(KernelError, match="last one 1"):
        fused.forward(x.t(), x.t())


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(("y -= bias[None, :]", "y += 0.0"), id="bias left in"),
        pytest.param(("for start in range(0, ROWS, BLOCK_T)", "for start in range(0, ROWS - BLOCK_T, BLOCK_T)"),
                     id="the last rows of a program dropped"),
        pytest.param(("inside = (row < num_rows)[:, None] &", "inside = (row < num_rows - 1)[:, None] &"),
                     id="the last row dropped"),
        pytest.param(("total += x * y", "total += x * x"), id="the wrong matrix"),
    ],
)  # fmt: skip
def test_named_wrong_kernels_fail(edit, device, fused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert run(mutant(fused, [edit], tmp_path), (300, 64), torch.bfloat16, device, True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8192, 11008), (1001, 4096), (77, 1000)])
def test_large(shape: tuple[int, int], dtype: torch.dtype, fused: ModuleType) -> None:
    assert not run(fused, shape, dtype, torch.device("cuda"), True)
