"""Makes a small T5 from nothing: tokenizer, weights, and a short pretraining on a plain text.

    python tools/make_tiny_t5.py --text wikitext-2/valid.txt --steps 600 --out tiny-t5

It stands in for Flan-T5 where no network is: the same architecture (gated GELU, a head of its own), a thousandth of the
size. Its pretraining is T5's own (Raffel et al. 2020, section 3.1.4): 15 % of the tokens are taken out in spans of 3
on average, a sentinel stands for each, and the decoder writes them. Seeded: the same machine and software, with one
thread, give the same files. It knows word pieces and their neighbours, and has never seen a question.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

PAD, EOS, UNK = 0, 1, 2
NUM_SENTINELS = 32
SPECIAL = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(NUM_SENTINELS))]
MASKED_SHARE, SPAN_TOKENS = 0.15, 3
ROW_TOKENS, BATCH_ROWS = 128, 16


def make_tokenizer(text: str, vocab_size: int) -> Any:
    """Returns a Unigram tokenizer of the text, with T5's special tokens.

    SentencePiece finds the pieces, as it did for T5. The trainer of `tokenizers` walks hash maps with a new seed in
    each process, with one thread too: its sums, and with them pieces and scores, come out differently each time.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in text.splitlines() if line), model_writer=trained, model_type="unigram",
        vocab_size=vocab_size - NUM_SENTINELS, max_sentencepiece_length=12, normalization_rule_name="identity",
        character_coverage=1.0, pad_id=PAD, eos_id=EOS, unk_id=UNK, bos_id=-1, num_threads=1, minloglevel=1,
    )
    found = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    learnt = [(found.id_to_piece(i), found.get_score(i)) for i in range(UNK + 1, found.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram([*((name, 0.0) for name in SPECIAL), *learnt], unk_id=UNK))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return tokenizer


def make_model(vocab_size: int, width: int, seed: int) -> Any:
    """Returns a T5 with random weights in Flan-T5's architecture."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocab_size, d_model=width, d_kv=width // 4, d_ff=2 * width, num_layers=2, num_heads=4,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", tie_word_embeddings=False, pad_token_id=PAD,
        eos_token_id=EOS, decoder_start_token_id=PAD,
    )
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():  # transformers draws an untied head as wide as embeddings: the first loss would be 37, not 8
        model.lm_head.weight.mul_(width**-0.5)
    return model


def corrupted(ids: np.ndarray, draw: np.random.Generator) -> tuple[list[int], list[int]]:
    """Returns a row with spans taken out, and what the decoder has to write."""
    num_spans = max(1, min(NUM_SENTINELS, round(len(ids) * MASKED_SHARE / SPAN_TOKENS)))
    starts = np.sort(draw.choice(len(ids) // (2 * SPAN_TOKENS), num_spans, replace=False)) * 2 * SPAN_TOKENS
    seen: list[int] = []
    target: list[int] = []
    place = 0
    for number, start in enumerate(starts):
        end = start + int(draw.integers(1, 2 * SPAN_TOKENS))
        sentinel = SPECIAL.index("<extra_id_0>") + number
        seen += [*ids[place:start], sentinel]
        target += [sentinel, *ids[start:end]]
        place = end
    return [*seen, *ids[place:], EOS], [*target, EOS]


def batches(ids: np.ndarray, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yields padded batches of rows from random places of the text, without end."""
    draw = np.random.default_rng(seed)
    while True:
        places = draw.integers(0, len(ids) - ROW_TOKENS, BATCH_ROWS)
        pairs = [corrupted(ids[place : place + ROW_TOKENS], draw) for place in places]
        inputs, labels = ([torch.tensor(row) for row in side] for side in zip(*pairs, strict=True))
        seen = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=PAD)
        yield {
            "input_ids": seen, "attention_mask": (seen != PAD).long(),
            "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
        }


def pretrain(model: Any, ids: np.ndarray, steps: int, rate: float, seed: int) -> list[float]:
    """Returns the loss of each step; the model is trained in place, the rate falling to nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    losses = []
    model.train()
    for _, batch in zip(range(steps), batches(ids, seed), strict=False):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "T5TokenizerFast", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>",
        "extra_ids": NUM_SENTINELS, "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Makes the folder; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="plain text, UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=600, help="of 16 rows of 128 tokens")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--chars", type=int, default=None, help="only so much of the text (default: all)")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()
    text = given.text.read_text(encoding="utf-8")[: given.chars]
    tokenizer = make_tokenizer(text, given.vocab)
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
    model = make_model(tokenizer.get_vocab_size(), given.width, given.seed)
    size = sum(weight.numel() for weight in model.parameters())
    print(f"{size:,} weights, {tokenizer.get_vocab_size():,} pieces, {len(ids):,} tokens of text, "
          f"{time.perf_counter() - started:.1f} s")  # fmt: skip
    losses = pretrain(model, ids, given.steps, given.lr, given.seed)
    first, last = np.mean(losses[:10]), np.mean(losses[-10:])
    seconds = time.perf_counter() - started
    print(f"{given.steps} steps: loss {first:.2f} at first, {last:.2f} at the end, {seconds:.1f} s")
    model.save_pretrained(given.out)
    write_tokenizer(tokenizer, given.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
