"""Compiles every fused kernel for compute capability 9.0 on a machine without a GPU, and prints what came out.

The interpreter accepts what Triton's compiler does not (types that change in a loop, shapes that are no power of
two), and it says nothing of registers or of the width of memory accesses. A driver that only names its target is
enough to compile; nothing is launched. Run as a script, in a process of its own: the interpreter has to be off.

One JSON line a kernel: its name, the case, its PTX's widest stores, shared memory in bytes, and bytes spilled. With
numbers of tokens as arguments nothing is compiled: a line then has the number and the key under which Triton would
look for the compiled kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from chulengo.kernels.fused import column_dot, dropout, fp8, launch, nf4, rms_norm, rope, swiglu
from chulengo.kernels.fused import linear_cross_entropy as loss
from chulengo.kernels.reference.fp8 import ColumnTable, empty_copies
from chulengo.kernels.reference.nf4 import NF4Weight

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NamesItsTarget:
    """The part of a driver that compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def bf16(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


def e4m3(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float8_e4m3fn)


def weight(num_out: int, num_in: int) -> NF4Weight:
    blocks = num_out * num_in // 64
    eight = {"dtype": torch.uint8}
    return NF4Weight(
        torch.empty(num_out * num_in // 2, 1, **eight), torch.empty(blocks, **eight), torch.empty(16),
        (num_out, num_in), 64, torch.bfloat16, torch.empty(-(-blocks // 256)), torch.empty(256), torch.empty(()),
    )  # fmt: skip


def spilled(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    return max((int(n) for n in re.findall(r"STACK:(\d+)", text)), default=-1)


def kernel_calls(tokens: int) -> dict[str, Callable[[], Any]]:
    """Returns a call of every kernel, with this many tokens."""
    x, row, wide, matrix = bf16(tokens, 4096), bf16(4096), bf16(tokens, 22016), weight(256, 4096)
    gate, up = wide.chunk(2, 1)
    adapter = {"lora_a_RI": bf16(16, 4096), "lora_b_OR": bf16(256, 16)}
    tables = torch.empty(64, 64), torch.empty(64, 64), torch.zeros(tokens, dtype=torch.int64)
    return {
        "nf4": lambda: nf4.dequantize(matrix, torch.bfloat16),
        "nf4 + adapter": lambda: nf4.dequantize(matrix, torch.bfloat16, **adapter),
        "nf4 + adapter, rows scaled": lambda: nf4.dequantize(
            matrix, torch.bfloat16, **adapter, row_scale_O=torch.ones(256)
        ),
        "nf4 to fp8": lambda: nf4.dequantize_fp8(matrix, torch.ones(256), e4m3(256, 4096), transposed=False),
        "nf4 to fp8, transposed": lambda: nf4.dequantize_fp8(
            matrix, torch.ones(4096), e4m3(4096, 256), transposed=True
        ),
        "rms_norm": lambda: rms_norm.forward(x, x, row, 1e-5),
        "rms_norm backward": lambda: rms_norm.backward(x, x, x, row, torch.empty(tokens), weight_gradient=True),
        "swiglu": lambda: swiglu.forward(gate, up),
        "swiglu backward": lambda: swiglu.backward(bf16(tokens, 11008), gate, up, dgate_TI=gate, dup_TI=up),
        "dropout": lambda: dropout.forward(x, 0.1, torch.zeros(1, dtype=torch.int64), 5),
        "dropout of a gradient": lambda: dropout.add_(x, x, 2.0, 0.1, torch.zeros(1, dtype=torch.int64), 5),
        "dot of columns": lambda: column_dot.forward(gate, up, bf16(11008)),
        "rope": lambda: rope.forward(bf16(tokens, 32, 128), bf16(tokens, 8, 128), *tables),
        "loss": lambda: loss.nll_and_gradient_(bf16(tokens, 32000), torch.zeros(tokens, dtype=torch.int64)),
        "fp8 rows": lambda: fp8.quantize_rows(x),
        "fp8 norm": lambda: fp8.rms_norm_rows(x, x, row, 1e-5),
        "fp8 norm backward": lambda: fp8.rms_norm_backward_rows(x, x, x, row, torch.empty(tokens), 128),
        "fp8 norm backward of an unscaled product": lambda: fp8.rms_norm_backward_rows(
            x, x, x, row, torch.empty(tokens), 128, scales=(torch.empty(tokens, 1), torch.empty(4096, 1))
        ),
        "fp8 swiglu": lambda: fp8.swiglu_rows(gate, up),
        "fp8 swiglu backward": lambda: fp8.swiglu_backward_rows(
            bf16(tokens, 11008), gate, up, wide, bf16(tokens, 11008), 128
        ),
        "fp8 rope backward": lambda: fp8.rope_backward_rows(
            bf16(tokens, 32, 128), *[bf16(tokens, 8, 128)] * 2, *tables
        ),
        "fp8 rank product": lambda: fp8.rank_product(
            e4m3(tokens, 4224), torch.ones(tokens, 1), e4m3(48, 4096), torch.ones(48, 1), torch.ones(48), torch.bfloat16
        ),
        "fp8 rank product, 768 ranks": lambda: fp8.rank_product(
            e4m3(tokens, 5120), torch.ones(tokens, 1), e4m3(768, 4096), torch.ones(768, 1), torch.ones(768),
            torch.bfloat16,
        ),
        "fp8 copies of an adapter": lambda: fp8.copy_adapter(
            bf16(48, 4096), bf16(256, 16), ColumnTable(*[torch.zeros(48, dtype=torch.int32)] * 3), torch.ones(256, 1),
            torch.ones(4096, 1), 2.0, empty_copies(48, 4096, 256, torch.device("cpu")),
        ),
        "fp8 columns": lambda: fp8.set_columns(
            e4m3(tokens, 4224), torch.ones(tokens, 1), 4096, bf16(tokens, 48), torch.ones(48)
        ),
    }


def compile_all() -> None:
    plain_run, case = JITFunction.run, ""

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = plain_run(self, *args, grid=grid, warmup=True, **kwargs)
        stores = re.findall(r"st\.global[\w.:]*?(v4|v2)?\.b(\d+)", kernel.asm["ptx"])
        widest = max(int(count[1:] or 1) * int(size) // 8 if count else int(size) // 8 for count, size in stores)
        row = {"case": case, "kernel": self.fn.__name__, "store_bytes": widest, "shared": kernel.metadata.shared}
        print(json.dumps(row | {"spilled": spilled(kernel.asm["cubin"])}), flush=True)
        return kernel

    JITFunction.run = compile_only
    for case, run in kernel_calls(64).items():  # noqa: B007 - read by compile_only
        run()


def print_keys(numbers_of_tokens: list[int]) -> None:
    def print_key(*, key: str, fn: Any, **_: Any) -> bool:
        print(json.dumps({"case": case, "tokens": tokens, "kernel": fn.name, "key": key}), flush=True)
        return True  # it is not compiled

    knobs.runtime.jit_cache_hook = print_key
    for tokens in numbers_of_tokens:
        for case, run in kernel_calls(tokens).items():  # noqa: B007 - read by print_key
            run()


def main() -> None:
    driver.set_active(NamesItsTarget())
    launch.interpreted = lambda: True  # tensors are on the CPU, and are never touched
    if len(sys.argv) > 1:
        print_keys([int(number) for number in sys.argv[1:]])
    else:
        compile_all()


if __name__ == "__main__":
    sys.exit(main())
