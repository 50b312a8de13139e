"""The table of contents: which implementation runs and why, and gradients through autograd for both."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from measure import normal

from chulengo.kernels import ops
from chulengo.kernels.applies import KernelError
from chulengo.kernels.reference import nf4
from chulengo.kernels.reference.rope import tables

HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ["reference", pytest.param("fused", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]
KIND = {"dtype": torch.float32, "device": torch.device("cuda" if torch.cuda.is_available() else "cpu")}


def leaf(*shape: int, seed: int) -> torch.Tensor:
    return normal(*shape, seed=seed, **KIND).requires_grad_()  # type: ignore[arg-type]


def test_the_choice_and_its_reason() -> None:
    assert ops.choose("cpu") == ("reference", "Triton does not compile for cpu")
    assert ops.choose("cuda")[0] == ("fused" if HAS_TRITON else "reference")
    rows = ops.describe("cpu")
    assert [row.op for row in rows] == list(ops.OPERATIONS)
    assert all(row.backend == "reference" and row.why for row in rows)
    with pytest.raises(KernelError, match="auto, fused, reference"):
        ops.choose("cpu", "fast")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in ops.choose("cuda")[1]
    with pytest.raises(KernelError, match=r"chulengo\[gpu\]"):
        ops.choose("cuda", "fused")


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_a_fused_kernel_refuses_a_cpu_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    from chulengo.kernels.fused import launch

    monkeypatch.setattr(launch, "interpreted", lambda: False)
    with pytest.raises(KernelError, match="backend='reference'"):
        ops.swiglu(torch.zeros(1, 4), torch.zeros(1, 4), backend="fused")


@pytest.mark.parametrize("backend", BACKENDS)
class TestGradients:
    """Against autograd of the plain expression; gradients arrive expanded, as `sum().backward()` sends them."""

    def check(self, ours: torch.Tensor, plain: torch.Tensor, leaves: list[torch.Tensor]) -> None:
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
        got, want = (torch.autograd.grad(x, leaves, retain_graph=True) for x in (ours, plain))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("used", ["both", "y", "sum"])
    def test_rms_norm(self, backend: str, used: str) -> None:
        x, residual, weight = leaf(3, 20, seed=1), leaf(3, 20, seed=2), leaf(20, seed=3)
        y, total = ops.rms_norm(x, weight, 1e-3, residual_TD=residual, backend=backend)
        plain_total = x + residual
        plain_y = torch.nn.functional.rms_norm(plain_total, (20,), weight, 1e-3)
        parts = {"both": (y.sum() + 2 * total.sum(), plain_y.sum() + 2 * plain_total.sum())}
        parts |= {"y": (y.sum(), plain_y.sum()), "sum": (total.sum(), plain_total.sum())}
        self.check(*parts[used], [x, residual] if used == "sum" else [x, residual, weight])

    def test_rms_norm_without_residual(self, backend: str) -> None:
        x, weight = leaf(3, 20, seed=1), leaf(20, seed=3)
        y, same = ops.rms_norm(x, weight, 1e-3, backend=backend)
        assert same is x
        self.check(y.square().sum(), torch.nn.functional.rms_norm(x, (20,), weight, 1e-3).square().sum(), [x, weight])

    def test_swiglu(self, backend: str) -> None:
        both = leaf(3, 40, seed=1)
        gate, up = both[:, :20], both[:, 20:]
        plain = (torch.nn.functional.silu(gate) * up).sum()
        self.check(ops.swiglu(gate, up, backend=backend).sum(), plain, [both])
        self.check(ops.swiglu_packed(both, backend=backend).sum(), plain, [both])

    def test_rope(self, backend: str) -> None:
        packed, (cos, sin) = leaf(5, 6, 8, seed=1), tables(16, 8, device=KIND["device"])  # type: ignore[arg-type]
        position = torch.tensor([0, 1, 2, 0, 9], device=packed.device)
        q, k = ops.rope(packed[:, :4], packed[:, 4:], cos, sin, position, backend=backend)
        pairs = torch.view_as_complex(torch.stack(packed.chunk(2, -1), -1).contiguous())
        turned = pairs * torch.complex(cos, sin)[position][:, None]
        plain = torch.cat((turned.real, turned.imag), -1)
        weights = normal(5, 6, 8, seed=2, **KIND)  # type: ignore[arg-type]
        self.check((torch.cat((q, k), 1) * weights).sum(), (plain * weights).sum(), [packed])

    def test_linear_cross_entropy(self, backend: str) -> None:
        hidden, weight = leaf(7, 12, seed=1), leaf(30, 12, seed=2)
        target = torch.tensor([3, -100, 5, 29, 0, 1, 1], device=hidden.device)
        ours = ops.linear_cross_entropy(hidden, weight, target, chunk_tokens=3, backend=backend) / 6
        self.check(ours, torch.nn.functional.cross_entropy(hidden @ weight.t(), target), [hidden, weight])
        self.check(ours * 3, torch.nn.functional.cross_entropy(hidden @ weight.t(), target) * 3, [hidden, weight])

    def test_a_frozen_head_and_no_gradient_at_all(self, backend: str) -> None:
        hidden, weight = leaf(7, 12, seed=1), leaf(30, 12, seed=2).detach()
        target = torch.arange(7, device=hidden.device)
        ops.linear_cross_entropy(hidden, weight, target, backend=backend).backward()
        assert hidden.grad is not None
        with torch.no_grad():
            assert ops.linear_cross_entropy(hidden, weight, target, backend=backend).isfinite()

    def test_dequantize(self, backend: str) -> None:
        weight = nf4.quantize(normal(16, 64, seed=1, **KIND))  # type: ignore[arg-type]
        a, b = normal(4, 64, seed=2, **KIND), normal(16, 4, seed=3, **KIND)  # type: ignore[arg-type]
        folded = ops.dequantize_nf4(weight, torch.float32, lora_a_RI=a, lora_b_OR=b, lora_scale=2.0, backend=backend)
        base = ops.dequantize_nf4(weight, torch.float32, backend=backend)
        torch.testing.assert_close(folded - base, 2 * b @ a, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_the_gradient_of_a_16_bit_state_is_scaled_in_float32() -> None:
    hidden = normal(4, 8, dtype=torch.bfloat16, device=KIND["device"], seed=1).requires_grad_()  # type: ignore[arg-type]
    weight = normal(20, 8, dtype=torch.bfloat16, device=KIND["device"], seed=2)  # type: ignore[arg-type]
    loss = ops.linear_cross_entropy(hidden, weight, torch.arange(4, device=hidden.device))
    (whole,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (third,) = torch.autograd.grad(loss / 3, hidden)
    assert torch.equal(third, (whole.float() * (torch.ones((), device=hidden.device) / 3)).bfloat16())
