"""SwiGLU: forward, both gradients and the recomputed product against float64, and wrong kernels that fail."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from measure import faults, mutant, normal
from torch import Tensor

from chulengo.kernels.applies import KernelError
from chulengo.kernels.reference import swiglu as reference

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(4, 64), (1, 1), (3, 100), (2, 1030)]


@pytest.fixture
def fused() -> ModuleType:
    pytest.importorskip("triton")
    from chulengo.kernels.fused import swiglu

    return swiglu


def by_autograd(gate: Tensor, up: Tensor, dproduct: Tensor) -> dict[str, Tensor]:
    gate, up = gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()
    product = torch.nn.functional.silu(gate) * up
    product.backward(dproduct)
    return {"product": product, "dgate": gate.grad, "dup": up.grad, "again": product}  # type: ignore[dict-item]


def run(module: ModuleType, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[str]:
    """Gate and up are the halves of one tensor, as are their gradients."""
    both = normal(shape[0], 2 * shape[1], dtype=dtype, device=device, seed=1, scale=1.5)
    gate, up = both[:, : shape[1]], both[:, shape[1] :]
    dproduct = normal(*shape, dtype=dtype, device=device, seed=2)
    gradients, again = torch.full_like(both, float("nan")), torch.full_like(dproduct, float("nan"))
    product = module.forward(gate, up)
    dgate, dup = gradients[:, : shape[1]], gradients[:, shape[1] :]
    module.backward(dproduct, gate, up, dgate_TI=dgate, dup_TI=dup, product_TI=again)
    if not torch.equal(again, product):
        return ["the product made again differs from the forward's"]
    got = {"product": product, "dgate": dgate, "dup": dup, "again": again}
    exact = by_autograd(gate.double(), up.double(), dproduct.double())
    return faults(got, exact, by_autograd(gate, up, dproduct))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_near_exact(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, fused: ModuleType) -> None:
    for module in (reference, fused):
        assert not run(module, shape, dtype, device)


def test_extreme_gates(device: torch.device, fused: ModuleType) -> None:
    gate = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4]], device=device)
    one = torch.ones_like(gate)
    for module in (reference, fused):
        dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
        module.backward(one, gate, one, dgate_TI=dgate, dup_TI=dup)
        torch.testing.assert_close(module.forward(gate, one), torch.nn.functional.silu(gate))
        torch.testing.assert_close(dgate, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]], device=device))


def test_what_does_not_apply_is_named(device: torch.device, fused: ModuleType) -> None:
    gate = normal(4, 8, dtype=torch.float32, device=device, seed=0)
    with pytest.raises(KernelError, match="one dtype, one device, one shape"):
        fused.forward(gate, gate.bfloat16())
    with pytest.raises(KernelError, match="last one 1"):
        fused.forward(gate.t(), gate.t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(("gate * tl.sigmoid(gate) * up", "tl.maximum(gate, 0.0) * up"), id="relu for silu"),
        pytest.param(("(1.0 + gate * (1.0 - sigmoid))", "1.0"), id="sigmoid's slope missing"),
        pytest.param(("dup = dproduct * gate * sigmoid", "dup = dproduct * sigmoid"), id="gate missing in dup"),
        pytest.param(("tl.sigmoid(gate)", "tl.sigmoid(1.702 * gate)"), id="gelu's sigmoid"),
    ],
)
def test_named_wrong_kernels_fail(edit, dtype, device, fused, tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert run(mutant(fused, [edit], tmp_path), (3, 100), dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8192, 11008), (1001, 14336), (77, 1000)])
def test_large(shape: tuple[int, int], dtype: torch.dtype, fused: ModuleType) -> None:
    assert not run(fused, shape, dtype, torch.device("cuda"))
