"""Gradients of stacked adapters against float64, in both reading orders, and wrong kernels that fail."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from measure import faults, mutant, normal
from torch import Tensor

from chulengo.kernels.applies import KernelError
from chulengo.kernels.reference import lora_gradients as reference

DTYPES = [torch.float32, torch.bfloat16]
# tokens, in features, out features of each adapter, rank
SHAPES = [
    pytest.param((70, 40, (48, 24, 24), 8), id="q, k, v: x is narrow"),
    pytest.param((130, 300, (40,), 16), id="down: x is wide"),
    pytest.param((1, 7, (5,), 1), id="one token"),
    pytest.param((65, 24, (72, 72), 3), id="gate and up, rank 3"),
]


@pytest.fixture
def fused() -> ModuleType:
    pytest.importorskip("triton")
    from chulengo.kernels.fused import lora_gradients

    return lora_gradients


def by_autograd(x: Tensor, dys: list[Tensor], factors: list[tuple[Tensor, Tensor]], scale: float) -> dict[str, Tensor]:
    found = {}
    for j, (dy, (a, b)) in enumerate(zip(dys, factors, strict=True)):
        a, b = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
        (scale * (x @ a.t()) @ b.t()).backward(dy)
        found |= {f"dA{j}": a.grad, f"dB{j}": b.grad}
    return found  # type: ignore[return-value]


def run(module: ModuleType, shape, dtype, device) -> list[str]:  # type: ignore[no-untyped-def]
    tokens, features, outs, rank = shape
    # scaled so that every gradient has an rms near 1; dy are slices of one wider tensor, as a fused product's would be
    x = normal(tokens, features + 8, dtype=dtype, device=device, seed=1)[:, :features]
    wide = normal(tokens, sum(outs), dtype=dtype, device=device, seed=2, scale=tokens**-0.5)
    dys = list(wide.split(outs, 1))
    factors = [
        (
            normal(rank, features, dtype=dtype, device=device, seed=10 + j, scale=features**-0.5),
            normal(out, rank, dtype=dtype, device=device, seed=20 + j, scale=out**-0.5),
        )
        for j, out in enumerate(outs)
    ]
    das, dbs = module.lora_gradients(x, dys, [a for a, _ in factors], [b for _, b in factors], 2.0)
    got = {f"dA{j}": da for j, da in enumerate(das)} | {f"dB{j}": db for j, db in enumerate(dbs)}
    exact = by_autograd(
        x.double(), [d.double() for d in dys], [(a.double(), b.double()) for a, b in factors], 2.0
    )
    return faults(got, exact, by_autograd(x, dys, factors, 2.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_near_exact(shape, dtype, device, fused) -> None:  # type: ignore[no-untyped-def]
    for module in (reference, fused):
        assert not run(module, shape, dtype, device)


def test_factors_may_be_wider_than_the_activations(device: torch.device, fused: ModuleType) -> None:
    x, dy = (normal(20, 16, dtype=torch.bfloat16, device=device, seed=s) for s in (1, 2))
    a, b = (normal(*s, dtype=torch.float32, device=device, seed=3) for s in ((4, 16), (16, 4)))
    for module in (reference, fused):
        (da,), (db,) = module.lora_gradients(x, [dy], [a], [b], 1.0)
        assert da.dtype == db.dtype == torch.float32
        assert da.shape == a.shape
        assert db.shape == b.shape


def test_the_same_every_time(device: torch.device, fused: ModuleType) -> None:
    x, dy = (normal(300, 40, dtype=torch.float32, device=device, seed=s) for s in (1, 2))
    a, b = (normal(*s, dtype=torch.float32, device=device, seed=3) for s in ((4, 40), (40, 4)))
    first, second = (fused.lora_gradients(x, [dy], [a], [b], 1.0) for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    assert torch.equal(first[1][0], second[1][0])


def test_no_tokens(device: torch.device, fused: ModuleType) -> None:
    a, b = torch.ones(4, 16, device=device), torch.ones(8, 4, device=device)
    for module in (reference, fused):
        (da,), (db,) = module.lora_gradients(
            torch.empty(0, 16, device=device), [torch.empty(0, 8, device=device)], [a], [b], 1.0
        )
        assert not da.any()
        assert not db.any()


def test_what_does_not_apply_is_named(device: torch.device, fused: ModuleType) -> None:
    x = torch.zeros(4, 16, device=device)
    with pytest.raises(KernelError, match=r"A \[R, K\]"):
        fused.lora_gradients(x, [x], [torch.zeros(2, 8, device=device)], [torch.zeros(16, 2, device=device)], 1.0)
    with pytest.raises(KernelError, match="at most 256"):
        fused.lora_gradients(x, [x], [torch.zeros(300, 16, device=device)], [torch.zeros(16, 300, device=device)], 1.0)


# small blocks and two shares of tokens, so that a small shape has several blocks in each
SMALL = [
    ("BLOCK_T = 64", "BLOCK_T = 16"),
    ("BLOCK_T // 2", "BLOCK_T"),
    ("max(64, min(256, 16384 // rank_block)) if half else 64", "16"),
    ("PROGRAMS = 528", "PROGRAMS = 6"),
]
SMALL_SHAPE = (40, 40, (48, 48), 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_small_blocks(dtype, device, fused, tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert not run(mutant(fused, SMALL, tmp_path), SMALL_SHAPE, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(("(scale * da)", "da"), id="scale missing in dA"),
        pytest.param(("outer += tl.dot", "outer = tl.dot"), id="only the last block of tokens"),
        pytest.param(("outer.sum(0)", "outer[0]"), id="only the first share of tokens"),
        pytest.param(("product.sum(0)", "product[0]"), id="only the first block of columns"),
        pytest.param(("h_TR.split(ranks, 1)", "h_TR.split(ranks, 1)[::-1]"), id="adapters exchanged"),
    ],
)
def test_named_wrong_kernels_fail(edit, dtype, device, fused, tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert run(mutant(fused, [*SMALL, edit], tmp_path), SMALL_SHAPE, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(8192, 4096, (4096, 4096, 4096), 16), (8192, 4096, (11008, 11008), 16), (8192, 11008, (4096,), 16),
     (1001, 4096, (4096, 1024, 1024), 64), (300, 512, (512,), 128)],
)  # fmt: skip
def test_large(shape, dtype, fused) -> None:  # type: ignore[no-untyped-def]
    assert not run(fused, shape, dtype, torch.device("cuda"))
