"""Evaluation on Llama 2 7B's shape: its memory against training's, and what `generate` takes beside the token engine.

Four commands as a user types them, each in a process of its own that notes the most memory that was allocated:

- `train`, lean (4 x 2,048 tokens, everything computed again, embeddings on the host), which also makes the adapter.
  An evaluation that stays below it stays below every training.
- `eval --json`: perplexity of whole conversations, every row's own included.
- `eval --task chat`: generated answers, chrF, ROUGE, perplexity, and BERTScore, by default with random weights in the
  shape of roberta-large: memory does not ask what they say.
- `generate`: 64 prompts, 32 new tokens each. Inside it the time of the token engine (`complete_all`) is taken apart
  from the rest, which is the harness: reading, rendering, writing answers. Loading is neither.

The share for 1,000 longer answers is a computation: the harness costs the same for every answer, the engine in
proportion to its tokens. The first is nearly so (a longer answer is a longer line), the second a lower bound, since
a later token attends to more before it; both make the true share smaller or hardly larger.

    python benchmarks/evaluation.py --model /tmp/7b/nf4 --data guanaco.parquet --out evaluation.jsonl
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from commands import Ended, append, circumstances, guarded, settings

GIB = 1 << 30
ANSWERS = 1000


def inside(file: Path, words: list[str]) -> None:
    """Runs a command of Chulengo in this process, and writes its peak memory and times to a file."""
    import torch

    import chulengo.generate.engine
    import chulengo.generate.prompts
    import chulengo.model.session
    from chulengo.cli.main import main

    spent = {"reading_s": 0.0, "loading_s": 0.0, "engine_s": 0.0}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            found = function(*given, **named)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent[name] += time.perf_counter() - started
            if name == "loading_s":
                spent["loaded_at"] = time.perf_counter()
            return found

        return call

    chulengo.generate.engine.complete_all = timed("engine_s", chulengo.generate.engine.complete_all)
    chulengo.generate.prompts.read_prompts = timed("reading_s", chulengo.generate.prompts.read_prompts)
    chulengo.model.session.open_session = timed("loading_s", chulengo.model.session.open_session)
    status = main(words)
    loaded, ended = spent.pop("loaded_at", None), time.perf_counter()
    found = {**spent, "after_loading_s": None if loaded is None else ended - loaded}
    if torch.cuda.is_available():
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    file.write_text(json.dumps(found), encoding="utf-8")
    sys.exit(status)


def measured(words: list[str], seconds: float) -> tuple[Ended, dict[str, Any]]:
    """Returns how a command ended, and what `inside` noted of it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "noted.json"
        ended = guarded([sys.executable, __file__, "--inside", str(file), "--", *words], seconds)
        noted = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    row = {"command": words[0], "ok": ended.ok, "seconds": ended.seconds, "why": None if ended.ok else ended.why()}
    return ended, row | noted


def harness(row: dict[str, Any], prompts: int, new_tokens: int, usual_tokens: int) -> dict[str, float]:
    """Returns the harness's share of the time after loading, as measured and for longer answers."""
    rest = row["reading_s"] + row["after_loading_s"] - row["engine_s"]
    per_answer, engine = rest / prompts, row["engine_s"] / prompts
    longer = engine * usual_tokens / new_tokens
    return {
        "harness_ms_an_answer": 1000 * per_answer, "engine_ms_an_answer": 1000 * engine,
        "share": rest / (rest + row["engine_s"]), "tokens_per_s": new_tokens / engine,
        f"share_of_{ANSWERS}_answers_of_{usual_tokens}_tokens": per_answer / (per_answer + longer),
    }  # fmt: skip


def make_encoder(folder: Path, tokenizer: Path, *, tiny: bool) -> None:
    """Writes random weights in the shape of roberta-large, with another model's tokenizer."""
    from transformers import BertConfig, BertModel

    width, layers = (64, 2) if tiny else (1024, 24)
    BertModel(BertConfig(
        vocab_size=32000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=4 * width, max_position_embeddings=512,
    )).save_pretrained(folder)  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)


