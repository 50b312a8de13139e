"""Small tokenizers of every kind that the renderer meets, made in a moment, and conversations to render with them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tokenizers as tk

from chulengo.data.tokenizer import Tokenizer, load_tokenizer
from chulengo.data.tokenizer_json import TransformersTokenizer
from chulengo.data.types import Message

CORPUS = [
    "Where do guanacos live? In the Andes, where the wind blows. A chulengo is a young guanaco.",
    "user assistant system [INST] hello [/INST] Hello there! <<SYS>> Be brief. <</SYS>> ### Human: ### Assistant:",
    "One, two, three: 1 2 3 4500.\n\nA new paragraph.\n- first\n- second\n    indented  text",
    "Чуленго живёт в Андах. ¿Qué es un chulengo? 驼羊 🦙",
] * 4
CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# what a user may type: the control tokens and marks of every style
MARKS = ("</s>", "<s>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", *CHATML, *LLAMA3, "<|begin_of_text|>",
         "<|end_of_text|>", "### Human:", "<unk>", "<think>")
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(
    *controls: str, bos: str | None = None, eos: str | None = None, template: str | None = None,
    plain: tuple[str, ...] = (),
) -> TransformersTokenizer:
    """A byte-level BPE as Llama 3 and Qwen have it; `plain` tokens are added ones not flagged special."""
    return TransformersTokenizer(byte_level_json(*controls, plain=plain),
                                 {"bos_token": bos, "eos_token": eos, "chat_template": template})


def byte_level_json(*controls: str, plain: tuple[str, ...] = ()) -> str:
    """The tokenizer.json of `byte_level`."""
    tokenizer = tk.Tokenizer(tk.models.BPE())
    tokenizer.pre_tokenizer = tk.pre_tokenizers.Sequence([
        tk.pre_tokenizers.Split(tk.Regex(LLAMA3_PATTERN), "isolated"),
        tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(vocab_size=400, initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(),
                                     show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(list(controls))
    tokenizer.add_tokens(list(plain))
    return tokenizer.to_str()


def unigram(*extra: str) -> TransformersTokenizer:
    """A Unigram vocabulary as T5 has it: `</s>` is a piece like any other."""
    settings = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return TransformersTokenizer(unigram_json(*extra), settings)


def unigram_json(*extra: str) -> str:
    """The tokenizer.json of `unigram`."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(c, -4.0) for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:?!/0123456789\n"]
    pieces += [(word, -3.0) for word in ("▁the", "▁Where", "▁live", *extra)]
    tokenizer = tk.Tokenizer(tk.models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = tk.pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = tk.decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return str(tokenizer.to_str())


def sentencepiece_model(folder: Path, **settings: Any) -> Path:
    """Trains a small SentencePiece BPE as Llama 2's is made, and returns its folder."""
    import sentencepiece

    user_defined = settings.pop("user_defined", [])
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(CORPUS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=420, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True, split_digits=True,
        allow_whitespace_only_pieces=True, character_coverage=0.999, user_defined_symbols=user_defined,
        minloglevel=2, max_sentence_length=10000,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def sentencepiece_tokenizer(folder: Path, **settings: Any) -> Tokenizer:
    """The tokenizer of `sentencepiece_model`."""
    return load_tokenizer(sentencepiece_model(folder, **settings))


def random_text(rng: random.Random, *, longest: int = 40) -> str:
    """Text of letters of several scripts, white space, emoji, combining marks and control-token look-alikes."""
    alphabet = [*"abcXYZ019.,:;!?<>[]|/#", " ", "  ", "\n", "\n\n", "\t", "é", "ß", "Ж", "驼", "羊", "🦙", "👩‍🚀", "́",
                "▁", "\u2003", "\u00a0", "ﬁ", "😊", *MARKS]
    text = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, longest)))
    return text if text.strip() else text + "x"


def random_conversation(rng: random.Random, *, exchanges: int = 3) -> tuple[Message, ...]:
    """A conversation that alternates, perhaps with a system prompt, of random texts."""
    messages = [Message("system", random_text(rng))] if rng.random() < 0.4 else []
    for _ in range(rng.randint(1, exchanges)):
        messages += [Message("user", random_text(rng)), Message("assistant", random_text(rng))]
    return tuple(messages)
