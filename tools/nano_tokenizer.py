"""Trains the embedded model's tokenizer and renders conversations with it by Meta's rule for Llama 2 chat."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from chulengo.nano.world import Message, write_document

BOS, EOS = 1, 2
_PRINTABLE = "".join(map(chr, range(33, 127)))
_CHAT_TEMPLATE = (
    "{%- set system = '' -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' -%}"
    "{%- set messages = messages[1:] -%}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('roles must alternate: user, assistant, user, ...') -}}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- bos_token + '[INST] ' + ((system if loop.first else '') + message['content']).strip() + ' [/INST]' -}}"
    "{%- else -%}"
    "{{- ' ' + message['content'].strip() + ' ' + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def chat_pairs(messages: Sequence[Message]) -> list[tuple[str, str | None]]:
    """Returns (prompt, answer) texts of every turn; the answer is None after a last, open question."""
    system = ""
    if messages[0]["role"] == "system":
        system = f"<<SYS>>\n{messages[0]['content'].strip()}\n<</SYS>>\n\n"
        messages = messages[1:]
    pairs: list[tuple[str, str | None]] = []
    for index in range(0, len(messages), 2):
        question = (system if index == 0 else "") + messages[index]["content"]
        answer = f"{messages[index + 1]['content'].strip()} " if index + 1 < len(messages) else None
        pairs.append((f"[INST] {question.strip()} [/INST]", answer))
    return pairs


def encode_chat(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Returns the token ids of a conversation and, for each, whether it belongs to an answer or its end.

    Prompt and answer are encoded apart: no piece spans a space, so the ids are those of the joined text.
    """
    ids: list[int] = []
    is_answer: list[bool] = []
    for prompt, answer in chat_pairs(messages):
        prompt_ids = [BOS, *tokenizer.encode(prompt)]
        answer_ids = [] if answer is None else [*tokenizer.encode(answer), EOS]
        ids += prompt_ids + answer_ids
        is_answer += [False] * len(prompt_ids) + [True] * len(answer_ids)
    return ids, is_answer


def _training_lines(seed: int, num_documents: int) -> Iterator[str]:
    for index in range(num_documents):
        document = write_document(seed, index)
        if "text" in document:
            yield from str(document["text"]).split("\n")
            continue
        for prompt, answer in chat_pairs(document["messages"]):  # type: ignore[arg-type]
            yield from prompt.split("\n")
            yield answer or ""


def train_tokenizer(folder: Path, seed: int, num_documents: int, vocab_size: int) -> Any:
    """Trains a SentencePiece BPE model on the world's text, writes it to `folder` and returns it loaded.

    The file holds neither the folder's name nor the number of threads of the machine, so it is the same everywhere.
    """
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in _training_lines(seed, num_documents) if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        required_chars=_PRINTABLE,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Any:
    """Returns the SentencePiece processor of `folder`."""
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def write_tokenizer_config(folder: Path, max_tokens: int) -> None:
    """Writes tokenizer_config.json, so that transformers' AutoTokenizer reads the folder."""
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
        "chat_template": _CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
