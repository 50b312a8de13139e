"""All of an adapter's A and B in one float32 tensor, and all their gradients in another.

An adapter of Llama 2 7B on all maps is 448 tensors of some 10,000 to 700,000 numbers. An optimiser that visits them
one by one spends its time on the host: bitsandbytes' 8-bit AdamW took 46 ms a step for kernels of 3 ms (H200). Of one
tensor it is one kernel; so are the gradients' norm, their clipping and their exchange between processes.

The tensors that PEFT's files name stay what they were, `nn.Parameter`s with a `grad`; their memory is a part of the
flat one. AdamW treats every number alone, so flat and separate updates are the same; 8-bit states have their scales
over blocks of 256 numbers, which may here span two tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn


class FlatFactors:
    """The trainable factors of a model as one parameter."""

    def __init__(self, factors: Sequence[nn.Parameter]) -> None:
        """Moves the factors' values into one tensor, of which they become parts.

        Args:
            factors: float32, on one device; at least one.
        """
        self.factors = list(factors)
        values = torch.cat([factor.detach().flatten() for factor in self.factors])
        self.parameter = nn.Parameter(values)
        for factor, part in zip(self.factors, self.parts_of(values), strict=True):
            factor.data = part

    def attach_gradients(self) -> None:
        """Gives every factor its part of the flat gradient to add to, zeros unless gradients are there already.

        Either way of clearing is seen: the flat parameter's gradient set to None, or the factors'.
        """
        whole = self.parameter.grad
        if whole is not None and self.factors[0].grad is not None:
            return
        # not zeroed in place: whoever still holds the old gradient keeps it, as everywhere in PyTorch
        self._set(torch.zeros_like(self.parameter))

    def add_gradients(self, gradient: torch.Tensor, factor: torch.Tensor) -> None:
        """Adds a flat gradient times a factor [] to what is there; where nothing is, it becomes the gradient itself."""
        if self.parameter.grad is None or self.factors[0].grad is None:
            self._set(gradient.mul_(factor))
        else:
            self.parameter.grad.addcmul_(gradient, factor)

    @contextlib.contextmanager
    def gradients_in(self, gradient: torch.Tensor) -> Iterator[None]:
        """Lets a backward inside the block add to a flat tensor instead of to the parameters' gradient."""
        before = [factor.grad for factor in self.factors]
        for factor, part in zip(self.factors, self.parts_of(gradient), strict=True):
            factor.grad = part
        try:
            yield
        finally:
            for factor, grad in zip(self.factors, before, strict=True):
                factor.grad = grad

    def release(self, gradient: torch.Tensor | None) -> None:
        """Makes sure that a tensor may be overwritten: if it is the parameters' gradient, a copy takes its place."""
        if gradient is not None and self.parameter.grad is not None and self.parameter.grad.is_set_to(gradient):
            self._set(gradient.clone())

    def parts_of(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """Returns the part of a flat tensor that belongs to each factor, in its shape."""
        parts = torch.split(whole.detach(), [factor.numel() for factor in self.factors])
        return [part.view(factor.shape) for part, factor in zip(parts, self.factors, strict=True)]

    def _set(self, gradient: torch.Tensor) -> None:
        self.parameter.grad = gradient
        for factor, part in zip(self.factors, self.parts_of(gradient), strict=True):
            factor.grad = part