def measure(arguments: argparse.Namespace, work: Path) -> None:
    """Runs the four commands; appends a row for each."""
    shared = circumstances("benchmarks/evaluation.py")
    device = settings(model__device="cpu", model__cpu_threads=1) if arguments.cpu else []
    long = [*settings(training__max_seq_tokens=arguments.seq, training__overlong="drop"), *device]
    base, run = ["--model", arguments.model], work / "run"
    data = ["--data", arguments.data]
    lean = settings(
        training__batching="packed", training__batch_size=4, training__max_steps=2, data__validation_fraction=0,
        training__optimizer=arguments.optimizer, model__engine="fast", model__weights_policy="stream",
        model__activations_policy="full" if arguments.cpu else "offload",
        model__embeddings_policy="device" if arguments.cpu else "host",
    )  # fmt: skip
    tuned = ["--adapter", str(run)]
    answering = ["--batch-size", str(arguments.batch_size), "--max-new-tokens", str(arguments.new_tokens)]
    scored = ["--num-rows", str(arguments.num_rows), "--json"]
    prompts = work / "prompts.txt"
    prompts.write_text("".join(f"Question {n}: what is the {n}th thing a guanaco would look for in a dry valley?\n"
                               for n in range(arguments.prompts)), encoding="utf-8")  # fmt: skip
    encoder = arguments.encoder
    if encoder is None and "task" in arguments.only:
        make_encoder(encoder := work / "encoder", Path(arguments.model), tiny=arguments.cpu)
    task = ["eval", *tuned, *data, "--task", "chat", "--side", "tuned", "--split", "all", *answering,
            "--encoder", str(encoder)]
    parts = {
        "train": ["train", *base, *data, "--out", str(run), *long, *lean],
        "perplexity": ["eval", *tuned, *data, *long, *scored, "--batch-size", str(arguments.batch_size)],
        "task": [*task, *long, "--num-rows", str(arguments.task_rows), "--out", str(work / "task")],
        "generate": ["generate", *tuned, "--prompts", str(prompts), "--out", str(work / "answers.jsonl"),
                     *answering, *device],
    }  # fmt: skip
    training_peak = None
    for name in arguments.only:
        ended, row = measured(parts[name], arguments.seconds)
        row = {"part": name, **row, **shared, "batch_size": arguments.batch_size, "seq": arguments.seq}
        if name == "train":
            training_peak = row.get("peak_bytes")
        row["training_peak_bytes"] = training_peak
        if name == "generate" and ended.ok:
            row |= {"prompts": arguments.prompts, "new_tokens": arguments.new_tokens}
            row["harness"] = harness(row, arguments.prompts, arguments.new_tokens, arguments.usual_tokens)
        append(row, arguments.out)
        show(row)


def show(row: dict[str, Any]) -> None:
    """Prints what a row says."""
    peak, training = row.get("peak_bytes"), row["training_peak_bytes"]
    said = f"{row['part']:11} {row['seconds']:>6} s"
    if peak is not None:
        said += f", peak {peak / GIB:.2f} GiB"
        if training and row["part"] != "train":
            said += f", {'below' if peak <= training else 'ABOVE'} lean training's {training / GIB:.2f}"
    if not row["ok"]:
        said += f", FAILED: {row['why']}"
    if "harness" in row:
        said += ", " + ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in row["harness"].items())
    print(said, flush=True)


def main() -> None:
    """Measures."""
    if "--inside" in sys.argv[1:2]:
        inside(Path(sys.argv[2]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("evaluation.jsonl"))
    parser.add_argument("--encoder", type=Path, help="folder of a text encoder for BERTScore (default: random weights)")
    parser.add_argument("--only", nargs="+", choices=("train", "perplexity", "task", "generate"),
                        default=["train", "perplexity", "task", "generate"])
    parser.add_argument("--num-rows", type=int, default=64, help="of perplexity")
    parser.add_argument("--task-rows", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--usual-tokens", type=int, default=128, help="of the answers that the share is computed for")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--optimizer", default="adamw_8bit")
    parser.add_argument("--seconds", type=float, default=120, help="limit of one command")
    parser.add_argument("--cpu", action="store_true", help="try the script on a CPU")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        measure(arguments, Path(work))


if __name__ == "__main__":
    main()
