"""The conversion to e4m3 that all kernels which write it share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_e4m3(x, LARGEST: tl.constexpr):
    """x.clamp(-448, 448).to(e4m3); NaN stays NaN, which the run must see: plain minima and maxima would drop it."""
    x = tl.maximum(x, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return x.to(tl.float8e4nv)
