"""Compiles some kernels ahead for compute capability 9.0 on a machine without a GPU, and says what came of it.

As `compile_for_hopper.py`, in a process of its own; the driver here also makes launchers, which only count. One JSON
object: how many kernels were compiled, launches during the work, launches and compilations of the same work afterwards,
hits of Triton's files when it compiles the same work by itself, whether the hook was restored after an error, threads.
"""

from __future__ import annotations

import json
import sys
import threading
from types import SimpleNamespace
from typing import Any

from compile_for_hopper import NamesItsTarget, kernel_calls
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from chulengo.kernels.fused import column_dot, dropout, fp8, fp8_adapter, launch, nf4, rms_norm, rope, swiglu
from chulengo.kernels.fused import linear_cross_entropy as loss
from chulengo.kernels.fused.compile_ahead import compiled_ahead

CASES = ("nf4 + adapter", "rms_norm backward", "dropout", "loss", "fp8 rank product")
MODULES = (column_dot, dropout, fp8, fp8_adapter, loss, nf4, rms_norm, rope, swiglu)


class Counts(NamesItsTarget):
    def __init__(self) -> None:
        self.launched: list[str] = []
        self.threads: set[str] = set()
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda name, kernel, shared, device: (name, name, 0, 0, 1024),
        )

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        self.threads.add(threading.current_thread().name)
        return lambda *arguments: self.launched.append(metadata.name)


def main() -> None:
    counts = Counts()
    driver.set_active(counts)
    launch.interpreted = lambda: True  # tensors are on the CPU, and are never touched

    def work() -> None:
        for tokens in (64, 50):
            calls = kernel_calls(tokens)
            for case in CASES:
                calls[case]()

    report: dict[str, Any] = {"compiled": compiled_ahead(work, 3), "launched at first": len(counts.launched)}
    report["threads"] = len(counts.threads)
    compiled: list[str] = []
    before = knobs.runtime.jit_post_compile_hook = lambda *, key, **_: compiled.append(key)
    work()
    report |= {"launched then": len(counts.launched), "compiled then": len(compiled)}
    report["compiled again"] = compiled_ahead(work, 3)
    hits: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    for module in MODULES:
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                value.device_caches.clear()
    work()
    report |= {"by itself": len(hits), "from files": sum(hits)}

    def ask(**_: Any) -> bool:
        return False

    def wrong() -> None:
        raise KeyError

    knobs.runtime.jit_cache_hook = ask
    try:
        compiled_ahead(wrong, 3)
    except KeyError:
        report["restored"] = knobs.runtime.jit_cache_hook is ask and knobs.runtime.jit_post_compile_hook is before
    print(json.dumps(report))


if __name__ == "__main__":
    sys.exit(main())
