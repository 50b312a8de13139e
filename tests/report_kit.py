"""Run folders and results as `chulengo train` and `chulengo eval --task` write them, small and made up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from chulengo.config import RunConfig, load_config, to_yaml
from chulengo.config.load import flatten
from chulengo.evaluate.comparison import compare_all
from chulengo.evaluate.metrics.metric import Metric, Outcome, mean_of
from chulengo.evaluate.results import RESULTS_FORMAT
from chulengo.evaluate.scoring import score_all

DEFAULTS = flatten(RunConfig())
HOSTILE = (
    "<script>alert(1)</script>", "</style><style>*{display:none}</style>",
    "</svg></title>&amp;\"'><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% raw %}", "שלום עולם, this is mixed: مرحبا 12:30", "🦙🧣👩🏽‍🔬", "", "word" * 2500,
    "a\x00b\x1b[31m\ud800\u202eevil\r\nnext line", "\n".join(f"line {number}" for number in range(60)),
)  # fmt: skip


def write_run(folder: Path, *, steps: int = 60, finished: bool = True, **settings: str) -> Path:
    """Writes a run folder and returns it; `settings` are `section__key=value`."""
    folder.mkdir(parents=True)
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    config = load_config(None, ["data.train=talks.jsonl", "lora.rank=8", *overrides])
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    ledger = {
        "num_rows": 500, "num_used_rows": 497, "num_tokens": 61_240, "num_supervised_tokens": 30_120,
        "num_encoder_tokens": 0, "supervised_share": 0.4918, "max_seq_tokens": 512, "overlong": "drop",
        "long_rows": [{"source": f"talks.jsonl:{n}", "num_tokens": 700, "num_used_tokens": 0} for n in (3, 90, 200)],
        "num_dropped_rows": 3, "num_shortened_rows": 0, "num_dropped_turns": 0, "cut_ends": [],
        "unsupervised_rows": [], "duplicates": [], "num_duplicate_rows": 4,
        "lengths": {"p5": 31.0, "p50": 104.0, "mean": 122.8, "p95": 300.0, "max": 700}, "padded_share": {"4": 0.2},
        "problems": [],
    }
    write(folder / "ledger.json", {
        "train": ledger, "validation": ledger | {"num_rows": 50, "num_used_rows": 50, "lengths": {
            "p5": 30.0, "p50": 99.0, "mean": 110.0, "p95": 280.0, "max": 410}},
        "load": {"format": "messages", "source": "/data/talks.jsonl", "rows_read": 510, "rows_kept": 500,
                 "dropped": {"empty answer": 10}, "changed": {}, "unused_columns": ["lang"]},
    })
    write(folder / "manifest.json", {
        "chulengo": "0.1.0", "python": "3.12.3", "platform": "Linux-6.8-x86_64",
        "versions": {"torch": "2.11.0", "transformers": "5.17.0", "peft": "0.21.0", "triton": None},
        "devices": [{"name": "NVIDIA H200", "memory_bytes": 150_000_000_000, "capability": "9.0"}],
        "cuda_driver": "580.82.07", "cpu": {"model": "AMD EPYC", "cores": 16},
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": True},
        "command": ["/home/me/.venv/bin/chulengo", "train", "--data", "talks.jsonl", "--hf-token", "***"],
        "seeds": {"training": 0, "data": 0},
        "hashes": {"model": "sha256:" + "ab" * 32, "data": "cd" * 32, "renderer": "ef" * 32},
        "started_utc": "2026-11-20T17:47:16+00:00", "config": flatten(config),
    })
    rows = list(_metric_rows(steps))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if finished:
        write(folder / "result.json", {
            "base_loss": 2.9, "tuned_loss": 1.31, "base_perplexity": math.exp(2.9), "tuned_perplexity": math.exp(1.31),
            "steps": steps, "kept_step": steps, "best_step": steps, "seconds": 5021.0, "tokens": 12_300_000,
            "peak_bytes": 11_200_000_000, "stopped_early": False,
            "shape": {"total_steps": steps, "first_step": 0, "trainable_parameters": 39_976_960},
        })
    return folder


def write_results(folder: Path, *, run: Path | None = None, **changes: Any) -> Path:
    """Writes the results of an evaluation and returns the folder; `changes` replace entries of the file."""
    write(folder / "results.json", results(run=run) | changes)
    return folder


def results(*, run: Path | None = None, items: int = 120, gain: float = 0.5) -> dict[str, Any]:
    """Returns the results of an evaluation whose tuned side answers a share `gain` more questions right."""
    sides = {"base": _outcomes(items, 0.3), "tuned": _outcomes(items, 0.3 + gain)}
    metrics = [
        mean_of("squad_f1", "squad-f1/1", "Share of words in common.", _f1, unit="points"),
        mean_of("exact_match", "exact-match/2", "Letter for letter.", lambda o: float(o.answer == o.references[0])),
        _perplexity(),
        mean_of("answer_words", "answer-words/1", "Words of an answer.", lambda o: float(len(o.answer.split())),
                unit="number", higher_is_better=None),
    ]
    scores = {side: score_all(metrics, outcomes, draws=200) for side, outcomes in sides.items()}
    compared = compare_all(list(zip(scores["base"], scores["tuned"], strict=True)), draws=200)
    adapter = None if run is None else str(run / "adapter")
    return {
        "format": RESULTS_FORMAT, "task": "squad", "headline": "squad_f1",
        "data": {"source": "dev-v1.1.json", "rows": items, "num_rows": items, "hash": "12" * 32},
        "sides": {"base": {"model": "nano", "adapter": None}, "tuned": {"model": "nano", "adapter": adapter}},
        "settings": {"max_new_tokens": 32, "temperature": 0.0}, "versions": {"chulengo": "0.1.0", "torch": "2.11.0"},
        "seconds": {"base": 12.0, "tuned": 13.0},
        "command": ["chulengo", "eval", "--adapter", adapter or "runs/support", "--task", "squad", "--data",
                    "/somewhere/dev-v1.1.json", "--set", "data.cleaning=[drop_long:500]", "--out", "results/squad"],
        "scores": {side: [score.to_dict() for score in found] for side, found in scores.items()},
        "comparisons": [comparison.to_dict() for comparison in compared],
        "examples": [
            {"id": one.id, "group": one.group, "question": one.question, "references": list(one.references),
             "answers": {"base": {"text": one.answer, "finish_reason": "stop"},
                         "tuned": {"text": other.answer, "finish_reason": "length" if n % 7 == 0 else "stop"}}}
            for n, (one, other) in enumerate(zip(sides["base"], sides["tuned"], strict=True))
        ],
    }  # fmt: skip


def hostile_results(*, run: Path | None = None) -> dict[str, Any]:
    """Returns results in which every text from model and data tries something."""
    made = results(run=run, items=40)
    for number, example in enumerate(made["examples"]):
        text = HOSTILE[number % len(HOSTILE)]
        example |= {"question": text, "references": [text, "another"]}
        example["answers"] = {"base": {"text": text, "finish_reason": text[:20]},
                              "tuned": {"text": HOSTILE[(number + 3) % len(HOSTILE)], "finish_reason": "stop"}}
    made["task"] = HOSTILE[0]
    made["sides"]["base"]["model"] = HOSTILE[1]
    made["settings"][HOSTILE[0]] = HOSTILE[2]
    made["scores"]["base"][0]["definition"] = made["scores"]["tuned"][0]["definition"] = HOSTILE[1]
    return made


def write(path: Path, content: Any) -> None:
    """Writes JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _metric_rows(steps: int) -> Any:
    rng = np.random.default_rng(0)
    yield _validation(0, 2.9)
    for step in range(1, steps + 1):
        share = step / steps
        yield {
            "kind": "train", "step": step, "epoch": 2 * share,
            "loss": 1.2 + 1.7 * math.exp(-5 * share) + 0.08 * float(rng.standard_normal()),
            "learning_rate": 2e-4 * min(1.0, step / 5) * 0.5 * (1 + math.cos(math.pi * share)),
            "grad_norm": 0.4 + 0.1 * abs(float(rng.standard_normal())), "tokens": 20_000, "supervised_tokens": 9_000,
            "tokens_per_s": 2450.0, "step_s": 8.1, "peak_bytes": 11_200_000_000, "elapsed_s": 8.2 * step,
        }  # fmt: skip
        if step % max(1, steps // 6) == 0:
            yield _validation(step, 1.3 + 1.6 * math.exp(-5 * share) + (0.05 if share == 1 else 0))


def _validation(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "validation", "step": step, "epoch": 0, "loss": loss, "perplexity": math.exp(loss),
            "supervised_tokens": 4000, "seconds": 1.0}


def _outcomes(items: int, share_right: float) -> list[Outcome]:
    made = []
    for number in range(items):
        odd = number % 11 == 5  # the base has these right, the tuned side wrong
        right = share_right < 0.5 if odd else (number * 37 % 100) / 100 < share_right
        town = f"Tafalla {number}"
        answer = town if right else f"It is {'very far ' * (number % 4)}from here"
        question = f"In which town is stop {number}?"
        made.append(Outcome(f"q{number:03}", f"page{number // 3}", question, (town,), answer, "stop"))
    return made


def _f1(outcome: Outcome) -> float:
    said, wanted = outcome.answer.split(), outcome.references[0].split()
    common = len(set(said) & set(wanted))
    return 100 * 2 * common / (len(said) + len(wanted)) if common else 0.0


def _perplexity() -> Metric:
    return mean_of("perplexity", "perplexity/2", "Made up.", lambda o: 4.0 if o.answer == o.references[0] else 7.0,
                   unit="number", higher_is_better=False)
