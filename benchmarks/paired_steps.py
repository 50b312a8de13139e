"""Runs the fast engine and its peers in turn, on one machine, one set of weights and the same tokens.

Every variant runs in a process of its own, twice, in an order that comes back (a b c … c b a), so that a machine that
warms up favours nobody. The first loss of every run, before any update, must agree within 0.02 nats (0.1 with products
in FP8), or the row is not written. Rows go to a JSONL file; the table at the end is made of them.

    PYTHONPATH=src python benchmarks/paired_steps.py --folder /tmp/weights --out rows.jsonl
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LEAN8 = ["--activations", "offload", "--host-embeddings", "--optimizer", "adamw_8bit"]  # as the plan has it, by dtype
LEAN = ["--activations", "offload-attention", *LEAN8[2:]]
GRAPH8 = ["--graphs", "--weights", "stream-fp8", *LEAN8]  # the host would launch for longer than the device works
FULL = ["--activations", "selective", "--optimizer", "adamw_8bit"]
SETTINGS: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "no recompute, 4 x 2048": ([], {"unsloth": [], "fast": FULL, "fast in FP8": ["--weights", "resident-fp8", *FULL]}),
    "lean, 4 x 2048": ([], {"unsloth": ["--recompute"], "fast": LEAN, "fast in FP8": GRAPH8}),
    "lean, 1 x 512": (["--batch", "1", "--seq", "512"], {
        "unsloth": ["--recompute"], "fast": ["--graphs", *LEAN], "fast in FP8": GRAPH8,
    }),
    "lean, 1 x 8192": (["--batch", "1", "--seq", "8192"], {
        "unsloth": ["--recompute"], "fast": LEAN, "fast in FP8": GRAPH8,
    }),
    "no recompute, 8 x 2048": (["--batch", "8"], {"unsloth": [], "fast": FULL}),
    "usual stack, 4 x 2048": ([], {"transformers": ["--recompute"], "liger": ["--recompute"]}),
}


def run(engine: str, options: list[str], folder: Path, seconds: int) -> dict[str, object] | None:
    """Runs one variant and returns its row, or None with the end of what it printed."""
    if engine.startswith("fast"):
        command = [sys.executable, str(HERE / "train_step.py"), "--model", str(folder / "nf4"), *options]
    else:
        command = [sys.executable, str(HERE / "peers.py"), "--impl", engine, "--model", str(folder / "nf4"), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        print(f"{engine}: more than {seconds} s", flush=True)
        return None
    rows = [line.removeprefix("ROW ") for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if not rows:
        print(f"{engine} failed:\n{(done.stdout + done.stderr)[-1500:]}", flush=True)
        return None
    found: dict[str, object] = json.loads(rows[-1])
    return found


def main() -> None:
    """Runs all settings, or those named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="made by peers.py --make")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=SETTINGS)
    parser.add_argument("--seconds", type=int, default=100, help="limit of one run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--without", nargs="*", default=[], help="engines to leave out")
    arguments = parser.parse_args()
    for name in arguments.only or SETTINGS:
        shared, engines = SETTINGS[name]
        first_losses: dict[bool, list[float]] = {False: [], True: []}  # in FP8, or not
        for turn in range(arguments.rounds):
            for engine in list(engines)[:: 1 if turn % 2 == 0 else -1]:
                if engine in arguments.without:
                    continue
                row = run(engine, [*shared, *engines[engine]], arguments.folder, arguments.seconds)
                if row is None:
                    continue
                loss, fp8 = float(str(row["first_loss"])), "FP8" in engine
                others = first_losses[False] or first_losses[fp8]
                if others and max(abs(loss - other) for other in others) > (0.1 if fp8 else 0.02):
                    print(f"{engine}: first loss {loss}, another's {others[0]}: not written")
                    continue
                first_losses[fp8].append(loss)
                print(f"{name:26} {engine:12} {row['tokens_per_s']:>7} tokens/s {row['peak_gib']:>6} GiB "
                      f"first loss {row['first_loss']}", flush=True)  # fmt: skip
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"setting": name, "round": turn, **row}) + "\n")


if __name__ == "__main__":
    main()
