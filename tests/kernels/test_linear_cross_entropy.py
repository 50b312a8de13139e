"""Head and loss in chunks: loss, dhidden and dweight against float64, chunk independence, wrong kernels that fail."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from measure import errors, faults, mutant, normal
from torch import Tensor

from chulengo.kernels.applies import KernelError
from chulengo.kernels.reference import linear_cross_entropy as reference

DTYPES = [torch.float32, torch.bfloat16]
# tokens, features, vocabulary, chunk
SHAPES = [(12, 32, 100, 5), (1, 8, 3, 1), (7, 16, 33, 64), (3, 8, 4200, 2)]


@pytest.fixture
def fused() -> ModuleType:
    pytest.importorskip("triton")
    from chulengo.kernels.fused import linear_cross_entropy

    return linear_cross_entropy


def by_autograd(hidden: Tensor, weight: Tensor, target: Tensor) -> dict[str, Tensor]:
    """As Hugging Face: logits in the dtype of hidden, then the loss in float32."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    logits = hidden @ weight.t()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = torch.nn.functional.cross_entropy(wide, target, reduction="sum")
    loss.backward()
    return {"loss": loss, "dhidden": hidden.grad, "dweight": weight.grad}  # type: ignore[dict-item]


def run(module: ModuleType, shape, dtype, device, seed: int = 1) -> list[str]:  # type: ignore[no-untyped-def]
    tokens, features, vocabulary, chunk = shape
    hidden = normal(tokens, features, dtype=dtype, device=device, seed=seed)
    # logits of rms 2: far from uniform, far from one-hot
    weight = normal(vocabulary, features, dtype=dtype, device=device, seed=seed + 1, scale=2 * features**-0.5)
    target = (torch.arange(tokens) * 37 % vocabulary).to(device)
    target[tokens // 2 :: 5] = reference.IGNORE if tokens > 1 else 0
    loss, dhidden, dweight = module.forward(hidden, weight, target, chunk_tokens=chunk, weight_gradient=True)
    assert loss.dtype == torch.float32
    got = {"loss": loss, "dhidden": dhidden, "dweight": dweight}
    exact = by_autograd(hidden.double(), weight.double(), target)
    plain = by_autograd(hidden, weight, target)
    lines = faults({k: got[k] for k in ("dhidden", "dweight")}, {k: exact[k] for k in ("dhidden", "dweight")},
                   {k: plain[k] for k in ("dhidden", "dweight")}, terms=vocabulary)  # fmt: skip
    # one number: held against the rounding of its logits, not against plain PyTorch's luck with it
    if not errors(loss, exact["loss"])[0] <= (1e-6 if dtype == torch.float32 else 2e-3):
        lines.append(f"loss {loss.item()} instead of {exact['loss'].item()}")
    return lines


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_near_exact(shape, dtype, device, fused) -> None:  # type: ignore[no-untyped-def]
    for module in (reference, fused):
        assert not run(module, shape, dtype, device)


def test_the_chunk_does_not_change_the_result(device: torch.device, fused: ModuleType) -> None:
    hidden = normal(9, 16, dtype=torch.float32, device=device, seed=1)
    weight, target = normal(50, 16, dtype=torch.float32, device=device, seed=2), torch.arange(9, device=device)
    for module in (reference, fused):
        whole = module.forward(hidden, weight, target, chunk_tokens=9)
        parts = module.forward(hidden, weight, target, chunk_tokens=4)
        torch.testing.assert_close(parts[0], whole[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(parts[1], whole[1], rtol=1e-5, atol=1e-6)


def test_no_tokens_and_only_ignored_tokens(device: torch.device, fused: ModuleType) -> None:
    weight = normal(50, 16, dtype=torch.float32, device=device, seed=2)
    for module in (reference, fused):
        for tokens in (0, 3):
            hidden = torch.ones(tokens, 16, device=device)
            target = torch.full((tokens,), reference.IGNORE, device=device)
            loss, dhidden, dweight = module.forward(hidden, weight, target, weight_gradient=True)
            assert loss.item() == 0
            assert dhidden.shape == (tokens, 16)
            assert not dhidden.any()
            assert not dweight.any()


def test_extreme_logits(device: torch.device, fused: ModuleType) -> None:
    for module in (reference, fused):
        logits = torch.tensor([[1e4, -1e4, 0.0], [float("-inf"), 0.0, 0.0]], device=device)
        nll = module.nll_and_gradient_(logits, torch.tensor([1, 2], device=device))
        torch.testing.assert_close(nll.cpu(), torch.tensor([2e4, 0.6931472]))
        torch.testing.assert_close(logits.cpu(), torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.5, -0.5]]))


def test_a_target_outside_the_vocabulary_gives_nan(device: torch.device, fused: ModuleType) -> None:
    for module in (reference, fused):
        for wrong in (3, -1):
            nll = module.nll_and_gradient_(torch.zeros(1, 3, device=device), torch.tensor([wrong], device=device))
            assert nll.isnan().all()


def test_what_does_not_apply_is_named(device: torch.device, fused: ModuleType) -> None:
    hidden, weight = torch.zeros(2, 4, device=device), torch.zeros(5, 4, device=device)
    with pytest.raises(KernelError, match=r"int64 \[N\]"):
        fused.forward(hidden, weight, torch.zeros(2, device=device, dtype=torch.int32))
    with pytest.raises(KernelError, match="one dtype"):
        fused.forward(hidden, weight.bfloat16(), torch.zeros(2, device=device, dtype=torch.int64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(("v == target, 1.0", "v == target + 1, 1.0"), id="target off by one in the gradient"),
        pytest.param(("start_ptr + target,", "start_ptr + target - 1,"), id="target off by one in the loss"),
        pytest.param(("total * tl.exp(most - above)", "total"), id="running sum not rescaled"),
        pytest.param(("tl.where(known, gradient, 0.0)", "gradient"), id="ignored tokens get a gradient"),
        pytest.param(("log_sum = largest + tl.log", "log_sum = tl.log"), id="maximum forgotten"),
    ],
)
def test_named_wrong_kernels_fail(edit, dtype, device, fused, tmp_path) -> None:  # type: ignore[no-untyped-def]
    wrong = mutant(fused, [edit, ("BLOCK_V = 4096", "BLOCK_V = 16")], tmp_path)
    assert run(wrong, (12, 32, 100, 5), dtype, device)


def test_several_blocks_of_the_vocabulary(device, fused, tmp_path) -> None:  # type: ignore[no-untyped-def]
    small = mutant(fused, [("BLOCK_V = 4096", "BLOCK_V = 16")], tmp_path)
    assert not run(small, (12, 32, 100, 5), torch.float32, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2500, 512, 32000, 2048), (300, 256, 128256, 256)])
def test_large(shape, dtype, fused) -> None:  # type: ignore[no-untyped-def]
    assert not run(fused, shape, dtype, torch.device("cuda"))
