"""Times every fused kernel beside plain PyTorch and beside its floor, on the shapes of Llama-2-7B.

The floor of an operation is the larger of two times: its bytes (each input read once, each output written once) at
this machine's copy speed, and its operations at this machine's bfloat16 product speed; both are measured first. Every
result is checked before it is timed. Medians of many runs with the L2 cache cleared between them; p20 and p80 go into
the JSON lines, with the memory each version takes on top of its inputs.

    PYTHONPATH=src python benchmarks/kernels.py                 # all, under four minutes on an H200
    PYTHONPATH=src python benchmarks/kernels.py --only nf4 rope
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chulengo.kernels.reference import fp8 as fp8_reference
from chulengo.kernels.reference import linear_cross_entropy as loss_reference
from chulengo.kernels.reference import nf4 as nf4_reference
from chulengo.kernels.reference import rms_norm as norm_reference
from chulengo.kernels.reference import rope as rope_reference

DEVICE = "cuda"
HIDDEN, WIDE, HEADS, VOCABULARY, RANK = 4096, 11008, 32, 32000, 16
CASE_SECONDS, ALL_SECONDS = 40, 225
TOLERANCE = 1e-2  # rel-L2, bfloat16; NF4 and plain FP8 rows have to be bit-equal


@dataclass(frozen=True)
class Case:
    """One operation on one shape: what to run, what to compare, and what it has to move and compute."""

    name: str
    fused: Callable[[], Any]
    plain: Callable[[], Any]
    num_bytes: float
    num_flops: float = 0.0
    tolerance: float = TOLERANCE
    expected: Callable[[], Any] | None = None  # for plain code whose result has another form


def bf16(*shape: int, scale: float = 1.0) -> Tensor:
    """Returns normal values in bfloat16 on the GPU."""
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16) * scale


def flat(result: Any) -> list[Tensor]:
    """Returns the tensors of a result, nested or not, without the missing ones."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result if part is not None for t in flat(part)]


def check(case: Case) -> float:
    """Returns the largest relative L2 difference of the fused result from the expected one; raises above tolerance."""
    got, want = flat(case.fused()), flat((case.expected or case.plain)())
    assert len(got) == len(want), (len(got), len(want))
    worst = 0.0
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape, (g.shape, w.shape)
        if case.tolerance == 0:
            assert torch.equal(g.view(torch.uint8), w.view(torch.uint8)), f"{case.name}: not bit-equal"
            continue
        error = ((g.float() - w.float()).norm() / w.float().norm().clamp(min=1e-30)).item()
        assert error <= case.tolerance, f"{case.name}: rel-L2 {error:.2e}"
        worst = max(worst, error)
    return worst


def timed(run: Callable[[], Any]) -> tuple[list[float], int]:
    """Returns p20, p50, p80 in microseconds, and the bytes allocated above what was there before."""
    from triton.testing import do_bench

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    milliseconds = do_bench(run, warmup=15, rep=60, quantiles=[0.2, 0.5, 0.8])
    return [round(1000 * ms, 2) for ms in milliseconds], peak


def machine_speed() -> tuple[float, float]:
    """Returns copy bandwidth (bytes read plus written, a second) and the rate of a large bfloat16 product (FLOP/s)."""
    source = torch.randn(2**28, device=DEVICE)
    target = torch.empty_like(source)
    (_, copy_us, _), _ = timed(lambda: target.copy_(source))
    x, w = bf16(8192, HIDDEN), bf16(WIDE, HIDDEN)
    (_, product_us, _), _ = timed(lambda: x @ w.t())
    return 2 * source.numel() * 4 / copy_us * 1e6, 2 * 8192 * HIDDEN * WIDE / product_us * 1e6


