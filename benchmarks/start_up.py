"""Time and memory of the commands that must feel instant, against the time Python itself takes to start.

    python benchmarks/start_up.py [--runs 15]

Appends one row a command to benchmarks/results/<machine>/start_up.jsonl. Ratios are within one run of this script.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "chulengo --help": ["-m", "chulengo", "--help"],
    "chulengo train --help": ["-m", "chulengo", "train", "--help"],
    "chulengo inspect (nano-demo)": ["-m", "chulengo", "inspect", "--model", "nano", "--data", "nano-demo", "--json"],
}


def measure(words: list[str], runs: int) -> dict[str, float]:
    """Returns wall seconds (p20, p50, p80) and the peak memory of the largest child so far, in bytes."""
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    cuts = statistics.quantiles(seconds, n=10)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"p20_s": cuts[1], "p50_s": cuts[4], "p80_s": cuts[7], "largest_child_bytes": peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    machine = f"{platform.system()}-{platform.machine()}-cpu".lower()
    file = Path(__file__).parent / "results" / machine / "start_up.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    floor = None
    with file.open("a", encoding="utf-8") as stream:
        for name, words in COMMANDS.items():
            row = measure(words, runs)
            floor = floor or row["p50_s"]
            stream.write(json.dumps({
                "command": name, "runs": runs, "python": platform.python_version(), "over_python": row["p50_s"] / floor,
                **row,
            }) + "\n")
            print(f"{name:<30} p20 {row['p20_s']:.3f}  p50 {row['p50_s']:.3f}  p80 {row['p80_s']:.3f} s"
                  f"  {row['p50_s'] / floor:5.1f} x python")
    print(f"appended to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
