"""Llama 2 7B on cards of 8, 12, 16 and 24 GiB: what the plan says of each, and runs that hold it to that.

For every card three settings: one row of 2,048 tokens at a time, four, and as many as the plan lets through. Each is
planned (`chulengo plan --device-memory 8GiB`), then run for a few steps by `chulengo train` with
`model.gpu_memory_limit=8GiB`: PyTorch's allocator gives no more than that less CUDA's context, and the run plans for
what it gets. A run that needs more ends with an error, and the row says so. Then the first setting that the plan
refuses: `train` must refuse it, and the change that the plan advises must run.

The speeds are those of the GPU underneath, capped; a real card of that size computes slower, and its host differs.

    python benchmarks/peers.py --make /tmp/7b --tokenizer TOKENIZER                       # random weights, on a GPU
    python benchmarks/cards.py --model /tmp/7b/nf4 --data guanaco.parquet --out cards.jsonl
    python benchmarks/cards.py --table cards.jsonl                                        # the README's table
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from commands import CHULENGO, append, circumstances, guarded, metric_rows, read_rows, settings, watched_memory

from chulengo.cli.main import main as chulengo

GIB = 1 << 30
CARDS = (8, 12, 16, 24)
MOST_ROWS = 64


def words_of(arguments: argparse.Namespace, batch: int, changes: tuple[str, ...] = ()) -> list[str]:
    """Returns the settings of a run with so many rows a micro-batch."""
    words = settings(
        training__max_seq_tokens=arguments.seq, training__overlong="drop", training__batching="packed",
        training__batch_size=batch, training__optimizer=arguments.optimizer, lora__rank=arguments.rank,
        data__validation_fraction=0,
    )  # fmt: skip
    if arguments.cpu:
        words += settings(model__device="cpu", model__cpu_threads=1)
    for change in changes:
        words += ["--set", change]
    return words


def plan_of(
    arguments: argparse.Namespace, card: float, batch: int, changes: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Returns the plan's answer for a card: whether it fits, how, in what memory and at what speed."""
    command = ["plan", "--model", arguments.model, "--device-memory", f"{card}GiB", "--json"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        chulengo([*command, *words_of(arguments, batch, changes)])  # here, not in a process: it is asked some 40 times
    found = json.loads(said.getvalue())
    step = found["step"] or {}
    return {
        "fits": found["fits"], "policies": found["policies"], "peak_bytes": found["plan"]["peak_bytes"],
        "device_bytes": found["plan"]["device_bytes"], "tokens_per_s": step.get("tokens_per_s"),
        "rates": (found["rates"] or {}).get("source"), "smallest_change": found["smallest_change"],
    }  # fmt: skip


def largest_batch(arguments: argparse.Namespace, card: float) -> int:
    """Returns the most rows a micro-batch that the plan lets through, by halving; 0 for none."""
    low, high = 0, MOST_ROWS + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plan_of(arguments, card, middle)["fits"] else (low, middle)
    return low


def run_of(
    arguments: argparse.Namespace, card: float, batch: int, changes: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Returns how a run went that may take no more than a card has."""
    words = words_of(arguments, batch, changes) + settings(training__max_steps=arguments.steps)
    if not arguments.cpu:
        words += settings(model__gpu_memory_limit=f"{card}GiB")
    with tempfile.TemporaryDirectory() as folder, watched_memory() as most:
        out = Path(folder) / "run"
        command = [*CHULENGO, "train", "--model", arguments.model, "--data", arguments.data, "--out", str(out), *words]
        done = guarded(command, arguments.seconds)
        steps = [row for row in metric_rows(out) if row["kind"] == "train"]
        result, engine = read_json(out / "result.json"), read_json(out / "manifest.json").get("engine")
    row: dict[str, Any] = {
        "ok": done.ok, "status": done.status, "seconds": done.seconds, "engine": engine, "steps": len(steps),
        "why": None if done.ok else done.why(), "device_used_bytes": most[0] if most else None,
        "peak_bytes": result.get("peak_bytes"), "planned_peak_bytes": result.get("planned_peak_bytes"),
    }  # fmt: skip
    if steps:
        timed = steps[1:] or steps  # the first step compiles
        row["tokens_per_s"] = sum(s["tokens"] for s in timed) / sum(s["step_s"] for s in timed)
        row["most_tokens"] = max(s["tokens"] for s in steps)
        row["losses"] = [round(s["loss"], 4) for s in steps]
    return row


def read_json(file: Path) -> dict[str, Any]:
    """Returns a JSON file's content, nothing where it is not there."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def show(row: dict[str, Any]) -> None:
    """Prints one row."""
    plan, run = row["plan"], row["run"]
    print(f"{row['card_gib']:>4} GiB {row['kind']:>8} {row['batch']:>3} x {row['seq']} {how(plan):44} "
          f"planned {gib(plan['peak_bytes'])} measured {gib(run.get('peak_bytes'))} "
          f"whole process {gib(run.get('device_used_bytes'))} {speed(run)} "
          f"{'ran' if run['ok'] else 'FAILED: ' + str(run['why'])}"
          f"{'' if as_planned(plan, run['engine']) else ', NOT AS PLANNED: ' + str(run['engine'])}", flush=True)


def as_planned(plan: dict[str, Any], engine: dict[str, str] | None) -> bool:
    """Returns whether a run took the policies that the plan had chosen for its card."""
    policies = plan["policies"]
    if engine is None or policies is None:
        return False
    activations = {f"{name}: {count} layers" for name, count in policies["activations"].items()}
    return (
        engine["weights"].split(",")[0] == policies["weights"] and set(engine["activations"].split(", ")) == activations
        and engine["embeddings"] == policies["embeddings"] and (engine["graphs"] != "none") == policies["graphs"]
    )


def how(plan: dict[str, Any]) -> str:
    """Returns the policies in short."""
    policies = plan["policies"]
    if policies is None:
        return "reference engine"
    kept = ", ".join(f"{count} {name}" for name, count in policies["activations"].items())
    rest = (["embeddings on the host"] if policies["embeddings"] == "host" else []) + ["graphs"] * policies["graphs"]
    return "; ".join([policies["weights"], kept, *rest])


def gib(size: float | None) -> str:
    """Returns bytes as GiB."""
    return "-" if size is None else f"{size / GIB:.2f}"


def speed(found: dict[str, Any]) -> str:
    """Returns tokens a second."""
    return f"{found['tokens_per_s']:,.0f}" if found.get("tokens_per_s") else "-"


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the Markdown table; of several runs of one setting the last counts."""
    last = {(row["card_gib"], row["kind"]): row for row in rows}
    lines = [
        "| card | rows of 2,048 tokens | activations of 32 layers | planned GiB | measured | whole process | "
        "tokens/s of an H200, planned | measured |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    order = ("one", "usual", "largest", "changed")
    for card in sorted({card for card, _ in last}):
        for kind in (kind for kind in order if (card, kind) in last):
            row = last[card, kind]
            plan, run = row["plan"], row["run"]
            size = f"{row['batch']}"
            size += f" (the most that fit: {row['batch'] * row['seq']:,} tokens)" if kind == "largest" else ""
            if kind == "changed":
                size = f"{row['refused_batch']}: refused; with {', '.join(row['changes'])}"
            ran = [gib(run["peak_bytes"]), gib(run["device_used_bytes"])] if run["ok"] else ["failed", str(run["why"])]
            cells = [f"{card} GiB", size, how(plan), gib(plan["peak_bytes"]), *ran, speed(plan), speed(run)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(arguments: argparse.Namespace) -> None:
    """Plans and runs all cards."""
    shared = circumstances("benchmarks/cards.py") | {
        "seq": arguments.seq, "rank": arguments.rank, "optimizer": arguments.optimizer, "model": "7b shape",
    }  # fmt: skip
    for card in arguments.cards:
        most = largest_batch(arguments, card)
        batches = {"one": 1, "usual": 4, "largest": most}
        for kind in arguments.kinds:
            if kind == "changed" or not 0 < batches[kind] <= most:
                continue
            batch = batches[kind]
            row = {"card_gib": card, "kind": kind, "batch": batch, "plan": plan_of(arguments, card, batch)}
            row |= {"run": run_of(arguments, card, batch), **shared}
            append(row, arguments.out)
            show(row)
        if "changed" in arguments.kinds and card in arguments.refused and most < MOST_ROWS:
            refused(arguments, card, most + 1, shared)


def refused(arguments: argparse.Namespace, card: float, batch: int, shared: dict[str, Any]) -> None:
    """Lets `train` refuse a setting, and runs the change that the plan advises."""
    plan = plan_of(arguments, card, batch)
    refusal = run_of(arguments, card, batch)
    if refusal["status"] != 2 and not arguments.cpu:
        print(f"{card} GiB: {batch} rows were to be refused, and were not: {refusal}", flush=True)
    changes = tuple(plan["smallest_change"] or ())
    if not changes:
        print(f"{card} GiB: no change of {batch} rows fits", flush=True)
        return
    small = int(next((c.partition("=")[2] for c in changes if c.startswith("training.batch_size")), batch))
    row = {
        "card_gib": card, "kind": "changed", "batch": small, "refused_batch": batch, "changes": list(changes),
        "refusal": refusal, "plan": plan_of(arguments, card, batch, changes),
        "run": run_of(arguments, card, batch, changes), **shared,
    }  # fmt: skip
    append(row, arguments.out)
    print(f"{card} GiB refused {batch} rows: {refusal['why']}")
    show(row)


def main() -> None:
    """Measures, or prints the table of rows measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder with weights of Llama 2 7B's shape and a tokenizer")
    parser.add_argument("--data", help="conversations, enough to fill packs")
    parser.add_argument("--out", type=Path, default=Path("cards.jsonl"))
    parser.add_argument("--table", type=Path, metavar="JSONL", help="print the Markdown table of these rows, and stop")
    parser.add_argument("--cards", type=float, nargs="+", default=list(CARDS), metavar="GIB")
    parser.add_argument("--kinds", nargs="+", choices=("one", "usual", "largest", "changed"),
                        default=["one", "usual", "largest", "changed"])
    parser.add_argument("--refused", type=float, nargs="*", default=[8], help="cards for `changed` (default: 8)")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--optimizer", default="adamw_8bit")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=120, help="limit of one run")
    parser.add_argument("--cpu", action="store_true", help="try the script: no limit is set, nothing is proved")
    arguments = parser.parse_args()
    arguments.cards = [int(card) if card == int(card) else card for card in arguments.cards]
    if arguments.table:
        print(table(read_rows(arguments.table)))
        return
    if not arguments.model or not arguments.data:
        parser.error("--model and --data, or --table")
    measure(arguments)
    print(table(read_rows(arguments.out)))


if __name__ == "__main__":
    main()
