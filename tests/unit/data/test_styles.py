"""Each style's tokens, worked out by hand or by its authority, and the properties that all styles share."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from small_tokenizers import (
    CHATML,
    LLAMA3,
    MARKS,
    byte_level,
    random_conversation,
    sentencepiece_tokenizer,
)

from chulengo.data.renderer import Renderer
from chulengo.data.styles import STYLES
from chulengo.data.tokenizer import Tokenizer, load_tokenizer
from chulengo.data.types import Example, Message
from chulengo.errors import ConfigError, RenderError

FIRST = (Message("user", "Hi there."), Message("assistant", "Hello!"))
TALK = (Message("system", "Be brief."), *FIRST, Message("user", "And?"), Message("assistant", "Bye."))
EVERY_STYLE = tuple(STYLES)


def everything(folder: Path) -> list[Tokenizer]:
    """Vocabularies in which every style can be written, with and without a prefix space."""
    controls = ("<s>", "</s>", *CHATML, *LLAMA3)
    tokens = {str(420 + i): {"content": token, "special": True} for i, token in enumerate((*CHATML, *LLAMA3))}
    return [
        byte_level(*controls, bos="<s>", eos="</s>"),
        sentencepiece_tokenizer(folder / "legacy", added_tokens_decoder=tokens),
        sentencepiece_tokenizer(folder / "new", added_tokens_decoder=tokens, legacy=False),
    ]


def spelled(renderer: Renderer, messages: tuple[Message, ...]) -> tuple[str, str]:
    """The rendered text, and that of the trained tokens."""
    row = renderer.render(Example(messages, "row"))
    texts, _ = renderer.spell(Example(messages, "row"))
    assert len(texts) == len(row.ids)
    return "".join(texts), "".join(text for text, flag in zip(texts, row.trained, strict=True) if flag)


EXPECTED = {
    "llama2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi there. [/INST] Hello! </s><s>[INST] And? [/INST] Bye. </s>",
        " Hello! </s> Bye. </s>",
    ),
    "mistral": (
        "<s>[INST] Be brief.\n\nHi there. [/INST] Hello!</s>[INST] And? [/INST] Bye.</s>",
        " Hello!</s> Bye.</s>",
    ),
    "chatml": (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there.<|im_end|>\n<|im_start|>assistant\n"
        "Hello!<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nBye.<|im_end|>",
        "Hello!<|im_end|>Bye.<|im_end|>",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi there.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nBye.<|eot_id|>",
        "Hello!<|eot_id|>Bye.<|eot_id|>",
    ),
    "guanaco": (
        "<s>Be brief.\n\n### Human: Hi there. ### Assistant: Hello!</s>### Human: And? ### Assistant: Bye.</s>",
        " Hello!</s> Bye.</s>",
    ),
    "plain": ("<s>Be brief.\n\nHi there.\nHello!</s>And?\nBye.</s>", "Hello!</s>Bye.</s>"),
}


@pytest.mark.parametrize("style", EVERY_STYLE)
def test_rendered_text_and_trained_text(style: str, tmp_path: Path) -> None:
    for tokenizer in everything(tmp_path):
        assert spelled(Renderer(tokenizer, style=style), TALK) == EXPECTED[style]


def test_llama2_ids_worked_by_hand(shared_data: Path) -> None:
    renderer = Renderer(load_tokenizer(shared_data / "llama2_tokenizer"), style="llama2")
    row = renderer.render(Example((Message("user", " hi "), Message("assistant", "Hello there.\n")), "row"))
    # ▁[ INST ] ▁hi ▁[ / INST ] | ▁Hello ▁there . ▁
    assert row.ids == [1, 518, 25580, 29962, 7251, 518, 29914, 25580, 29962, 15043, 727, 29889, 29871, 2]
    assert row.trained == [False] * 9 + [True] * 5
    assert row.turn_ends == [14]


def test_llama2_system_prompt_is_folded_as_meta_does(shared_data: Path) -> None:
    import sentencepiece

    folder = shared_data / "llama2_tokenizer"
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    renderer = Renderer(load_tokenizer(folder), style="llama2")
    for system, user in (("Be brief.", "Hi"), (" \nspaces \n", "  both sides \n"), ("x", "")):
        folded = "<<SYS>>\n" + system + "\n<</SYS>>\n\n" + user
        expected = [1, *oracle.encode(f"[INST] {folded.strip()} [/INST] Yes. "), 2]
        messages = (Message("system", system), Message("user", user), Message("assistant", " Yes."))
        assert renderer.render(Example(messages, "row")).ids == expected
        assert renderer.prompt(messages[:2]) == [1, *oracle.encode(f"[INST] {folded.strip()} [/INST]")]


def test_mistral_ids_are_those_of_mistral_common(shared_data: Path) -> None:
    # recorded: mistral-common 1.13.1, InstructTokenizerV1 over Llama 2's tokenizer.model, this conversation
    expected = [1, 518, 25580, 29962, 1522, 11473, 29889, 13, 13, 18567, 727, 29889, 518, 29914, 25580, 29962, 15043,
                29991, 2, 518, 25580, 29962, 1126, 29973, 518, 29914, 25580, 29962]
    renderer = Renderer(load_tokenizer(shared_data / "llama2_tokenizer"), style="mistral")
    assert renderer.prompt(TALK[:-1]) == expected


def test_chatml_and_llama3_ids_worked_by_hand() -> None:
    tokenizer = byte_level("<s>", "</s>", *CHATML, *LLAMA3, bos="<s>", eos="</s>")

    def text(string: str) -> list[int]:
        return tokenizer.encode(string)[0]

    start, end = (tokenizer.control_tokens[token] for token in CHATML)
    row = Renderer(tokenizer, style="chatml").render(Example(FIRST, "row"))
    question = [tokenizer.bos_id, start, *text("user\nHi there."), end, *text("\n"), start, *text("assistant\n")]
    assert row.ids == [*question, *text("Hello!"), end]
    assert row.trained == [False] * len(question) + [True] * (len(text("Hello!")) + 1)
    left, right, eot = (tokenizer.control_tokens[token] for token in LLAMA3)
    row = Renderer(tokenizer, style="llama3").render(Example(FIRST, "row"))
    question = [tokenizer.bos_id, left, *text("user"), right, *text("\n\n"), *text("Hi there."), eot]
    question += [left, *text("assistant"), right, *text("\n\n")]
    assert row.ids == [*question, *text("Hello!"), eot]
    assert row.trained == [False] * len(question) + [True] * (len(text("Hello!")) + 1)


@pytest.mark.parametrize("legacy", [True, False])
def test_space_after_control_tokens_follows_the_vocabulary(legacy: bool, tmp_path: Path) -> None:
    tokens = {str(420 + i): {"content": token, "special": True} for i, token in enumerate(CHATML)}
    tokenizer = sentencepiece_tokenizer(tmp_path, added_tokens_decoder=tokens, legacy=legacy)

    def text(string: str) -> list[int]:
        return tokenizer.encode(string, prefix=legacy)[0]

    row = Renderer(tokenizer, style="chatml").render(Example(FIRST, "row"))
    question = [1, 420, *text("user\nHi there."), 421, *text("\n"), 420, *text("assistant\n")]
    # the answer follows a line break, not a control token: never a space of the vocabulary's own
    assert row.ids == [*question, *tokenizer.encode("Hello!", prefix=False)[0], 421]
    assert text("user") != tokenizer.encode("user", prefix=not legacy)[0]


def test_chatml_puts_no_beginning_where_it_has_another_office() -> None:
    ended = byte_level("<|endoftext|>", *CHATML, bos="<|endoftext|>", eos="<|endoftext|>")
    assert spelled(Renderer(ended, style="chatml"), FIRST)[0].startswith("<|im_start|>user")
    none = byte_level("<|endoftext|>", *CHATML, eos="<|endoftext|>")
    assert spelled(Renderer(none, style="chatml"), FIRST)[0].startswith("<|im_start|>user")


@pytest.mark.parametrize("style", EVERY_STYLE)
def test_prompts_are_prefixes_and_answers_decode(style: str, tmp_path: Path) -> None:
    rng = random.Random(style)
    for tokenizer in everything(tmp_path):
        renderer = Renderer(tokenizer, style=style)
        for _ in range(60):
            messages = random_conversation(rng)
            row = renderer.render(Example(messages, "row"))
            answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
            assert len(row.turn_ends) == len(answers)
            for turn, end in zip(answers, row.turn_ends, strict=True):
                prompt = renderer.prompt(messages[:turn])
                assert row.ids[: len(prompt)] == prompt
                # from where the model starts to speak to the end of its turn, all is trained
                assert all(row.trained[len(prompt) : end])
                assert row.ids[end - 1] in renderer.stop_ids
                answer = renderer.decode(row.ids[len(prompt) : end])
                assert squeezed(answer) == squeezed(messages[turn].content)
            assert sum(row.trained) == sum(
                end - len(renderer.prompt(messages[:turn])) for turn, end in zip(answers, row.turn_ends, strict=True)
            )


def squeezed(text: str) -> str:
    # SentencePiece's decoder cannot tell a literal U+2581 from a space, and drops a first one
    return text.replace("▁", " ").strip()


@pytest.mark.parametrize("style", EVERY_STYLE)
def test_marks_typed_by_users_stay_text(style: str, tmp_path: Path) -> None:
    for tokenizer in everything(tmp_path):
        renderer = Renderer(tokenizer, style=style)
        controls = set(tokenizer.control_tokens.values())

        def placed(
            messages: tuple[Message, ...], renderer: Renderer = renderer, controls: set[int] = controls
        ) -> list[int]:
            return [i for i in renderer.render(Example(messages, "row")).ids if i in controls]

        usual = placed(TALK)
        for mark in MARKS:
            messages = tuple(Message(m.role, f"a {mark} b{mark}") for m in TALK)
            assert placed(messages) == usual, mark
            ids = renderer.render(Example(messages, "row")).ids
            inner = tokenizer.encode(f" {mark} b", prefix=False)[0]
            # the characters come out as they do in any text
            assert any(ids[i : i + len(inner) - 1] == inner[:-1] for i in range(len(ids))), mark


@pytest.mark.parametrize("style", ["llama2", "mistral", "guanaco", "plain"])
@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ((Message("user", "a"), Message("user", "b"), Message("assistant", "c")), "Messages 1 and 2 are both user"),
        ((Message("assistant", "a"), Message("user", "b")), "starts with a message of the assistant"),
        ((*FIRST, Message("system", "a"), *FIRST), "Message 3 is a system message in mid-conversation"),
        ((*FIRST, FIRST[1]), "Messages 2 and 3 are both assistant"),
        ((Message("system", "a"),), "no user message"),
    ],
)
def test_conversations_that_do_not_alternate(style: str, messages: tuple[Message, ...], what: str) -> None:
    renderer = Renderer(byte_level("<s>", "</s>", bos="<s>", eos="</s>"), style=style)
    with pytest.raises(RenderError, match=what) as raised:
        renderer.render(Example(messages, "file.jsonl:7"))
    assert "file.jsonl:7: " in str(raised.value)


def test_headed_styles_take_any_order() -> None:
    tokenizer = byte_level("<s>", "</s>", *CHATML, *LLAMA3, bos="<s>", eos="</s>")
    messages = (Message("assistant", "Welcome."), Message("user", "a"), Message("user", "b"), Message("assistant", "c"))
    for style in ("chatml", "llama3"):
        row = Renderer(tokenizer, style=style).render(Example(messages, "row"))
        assert len(row.turn_ends) == 2


def test_missing_control_tokens_are_named_with_a_way_out() -> None:
    tokenizer = byte_level("</s>", eos="</s>")
    with pytest.raises(ConfigError, match=r"'chatml' needs <\|im_start\|>, <\|im_end\|>") as raised:
        Renderer(tokenizer, style="chatml")
    assert raised.value.allowed == "guanaco, plain"
    with pytest.raises(ConfigError, match="needs a beginning-of-text token"):
        Renderer(tokenizer, style="llama2")
    with pytest.raises(ConfigError, match="no chat style 'lama2'") as raised:
        Renderer(tokenizer, style="lama2")
    assert raised.value.next_step == "--set prompt.style=llama2"
    with pytest.raises(ConfigError, match="no chat template"):
        Renderer(tokenizer, style="tokenizer")
