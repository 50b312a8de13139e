"""Mends Triton's interpreter where it computes something else than the GPU.

Seen in Triton 3.6: float32 to bfloat16 cuts the low bits off instead of rounding to nearest even, float8
likewise, a product of bfloat16 tiles multiplies their bit patterns, and loop bounds that are kernel arguments stop it
under NumPy 2.4. Without this a bfloat16 kernel cannot be compared with anything. PyTorch's own conversions take the
place of the interpreter's.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH_TYPES = {
    "fp32": (torch.float32, np.float32),
    "fp64": (torch.float64, np.float64),
    "fp16": (torch.float16, np.float16),
    "bf16": (torch.bfloat16, np.uint16),
    "fp8e4nv": (torch.float8_e4m3fn, np.uint8),
    "fp8e5": (torch.float8_e5m2, np.uint8),
}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    """Returns `data`, in the interpreter's storage of `source`, rounded to nearest even as storage of `target`."""
    (from_type, _), (to_type, storage) = TORCH_TYPES[source.scalar.name], TORCH_TYPES[target.scalar.name]
    bits = torch.from_numpy(np.ascontiguousarray(data).reshape(-1).view(f"i{data.dtype.itemsize}").copy())
    result = bits.view(from_type).to(to_type).view(INTEGERS[to_type.itemsize])
    return result.numpy().view(storage).reshape(data.shape)


def mend_interpreter() -> None:
    """Replaces the interpreter's conversions between floats, its dot, and its conversion of a scalar to int."""
    builder = interpreter.InterpreterBuilder
    plain_cast = builder.cast_impl

    def cast(self, src, dst_type):  # type: ignore[no-untyped-def]
        source, target = src.dtype.scalar, dst_type.scalar
        if source.name in TORCH_TYPES and target.name in TORCH_TYPES:
            return interpreter.TensorHandle(convert(src.data, source, target), target)
        return plain_cast(self, src, dst_type)

    def fp_to_fp(self, src, dst_type, rounding_mode):  # type: ignore[no-untyped-def]
        return cast(self, src, dst_type)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
        left, right = (convert(t.data, t.dtype, tl.float32) for t in (a, b))
        return interpreter.TensorHandle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    builder.cast_impl = cast
    builder.create_fp_to_fp = fp_to_fp
    builder.create_dot = dot
    # the aliases were bound to the old function when the class was made
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, lambda self, src, dst_type: cast(self, src, dst_type))
    plain_patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope) -> None:  # type: ignore[no-untyped-def]
        plain_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor
