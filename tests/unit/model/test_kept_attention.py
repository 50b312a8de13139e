"""Attention whose output waits elsewhere gives the gradients of an attention that kept everything, bit for bit."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from chulengo.kernels import ops
from chulengo.model.kept_attention import KeptAttention

ENDS = torch.tensor([0, 40, 41, 97], dtype=torch.int32)


def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
    return ops.packed_attention(q_TNH, k_TKH, v_TKH, ENDS, 56)


def inputs(*, stacked: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """4 query heads, 2 key heads: parts of one product's result as in a layer, or tensors of their own."""
    values = torch.randn(97, 8, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    parts = torch.split(values, [4, 2, 2], dim=1)
    q, k, v = parts if stacked else [part.contiguous() for part in parts]
    return q, k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stacked", [True, False])
def test_the_gradients_are_those_of_one_pass(stacked: bool, dtype: torch.dtype) -> None:
    da = torch.randn(97, 4, 16, generator=torch.Generator().manual_seed(4)).to(dtype)
    plain = [x.detach().requires_grad_() for x in inputs(stacked=stacked, dtype=dtype)]
    expected = attend(*plain)
    expected.backward(da)

    call = KeptAttention()
    a, kept = call.forward(attend, *inputs(stacked=stacked, dtype=dtype))
    assert torch.equal(a, expected)
    assert not a.requires_grad
    elsewhere = [x.clone() for x in kept]
    for x in (a, *kept):
        x.fill_(torch.nan)  # nothing of the first forward's memory is read again
    again = [x.detach().requires_grad_() for x in inputs(stacked=stacked, dtype=dtype)]
    output = call.again(elsewhere, *again)
    assert torch.equal(output, expected)
    output.backward(da)
    for found, one_pass in zip(again, plain, strict=True):
        assert torch.equal(found.grad, one_pass.grad)


def test_queries_keys_and_values_are_not_held() -> None:
    """They are the largest part, and are computed again: between the passes nobody may keep them alive."""
    q, k, v = inputs(stacked=True)
    call = KeptAttention()
    _, kept = call.forward(attend, q, k, v)
    storage = weakref.ref(q.untyped_storage())
    assert all(x.untyped_storage().data_ptr() != q.untyped_storage().data_ptr() for x in kept)
    held = [weakref.ref(x) for x in (q, k, v)]
    del q, k, v
    gc.collect()
    assert [each() for each in held] == [None] * 3
    assert storage() is None


def test_what_is_given_out_is_whole() -> None:
    _, kept = KeptAttention().forward(attend, *inputs(stacked=True))
    assert all(x.is_contiguous() and x.dim() == 1 and not x.requires_grad for x in kept)
    assert sum(x.numel() for x in kept) >= 97 * 4 * 16


def test_other_queries_give_other_gradients() -> None:
    da = torch.ones(97, 4, 16)
    found = []
    for factor in (1.0, 1.1):
        call = KeptAttention()
        _, kept = call.forward(attend, *inputs(stacked=False))
        again = [(factor * x).detach().requires_grad_() for x in inputs(stacked=False)]
        call.again(kept, *again).backward(da)
        found.append(again[1].grad)
    assert not torch.equal(*found)


def test_another_layout_is_refused() -> None:
    call = KeptAttention()
    _, kept = call.forward(attend, *inputs(stacked=True))
    with pytest.raises(AssertionError, match="laid out"):
        call.again(kept, *inputs(stacked=False))


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_of_a_call_without_its_backward(fails: bool) -> None:
    """A backward that is broken off, or never comes, must not hold memory: the run may go on leaner."""
    q, k, v = inputs(stacked=True)
    call = KeptAttention()
    _, kept = call.forward(attend, q, k, v)
    # after an error some nodes of autograd's stay, and the empty exchange with them
    gone = [weakref.ref(x) for x in (kept if fails else (call._exchange, *kept))]
    if fails:
        lost = list(kept)
        output = call.again(lost, *(x.detach().requires_grad_() for x in inputs(stacked=True)))
        lost.clear()
        raised = False
        try:  # not `pytest.raises`, which holds the error, and that its frames
            output.backward(torch.ones(97, 4, 16))
        except IndexError:
            raised = True
        assert raised
        del output
    del q, k, v, kept, call
    gc.collect()
    assert [each() for each in gone] == [None] * len(gone)
