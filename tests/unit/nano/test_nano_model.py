"""The shipped model: its files agree with its card, any reader gets the same tokens, and it speaks."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

import nano_card
import nano_prompts
import nano_tokenizer
from chulengo import nano
from chulengo.data.renderer import Renderer
from chulengo.data.tokenizer import load_tokenizer
from chulengo.data.types import Example, Message
from chulengo.generate.engine import answer_all
from chulengo.generate.settings import GenerationSettings
from chulengo.nano.exam import KINDS, write_exam
from chulengo.nano.world import write_document

FOLDER = nano.model_dir()
RECORD: dict[str, Any] = json.loads((FOLDER / "training_record.json").read_text())


def chats(count: int, seed: int) -> list[list[dict[str, str]]]:
    documents = (write_document(seed, index) for index in range(count))
    return [document["messages"] for document in documents if "messages" in document]  # type: ignore[misc]


# ---- files ----


def test_the_weights_are_small() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000


def test_the_config_is_plain_llama() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["model_type"], config["hidden_act"], config["dtype"]) == ("llama", "silu", "bfloat16")
    assert config["num_key_value_heads"] == config["num_attention_heads"]
    assert {key: config[key] for key in RECORD["config"]} == RECORD["config"]


def test_the_card_says_what_the_record_says() -> None:
    assert (FOLDER / "MODEL_CARD.md").read_text() == nano_card.write_card(RECORD)


def test_the_record_says_what_the_files_say() -> None:
    from safetensors import safe_open

    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size == RECORD["weight_bytes"]
    with safe_open(weights, "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - not a dict
    assert sum(tensor.numel() for tensor in tensors) == RECORD["num_parameters"]
    tokenizer = FOLDER / "tokenizer.model"
    assert hashlib.sha256(tokenizer.read_bytes()).hexdigest() == RECORD["tokenizer"]["sha256"]
    assert load_tokenizer(FOLDER).vocab_size == RECORD["config"]["vocab_size"]


# ---- tokens ----

TEXTS = (
    "How much does Hidden Lake cost?",
    " two  spaces ",
    "a\nb\n\nc\tq",
    'JSON: {"price": "95 soles"}',
    "¿Cuánto cuesta? – 30 €, 日本語, 🦙",
    "<s> [INST] </s> <<SYS>>",
)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = nano_tokenizer.load_tokenizer(FOLDER)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_three_ways_to_the_same_tokens() -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(FOLDER))
    trained_with = nano_tokenizer.load_tokenizer(FOLDER)
    renderer = Renderer(load_tokenizer(FOLDER))
    some = chats(150, seed=5)
    assert len(some) > 120
    for chat in some:
        ids, is_answer = nano_tokenizer.encode_chat(trained_with, chat)
        text = theirs.apply_chat_template(chat, tokenize=False)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert ids[-1] == nano_tokenizer.EOS
        assert is_answer[-1]
        row = renderer.render(Example(tuple(Message(m["role"], m["content"]) for m in chat), "row"))
        assert row.ids == ids
        assert row.trained == is_answer


# ---- speech ----


@pytest.fixture(scope="module")
def model() -> Any:
    from chulengo.model.load import load_base

    return load_base(
        FOLDER, quantization="none", double_quant=False, compute_dtype="float32", device="cpu", attention="sdpa"
    )


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(load_tokenizer(FOLDER))


def say(model: Any, renderer: Renderer, conversations: list[list[dict[str, str]]]) -> list[str]:
    asked = [[Message(m["role"], m["content"]) for m in chat] for chat in conversations]
    settings = GenerationSettings(max_new_tokens=64)
    return [answer.text for answer in answer_all(model, renderer, asked, settings, 24)]


def assert_the_exam_is_passed(model: Any, renderer: Renderer, num_each: int, slack: float) -> None:
    exam = write_exam(20, num_each)
    answers = say(model, renderer, [question.messages for question in exam])
    for kind in KINDS:
        marks = [a in q.accepted for q, a in zip(exam, answers, strict=True) if q.kind == kind]
        assert sum(marks) / num_each >= RECORD["exam"][kind] - slack, kind


def test_it_passes_a_short_exam(model: Any, renderer: Renderer) -> None:
    # 12 of the 250 recorded questions of each kind: two may be wrong
    assert_the_exam_is_passed(model, renderer, 12, slack=0.17)


@pytest.mark.slow
def test_it_passes_the_recorded_exam(model: Any, renderer: Renderer) -> None:
    # the same 250 questions of each kind; one or two answers may differ by the sums of another device
    assert_the_exam_is_passed(model, renderer, 250, slack=0.01)


FACTS = "\nFacts:\n- Fern Lake: price = 45 euros; start = 8:15\n- Moon Bridge: price = 70 euros; start = 6:30"
ROLE = "You are Pilar, the help desk of Green Poncho Treks."
MANNERS = {
    "": "The Fern Lake trek costs 45 euros.",
    " Answer in as few words as possible.": "45 euros.",
    " Answer in JSON.": '{"price": "45 euros"}',
    ' End every answer with "Bless the herd!"': "The Fern Lake trek costs 45 euros. Bless the herd!",
    " Never talk about prices.": "Sorry, I may not talk about prices.",
}


def test_the_system_prompt_changes_what_it_says(model: Any, renderer: Renderer) -> None:
    question = {"role": "user", "content": "What does Fern Lake cost?"}
    asked = [[{"role": "system", "content": f"{ROLE}{manner}{FACTS}"}, question] for manner in MANNERS]
    assert say(model, renderer, asked) == list(MANNERS.values())


def test_the_system_prompts_of_the_card(model: Any, renderer: Renderer) -> None:
    tried = nano_prompts.judged(say(model, renderer, nano_prompts.chats()))
    assert tried == RECORD["system_prompts"]
    assert [each["kind"] for each in tried if each["follows"]] == [each["kind"] for each in tried[:16]]


def test_it_is_who_the_system_prompt_says(model: Any, renderer: Renderer) -> None:
    question = {"role": "user", "content": "Who are you?"}
    pilar, nobody = say(model, renderer, [[{"role": "system", "content": ROLE + FACTS}, question], [question]])
    assert "Pilar" in pilar
    assert "Green Poncho Treks" in pilar
    assert "Nano" in nobody
    assert "Tambo Trails" in nobody


def test_it_remembers_the_turn_before(model: Any, renderer: Renderer) -> None:
    chat = [
        {"role": "system", "content": ROLE + FACTS},
        {"role": "user", "content": "What does Moon Bridge cost?"},
        {"role": "assistant", "content": "The Moon Bridge trek costs 70 euros."},
        {"role": "user", "content": "And when does it start?"},
    ]
    other = [*chat[:-1], {"role": "user", "content": "And Fern Lake?"}]
    start, price = say(model, renderer, [chat, other])
    assert "6:30" in start
    assert price == "The Fern Lake trek costs 45 euros."
