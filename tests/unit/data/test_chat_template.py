"""A tokenizer's own template: the same ids as transformers gives, the mask, and the templates that are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import CHATML, LLAMA3, MARKS, byte_level, byte_level_json, random_conversation

from chulengo.data.renderer import Renderer
from chulengo.data.tokenizer import Tokenizer, load_tokenizer
from chulengo.data.types import Example, Message
from chulengo.errors import ConfigError, RenderError

TALK = (
    Message("system", "Be brief."), Message("user", "One?"), Message("assistant", "Uno."),
    Message("user", "Two?"), Message("assistant", "Dos."),
)  # fmt: skip
# the templates of well-known families, in short
QWEN = (
    "{%- if messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{%- else %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role != 'system' %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
CHATML_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# a reasoning model: an empty thought before the last answer only
THINKING = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{ m.content.split('</think>')[-1] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTROLS = ("<s>", "</s>", *CHATML, *LLAMA3)
ALL = {"qwen": QWEN, "chatml": CHATML_TEMPLATE, "llama2": LLAMA2, "llama3": LLAMA3_TEMPLATE, "zephyr": ZEPHYR,
       "thinking": THINKING, "generation": GENERATION}  # fmt: skip


def with_template(template: str, folder: Path | None = None) -> Tokenizer:
    if folder is None:
        return byte_level(*CONTROLS, bos="<s>", eos="</s>", template=template, plain=("<think>", "</think>"))
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(byte_level_json(*CONTROLS, plain=("<think>", "</think>")))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


def own(template: str, **options: Any) -> Renderer:
    return Renderer(with_template(template), style="tokenizer", **options)


def trained_text(renderer: Renderer, messages: tuple[Message, ...]) -> str:
    row = renderer.render(Example(messages, "row"))
    texts, _ = renderer.spell(Example(messages, "row"))
    return "".join(text for text, flag in zip(texts, row.trained, strict=True) if flag)


@pytest.mark.parametrize("name", ALL)
def test_ids_equal_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    renderer = Renderer(with_template(ALL[name], tmp_path), style="tokenizer")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    for messages in (TALK, TALK[1:], TALK[:3]):
        chat = [{"role": m.role, "content": m.content} for m in messages]
        whole = theirs.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert renderer.render(Example(messages, "row")).ids == whole
        prompt = theirs.apply_chat_template(chat[:-1], tokenize=True, return_dict=False, add_generation_prompt=True)
        assert renderer.prompt(messages[:-1]) == prompt


def test_mask_is_what_the_turn_adds_up_to_its_last_control_token() -> None:
    assert trained_text(own(QWEN), TALK) == "Uno.<|im_end|>Dos.<|im_end|>"
    assert trained_text(own(LLAMA2), TALK) == " Uno. </s> Dos. </s>"
    assert trained_text(own(LLAMA3_TEMPLATE), TALK) == "Uno.<|eot_id|>Dos.<|eot_id|>"
    assert trained_text(own(ZEPHYR), TALK) == "Uno.</s>Dos.</s>"
    assert trained_text(own(MISTRAL), TALK[1:]) == "Uno.</s>Dos.</s>"
    assert trained_text(own(GENERATION), TALK) == "Uno.<|im_end|>Dos.<|im_end|>"
    # what the template writes after its generation prompt is for the model to write
    assert trained_text(own(THINKING), TALK) == "Uno.<|im_end|><think>\n\n</think>\n\nDos.<|im_end|>"
    assert trained_text(own(QWEN, train_on="last_answer"), TALK) == "Dos.<|im_end|>"
    assert trained_text(own(QWEN, train_end_of_turn=False), TALK) == "Uno.Dos."
    assert trained_text(own(QWEN, train_roles=("user",)), TALK) == "One?<|im_end|>Two?<|im_end|>"
    assert own(QWEN).stop_ids == {with_template(QWEN).control_tokens[t] for t in ("<|im_end|>", "</s>")}


def test_a_control_token_before_the_answer_is_no_end() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{{ '<think>' if m.role == 'assistant' }}"
        "{{ m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    assert trained_text(own(template), TALK) == "<think>Uno.<|im_end|><think>Dos.<|im_end|>"
    assert trained_text(own(template, train_end_of_turn=False), TALK) == "<think>Uno.<think>Dos."


@pytest.mark.parametrize("name", ["qwen", "chatml", "llama2", "llama3", "zephyr", "generation"])
def test_prompts_are_prefixes_for_any_content(name: str) -> None:
    rng = random.Random(name)
    renderer = own(ALL[name])
    for _ in range(60):
        messages = random_conversation(rng)
        row = renderer.render(Example(messages, "row"))
        answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
        assert len(row.turn_ends) == len(answers)
        for turn, end in zip(answers, row.turn_ends, strict=True):
            prompt = renderer.prompt(messages[:turn])
            assert row.ids[: len(prompt)] == prompt
            assert all(row.trained[len(prompt) : end])
            assert renderer.decode(row.ids[len(prompt) : end]).strip() == messages[turn].content.strip()


@pytest.mark.parametrize("name", ["qwen", "llama2", "llama3", "zephyr"])
def test_marks_typed_by_users_stay_text(name: str) -> None:
    renderer = own(ALL[name])
    controls = set(renderer.tokenizer.control_tokens.values())

    def placed(messages: tuple[Message, ...]) -> list[int]:
        return [i for i in renderer.render(Example(messages, "row")).ids if i in controls]

    for mark in MARKS:
        assert placed(tuple(Message(m.role, f"a {mark} b{mark}") for m in TALK)) == placed(TALK)


def test_contents_with_the_placeholders_own_characters_are_safe() -> None:
    odd = "\ue0001\ue001 \u2003\ue000"
    messages = (Message("user", odd), Message("assistant", odd + "x"))
    renderer = own(CHATML_TEMPLATE)
    assert renderer.render(Example(messages, "row")).ids == Renderer(
        renderer.tokenizer, style="chatml"
    ).render(Example(messages, "row")).ids + renderer.tokenizer.encode("\n")[0]


@pytest.mark.parametrize(
    ("template", "messages", "what"),
    [
        # earlier answers lose a part once the conversation goes on
        ("{% for m in messages %}{{ m.role + ': ' + m.content }}{{ '</s>' if m.role == 'assistant' and loop.last }}"
         "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
         TALK, r"ends message 3 \(assistant\) differently"),
        # the whole prompt changes with the number of messages
        ("{{ messages | length // 3 }}" + ZEPHYR,
         TALK, r"does not keep message 3 \(assistant\) behind its own generation"),
        (THINKING, (TALK[1], Message("assistant", "<think>x</think>Uno.")),
         r"changes the text of message 2 \(assistant\)"),
        ("{% for m in messages %}{% if m.role != 'system' %}{{ m.content + '</s>' }}{% endif %}{% endfor %}",
         TALK, r"leaves out message 1 \(system\)"),
        ("{% for m in messages %}{{ m.content + m.content + '</s>' }}{% endfor %}", TALK, "repeats message 1"),
        (MISTRAL, TALK, "Only user and assistant roles are supported!"),
        (LLAMA2, (TALK[1], *TALK[1:]), "Conversation roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", TALK, "refuses the conversation"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_trained_on(template: str, messages: tuple[Message, ...], what: str) -> None:
    with pytest.raises((RenderError, ConfigError), match=what):
        own(template).render(Example(messages, "data.jsonl:1"))


def test_a_template_that_never_ends_a_turn_is_refused() -> None:
    with pytest.raises(ConfigError, match="no control token after an answer"):
        own("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}")
    with pytest.raises(ConfigError, match="cannot be read"):
        own("{% for m in messages %}")


def test_the_clock_stands_still() -> None:
    template = "{{ strftime_now('%d %b %Y') }}" + ZEPHYR
    renderer = own(template)
    assert "".join(renderer.spell(Example(TALK, "row"))[0]).startswith("26 Jul 2024")


def test_auto_knows_a_built_in_format_by_what_it_renders() -> None:
    def auto(template: str) -> str:
        renderer = Renderer(with_template(template))
        assert renderer.style_reason
        return renderer.style

    assert auto(CHATML_TEMPLATE) == "chatml"
    assert auto(LLAMA2) == "llama2"
    assert auto(LLAMA3_TEMPLATE) == "llama3"
    assert auto(MISTRAL) == "mistral"
    assert auto(QWEN) == "tokenizer"  # ChatML with a system prompt of its own
    assert auto(ZEPHYR) == "tokenizer"


def test_template_is_saved_with_the_renderer(tmp_path: Path) -> None:
    from chulengo.data.renderer import load_renderer, save_renderer

    save_renderer(own(QWEN), tmp_path)
    other_folder = byte_level(*CONTROLS, bos="<s>", eos="</s>", plain=("<think>", "</think>"))
    again = load_renderer(tmp_path, other_folder)
    assert again.render(Example(TALK, "row")) == own(QWEN).render(Example(TALK, "row"))