def nf4_cases(tokens: int) -> Iterator[Case]:
    """NF4 to bfloat16, plain, with an adapter, and to FP8."""
    from chulengo.kernels.fused import nf4

    try:
        from bitsandbytes import functional
    except ImportError:
        functional = None
    for num_out, num_in in ((HIDDEN, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE)):
        for double_quant in (True, False):
            weight = nf4_reference.quantize(bf16(num_out, num_in, scale=0.02), double_quant=double_quant)
            size, out = num_out * num_in, torch.empty(num_out, num_in, dtype=torch.bfloat16, device=DEVICE)
            plain = lambda w=weight: nf4_reference.dequantize(w, torch.bfloat16)  # noqa: E731
            versus = plain
            if functional is not None:
                packed, state = functional.quantize_4bit(
                    plain(), compress_statistics=double_quant, quant_type="nf4"
                )
                versus = lambda p=packed, s=state: functional.dequantize_4bit(p, s)  # noqa: E731
            label = f"nf4 {num_out}x{num_in}{'' if double_quant else ' single'}"
            fused = lambda w=weight, o=out: nf4.dequantize(w, torch.bfloat16, out=o)  # noqa: E731
            moved = weight.num_bytes() + 2 * size
            yield Case(label, fused, versus, moved, tolerance=0, expected=plain)
            if not double_quant:
                continue
            a, b = bf16(RANK, num_in, scale=0.02), bf16(num_out, RANK, scale=0.02)
            adapter = {"lora_a_RI": a, "lora_b_OR": b, "lora_scale": 2.0}
            yield Case(
                f"nf4+lora {num_out}x{num_in}",
                lambda w=weight, o=out, d=adapter: nf4.dequantize(w, torch.bfloat16, out=o, **d),
                lambda v=versus, a=a, b=b: torch.addmm(v(), b, a, alpha=2.0),
                moved,
                expected=lambda w=weight, d=adapter: nf4_reference.dequantize(w, torch.bfloat16, **d),
            )
            scales = nf4_reference.fp8_scales(weight)
            for transposed in (False, True):
                shape = (num_in, num_out) if transposed else (num_out, num_in)
                copy = torch.empty(shape, dtype=torch.float8_e4m3fn, device="cuda")
                options = {"transposed": transposed}
                yield Case(
                    f"nf4->fp8{' transposed' if transposed else ''} {num_out}x{num_in}",
                    lambda w=weight, s=scales[transposed], c=copy, o=options: nf4.dequantize_fp8(w, s, c, **o) or c,
                    lambda w=weight, s=scales[transposed], c=copy, o=options: (
                        nf4_reference.dequantize_fp8(w, s, c, **o) or c.clone()
                    ),
                    weight.num_bytes() + size,
                    tolerance=0,
                )


def norm_cases(tokens: int) -> Iterator[Case]:
    """RMSNorm with residual, forward and backward, and into FP8."""
    from chulengo.kernels.fused import fp8, rms_norm

    x, residual, dy, dsum = (bf16(tokens, HIDDEN) for _ in range(4))
    weight = bf16(HIDDEN)

    def llama() -> tuple[Tensor, Tensor]:
        total = residual + x
        wide = total.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16(), total

    size = 2 * tokens * HIDDEN
    yield Case("rms_norm", lambda: rms_norm.forward(x, residual, weight, 1e-5)[:2], llama, 4 * size)
    leaf = x.clone().requires_grad_()
    wide = leaf.float()
    y = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16()
    _, _, rstd = norm_reference.forward(x, None, weight, 1e-5)

    def by_autograd() -> Tensor:
        return torch.autograd.grad(y, leaf, dy, retain_graph=True)[0] + dsum

    yield Case("rms_norm backward", lambda: rms_norm.backward(dy, dsum, x, weight, rstd)[0], by_autograd, 4 * size)
    yield Case(
        "rms_norm->fp8",
        lambda: fp8.rms_norm_rows(x, residual, weight, 1e-5)[:4],
        lambda: (*fp8_reference.quantize_rows(llama()[0]), *llama()),
        4.5 * size,
    )
    yield Case(
        "rms_norm backward->fp8",
        lambda: fp8.rms_norm_backward_rows(dy, dsum, x, weight, rstd),
        lambda: (*fp8_reference.quantize_rows(dx := by_autograd()), dx),
        4.5 * size,
    )
    yield Case(
        "fp8 rows", lambda: fp8.quantize_rows(x), lambda: fp8_reference.quantize_rows(x), 1.5 * size, tolerance=1e-6
    )


