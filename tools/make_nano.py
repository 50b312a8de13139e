"""Makes the embedded model from nothing: text, tokenizer, pretraining, measurement, files.

    PYTHONPATH=src python tools/make_nano.py --out src/chulengo/nano/model

Seeded: on the same machine and software, with ``--steps`` as recorded, the text, the tokenizer and the batches are the
same; the weights agree up to the order of the GPU's sums. ``--smoke`` makes a toy in seconds on a CPU.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import nano_card
import nano_corpus
import nano_pretrain
import nano_prompts
import nano_score
import nano_tokenizer

HELDOUT_SEED_OFFSET = 1_000_003
MAX_WEIGHT_BYTES = 8_000_000


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.model made before by this script, used as it is")
    parser.add_argument("--tokenizer-note", default="", help="how that tokenizer was made, for the record")
    parser.add_argument("--documents", type=int, default=2_500_000, help="documents in the corpus")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--row-tokens", type=int, default=1024)
    parser.add_argument("--batch-rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=0, help="0: as many as fit into --max-seconds")
    parser.add_argument("--max-seconds", type=float, default=300, help="limit of the training loop")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--exam-each", type=int, default=250, help="exam questions of each kind")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model for training")
    parser.add_argument("--smoke", action="store_true", help="a toy model, a few seconds on a CPU")
    chosen = parser.parse_args(arguments)
    if chosen.smoke:
        toy = {"documents": 400, "vocab": 640, "hidden": 64, "ffn": 128, "layers": 2, "heads": 2, "batch_rows": 2}
        vars(chosen).update(toy | {"steps": 8, "exam_each": 2, "processes": 1})
    return chosen


def _say(started: float, text: str) -> None:
    print(f"[{time.monotonic() - started:6.1f} s] {text}", flush=True)


def build_model(chosen: argparse.Namespace) -> LlamaForCausalLM:
    """Returns the untrained model, fp32, on the CPU."""
    config = LlamaConfig(
        vocab_size=chosen.vocab,
        hidden_size=chosen.hidden,
        intermediate_size=chosen.ffn,
        num_hidden_layers=chosen.layers,
        num_attention_heads=chosen.heads,
        num_key_value_heads=chosen.heads,
        max_position_embeddings=chosen.row_tokens,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=nano_tokenizer.BOS,
        eos_token_id=nano_tokenizer.EOS,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    torch.manual_seed(chosen.seed)
    return LlamaForCausalLM(config)


def save_model(model: LlamaForCausalLM, folder: Path) -> int:
    """Writes config, generation config and bfloat16 weights; returns the size of the weights in bytes."""
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=nano_tokenizer.BOS, eos_token_id=nano_tokenizer.EOS, max_new_tokens=96, do_sample=False
    )
    model.save_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    if size > MAX_WEIGHT_BYTES:
        raise RuntimeError(f"the weights have {size} bytes; at most {MAX_WEIGHT_BYTES} are allowed")
    return size


def command_line(chosen: argparse.Namespace, num_steps: int) -> str:
    """Returns the command that repeats this run."""
    left_out = ("out", "steps", "processes", "smoke", "compile", "tokenizer", "tokenizer_note")
    flags = {key: value for key, value in vars(chosen).items() if key not in left_out}
    words = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in flags.items())
    passed_in = "" if chosen.tokenizer is None else " --tokenizer src/chulengo/nano/model/tokenizer.model"
    return f"python tools/make_nano.py --out OUT{passed_in} --steps {num_steps} {words}"


def tokenizer_record(chosen: argparse.Namespace) -> dict[str, Any]:
    """Returns where the tokenizer came from, with its hash."""
    digest = hashlib.sha256((chosen.out / "tokenizer.model").read_bytes()).hexdigest()
    here = chosen.tokenizer is None
    note = "Trained in the same run." if here else f"Passed in with --tokenizer. {chosen.tokenizer_note}".strip()
    return {"sha256": digest, "trained_in_this_run": here, "note": note}


def measure(chosen: argparse.Namespace, tokenizer: Any, device: torch.device, record: dict[str, Any]) -> None:
    """Reads the written model back and adds its scores to `record`."""
    model = LlamaForCausalLM.from_pretrained(chosen.out, dtype=torch.float32).to(device).eval()
    num_heldout = min(4000, chosen.documents)
    rows, _ = nano_corpus.write_corpus(chosen.out, chosen.seed + HELDOUT_SEED_OFFSET, num_heldout, chosen.row_tokens, 1)
    record["perplexity"] = nano_score.perplexity(model, rows, device)
    longest = 8 if chosen.smoke else 96  # tokens; a toy never ends its answers, and they are most of its time
    record["exam"], wrong = nano_score.take_exam(model, tokenizer, device, chosen.seed, chosen.exam_each, longest)
    record["samples"] = nano_score.sample_chats(model, tokenizer, device, longest)
    record["system_prompts"] = nano_prompts.judged(
        nano_score.answer_all(model, tokenizer, nano_prompts.chats(), device, longest)
    )
    for question, answer in wrong[:: max(1, len(wrong) // 40)]:
        print(json.dumps({"kind": question.kind, "asked": question.messages, "said": answer}), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs all stages; returns 0, or 1 when the model was written but could not be measured."""
    chosen, started = parse_arguments(arguments), time.monotonic()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.tokenizer is not None:
        shutil.copyfile(chosen.tokenizer, chosen.out / "tokenizer.model")
        tokenizer = nano_tokenizer.load_tokenizer(chosen.out)
    else:
        num_documents = min(40_000, chosen.documents)
        tokenizer = nano_tokenizer.train_tokenizer(chosen.out, chosen.seed, num_documents, chosen.vocab)
    nano_tokenizer.write_tokenizer_config(chosen.out, chosen.row_tokens)
    _say(started, f"tokenizer of {chosen.vocab} pieces")
    rows, num_too_long = nano_corpus.write_corpus(
        chosen.out, chosen.seed, chosen.documents, chosen.row_tokens, chosen.processes
    )
    corpus_tokens = int(((rows & nano_corpus.ID_MASK) != 0).sum())
    _say(started, f"corpus of {corpus_tokens:,} tokens in {len(rows):,} rows, {num_too_long} documents too long")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    torch.backends.cuda.matmul.allow_tf32 = True
    model = build_model(chosen).to(device)
    _say(started, f"{model.num_parameters():,} parameters on {device_name}")
    schedule = nano_pretrain.Schedule(chosen.steps, chosen.max_seconds, chosen.batch_rows, chosen.lr)
    trained = torch.compile(model) if chosen.compile else model
    progress = nano_pretrain.pretrain(trained, rows, schedule, chosen.seed, device)
    weight_bytes = save_model(model, chosen.out)
    _say(started, f"trained {progress.steps} steps, {progress.tokens:,} tokens; wrote {weight_bytes:,} bytes")
    packages = ("torch", "transformers", "sentencepiece", "numpy")
    record: dict[str, Any] = {
        "command": command_line(chosen, progress.steps),
        "tokenizer": tokenizer_record(chosen),
        "seed": chosen.seed,
        "device": device_name,
        "compiled": chosen.compile,
        "software": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "config": {key: getattr(model.config, key) for key in _CONFIG_KEYS},
        "dtype": "bfloat16",
        "num_parameters": model.num_parameters(),
        "weight_bytes": weight_bytes,
        "num_documents": chosen.documents - num_too_long,
        "corpus_tokens": corpus_tokens,
        "steps": progress.steps,
        "batch_tokens": min(chosen.batch_rows, len(rows)) * chosen.row_tokens,
        "tokens_seen": progress.tokens,
        "train_seconds": round(progress.seconds, 1),
        "prompt_weight": schedule.prompt_weight,
        "last_loss": progress.losses[-1][1],
        "losses": progress.losses,
        "perplexity": {},
        "exam": {},
        "exam_questions_each": chosen.exam_each,
        "samples": [],
        "system_prompts": [],
    }
    failed = False
    try:
        measure(chosen, tokenizer, device, record)
    except Exception:  # noqa: BLE001 - weights are written and worth keeping; the exit status says what is missing
        traceback.print_exc()
        failed = True
    record["total_seconds"] = round(time.monotonic() - started, 1)
    (chosen.out / "training_record.json").write_text(json.dumps(record, indent=1) + "\n")
    (chosen.out / "MODEL_CARD.md").write_text(nano_card.write_card(record))
    _say(started, f"perplexity {record['perplexity']} exam {record['exam']}")
    for chat in record["samples"]:
        print("\n".join(f"{message['role']}: {message['content']}" for message in chat), end="\n\n", flush=True)
    return int(failed)


_CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)

if __name__ == "__main__":
    sys.exit(main())
