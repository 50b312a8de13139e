"""Rotary embedding: forward and backward against float64 and Hugging Face's function, and wrong kernels that fail."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from measure import faults, mutant, normal
from torch import Tensor

from chulengo.kernels.applies import KernelError
from chulengo.kernels.reference import rope as reference

DTYPES = [torch.float32, torch.bfloat16]
# tokens, query heads, key heads, head size
SHAPES = [(5, 4, 2, 16), (1, 1, 1, 2), (3, 3, 1, 6), (2, 40, 8, 8), (4, 6, 6, 80)]


@pytest.fixture
def fused() -> ModuleType:
    pytest.importorskip("triton")
    from chulengo.kernels.fused import rope

    return rope


def turned(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor:
    """Hugging Face's way: tables repeated over both halves and cast to the dtype of x, x cos + rotate_half(x) sin."""
    cos, sin = (torch.cat((t, t), -1)[position][:, None].to(x.dtype) for t in (cos, sin))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def by_autograd(q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor], position: Tensor, dq: Tensor, dk: Tensor):  # type: ignore[no-untyped-def]
    q, k = q.detach().clone().requires_grad_(), k.detach().clone().requires_grad_()
    turned_q, turned_k = turned(q, *tables, position), turned(k, *tables, position)
    torch.autograd.backward([turned_q, turned_k], [dq, dk])
    return {"q": turned_q, "k": turned_k, "dq": q.grad, "dk": k.grad}


def run(module: ModuleType, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> list[str]:
    """q and k are slices of one [T, (N + 2K) H] tensor; positions are those of packed sequences."""
    tokens, heads, key_heads, size = shape
    tables = reference.tables(64, size, device=device)
    position = (torch.arange(tokens) * 7 % 61).to(device)
    packed = normal(tokens, heads + 2 * key_heads, size, dtype=dtype, device=device, seed=1)
    q, k = packed[:, :heads], packed[:, heads : heads + key_heads]
    dq, dk = (normal(*x.shape, dtype=dtype, device=device, seed=2) for x in (q, k))
    before = packed.clone()
    got = dict(zip(("q", "k"), module.forward(q, k, *tables, position), strict=True))
    dv, stacked = packed[:, heads + key_heads :], torch.zeros_like(packed)
    place = stacked[:, heads + key_heads :]
    got |= dict(zip(("dq", "dk"), module.backward(dq, dk, *tables, position, copied=(dv, place)), strict=True))
    assert torch.equal(packed, before), "inputs were changed"
    assert torch.equal(place, dv), "v's gradient was not copied"
    assert not stacked[:, : heads + key_heads].any(), "more than v's gradient was written"
    wide = tuple(t.double() for t in tables)
    exact = by_autograd(q.double(), k.double(), wide, position, dq.double(), dk.double())  # type: ignore[arg-type]
    return faults(got, exact, by_autograd(q, k, tables, position, dq, dk))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_near_exact(shape, dtype, device, fused) -> None:  # type: ignore[no-untyped-def]
    for module in (reference, fused):
        assert not run(module, shape, dtype, device)


def test_as_hugging_face_turns(device: torch.device, fused: ModuleType) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    cos, sin = reference.tables(9, 16, device=device)
    position = torch.tensor([0, 1, 2, 0, 1, 8], device=device)
    q, k = (normal(6, n, 16, dtype=torch.float32, device=device, seed=n) for n in (4, 2))
    full = [torch.cat((t, t), -1)[position][None] for t in (cos, sin)]
    expected = llama.apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *full)
    for module in (reference, fused):
        for got, want in zip(module.forward(q, k, cos, sin, position), expected, strict=True):
            torch.testing.assert_close(got, want[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


def test_the_gradient_turns_back(device: torch.device, fused: ModuleType) -> None:
    tables = reference.tables(32, 16, device=device)
    position = torch.arange(5, device=device)
    q, k = (normal(5, n, 16, dtype=torch.float32, device=device, seed=n) for n in (4, 2))
    there = fused.forward(q, k, *tables, position)
    for got, want in zip(fused.backward(*there, *tables, position), (q, k), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_what_does_not_apply_is_named(device: torch.device, fused: ModuleType) -> None:
    cos, sin = reference.tables(8, 16, device=device)
    position = torch.arange(3, device=device)
    q = torch.zeros(3, 2, 16, device=device)
    with pytest.raises(KernelError, match=r"float32 \[S, 8\]"):
        fused.forward(q, q, torch.cat((cos, cos), -1), sin, position)
    with pytest.raises(KernelError, match="int32 or int64"):
        fused.forward(q, q, cos, sin, position[:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(("DIRECTION * tl.load(sin_ptr", "-DIRECTION * tl.load(sin_ptr"), id="rotation sign flipped"),
        pytest.param(("DIRECTION * tl.load(sin_ptr", "tl.load(sin_ptr"), id="gradient not turned back"),
        pytest.param(("position * stride_cos", "token * stride_cos"), id="place in the pack for the position"),
        pytest.param(("head[:, None] * stride_head + p[None, :]", "head[:, None] * stride_head + (p ^ 1)[None, :]"),
                     id="pairs exchanged"),
    ],
)  # fmt: skip
def test_named_wrong_kernels_fail(edit, dtype, device, fused, tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert run(mutant(fused, [edit], tmp_path), (5, 4, 2, 16), dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8192, 32, 32, 128), (4096, 64, 8, 128), (1001, 28, 4, 80)])
def test_large(shape, dtype, fused) -> None:  # type: ignore[no-untyped-def]
    assert not run(fused, shape, dtype, torch.device("cuda"))
