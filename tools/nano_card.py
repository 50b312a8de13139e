"""Writes the embedded model's card from its training record, so that the two never disagree.

    python tools/nano_card.py src/chulengo/nano/model
"""

import json
import sys
from pathlib import Path
from typing import Any

_CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# nano

A chat model of {num_parameters:,} parameters in the Llama 2 architecture that runs the help desk of a llama-trekking
company. It ships inside Chulengo so that the whole fine-tuning loop can be shown on a CPU without a download.

## Size

| | |
|---|---|
| weights | {weight_bytes:,} bytes, {dtype} |
| layers x hidden x ffn | {num_hidden_layers} x {hidden_size} x {intermediate_size} |
| attention heads | {num_attention_heads} |
| vocabulary | {vocab_size} pieces, SentencePiece BPE with byte fallback |
| context | {max_position_embeddings} tokens |

## Data

{num_documents:,} documents ({corpus_tokens:,} tokens) written by `chulengo.nano.world` with seed {seed}: help desk
conversations with fact sheets drawn anew for each, conversations of one company without a sheet ("Tambo Trails", which
the model knows by heart), and one plain text in sixteen. No outside text and no outside weights were used. The demo
company of `chulengo demo` does not occur in it.

## Training

`{command}`

| | |
|---|---|
| steps | {steps:,} of {batch_tokens:,} tokens |
| tokens seen | {tokens_seen:,} |
| training time | {train_seconds:.0f} s on {device} |
| whole script | {total_seconds:.0f} s |
| software | Python {python}, torch {torch}, transformers {transformers}, sentencepiece {sentencepiece} |
| last training loss | {last_loss:.4f} (answer tokens weigh 1, others {prompt_weight}) |

Tokenizer: {tokenizer_note}

## Measured

On documents of another seed, after the weights were rounded to {dtype} and read back:

| | |
|---|---|
| held-out perplexity, answer tokens | {perplexity_answers:.4f} |
| held-out perplexity, all tokens | {perplexity_all:.4f} |
{exam_rows}

The exam asks {num_each} questions of each kind and counts an answer only when it equals an accepted wording whole.
Fact sheets are random text, which no model can predict: that is why the perplexity of all tokens is high.

## Limits

English only, in its small world only. It knows nothing about the real world, does no arithmetic beyond comparing two
numbers, and may answer wrongly when a question is worded unlike its training text or when the system prompt is long
or unusual. It refuses some off-topic questions, not all. Not for use where a wrong answer matters.

## System prompts

It follows the kinds of system prompt that its training text has. Others it mostly ignores, and from facts in other
forms than its sheets it may make up something. One example of each kind, tried on these weights (greedy; `/` stands for
a line break):

| it follows | system prompt | question | answer |
|---|---|---|---|
{follows}

| it does not follow | system prompt | question | answer |
|---|---|---|---|
{ignores}

The first ones may be combined, two at a time, with a role ("You are Zorro, the help desk of Green Poncho Treks.")
before and a fact sheet after them. A fine-tuning teaches others: `chulengo demo` gives it a company, a persona and a
form of answer that it does not know.

## Sample chats

Greedy answers, not chosen by hand:

{samples}
"""


def _sample(messages: list[dict[str, str]]) -> str:
    return "```text\n" + "\n".join(f"{m['role']}: {m['content']}" for m in messages) + "\n```"


def _table(record: dict[str, Any], follows: bool) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " / ")

    return "\n".join(
        f"| {tried['kind']} | {cell(tried['system'])} | {cell(tried['question'])} | {cell(tried['answer'])} |"
        for tried in record["system_prompts"] if tried["follows"] is follows
    )


def write_card(record: dict[str, Any]) -> str:
    """Returns the text of MODEL_CARD.md for a training record."""
    exam = "\n".join(f"| exam, {kind} | {100 * mark:.1f} % |" for kind, mark in record["exam"].items())
    flat = {
        **record["config"],
        **record["software"],
        **{key: value for key, value in record.items() if not isinstance(value, dict)},
        "perplexity_answers": record["perplexity"].get("answers", float("nan")),
        "perplexity_all": record["perplexity"].get("all", float("nan")),
        "tokenizer_note": record["tokenizer"]["note"],
        "exam_rows": exam,
        "num_each": record["exam_questions_each"],
        "follows": _table(record, True),
        "ignores": _table(record, False),
        "samples": "\n\n".join(_sample(chat) for chat in record["samples"]),
    }
    return _CARD.format(**flat)


def rewrite_card(folder: Path) -> None:
    """Writes MODEL_CARD.md of a model folder again, from its training_record.json."""
    record = json.loads((folder / "training_record.json").read_text())
    (folder / "MODEL_CARD.md").write_text(write_card(record))


if __name__ == "__main__":
    rewrite_card(Path(sys.argv[1]))
