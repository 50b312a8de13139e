"""What every fused kernel asks before it launches: a device that runs Triton, and block sizes.

Triton compiles for CUDA devices. With `TRITON_INTERPRET=1`, set before Triton is imported, its interpreter runs the
same kernels on CPU tensors, slowly: the tests use that, nothing else does.

Triton compiles a kernel again for an int argument that is 1, or that is a multiple of 16 where none was before. Sizes
of the model are meant to be known so, for wide loads. The number of rows changes from batch to batch: kernels that
take it say `do_not_specialize=["num_rows"]`, and compile once.
"""

from __future__ import annotations

import functools

import torch
import triton

from chulengo.kernels.applies import need
from chulengo.kernels.limits import LARGEST_ROW, REFERENCE_ENGINE

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Returns whether kernels run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


def need_launchable(x: torch.Tensor) -> None:
    """Raises `KernelError` unless a Triton kernel can be launched on the device of `x`."""
    if interpreted():
        return
    need(
        x.is_cuda,
        f"A fused kernel was asked for a tensor on {x.device}.",
        allowed="CUDA devices",
        next_step="backend='reference'",
    )
    # Triton launches on the current device, wherever the pointers point
    need(
        x.device.index == torch.cuda.current_device(),
        f"The tensor is on {x.device}, the current device is cuda:{torch.cuda.current_device()}.",
        next_step="torch.cuda.set_device(...) before the call",
    )


def shared_bytes(x: torch.Tensor) -> int:
    """Returns the shared memory that one program may use on the device of `x`: 227 KiB on Hopper, 99 on Ada."""
    return _shared_bytes(x.device.index) if x.is_cuda else 227 << 10  # interpreted


@functools.cache  # asked some 500 times a step
def _shared_bytes(device: int) -> int:
    most: int = triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]
    return most


def need_float(name: str, x: torch.Tensor) -> None:
    """Raises `KernelError` unless `x` is float32, bfloat16 or float16."""
    need(x.dtype in FLOATS, f"{name} is {x.dtype}.", allowed="float32, bfloat16, float16")


def row_block(width: int, most: int = LARGEST_ROW) -> int:
    """Returns the power of two that holds a whole row of `width` elements; raises where it is above `most`."""
    block = triton.next_power_of_2(max(width, 1))
    need(block <= most, f"A row of {width} elements is too wide for one program.", allowed=f"at most {most}",
         next_step=REFERENCE_ENGINE)
    return block


def row_warps(block: int) -> int:
    """Returns how many warps share a row: 16 elements a thread, two 16-byte loads of a 16-bit type; at most 16."""
    return max(1, min(16, block // (32 * 16)))
