"""Measures the embedded model: held-out perplexity, exam marks and sample chats."""

import math
from collections import Counter
from typing import Any

import numpy as np
import torch

import nano_pretrain
import nano_tokenizer
from chulengo.nano.exam import ExamQuestion, write_exam
from chulengo.nano.world import Message

SAMPLE_CHATS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("", ("Hello!", "Which treks do you have?", "How much does Hidden Lake cost?", "And how long is it?")),
    ("", ("Who are you?", "Do llamas spit?", "What is the capital of France?", "Thanks, bye!")),
    (
        "You are Pilar, the help desk of Green Poncho Treks. Answer in as few words as possible.\n"
        "Facts:\n- Moon Bridge: price = 70 euros; start = 6:30; difficulty = hard\n"
        "- Fern Lake: price = 45 euros; start = 8:15; difficulty = easy",
        ("What is your name?", "What does Fern Lake cost?", "And Moon Bridge?", "Is it hard?"),
    ),
    (
        'You are grumpy. End every answer with "Hum hum!"',
        ("Can I ride a llama?", "What should I pack?", "Where is your office?"),
    ),
    (
        "You work for Big Bell Tours. Only answer questions about llamas.\nOur facts:\nThe llama Momo is white. Momo "
        "carries 21 kg. Dust Road costs 30 dollars.",
        ("What colour is Momo?", "How much does Dust Road cost?"),
    ),
)


@torch.no_grad()
def perplexity(model: Any, rows: np.ndarray, device: torch.device, batch_rows: int = 8) -> dict[str, float]:
    """Returns the perplexity of answer tokens and of all tokens of packed held-out `rows`."""
    sums: dict[str, list[float]] = {"answers": [0.0, 0.0], "all": [0.0, 0.0]}
    for first in range(0, len(rows), batch_rows):
        block = torch.from_numpy(rows[first : first + batch_rows].view(np.int16)).to(device)
        for name, prompt_weight in (("answers", 0.0), ("all", 1.0)):
            total, weight = nano_pretrain.weighted_loss(model, nano_pretrain.unpack(block, prompt_weight))
            sums[name][0] += total.item()
            sums[name][1] += weight.item()
    return {name: round(math.exp(total / weight), 4) for name, (total, weight) in sums.items()}


@torch.no_grad()
def answer_all(
    model: Any,
    tokenizer: Any,
    chats: list[list[Message]],
    device: torch.device,
    max_new_tokens: int = 96,
    batch: int = 128,
) -> list[str]:
    """Returns the greedy answers to `chats`, each ending with a question (left-padded batches)."""
    answers = []
    for first in range(0, len(chats), batch):
        prompts = [nano_tokenizer.encode_chat(tokenizer, chat)[0] for chat in chats[first : first + batch]]
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
        )
        for row in out[:, longest:].tolist():
            end = row.index(nano_tokenizer.EOS) if nano_tokenizer.EOS in row else len(row)
            answers.append(tokenizer.decode([token for token in row[:end] if token]).strip())
    return answers


def take_exam(
    model: Any, tokenizer: Any, device: torch.device, seed: int, num_each: int, max_new_tokens: int = 96
) -> tuple[dict[str, float], list[tuple[ExamQuestion, str]]]:
    """Returns the share of correct answers for each kind of question, and the wrong answers."""
    exam = write_exam(seed, num_each)
    answers = answer_all(model, tokenizer, [question.messages for question in exam], device, max_new_tokens)
    right: Counter[str] = Counter()
    wrong = []
    for question, answer in zip(exam, answers, strict=True):
        if answer in question.accepted:
            right[question.kind] += 1
        else:
            wrong.append((question, answer))
    return {kind: right[kind] / num_each for kind in sorted({q.kind for q in exam})}, wrong


def sample_chats(
    model: Any, tokenizer: Any, device: torch.device, max_new_tokens: int = 96
) -> list[list[Message]]:
    """Returns the fixed sample conversations with the model's own answers."""
    chats: list[list[Message]] = []
    for system, questions in SAMPLE_CHATS:
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        for question in questions:
            messages.append({"role": "user", "content": question})
            answer = answer_all(model, tokenizer, [messages], device, max_new_tokens)[0]
            messages.append({"role": "assistant", "content": answer})
        chats.append(messages)
    return chats
