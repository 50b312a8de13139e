"""What FP8 costs in quality: QLoRA fine-tuning in FP8 against bf16, on a model that was really pretrained.

Random weights would not show it: their activations have no outliers and their losses nothing to lose. So a model in
Llama's shape is pretrained first, on real text, for about two minutes of a large GPU. Then, for each of three seeds
(adapter, order of batches), it is fine-tuned on real conversations by the fast engine, once with every weights policy,
in everything else alike. The same held-out conversations are scored twice: by the policy's own arithmetic, and by the
bf16 engine with the adapter that was trained, which is what a user gets who trains in FP8 and serves in 16 bits.

The gate: bf16's score of the FP8 adapters within 0.3 % of that of the bf16 adapters, on average over the seeds. The
spread over seeds says how far that average can be trusted. Its limit: this model has a hundred million parameters, and
outliers grow with size.

    python benchmarks/fp8_gate.py --pack gate.npz --data ../shared/data                       # anywhere; 10 MB
    python benchmarks/fp8_gate.py --packed gate.npz --weights stream,resident-fp8 --out fp8_gate.jsonl    # on the GPU
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from commands import append, circumstances, guarded, read_rows

GATE_PERCENT = 0.3
VOCABULARY, ROW_TOKENS = 32000, 1024
TEXTS = (  # for pretraining, below --data; none of the rows that are fine-tuned on or held out
    "wikitext-2/*.txt", "tinystories/*.txt", "shakespeare/*.txt", "medquad/*.jsonl", "chatdoctor/*.json",
    "pubmedqa/ori_pqal.json", "squad/*.json", "imdb/imdb_train*.jsonl.gz", "alpaca/*.json", "preference/dpo*.json",
    "preference/hh*.jsonl.gz", "openassistant-guanaco/*.jsonl",
)  # fmt: skip
CONVERSATIONS = "guanaco-llama2-1k"


def texts_of(file: Path) -> Iterator[str]:
    """Yields the documents of a file: paragraphs between blank lines or story marks, or all the text of each record."""
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    text, name = content.decode("utf-8"), file.name.removesuffix(".gz")
    if name.endswith(".txt"):
        for part in text.split("<|endoftext|>"):
            yield from (part[i : i + 20_000] for i in range(0, len(part), 20_000))
        return
    records: Any
    if name.endswith("l"):
        records = [json.loads(line) for line in text.split("\n") if line.strip()]
    else:
        records = json.loads(text)
    if isinstance(records, dict):  # SQuAD: its articles; PubMedQA: its questions
        records = records.get("data", records.values())
    for record in records:
        yield "\n".join(dict.fromkeys(sentences_in(record)))


def sentences_in(value: Any) -> Iterator[str]:
    """Yields the strings in a JSON value that are more than one word."""
    if isinstance(value, str):
        if " " in value.strip():
            yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from sentences_in(inner)


def pack(data: Path, out: Path, max_tokens: int) -> None:
    """Writes all token ids that the GPU needs into one file."""
    import sentencepiece

    from chulengo.config import load_config
    from chulengo.train.finetune import prepare_inputs

    tokenizer = sentencepiece.SentencePieceProcessor(str(data / "llama2_tokenizer" / "tokenizer.model"))
    documents = [text for pattern in TEXTS for file in sorted(data.glob(pattern)) for text in texts_of(file)]
    np.random.default_rng(0).shuffle(documents)
    stream: list[int] = []
    for text in documents:
        stream += [tokenizer.bos_id(), *tokenizer.encode(text), tokenizer.eos_id()]
    arrays: dict[str, Any] = {"text": np.array(stream, dtype=np.uint16)}
    inputs = prepare_inputs(load_config(None, [
        f'model.name="{data / "llama2_tokenizer"}"', f'data.train="{data / CONVERSATIONS}"', "prompt.style=llama2",
        "data.validation_fraction=0.15", f"training.max_seq_tokens={max_tokens}", "training.overlong=drop",
    ]), weights=False)  # fmt: skip
    assert inputs.validation is not None, "a fraction was asked for"
    for name, rows in (("train", inputs.train.rows), ("held_out", inputs.validation.rows)):
        arrays[f"{name}_ids"] = np.array([i for row in rows for i in row.ids], dtype=np.uint16)
        arrays[f"{name}_trained"] = np.array([t for row in rows for t in row.trained], dtype=bool)
        arrays[f"{name}_lengths"] = np.array([len(row.ids) for row in rows], dtype=np.int32)
    np.savez_compressed(out, **arrays)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; {len(stream):,} tokens of text in {len(documents):,} documents; "
          + ", ".join(f"{len(arrays[f'{n}_lengths'])} {n} conversations of {len(arrays[f'{n}_ids']):,} tokens"
                      for n in ("train", "held_out")))  # fmt: skip


def pretrain(arguments: argparse.Namespace) -> None:
    """Trains a model in Llama's shape from nothing for a given time, and writes it as Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device, text = torch.device(arguments.device), np.load(arguments.packed)["text"]
    rows = torch.from_numpy(text[: len(text) // ROW_TOKENS * ROW_TOKENS].astype(np.int32)).view(-1, ROW_TOKENS)
    rows = rows[torch.randperm(len(rows))].to(device)
    num_held = max(1, len(rows) // 100)
    held, rows = rows[:num_held], rows[num_held:]
    heads = max(1, arguments.hidden // 64)
    model: Any = LlamaForCausalLM(LlamaConfig(
        hidden_size=arguments.hidden, intermediate_size=-(-arguments.hidden * 8 // 3 // 128) * 128,
        num_hidden_layers=arguments.layers, num_attention_heads=heads, num_key_value_heads=heads, rms_norm_eps=1e-5,
        vocab_size=VOCABULARY, max_position_embeddings=2 * ROW_TOKENS, bos_token_id=1, eos_token_id=2,
    )).to(device)  # fmt: skip

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            found: torch.Tensor = model(input_ids=batch.long(), labels=batch.long(), use_cache=False).loss
            return found

    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device.type == "cuda")
    started, step, loss = time.monotonic(), 0, torch.zeros(())
    order = torch.randperm(len(rows), device=device)
    while (done := (time.monotonic() - started) / arguments.pretrain_seconds) < 1:
        place = step * arguments.pretrain_rows % max(1, len(rows) - arguments.pretrain_rows + 1)
        if step and place < arguments.pretrain_rows:
            order = torch.randperm(len(rows), device=device)
        rate = arguments.pretrain_rate * min(1, (step + 1) / 50) * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(rows[order[place : place + arguments.pretrain_rows]])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        value = float(loss)  # waits for the device, so that the clock is true
        if step % 50 == 0 or step < 4:
            print(f"pretraining: step {step}, {done:.0%}, loss {value:.3f}", flush=True)
    with torch.no_grad():
        scored = [float(loss_of(batch)) for batch in held.split(8)]
    model.to(torch.bfloat16).save_pretrained(arguments.model)
    tokens = step * arguments.pretrain_rows * ROW_TOKENS
    append({
        "stage": "pretrain", "parameters": sum(p.numel() for p in model.parameters()), "hidden": arguments.hidden,
        "layers": arguments.layers, "steps": step, "tokens": tokens, "epochs": round(tokens / text.size, 2),
        "seconds": round(time.monotonic() - started, 1), "train_loss": round(float(loss), 4),
        "held_out_loss": round(statistics.mean(scored), 4), **circumstances("benchmarks/fp8_gate.py"),
    }, arguments.out)  # fmt: skip
    print(f"pretrained: {step} steps, {tokens / 1e6:.1f} M tokens, held-out loss {statistics.mean(scored):.3f}")


def conversations(packed: Path, name: str) -> list[tuple[Any, Any]]:
    """Returns ids and trained marks of every conversation."""
    arrays = np.load(packed)
    cuts = np.cumsum(arrays[f"{name}_lengths"])[:-1]
    ids, trained = (np.split(arrays[f"{name}_{part}"], cuts) for part in ("ids", "trained"))
    return list(zip(ids, trained, strict=True))


def batches_of(rows: list[tuple[Any, Any]], order: Any, max_tokens: int) -> list[Any]:
    """Returns packed micro-batches of whole conversations, filled in the given order."""
    import torch

    from chulengo.data.batches import IGNORE
    from chulengo.model.packed_inputs import pack_batch

    groups: list[list[int]] = [[]]
    for index in order:
        if groups[-1] and sum(len(rows[i][0]) for i in groups[-1]) + len(rows[index][0]) > max_tokens:
            groups.append([])
        groups[-1].append(int(index))
    batches = []
    for group in groups:
        ids = torch.from_numpy(np.concatenate([rows[i][0] for i in group]).astype(np.int64))
        starts = np.concatenate([np.arange(len(rows[i][0])) for i in group])
        trained = torch.from_numpy(np.concatenate([rows[i][1] for i in group]) & (starts > 0))
        labels = torch.where(trained, ids, torch.full_like(ids, IGNORE))
        batches.append(pack_batch({"input_ids": ids[None], "labels": labels[None],
                                   "position_ids": torch.from_numpy(starts)[None]}))  # fmt: skip
    return [batch for batch in batches if batch.num_targets]


def tune(arguments: argparse.Namespace) -> None:
    """Fine-tunes with one weights policy, all seeds, and appends what was scored on the way."""
    import torch

    from chulengo.model.fast import load_fast

    train = conversations(arguments.packed, "train")
    held = conversations(arguments.packed, "held_out")[: arguments.held_rows]
    held_batches = batches_of(held, range(len(held)), arguments.tokens)
    shared = {"device": arguments.device, "max_seq_tokens": ROW_TOKENS * 2}
    judge = load_fast(arguments.model, **shared)
    facts = circumstances("benchmarks/fp8_gate.py") | {
        "stage": "tune", "weights": arguments.policy, "rank": arguments.rank, "learning_rate": arguments.rate,
        "tokens": arguments.tokens,
    }  # fmt: skip

    @torch.no_grad()
    def score(model: Any) -> float:
        model.train(False)
        found = [model.nll(batch) for batch in held_batches]
        model.train()
        return float(sum(nll.item() for nll, _ in found)) / sum(count for _, count in found)

    def judged(model: Any) -> float:
        with tempfile.TemporaryDirectory() as folder:
            model.save_adapter(Path(folder))
            judge.load_adapter(Path(folder))
        return score(judge)

    for seed in arguments.seeds:
        model = load_fast(arguments.model, weights=arguments.policy, activations=arguments.activations, **shared)
        model.attach_lora(rank=arguments.rank, alpha=2 * arguments.rank, seed=seed)
        print(f"{arguments.policy}, seed {seed}: {model.describe()}", flush=True)

        def look(step: int, model: Any = model, seed: int = seed) -> None:
            scores = {"own_loss": score(model), "bf16_loss": judged(model)}
            append({**facts, "seed": seed, "step": step, **scores}, arguments.out)

        losses = fine_tune(model, train, seed, arguments, look)
        append({**facts, "seed": seed, "step": "all", "train_losses": losses}, arguments.out)


def fine_tune(
    model: Any, rows: list[tuple[Any, Any]], seed: int, arguments: argparse.Namespace, look: Callable[[int], None]
) -> list[float]:
    """Trains the adapter; returns the loss of every step. The batches are a function of the seed alone."""
    import torch

    rng, parameters = np.random.default_rng(seed), model.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=arguments.rate, weight_decay=0.0)
    losses: list[Any] = []
    queue: list[Any] = []
    look(0)
    model.train()
    for step in range(arguments.steps):
        if not queue:
            queue = batches_of(rows, rng.permutation(len(rows)), arguments.tokens)[::-1]
        nll, count = model.nll(queue.pop())
        (nll / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        done = step / arguments.steps
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append((nll / count).detach())
        if (step + 1) % arguments.look_every == 0 or step + 1 == arguments.steps:
            look(step + 1)
    return [round(value, 5) for value in torch.stack(losses).tolist()]


def report(rows: list[dict[str, Any]]) -> str:
    """Returns the table of final losses and the gate's verdict; the first policy is the baseline."""
    scored = [row for row in rows if row.get("stage") == "tune" and row["step"] != "all"]
    if not scored:
        return "nothing was fine-tuned"
    last = max(row["step"] for row in scored)
    if last == 0:
        return "nothing was fine-tuned to its first score"
    found = {(row["weights"], row["seed"]): row for row in scored if row["step"] == last}
    policies = list(dict.fromkeys(row["weights"] for row in scored))
    seeds = sorted({row["seed"] for row in scored})
    base = [row["bf16_loss"] for row in scored if row["step"] == 0]
    lines = [f"held-out loss before {base[0]:.5f}; after {last} steps, scored in bf16 (in its own arithmetic):"]
    for policy in policies:
        ended = [found[policy, seed] for seed in seeds if (policy, seed) in found]
        cells = [f"{row['bf16_loss']:.5f} ({row['own_loss']:.5f})" for row in ended]
        lines.append(f"{policy:16} {'  '.join(cells)}")
    for policy in policies[1:]:
        for kind in ("bf16_loss", "own_loss"):
            pairs = [(found[policy, s][kind], found[policies[0], s]["bf16_loss"]) for s in seeds
                     if (policy, s) in found and (policies[0], s) in found]  # fmt: skip
            if not pairs:
                continue
            percent = [100 * (new / old - 1) for new, old in pairs]
            mean = statistics.mean(percent)
            spread = statistics.stdev(percent) if len(percent) > 1 else math.nan
            verdict = ""
            if kind == "bf16_loss" and len(pairs) < 3:
                verdict = ": too few seeds for the gate"
            elif kind == "bf16_loss":
                verdict = f": gate of {GATE_PERCENT} % {'passed' if mean <= GATE_PERCENT else 'FAILED'}"
            lines.append(f"{policy} against {policies[0]}, {kind}: mean {mean:+.3f} %, spread {spread:.3f}, "
                         f"seeds {', '.join(f'{p:+.3f}' for p in percent)}{verdict}")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Packs, or pretrains and tunes, each part in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, metavar="NPZ", help="write the token ids of --data, and stop")
    parser.add_argument("--data", type=Path, help="with --pack: the folder of real data")
    parser.add_argument("--packed", type=Path, help="what --pack has written")
    parser.add_argument("--model", type=Path, default=Path(tempfile.gettempdir()) / "fp8_gate_model",
                        help="the pretrained model's folder; pretrained first where it is not there")
    parser.add_argument("--weights", default="stream,resident-fp8", help="policies, the baseline first")
    parser.add_argument("--activations", default="keep")
    parser.add_argument("--out", type=Path, default=Path("fp8_gate.jsonl"))
    parser.add_argument("--report", type=Path, metavar="JSONL", help="print the table of these rows, and stop")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--pretrain-seconds", type=float, default=110)
    parser.add_argument("--pretrain-rows", type=int, default=64, help=f"of {ROW_TOKENS} tokens, a step")
    parser.add_argument("--pretrain-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--look-every", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=4096, help="most tokens of a fine-tuning step")
    parser.add_argument("--held-rows", type=int, help="held-out conversations that are scored (default: all)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seconds", type=float, default=200, help="limit of one policy's fine-tuning, all seeds")
    parser.add_argument("--stage", choices=("pretrain", "tune"), help=argparse.SUPPRESS)
    parser.add_argument("--policy", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.report:
        print(report(read_rows(arguments.report)))
    elif arguments.pack:
        pack(arguments.data, arguments.pack, ROW_TOKENS)
    elif arguments.stage:
        {"pretrain": pretrain, "tune": tune}[arguments.stage](arguments)
    elif arguments.packed is None:
        parser.error("--packed NPZ, made by --pack NPZ --data FOLDER")
    else:
        run_stages(arguments)


def run_stages(arguments: argparse.Namespace) -> None:
    """Runs what is missing: the pretrained model, then every policy; prints the report."""
    again = [sys.executable, __file__, *sys.argv[1:]]
    if not (arguments.model / "config.json").exists():
        ended = guarded([*again, "--stage", "pretrain"], arguments.pretrain_seconds + 90)
        print(ended.out[-600:], "" if ended.ok else f"FAILED: {ended.why()}", flush=True)
        if not ended.ok:
            sys.exit(1)
    for policy in arguments.weights.split(","):
        ended = guarded([*again, "--stage", "tune", "--policy", policy], arguments.seconds)
        said = f"{policy}: {'done' if ended.ok else 'FAILED: ' + ended.why()} in {ended.seconds} s"
        print(said, flush=True)
    print(report(read_rows(arguments.out)))


if __name__ == "__main__":
    main()
