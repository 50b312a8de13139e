"""RMSNorm with residual: forward, dx and dw against float64, for both implementations, and wrong kernels that fail."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from measure import faults, mutant, normal
from torch import Tensor

from chulengo.kernels.applies import KernelError
from chulengo.kernels.reference import rms_norm as reference

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(4, 64), (1, 1), (3, 100), (5, 130), (1, 288)]
EPS = 1e-2  # large beside the mean square of SMALL inputs, so that a kernel without it is seen
SMALL = 0.1


@pytest.fixture
def fused() -> ModuleType:
    pytest.importorskip("triton")
    from chulengo.kernels.fused import rms_norm

    return rms_norm


def llama(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Hugging Face's LlamaRMSNorm, and the residual sum in front of it."""
    total = x if residual is None else residual + x
    wide = total if total.dtype == torch.float64 else total.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * normed.to(x.dtype), total


def by_autograd(inputs: dict[str, Tensor | None], dy: Tensor, dsum: Tensor | None) -> dict[str, Tensor]:
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items() if v is not None}
    y, total = llama(leaves["x"], leaves.get("residual"), leaves["weight"])
    torch.autograd.backward([y, total] if dsum is not None else [y], [dy, dsum] if dsum is not None else [dy])
    return {"y": y, "sum": total, "dx": leaves["x"].grad, "dweight": leaves["weight"].grad}  # type: ignore[dict-item]


def run(module: ModuleType, shape, dtype, device, *, residual=True, dsum=True, stride=0) -> list[str]:  # type: ignore[no-untyped-def]
    wide = (shape[0], shape[1] + stride)
    x = normal(*wide, dtype=dtype, device=device, seed=1, scale=SMALL)[:, : shape[1]]
    res = normal(*wide, dtype=dtype, device=device, seed=2, scale=SMALL)[:, : shape[1]] if residual else None
    weight = normal(shape[1], dtype=dtype, device=device, seed=3)
    dy = normal(*wide, dtype=dtype, device=device, seed=4)[:, : shape[1]]
    dstream = normal(*wide, dtype=dtype, device=device, seed=5)[:, : shape[1]] if dsum else None
    y, total, rstd = module.forward(x, res, weight, EPS)
    dx, dweight = module.backward(dy, dstream, total, weight, rstd, weight_gradient=True)
    got = {"y": y, "sum": total, "dx": dx, "dweight": dweight}
    inputs = {"x": x, "residual": res, "weight": weight}
    plain = by_autograd(inputs, dy, dstream)
    exact = by_autograd(
        {k: None if v is None else v.double() for k, v in inputs.items()},
        dy.double(),
        None if dstream is None else dstream.double(),
    )
    return faults(got, exact, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_near_exact(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, fused: ModuleType) -> None:
    for module in (reference, fused):
        for residual, dsum in ((True, True), (False, False), (False, True)):
            assert not run(module, shape, dtype, device, residual=residual, dsum=dsum)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(dtype: torch.dtype, device: torch.device, fused: ModuleType) -> None:
    for module in (reference, fused):
        assert not run(module, (4, 96), dtype, device, stride=8)


def test_frozen_weight_gets_no_gradient(device: torch.device, fused: ModuleType) -> None:
    x, weight = (normal(*s, dtype=torch.float32, device=device, seed=0) for s in ((3, 64), (64,)))
    for module in (reference, fused):
        _, total, rstd = module.forward(x, None, weight, EPS)
        assert module.backward(x, None, total, weight, rstd)[1] is None


def test_no_tokens(device: torch.device, fused: ModuleType) -> None:
    x, weight = torch.empty(0, 64, device=device), torch.ones(64, device=device)
    for module in (reference, fused):
        y, total, rstd = module.forward(x, None, weight, EPS)
        dx, dweight = module.backward(y, None, total, weight, rstd, weight_gradient=True)
        assert y.shape == dx.shape == (0, 64)
        assert not dweight.any()


def test_what_does_not_apply_is_named(device: torch.device, fused: ModuleType) -> None:
    x = normal(64, 4, dtype=torch.float32, device=device, seed=0)
    with pytest.raises(KernelError, match=r"x\.contiguous\(\)"):
        fused.forward(x.t(), None, torch.ones(64, device=device), EPS)
    with pytest.raises(KernelError, match="dtype of x"):
        fused.forward(x, None, torch.ones(4, device=device, dtype=torch.bfloat16), EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(("/ num_features + eps)", "/ num_features)"), id="eps missing"),
        pytest.param(("tl.sum(h * h, 0) / num_features", "tl.sum(h * h, 0) / BLOCK_D"), id="mean over the padded row"),
        pytest.param(("- normed * inner", ""), id="projection missing in dx"),
        pytest.param(("dweight += dy * normed", "dweight += dy * h"), id="dw from the unnormalised row"),
        pytest.param(("if HAS_DSUM:", "if False:"), id="residual gradient dropped"),
    ],
)
def test_named_wrong_kernels_fail(edit, dtype, device, fused, tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert run(mutant(fused, [edit], tmp_path), (5, 130), dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8192, 4096), (1000, 5120), (333, 8192), (70, 11008)])
def test_large(shape: tuple[int, int], dtype: torch.dtype, fused: ModuleType) -> None:
    assert not run(fused, shape, dtype, torch.device("cuda"))
