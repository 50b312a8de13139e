"""Encoding: ids as the authorities give them, places of tokens, and text that never becomes a control token."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from small_tokenizers import (
    CHATML,
    MARKS,
    byte_level,
    byte_level_json,
    random_text,
    sentencepiece_model,
    sentencepiece_tokenizer,
    unigram,
)

from chulengo.data.tokenizer import Tokenizer, load_tokenizer
from chulengo.errors import ModelError


def every_kind(folder: Path) -> list[Tokenizer]:
    return [
        sentencepiece_tokenizer(folder / "spm"),
        byte_level(*CHATML, bos="<s>", eos="</s>", plain=("<think>",)),
        byte_level("<s>", "</s>", *CHATML, bos="<s>", eos="</s>"),
        unigram(),
    ]


def test_places_are_in_order_and_pieces_spell_the_text(tmp_path: Path) -> None:
    rng = random.Random(0)
    for tokenizer in every_kind(tmp_path)[:3]:
        for _ in range(300):
            text = random_text(rng)
            for prefix in (True, False):
                ids, starts = tokenizer.encode(text, prefix=prefix)
                assert len(ids) == len(starts)
                assert starts == sorted(starts)
                assert starts[0] >= 0
                assert starts[-1] < len(text)
                # SentencePiece writes spaces as U+2581, and its decoder takes a first one for the prefix
                expected = text.replace("▁", " ") if tokenizer.kind == "sentencepiece" else text
                assert tokenizer.decode(ids) in (expected, expected.removeprefix(" "))


def test_a_token_starts_where_its_text_stands(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer(tmp_path)
    text = "живёт 🦙 Hello"
    ids, starts = tokenizer.encode(text)
    borders = [*starts[1:], len(text)]
    spelled = [text[start:end] for start, end in zip(starts, borders, strict=True)]
    assert "".join(spelled) == text
    for token, part in zip(ids, spelled, strict=True):
        piece = tokenizer.piece(token)
        if part and not piece.startswith("<0x"):
            assert part == piece.replace("▁", " ") or piece == "▁" + part


def test_control_tokens_in_text_stay_text(tmp_path: Path) -> None:
    for tokenizer in every_kind(tmp_path):
        controls = set(tokenizer.control_tokens.values())
        assert controls
        for mark in MARKS:
            for text in (mark, f"a{mark}", f"{mark} {mark}", f"\n{mark}\n"):
                ids, _ = tokenizer.encode(text)
                assert not controls & set(ids), (tokenizer.kind, text)


def test_sentencepiece_ids_are_the_models_own(shared_data: Path) -> None:
    import sentencepiece

    folder = shared_data / "llama2_tokenizer"
    tokenizer = load_tokenizer(folder)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    rng = random.Random(1)
    for _ in range(500):
        text = random_text(rng)
        assert tokenizer.encode(text)[0] == oracle.encode(text)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 32000)
    assert tokenizer.control_tokens == {"<s>": 1, "</s>": 2}


def test_without_prefix_the_same_text_follows_a_word(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "llama2_tokenizer")
    first, _ = tokenizer.encode("[/INST]")
    both, _ = tokenizer.encode("[/INST] Hello")
    assert tokenizer.encode(" Hello", prefix=False)[0] == both[len(first):]
    assert tokenizer.encode("Hello", prefix=True)[0] == both[len(first):]
    assert tokenizer.encode("Hello", prefix=False)[0] != both[len(first):]


def test_normalising_sentencepiece_still_says_where_tokens_start(tmp_path: Path) -> None:
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("fish fin official ﬁsh\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=30, model_type="bpe", minloglevel=2,
        hard_vocab_limit=False,
    )
    tokenizer = load_tokenizer(tmp_path)
    text = "éé fish"  # é is unknown here: one piece of unknown width
    ids, starts = tokenizer.encode(text)
    fish = text.index("fish")
    assert fish in starts or fish - 1 in starts
    assert tokenizer.encode("ﬁsh")[0] == tokenizer.encode("fish")[0]  # NFKC
    assert tokenizer.encode("ﬁsh")[1][0] == 0
    assert len(ids) == len(starts)


def test_user_defined_turn_marks_become_control_tokens(tmp_path: Path) -> None:
    marks = {"added_tokens_decoder": {"4": {"content": "<turn>", "special": True}}}
    plain = load_tokenizer(sentencepiece_model(tmp_path / "a", user_defined=["<turn>", "\n\n"]))
    model = load_tokenizer(tmp_path / "a")
    assert model.control_id("<turn>") is None
    number = next(i for i in range(model.vocab_size) if model.piece(i) == "<turn>")
    assert number in plain.encode("x<turn>")[0]
    marks["added_tokens_decoder"] = {str(number): {"content": "<turn>", "special": True}}
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(marks))
    marked = load_tokenizer(tmp_path / "a")
    assert marked.control_id("<turn>") == number
    assert number not in marked.encode("x<turn>")[0]
    newlines = next(i for i in range(model.vocab_size) if model.piece(i) == "\n\n")
    assert newlines in marked.encode("a\n\nb")[0]


def test_json_ids_equal_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "tokenizer.json").write_text(byte_level_json("<s>", "</s>", plain=("<think>",)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    ours = load_tokenizer(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert (ours.bos_id, ours.eos_id) == tuple(theirs.convert_tokens_to_ids(["<s>", "</s>"]))
    rng = random.Random(2)
    for _ in range(300):
        text = random_text(rng)
        if "<s>" in text or "</s>" in text:
            continue
        encoded = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        assert ours.encode(text) == (encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]])


def test_an_added_token_that_the_template_writes_is_a_control_token() -> None:
    plain = byte_level("</s>", eos="</s>", plain=("<turn>", "<think>"))
    assert plain.control_id("<turn>") is None
    written = byte_level("</s>", eos="</s>", plain=("<turn>", "<think>"), template="{{ '<turn>' }}")
    turn = written.control_id("<turn>")
    assert turn is not None
    assert turn not in written.encode("a <turn>")[0]
    assert written.control_id("<think>") is None
    assert len(written.encode("<think>")[0]) == 1


def test_unigram_unknown_stays_possible() -> None:
    tokenizer = unigram()
    ids, starts = tokenizer.encode("the €")
    assert [tokenizer.piece(i) for i in ids] == ["▁the", "▁", "<unk>"]
    assert starts[-1] == 4
    assert tokenizer.encode("</s>")[0].count(tokenizer.eos_id or 0) == 0


@pytest.mark.parametrize(("scheme", "everywhere"), [("always", True), ("first", False), ("never", False)])
def test_prefix_space_of_metaspace_vocabularies(scheme: str, everywhere: bool) -> None:
    import tokenizers as tk

    from chulengo.data.tokenizer_json import TransformersTokenizer

    model = tk.models.BPE({"<s>": 0, "▁": 1, "a": 2, "▁a": 3}, [("▁", "a")])
    tokenizer = tk.Tokenizer(model)
    tokenizer.pre_tokenizer = tk.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.add_special_tokens(["<s>"])
    ours = TransformersTokenizer(tokenizer.to_str(), {"bos_token": "<s>"})
    assert ours.prefix_after_control == everywhere
    assert ours.encode("a")[0] == ([2] if scheme == "never" else [3])
    assert ours.encode("a", prefix=False)[0] == [2]
    # what the tokenizer itself does after a control token is what `prefix_after_control` says
    after = tokenizer.encode("<s>a", add_special_tokens=False).ids[1:]
    assert ours.encode("a", prefix=ours.prefix_after_control)[0] == after


def test_gpt2_end_token_is_asked_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_level_json("<|endoftext|>"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id is not None
    assert tokenizer.piece(tokenizer.eos_id) == "<|endoftext|>"


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x00nonsense")
    with pytest.raises(ModelError, match="not a readable SentencePiece"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_no_torch_and_no_transformers_are_imported(tmp_path: Path) -> None:
    import subprocess
    import sys

    (tmp_path / "tokenizer.json").write_text(byte_level_json("</s>"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    code = ("import sys; from pathlib import Path; from chulengo.data.tokenizer import load_tokenizer\n"
            "load_tokenizer(Path(sys.argv[1])).encode('hello')\n"
            "assert not {'torch', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