def swiglu_cases(tokens: int) -> Iterator[Case]:
    """SwiGLU forward, backward with the product again, and into FP8."""
    from chulengo.kernels.fused import fp8, swiglu

    both, dproduct = bf16(tokens, 2 * WIDE), bf16(tokens, WIDE)
    gate, up = both.chunk(2, dim=1)
    size = 2 * tokens * WIDE
    silu = torch.nn.functional.silu
    yield Case("swiglu", lambda: swiglu.forward(gate, up), lambda: silu(gate) * up, 3 * size)
    gradients, product = torch.empty_like(both), torch.empty_like(dproduct)
    other_gradients, other = torch.empty_like(both), torch.empty_like(dproduct)
    dgate, dup = gradients.chunk(2, dim=1)

    def fused() -> list[Tensor]:
        swiglu.backward(dproduct, gate, up, dgate_TI=dgate, dup_TI=dup, product_TI=product)
        return [dgate, dup, product]

    leaves = [t.detach().clone().requires_grad_() for t in (gate, up)]
    result = silu(leaves[0]) * leaves[1]

    def by_autograd() -> list[Tensor]:
        return [*torch.autograd.grad(result, leaves, dproduct, retain_graph=True), silu(gate) * up]

    yield Case("swiglu backward+product", fused, by_autograd, 6 * size)
    yield Case(
        "swiglu->fp8",
        lambda: fp8.swiglu_rows(gate, up),
        lambda: fp8_reference.quantize_rows(silu(gate) * up),
        3.5 * size,
        expected=lambda: fp8_reference.swiglu_rows(gate, up),
    )
    yield Case(
        "swiglu backward+product->fp8",
        lambda: (*fp8.swiglu_backward_rows(dproduct, gate, up, gradients, product), gradients, product),
        lambda: (*fp8_reference.quantize_rows(torch.cat(by_autograd()[:2], 1)), *by_autograd()),
        7 * size,
        expected=lambda: (
            *fp8_reference.swiglu_backward_rows(dproduct, gate, up, other_gradients, other), other_gradients, other
        ),
    )  # fmt: skip


