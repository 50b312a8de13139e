"""Compiles the kernels of some work side by side, instead of each where it is launched first.

Triton compiles a kernel at its first launch: Python that makes its code, LLVM, `ptxas`, and `gcc` for the C function
that launches it. One after the other, that is most of a run's first step.

The work is run once with Triton's `jit_cache_hook`, which is asked before a kernel is compiled and can say no; the
launch is then left out. What the hook is given is what `JITFunction.preload` takes, and preload leaves the kernel under
the key under which the next launch looks for it. It runs in threads: LLVM lets go of Python's lock, `ptxas` and `gcc`
are processes. (Triton's `AsyncCompileMode` has threads too, but a launch waits for its own kernel there.)

Nothing is compiled before the work is over: a launch that found a kernel while a thread loads it would fail.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import triton

from chulengo.kernels.fused.launch import interpreted


def compiled_ahead(work: Callable[[], None], workers: int) -> int:
    """Compiles for the current device what `work` launches and is not compiled yet; returns how many kernels that were.

    Args:
        work: runs once, and without those kernels: what they would write is whatever memory held. It must not choose by
            such values, nor take them for places. Not run where Triton interprets.
        workers: threads.
    """
    if interpreted():
        return 0
    found = {}

    def note(*, key, fn, compile, **_) -> bool:
        found[fn.jit_function, key] = compile["specialization_data"]
        return True  # neither compiled nor launched

    runtime = triton.knobs.runtime
    before, runtime.jit_cache_hook = runtime.jit_cache_hook, note
    try:
        work()
    finally:
        runtime.jit_cache_hook = before
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def compile_one(function, data: str) -> None:
        if device is not None:
            torch.cuda.set_device(device)  # every thread has its own
        kernel = function.preload(data)
        if kernel is not None:
            kernel.run  # noqa: B018 - builds what launches it, and loads it

    with ThreadPoolExecutor(max(1, min(workers, len(found)))) as pool:
        waiting = [pool.submit(compile_one, function, data) for (function, _), data in found.items()]
        for done in waiting:
            done.result()
    return len(found)
