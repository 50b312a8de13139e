"""One epoch of real conversations by `chulengo train`, from a machine that has never compiled its kernels.

What counts: attaching the adapter, where kernels are compiled, and every step, all tokens that are real, none of
padding. Importing libraries, loading the model and reading the data do not, for any engine; PyTorch's attention and
optimisers import its compiler, some seconds of Python on a machine that has not done it before, so that is done first.
Each run is a process of its own with an empty cache of Triton's.

    python benchmarks/epoch.py --model /tmp/7b/nf4 --data guanaco-llama2-1k.parquet --out epoch.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from commands import append, circumstances, guarded, metric_rows, read_rows, settings

WEIGHTS = ("auto", "stream", "fp8")
SKIPPED = 3  # steps of the speed without warm-up


def inside(file: Path, words: list[str]) -> None:
    """Trains in this process, and writes how long attaching the adapter took."""
    import torch
    import torch._dynamo
    import triton  # noqa: F401
    from torch.nn.attention import varlen  # noqa: F401

    from chulengo.cli.main import main
    from chulengo.model.fast import FastModel

    attach, spent = FastModel.attach_lora, [0.0]

    def timed(self: FastModel, **given: Any) -> None:
        torch.cuda.synchronize()
        started = time.perf_counter()
        attach(self, **given)
        torch.cuda.synchronize()
        spent[0] += time.perf_counter() - started

    FastModel.attach_lora = timed  # type: ignore[method-assign]
    status = main(words)
    file.write_text(json.dumps({"attach_s": spent[0]}), encoding="utf-8")
    sys.exit(status)


def measured(arguments: argparse.Namespace, weights: str) -> dict[str, Any]:
    """Returns the row of one run."""
    words = settings(
        data__validation_fraction=0, training__max_seq_tokens=2048, training__overlong="drop",
        training__batching="packed", training__batch_size=4, training__optimizer="adamw_8bit", model__engine="fast",
        model__weights_policy=weights, lora__rank=arguments.rank, lora__alpha=16,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = str(Path(folder) / "triton")
        out, noted = Path(folder) / "run", Path(folder) / "noted.json"
        train = ["train", "--model", arguments.model, "--data", arguments.data, "--out", str(out), *words]
        ended = guarded([sys.executable, __file__, "--inside", str(noted), "--", *train], arguments.seconds)
        steps = [row for row in metric_rows(out) if row["kind"] == "train"]
        row: dict[str, Any] = {"what": "one epoch", "weights": weights, "rank": arguments.rank, "ok": ended.ok}
        if not ended.ok or not steps:
            return row | {"why": ended.why()}
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        row["engine"] = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["engine"]
        attach_s = json.loads(noted.read_text(encoding="utf-8"))["attach_s"]
    tokens, seconds = sum(step["tokens"] for step in steps), attach_s + sum(step["step_s"] for step in steps)
    later = steps[SKIPPED:]
    return row | {
        "steps": len(steps), "tokens": tokens, "attach_s": attach_s, "first_step_s": steps[0]["step_s"],
        "seconds": seconds, "process_s": ended.seconds, "tokens_per_s_warm_up_counted": tokens / seconds,
        f"tokens_per_s_after_{SKIPPED}_steps": sum(s["tokens"] for s in later) / sum(s["step_s"] for s in later),
        "peak_bytes": result["peak_bytes"], "planned_peak_bytes": result["planned_peak_bytes"],
        "first_loss": steps[0]["loss"], "last_loss": steps[-1]["loss"],
    }  # fmt: skip


def main() -> None:
    """Measures, or prints what was measured."""
    if "--inside" in sys.argv[1:2]:
        inside(Path(sys.argv[2]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("epoch.jsonl"))
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120, help="limit of one run")
    arguments = parser.parse_args()
    shared = circumstances("benchmarks/epoch.py")
    for weights in arguments.weights:
        append(measured(arguments, weights) | shared, arguments.out)
        row = read_rows(arguments.out)[-1]
        if row["ok"]:
            print(f"{weights:8} {row['tokens']:,} tokens in {row['seconds']:.1f} s (attaching {row['attach_s']:.1f}, "
                  f"first step {row['first_step_s']:.1f}): {row['tokens_per_s_warm_up_counted']:,.0f} tokens/s, "
                  f"{row[f'tokens_per_s_after_{SKIPPED}_steps']:,.0f} after {SKIPPED} steps, "
                  f"{row['peak_bytes'] / 2**30:.1f} GiB", flush=True)  # fmt: skip
        else:
            print(f"{weights:8} FAILED: {row['why']}", flush=True)


if __name__ == "__main__":
    main()