def rope_cases(tokens: int) -> Iterator[Case]:
    """Rotary embedding of q and k that lie in one [T, 3D] tensor."""
    from chulengo.kernels.fused import rope

    packed = bf16(tokens, 3 * HEADS, HIDDEN // HEADS)
    q, k, _ = packed.chunk(3, dim=1)
    position = torch.arange(tokens, device=DEVICE) % 2048
    cos, sin = rope_reference.tables(2048, HIDDEN // HEADS, device=DEVICE)
    wide_cos, wide_sin = (torch.cat((t, t), -1)[position][:, None].bfloat16() for t in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * wide_cos + torch.cat((-b, a), -1) * wide_sin

    fused = lambda: rope.forward(q, k, cos, sin, position)  # noqa: E731
    yield Case("rope", fused, lambda: (turned(q), turned(k)), 8 * tokens * HIDDEN)


def loss_cases(tokens: int) -> Iterator[Case]:
    """The softmax part over one chunk, and the whole head and loss with gradient."""
    from chulengo.kernels.fused import linear_cross_entropy as fused

    target, chunk = torch.randint(0, VOCABULARY, (tokens,), device=DEVICE), min(2048, tokens)
    logits = bf16(chunk, VOCABULARY)
    buffers = {fused: torch.empty_like(logits), loss_reference: torch.empty_like(logits)}

    def in_place(module: Any) -> tuple[Tensor, Tensor]:
        buffers[module].copy_(logits)
        return module.nll_and_gradient_(buffers[module], target[:chunk]), buffers[module]

    # both versions copy the logits first (4 bytes each), because they overwrite them
    num_bytes = 8 * logits.numel()
    yield Case("copy+softmax+loss chunk", lambda: in_place(fused), lambda: in_place(loss_reference), num_bytes)
    hidden, weight = bf16(tokens, HIDDEN), bf16(VOCABULARY, HIDDEN, scale=HIDDEN**-0.5)
    leaf = hidden.clone().requires_grad_()

    def usual() -> tuple[Tensor, Tensor]:
        loss = torch.nn.functional.cross_entropy((leaf @ weight.t()).float(), target, reduction="sum")
        return loss, torch.autograd.grad(loss, leaf)[0]

    whole = lambda: fused.forward(hidden, weight, target)[:2]  # noqa: E731
    yield Case("head+loss", whole, usual, 2 * weight.numel(), 4 * tokens * HIDDEN * VOCABULARY)


GROUPS: dict[str, Callable[[int], Iterator[Case]]] = {
    "nf4": nf4_cases,
    "norm": norm_cases,
    "swiglu": swiglu_cases,
    "rope": rope_cases,
    "loss": loss_cases,
}


@contextlib.contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raises `TimeoutError` in the body after `seconds`."""

    def stop(_signal: int, _frame: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def facts() -> dict[str, str]:
    """Returns what a recorded number has to carry."""
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    found = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    try:
        import bitsandbytes

        found["bitsandbytes"] = bitsandbytes.__version__
    except ImportError:
        found["bitsandbytes"] = "absent"
    found |= {"cuda": str(torch.version.cuda), "commit": commit or "unknown", "generator": "benchmarks/kernels.py"}
    return found | {"gpu": torch.cuda.get_device_name(), "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def measure(case: Case, bandwidth: float, rate: float) -> dict[str, Any]:
    """Returns one row: error, times, floor and memory of a case."""
    error = check(case)
    fused_us, fused_peak = timed(case.fused)
    plain_us, plain_peak = timed(case.plain)
    floor_us = 1e6 * max(case.num_bytes / bandwidth, case.num_flops / rate)
    return {
        "op": case.name,
        "rel_l2": error,
        "fused_us": fused_us,
        "plain_us": plain_us,
        "floor_us": round(floor_us, 2),
        "fused_peak_bytes": fused_peak,
        "plain_peak_bytes": plain_peak,
    }


def show(row: dict[str, Any]) -> None:
    """Prints one line of the table."""
    fused, plain, floor = row["fused_us"][1], row["plain_us"][1], row["floor_us"]
    print(
        f"{row['op']:26s} {fused:9.1f} {plain:9.1f} {floor:9.1f} {floor / fused:7.0%} {plain / fused:7.2f}x "
        f"{row['fused_peak_bytes'] / 2**20:8.0f} {row['plain_peak_bytes'] / 2**20:8.0f}  {row['rel_l2']:.1e}",
        flush=True,
    )


def main() -> int:
    """Runs the chosen groups, prints a table and appends the rows; returns the number of failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    deadline = time.monotonic() + ALL_SECONDS
    bandwidth, rate = machine_speed()
    shared = facts() | {"tokens": arguments.tokens, "copy_tb_s": round(bandwidth / 1e12, 3)}
    shared |= {"bf16_tflop_s": round(rate / 1e12, 1)}
    print(" ".join(f"{key}={value}" for key, value in shared.items()))
    print(f"{'op':26s} {'fused us':>9s} {'plain us':>9s} {'floor us':>9s} {'floor':>7s} {'speed-up':>8s} {'MiB':>8s} "
          f"{'plain':>8s}  rel-L2")  # fmt: skip
    rows, failures = [], 0
    for name in arguments.only:
        cases = GROUPS[name](arguments.tokens)
        while True:
            left = int(deadline - time.monotonic())
            if left < 5:
                print(f"{name}: no time left of {ALL_SECONDS} s")
                failures += 1
                break
            try:
                with limit(min(CASE_SECONDS, left)):
                    case = next(cases, None)
                    if case is None:
                        break
                    row = measure(case, bandwidth, rate)
            except Exception as error:  # noqa: BLE001 - one kernel that fails must not cost the other measurements
                print(f"{name}: FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
                failures += 1
                if getattr(cases, "gi_frame", None) is None:  # the generator itself broke: its other cases are gone
                    break
                continue
            rows.append(row)
            show(row)
        torch.cuda.empty_cache()
    folder = arguments.out / shared["gpu"].lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "kernels.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row | shared) + "\n" for row in rows)
    print(f"{len(rows)} rows appended to {folder / 'kernels.jsonl'}, {failures} failures")
    return failures


if __name__ == "__main__":
    sys.exit(main())
