"""The renderer: Meta's rule on real data, what carries loss, texts, encoder-decoder pairs, and being saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_tokenizers import CHATML, LLAMA3, byte_level, sentencepiece_tokenizer, unigram

from chulengo.data.renderer import RENDERER_FILE, RenderedRow, Renderer, load_renderer, save_renderer
from chulengo.data.tokenizer import Tokenizer, load_tokenizer
from chulengo.data.types import Example, Message
from chulengo.errors import ConfigError, RenderError

TALK = (
    Message("system", "Be brief."), Message("user", "One?"), Message("assistant", "Uno."),
    Message("user", "Two?"), Message("assistant", "Dos."),
)  # fmt: skip


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Tokenizer:
    return byte_level("<s>", "</s>", *CHATML, *LLAMA3, bos="<s>", eos="</s>")


def trained_text(renderer: Renderer, messages: tuple[Message, ...]) -> str:
    row = renderer.render(Example(messages, "row"))
    texts, _ = renderer.spell(Example(messages, "row"))
    return "|".join(text for text, flag in zip(texts, row.trained, strict=True) if flag).replace("|", "")


def test_guanaco_llama2_1k_equals_metas_rule(shared_data: Path) -> None:
    import pyarrow.parquet as pq
    import sentencepiece

    oracle = sentencepiece.SentencePieceProcessor(model_file=str(shared_data / "llama2_tokenizer" / "tokenizer.model"))
    renderer = Renderer(load_tokenizer(shared_data / "llama2_tokenizer"))
    assert renderer.style == "llama2"
    (file,) = (shared_data / "guanaco-llama2-1k").glob("*.parquet")
    texts = pq.read_table(file)["text"].to_pylist()
    assert len(texts) == 1000
    for text in texts:
        messages, ids, trained = [], [], []
        for exchange in text.split("<s>")[1:]:
            user, answer = exchange.strip().removeprefix("[INST]").removesuffix("</s>").split("[/INST]", 1)
            messages += [Message("user", user), Message("assistant", answer)]
            prompt = oracle.encode(f"[INST] {user.strip()} [/INST]")
            whole = oracle.encode(f"[INST] {user.strip()} [/INST] {answer.strip()} ")
            ids += [1, *whole, 2]
            trained += [False] * (1 + len(prompt)) + [True] * (len(whole) - len(prompt) + 1)
        row = renderer.render(Example(tuple(messages), "row"))
        assert row.ids == ids
        assert row.trained == trained
        assert row.turn_ends == [i + 1 for i, token in enumerate(ids) if token == 2]
        assert renderer.prompt(messages[:-1]) == ids[: len(renderer.prompt(messages[:-1]))]


def test_which_turns_carry_loss(bytes_tokenizer: Tokenizer) -> None:
    def trained(**options: object) -> str:
        return trained_text(Renderer(bytes_tokenizer, style="llama2", **options), TALK)  # type: ignore[arg-type]

    assert trained() == " Uno. </s> Dos. </s>"
    assert trained(train_on="last_answer") == " Dos. </s>"
    assert trained(train_end_of_turn=False) == " Uno.  Dos. "
    assert trained(train_roles=("user",)) == "One? [/INST] Two? [/INST]"
    assert trained(train_roles=("user",), train_on="last_answer") == " Two? [/INST]"
    # a token belongs to the turn in which it starts: here one token is ".\n"
    assert trained(train_roles=("system",), train_end_of_turn=False) == "Be brief.\n"
    assert trained(train_on="everything") == (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nOne? [/INST] Uno. </s>[INST] Two? [/INST] Dos. </s>"
    )
    assert trained(train_on="everything", train_roles=()) == trained(train_on="everything")


@pytest.mark.parametrize("style", ["llama2", "chatml", "llama3", "mistral", "guanaco", "plain"])
def test_a_messages_own_choice_wins(style: str, bytes_tokenizer: Tokenizer) -> None:
    first_off = tuple(Message(m.role, m.content, False if m.content == "Uno." else None) for m in TALK)
    assert "Uno" not in trained_text(Renderer(bytes_tokenizer, style=style), first_off)
    assert "Dos" in trained_text(Renderer(bytes_tokenizer, style=style), first_off)
    user_on = tuple(Message(m.role, m.content, True if m.content == "One?" else None) for m in TALK)
    only = Renderer(bytes_tokenizer, style=style, train_on="last_answer")
    assert "One?" in trained_text(only, user_on)
    assert "Uno" not in trained_text(only, user_on)
    last_off = (*TALK[:-1], Message("assistant", "Dos.", False))
    assert "Dos" not in trained_text(Renderer(bytes_tokenizer, style=style, train_on="everything"), last_off)


def test_the_first_token_is_never_a_target() -> None:
    tokenizer = byte_level("</s>", eos="</s>")  # no beginning-of-text token
    for style in ("guanaco", "plain"):
        row = Renderer(tokenizer, style=style, train_on="everything").render(Example(TALK, "row"))
        assert row.trained[0] is False
        assert all(row.trained[1:])


def test_answer_spans_say_what_a_shorter_row_would_train(bytes_tokenizer: Tokenizer) -> None:
    renderer = Renderer(bytes_tokenizer, style="chatml", train_on="last_answer")
    row = renderer.render(Example(TALK, "row"))
    assert row.answer_spans is not None
    for end, (start, stop), length in zip(row.turn_ends, row.answer_spans, (3, 5), strict=True):
        alone = renderer.render(Example(TALK[:length], "row"))
        assert alone.ids == row.ids[:end]
        assert alone.trained == [start <= i < stop for i in range(end)]
    assert Renderer(bytes_tokenizer, style="chatml").render(Example(TALK, "row")).answer_spans is None


def test_default_system_prompt(bytes_tokenizer: Tokenizer) -> None:
    renderer = Renderer(bytes_tokenizer, style="chatml", system="Be kind.")
    question = (Message("user", "Hi"),)
    kind = (Message("system", "Be kind."), *question)
    plain = Renderer(bytes_tokenizer, style="chatml")
    assert renderer.prompt(question) == plain.prompt(kind)
    own = (Message("system", "Be brief."), *question)
    assert renderer.prompt(own) == plain.prompt(own)
    # an empty one of its own says that there is to be none
    assert renderer.prompt((Message("system", ""), *question)) == plain.prompt(question)


@pytest.mark.parametrize("style", ["llama2", "chatml", "llama3", "mistral", "guanaco", "plain"])
def test_raw_text_is_the_same_in_every_style(style: str, bytes_tokenizer: Tokenizer) -> None:
    text = "Once upon a time </s> there was.\n"
    row = Renderer(bytes_tokenizer, style=style, train_on="last_answer").render(
        Example((Message("text", text),), "row", kind="text")
    )
    ids = bytes_tokenizer.encode(text)[0]
    assert row.ids == [bytes_tokenizer.bos_id, *ids, bytes_tokenizer.eos_id]
    assert row.trained == [False] + [True] * (len(ids) + 1)
    assert row.turn_ends == [len(row.ids)]


def test_a_last_question_without_answer_is_context(bytes_tokenizer: Tokenizer) -> None:
    for style in ("llama2", "chatml", "guanaco"):
        renderer = Renderer(bytes_tokenizer, style=style)
        row = renderer.render(Example(TALK[:4], "row"))
        whole = renderer.render(Example(TALK, "row"))
        assert len(row.turn_ends) == 1
        assert not any(row.trained[row.turn_ends[0] :])
        assert whole.ids[: len(row.ids)] == row.ids


def test_what_no_style_renders_is_named(bytes_tokenizer: Tokenizer) -> None:
    renderer = Renderer(bytes_tokenizer, style="chatml")
    with pytest.raises(RenderError, match=r"data\.jsonl:3: The row has no answer"):
        renderer.render(Example((Message("user", "Hi"), Message("assistant", " \n")), "data.jsonl:3"))
    with pytest.raises(RenderError, match="no messages"):
        renderer.render(Example((), "row"))
    with pytest.raises(RenderError, match="The text is empty"):
        renderer.render(Example((Message("text", " "),), "row"))
    with pytest.raises(RenderError, match="one message of the role 'text'"):
        renderer.render(Example((Message("user", "a"), Message("text", "b")), "row"))
    with pytest.raises(RenderError, match="has the role 'tool'"):
        renderer.render(Example((Message("tool", "a"),), "row"))  # type: ignore[arg-type]
    with pytest.raises(RenderError, match="already ends with an answer"):
        renderer.prompt(TALK)
    with pytest.raises(ConfigError, match="train_on is 'all'"):
        Renderer(bytes_tokenizer, style="chatml", train_on="all")
    with pytest.raises(ConfigError, match="train_roles"):
        Renderer(bytes_tokenizer, style="chatml", train_roles=("bot",))


def test_an_empty_turn_among_others_is_rendered(bytes_tokenizer: Tokenizer) -> None:
    messages = (Message("user", ""), Message("assistant", "Hm?"), Message("user", "a"), Message("assistant", ""))
    row = Renderer(bytes_tokenizer, style="llama2").render(Example(messages, "row"))
    assert len(row.turn_ends) == 2


def test_decode_shows_the_answer_only(shared_data: Path) -> None:
    renderer = Renderer(load_tokenizer(shared_data / "llama2_tokenizer"))
    row = renderer.render(Example((Message("user", "Hi"), Message("assistant", "Hé 🦙\n  b")), "row"))
    answer = row.ids[len(renderer.prompt((Message("user", "Hi"),))) :]
    assert renderer.decode(answer) == "Hé 🦙\n  b"
    assert renderer.decode([*answer, *answer]) == "Hé 🦙\n  b"
    assert renderer.decode([1, *answer[:-1]]) == "Hé 🦙\n  b"
    assert renderer.decode([]) == ""


def test_encoder_decoder_pairs() -> None:
    tokenizer = unigram()
    renderer = Renderer(tokenizer, encoder_decoder=True, model_type="t5")
    assert renderer.style == "plain"
    messages = (Message("user", "Where live the llamas?"), Message("assistant", "there."))
    row = renderer.render(Example(messages, "row"))
    eos = tokenizer.eos_id
    assert row.encoder_ids == [*tokenizer.encode("Where live the llamas?")[0], eos] == renderer.prompt(messages[:1])
    assert row.ids == [*tokenizer.encode("there.")[0], eos]
    assert row.trained == [True] * len(row.ids)
    assert renderer.decode(row.ids) == "there."
    texts, encoder = renderer.spell(Example(messages, "row"))
    assert encoder is not None
    assert (len(texts), len(encoder)) == (len(row.ids), len(row.encoder_ids or []))
    assert "".join(texts) == "there.</s>"
    context = (Message("system", "s"), *messages, *messages)
    assert renderer.render(Example(context, "row")).encoder_ids == [
        *tokenizer.encode("s\n\nWhere live the llamas?\nthere.\nWhere live the llamas?")[0], eos
    ]
    open_row = renderer.render(Example(messages[:1], "row"))
    assert open_row.ids == []
    assert open_row.encoder_ids == row.encoder_ids


def test_auto_style(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    llama = sentencepiece_tokenizer(tmp_path / "llama")
    assert Renderer(llama, model_type="llama").style == "llama2"
    assert Renderer(llama, model_type="mistral").style == "mistral"
    assert Renderer(llama).style == "llama2"
    assert "SentencePiece" in Renderer(llama).style_reason
    assert Renderer(bytes_tokenizer, model_type="llama").style == "llama3"
    assert Renderer(byte_level("</s>", *CHATML, eos="</s>"), model_type="qwen2").style == "chatml"
    for tokenizer, family in ((byte_level("</s>", eos="</s>"), "gpt2"), (llama, "gemma")):
        with pytest.raises(ConfigError, match="cannot be known") as raised:
            Renderer(tokenizer, model_type=family)
        assert "prompt.style" in str(raised.value)


def test_saved_and_loaded(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    renderer = Renderer(bytes_tokenizer, style="chatml", system="Be kind.", train_on="last_answer")
    save_renderer(renderer, tmp_path)
    again = load_renderer(tmp_path, bytes_tokenizer)
    assert again.settings() == renderer.settings()
    assert again.fingerprint() == renderer.fingerprint()
    assert again.render(Example(TALK, "row")) == renderer.render(Example(TALK, "row"))
    assert not list(tmp_path.glob("*.tmp"))


def test_settings_change_the_fingerprint(bytes_tokenizer: Tokenizer) -> None:
    prints = {
        Renderer(bytes_tokenizer, style="chatml").fingerprint(),
        Renderer(bytes_tokenizer, style="llama3").fingerprint(),
        Renderer(bytes_tokenizer, style="chatml", system="x").fingerprint(),
        Renderer(bytes_tokenizer, style="chatml", train_end_of_turn=False).fingerprint(),
        Renderer(byte_level("<s>", "</s>", *CHATML, bos="<s>", eos="</s>"), style="chatml").fingerprint(),
    }
    assert len(prints) == 5


def test_another_tokenizer_or_style_is_refused(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    save_renderer(Renderer(bytes_tokenizer, style="chatml"), tmp_path)
    with pytest.raises(RenderError, match="golden conversations"):
        load_renderer(tmp_path, byte_level(*CHATML, "<s>", "</s>", bos="<s>", eos="</s>"))
    with pytest.raises(RenderError, match="cannot be used with this tokenizer"):
        load_renderer(tmp_path, byte_level("<s>", "</s>", bos="<s>", eos="</s>"))
    longer = byte_level("<s>", "</s>", *CHATML, *LLAMA3, "<|more|>", bos="<s>", eos="</s>")
    with pytest.raises(RenderError, match="vocabulary is not the one"):
        load_renderer(tmp_path, longer)
    file = tmp_path / RENDERER_FILE
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "settings": {**saved["settings"], "style": "llama3"}}))
    with pytest.raises(RenderError, match="golden conversations"):
        load_renderer(tmp_path, bytes_tokenizer)
    for broken in ("{", "[]", json.dumps({**saved, "settings": {**saved["settings"], "other": 1}})):
        file.write_text(broken)
        with pytest.raises(RenderError, match="damaged"):
            load_renderer(tmp_path, bytes_tokenizer)
    file.unlink()
    with pytest.raises(RenderError, match=r"has no chulengo_renderer\.json"):
        load_renderer(tmp_path, bytes_tokenizer)


def test_rendered_row_defaults() -> None:
    row = RenderedRow([1], [True], "row")
    assert (row.turn_ends, row.encoder_ids, row.answer_spans) == ([], None, None)
