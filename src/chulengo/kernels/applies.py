"""The one error of this package, and the checks that raise it.

A kernel that does not apply says so and stops: nothing falls back, copies or casts in silence. The message names
what was given, what is allowed, and what to call instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chulengo.errors import ChulengoError

if TYPE_CHECKING:
    from torch import Tensor


class KernelError(ChulengoError):
    """A kernel that does not apply to the tensors it was given."""


def need(condition: bool, given: str, *, allowed: str | None = None, next_step: str | None = None) -> None:
    """Raises `KernelError` unless `condition` holds."""
    if not condition:
        raise KernelError(given, allowed=allowed, next_step=next_step)


def need_rows(name: str, x: Tensor) -> None:
    """Raises `KernelError` unless the last dimension of `x` is contiguous; other strides are free."""
    need(
        x.shape[-1] <= 1 or x.stride(-1) == 1,
        f"{name} has strides {tuple(x.stride())} for shape {tuple(x.shape)}.",
        allowed="any strides with the last one 1",
        next_step=f"{name}.contiguous()",
    )


def need_same(name: str, x: Tensor, other_name: str, other: Tensor, *, shape: bool = True) -> None:
    """Raises `KernelError` unless both tensors have one dtype, device and (if `shape`) shape."""
    same = x.dtype == other.dtype and x.device == other.device and (not shape or x.shape == other.shape)
    need(
        same,
        f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}, "
        f"{other_name} is {tuple(other.shape)} {other.dtype} on {other.device}.",
        allowed="one dtype, one device" + (", one shape" if shape else ""),
    )
