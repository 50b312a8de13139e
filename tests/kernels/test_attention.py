"""Packed attention against the formula written out in float64, forward and backward, and wrong ones that fail."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from measure import faults, mutant, normal
from torch import Tensor

from chulengo.kernels import ops
from chulengo.kernels.applies import KernelError, need
from chulengo.kernels.reference import attention as reference

CPU = torch.device("cpu")
# lengths of the sequences, query heads, key heads, head size
SHAPES = [
    pytest.param(([5, 1, 9], 4, 2, 8), id="shared key heads"), pytest.param(([17], 3, 3, 16), id="one sequence"),
    pytest.param(([1], 1, 1, 8), id="one token"), pytest.param(([0, 4, 0, 0, 3, 0], 8, 1, 8), id="empty ones"),
]  # fmt: skip


def by_formula(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Every pair of tokens, masked; each query head's own copy of its key head."""
    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    place = torch.arange(len(owner), device=q.device)
    seen = (owner[:, None] == owner[None]) & (place[:, None] >= place[None])
    scores = torch.einsum("tnh,snh->nts", q, k) / q.shape[2] ** 0.5
    return torch.einsum("nts,snh->tnh", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def run(module: ModuleType, shape: Any, dtype: torch.dtype, device: torch.device = CPU) -> list[str]:
    lengths, heads, shared, size = shape
    tokens = sum(lengths)
    operands = [
        normal(tokens, h, size, dtype=dtype, device=device, seed=seed)
        for seed, h in ((1, heads), (2, shared), (3, shared))
    ]
    dy = normal(tokens, heads, size, dtype=dtype, device=device, seed=4)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)

    def results(attend: Any, wide: bool) -> dict[str, Tensor]:
        leaves = [(x.double() if wide else x).detach().clone().requires_grad_() for x in operands]
        y = attend(*leaves)
        return dict(zip(("y", "dq", "dk", "dv"), (y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))), strict=True))

    return faults(
        results(lambda q, k, v: module.packed_attention(q, k, v, cu_seqlens, max(lengths)), False),
        results(lambda *x: by_formula(*x, lengths), True), results(lambda *x: by_formula(*x, lengths), False),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_near_exact(shape: Any, dtype: torch.dtype) -> None:
    assert not run(reference, shape, dtype)


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(("is_causal=True", "is_causal=False"), id="sees what comes after"),
        pytest.param(("in pairwise(ends)", "in [(0, ends[-1])]"), id="one sequence of all"),
        pytest.param(("y = scaled", "k = k.flip(1); y = scaled"), id="another key head"),
        pytest.param(("enable_gqa=", "scale=1.0, enable_gqa="), id="without the scale"),
    ],
)
def test_named_wrong_kernels_fail(edit: tuple[str, str], tmp_path: Any) -> None:
    assert run(mutant(reference, [edit], tmp_path), ([5, 3, 9], 4, 2, 8), torch.float32)


def test_no_tokens() -> None:
    nothing = torch.zeros(0, 2, 8)
    ends = torch.zeros(3, dtype=torch.int32)
    assert ops.packed_attention(nothing, nothing, nothing, ends, 0).shape == (0, 2, 8)


def test_what_does_not_apply_is_named() -> None:
    q, k, ends = torch.zeros(4, 4, 8), torch.zeros(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    for arguments, said in [
        ((q, k[:3], k[:3], ends), "k is"), ((q, k, k[:3], ends), "v is"), ((q[:, :3], k, k, ends), "a multiple"),
        ((q, k.bfloat16(), k.bfloat16(), ends), "one dtype"), ((q, k, k, ends.long()), "int32"),
        ((q, k, k, ends[:1]), "int32"), ((q, k, k, torch.tensor([0, 3], dtype=torch.int32)), "0 to T"),
    ]:  # fmt: skip
        with pytest.raises(KernelError, match=said):
            ops.packed_attention(*arguments, 4)


def test_flash_attention_refuses_what_it_cannot_do() -> None:
    pytest.importorskip("triton")
    q, ends = torch.zeros(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(KernelError, match="backend='reference'"):
        ops.packed_attention(q, q, q, ends, 4, backend="fused")


def test_flash_attention_names_the_engine_that_has_every_head_size(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = pytest.importorskip("chulengo.kernels.fused.attention")
    ends = torch.tensor([0, 4], dtype=torch.int32)
    monkeypatch.setattr(fused, "need", lambda condition, given, **more: None if "CUDA" in str(more["allowed"]) else (
        need(condition, given, **more)))  # fmt: skip
    for dtype, size, said in ((torch.bfloat16, 264, "264"), (torch.bfloat16, 12, "12"), (torch.float32, 8, "float32")):
        q = torch.zeros(4, 2, size, dtype=dtype)
        with pytest.raises(KernelError, match=said) as caught:
            fused.packed_attention(q, q, q, ends, 4)
        assert caught.value.next_step == "--set model.engine=reference"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [([5, 1, 9], 4, 2, 64), ([700, 1, 0, 1347], 32, 8, 128), ([2048] * 4, 32, 32, 128), ([300, 212], 14, 2, 64)],
)
def test_flash_attention(shape: Any) -> None:
    from chulengo.kernels.fused import attention as fused

    assert not run(fused, shape, torch.bfloat16, torch.device("cuda"))


@pytest.fixture
def flash_3(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for the package and for PyTorch's registry: no machine here has it."""
    pytest.importorskip("triton")
    from torch.nn import attention

    from chulengo.kernels.fused import attention as fused

    class Registry:
        installed, major, active, fails = True, 9, None, False

        def activate(self, name: str) -> None:
            if self.fails:
                raise RuntimeError("does not expose FA3 kernels")
            self.active = name

    registry = Registry()
    find = fused.importlib.util.find_spec
    monkeypatch.setattr(
        fused.importlib.util, "find_spec",
        lambda name: registry.installed or None if name == "flash_attn_interface" else find(name),
    )
    monkeypatch.setattr(fused, "_major", lambda device: registry.major)
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: registry.active)
    monkeypatch.setattr(attention, "activate_flash_attention_impl", registry.activate)
    fused.use_flash_attention_3.cache_clear()
    yield registry, fused.use_flash_attention_3
    fused.use_flash_attention_3.cache_clear()


def test_flash_attention_3_where_it_is_there(flash_3: Any) -> None:
    registry, use = flash_3
    assert use(torch.device("cuda:0"))
    assert registry.active == "FA3"


@pytest.mark.parametrize("missing", [{"installed": False}, {"major": 8}, {"major": 10}])
def test_flash_attention_3_where_it_is_not(flash_3: Any, missing: dict[str, Any]) -> None:
    registry, use = flash_3
    vars(registry).update(missing)
    assert not use(torch.device("cuda:0"))
    assert registry.active is None


def test_another_implementation_stays(flash_3: Any) -> None:
    registry, use = flash_3
    registry.active = "FA4"
    assert not use(torch.device("cuda:0"))
    assert registry.active == "FA4"


def test_a_broken_package_is_named(flash_3: Any) -> None:
    registry, use = flash_3
    registry.fails = True
    with pytest.warns(UserWarning, match="flash_attn_interface is installed, but not used"):
        assert not use(torch.device("cuda:0"))
