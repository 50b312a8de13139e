"""Data-parallel training on two GPUs against one, on one machine: speed, steadiness, and the same losses.

The same command with and without `torchrun`, in turn (1, 2, 1, 2), so that a machine that warms up favours nobody. A
step of two processes has twice the tokens of a step of one; the ratio is of tokens a second, over the steps after the
first few. Then one process takes the two processes' steps, with twice the micro-batches: its losses must be theirs, to
the rounding of bfloat16 sums.

    python benchmarks/peers.py --make /tmp/7b --tokenizer TOKENIZER
    python benchmarks/two_gpus.py --model /tmp/7b/nf4 --data guanaco.parquet --out two_gpus.jsonl
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from commands import CHULENGO, append, circumstances, guarded, metric_rows, settings

LOSS_TOLERANCE = 2e-3  # relative; bf16 sums in another order, through a few updates


def train(arguments: argparse.Namespace, processes: int, *, accumulation: int = 1, steps: int) -> dict[str, Any]:
    """Returns how a run of so many processes went."""
    launcher = CHULENGO
    if processes > 1:
        count = f"--nproc_per_node={processes}"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", count, "-m", "chulengo"]
    words = settings(
        training__max_seq_tokens=arguments.seq, training__overlong="drop", training__batching="packed",
        training__batch_size=arguments.batch, training__gradient_accumulation=accumulation,
        training__optimizer=arguments.optimizer, training__max_steps=steps, lora__rank=arguments.rank,
        data__validation_fraction=0,
    )  # fmt: skip
    if arguments.cpu:
        words += settings(model__device="cpu", model__cpu_threads=1)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [*launcher, "train", "--model", arguments.model, "--data", arguments.data, "--out", str(out)]
        ended = guarded([*command, *words], arguments.seconds)
        rows = [row for row in metric_rows(out) if row["kind"] == "train"]
    timed = rows[arguments.warm :]
    found: dict[str, Any] = {
        "processes": processes, "accumulation": accumulation, "ok": ended.ok, "seconds": ended.seconds,
        "why": None if ended.ok else ended.why(), "steps": len(rows), "losses": [row["loss"] for row in rows],
        "step_s": [round(row["step_s"], 4) for row in rows], "step_tokens": [row["tokens"] for row in rows],
        "peak_bytes": max((row["peak_bytes"] for row in rows), default=None),
    }  # fmt: skip
    if len(timed) > 1:
        speeds = sorted(row["tokens"] / row["step_s"] for row in timed)
        found["tokens_per_s"] = sum(row["tokens"] for row in timed) / sum(row["step_s"] for row in timed)
        found["tokens_per_s_p20_p50_p80"] = [round(speeds[int(q * (len(speeds) - 1))]) for q in (0.2, 0.5, 0.8)]
    return found


def show(row: dict[str, Any]) -> None:
    """Prints one run."""
    if "tokens_per_s" not in row:
        print(f"{row['processes']} processes: {row['steps']} steps in {row['seconds']} s, {row['why'] or 'ran'}",
              flush=True)  # fmt: skip
        return
    low, middle, high = row["tokens_per_s_p20_p50_p80"]
    print(f"{row['processes']} processes: {row['tokens_per_s']:,.0f} tokens/s after warm-up; by step p20 {low:,} "
          f"p50 {middle:,} p80 {high:,}; {row['steps']} steps, {row['seconds']} s in all"
          f"{'' if row['ok'] else ', then FAILED: ' + row['why']}", flush=True)  # fmt: skip


def compared(rows: list[dict[str, Any]], many: int) -> str:
    """Returns the ratio of many processes to one: of each pair of runs, and of the medians of their steps."""
    ones, others = ([row for row in rows if row["processes"] == n and "tokens_per_s" in row] for n in (1, many))
    if not ones or not others:
        return "no ratio: runs are missing"
    pairs = [two["tokens_per_s"] / one["tokens_per_s"] for one, two in zip(ones, others, strict=False)]
    medians = [statistics.median(row["tokens_per_s_p20_p50_p80"][1] for row in group) for group in (ones, others)]
    return (f"{many} GPUs over one: {', '.join(f'{ratio:.3f}' for ratio in pairs)} in {len(pairs)} pairs of runs; "
            f"{medians[1] / medians[0]:.3f} by the median step")  # fmt: skip


def same_losses(one: dict[str, Any], two: dict[str, Any]) -> str:
    """Returns how far the losses of the first steps are from each other."""
    pairs = list(zip(one["losses"], two["losses"], strict=False))
    if not pairs:
        return "losses: not compared, a run is missing"
    far = max(abs(a - b) / abs(b) for a, b in pairs)
    said = "the same" if far <= LOSS_TOLERANCE else "DIFFERENT"
    return (f"losses of the first {len(pairs)} steps, one process with {one['accumulation']} micro-batches and "
            f"{two['processes']} processes: {said}, at most {far:.1e} relative apart (allowed {LOSS_TOLERANCE:.0e})")


def main() -> None:
    """Runs all, appends a row for each run and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("two_gpus.jsonl"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="pairs of runs")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--warm", type=int, default=5, help="steps that are not counted")
    parser.add_argument("--equal-steps", type=int, default=5, help="steps whose losses are compared; 0: none")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--optimizer", default="adamw_8bit")
    parser.add_argument("--seconds", type=float, default=120, help="limit of one run")
    parser.add_argument("--cpu", action="store_true", help="try the script on a CPU")
    arguments = parser.parse_args()
    shared = circumstances("benchmarks/two_gpus.py") | {
        "batch": arguments.batch, "seq": arguments.seq, "rank": arguments.rank, "optimizer": arguments.optimizer,
    }  # fmt: skip
    rows = []
    for turn in range(arguments.rounds):
        for processes in (1, arguments.processes):
            row = {"round": turn, **train(arguments, processes, steps=arguments.steps)}
            rows.append(row)
            append({**row, **shared}, arguments.out)
            show(row)
    if arguments.equal_steps:
        # the schedule of a run is that of its length, so both are as long
        one = train(arguments, 1, accumulation=arguments.processes, steps=arguments.equal_steps)
        two = train(arguments, arguments.processes, steps=arguments.equal_steps)
        for row in (one, two):
            append({"round": "losses", **row, **shared}, arguments.out)
        print(same_losses(one, two))
    print(compared(rows, arguments.processes))


if __name__ == "__main__":
    main()
