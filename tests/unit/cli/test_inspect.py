"""`chulengo inspect` as a user and as a program see it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers as tk

from chulengo.cli.main import main

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a config and a byte-level tokenizer, and no weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    alphabet = sorted(tk.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tk.Tokenizer(tk.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tk.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "max_position_embeddings": 200}))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five conversations: two the same, one Cyrillic, one too long for the model."""
    hello = ("Hi", "Hello  you!")
    rows = [hello, ("Привет", "Здравствуйте"), hello, ("Long?", "x" * 300), ("a\nb", "c\td")]
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": user}, {"role": "assistant", "content": answer}]}) + "\n" for user, answer in rows))
    return file


def output(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    status = main(["inspect", *map(str, words)])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def inspected(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output(capsys, *words, "--json"))
    return found


def test_json_for_programs(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(capsys, "--model", model, "--data", data, "--rows", "2")
    assert {"rows", "ledger"} <= found.keys()
    assert len(found["rows"]) == 2
    first = found["rows"][0]
    assert first["text"] == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello  you!<|im_end|>"
    )
    assert len(first["ids"]) == len(first["trained"]) == len(first["text"]) - len("<|im_start|>") * 2 - len(
        "<|im_end|>") * 2 + 4  # a byte a token, but for the control tokens
    assert set(first["trained"]) == {0, 1}
    assert sum(first["trained"]) == len("Hello  you!") + 1
    ledger = found["ledger"]
    assert ledger["num_rows"] == 5
    assert [row["num_tokens"] > 300 for row in ledger["long_rows"]] == [True]
    assert ledger["num_duplicate_rows"] == 1
    assert "longer than 200 tokens" in ledger["problems"][0]
    assert found["style"] == {"name": "chatml", "reason": "the tokenizer's chat template writes the chatml format"}


def test_text_for_people(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = output(capsys, "--model", model, "--data", data, "--rows", "9")
    assert "style:  chatml" in shown
    assert "⟦H│e│l│l│o│␣│␣│y│o│u│!│<|im_end|>⟧" in shown
    assert "a│⏎\n│b" in shown
    assert "c│⇥│d" in shown
    assert "⟦·│З│·│д│" in shown  # two bytes a letter: it stands at its last token
    assert "Latin 4, Cyrillic 1" in shown
    assert "talk.jsonl:1, " in shown.split("same tokens:")[1]
    assert "talk.jsonl:4: 3" in shown
    assert re.search(r"tokens by role +│ system 0 · user \d+ · assistant \d+ · control +│\n│ +│ \d+ +│", shown)
    assert "1 in 1 group " in shown
    assert "WARNING, training would stop here: 1 of 5 rows is longer than 200 tokens" in shown
    assert "\x1b[" not in shown


def test_colours_in_a_terminal(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = output(capsys, "--model", model, "--data", data)
    assert "\x1b[" in shown
    assert "⟦H" not in shown
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦H" in output(capsys, "--model", model, "--data", data)


def test_policies_shape_what_is_shown(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", model, "--data", data, "--rows", "9", "--set", "training.overlong=drop")
    found = inspected(capsys, *words)
    assert len(found["rows"]) == 4
    assert found["ledger"]["problems"] == []
    words = ("--model", model, "--data", data, "--rows", "9", "--set", "training.overlong=cut")
    found = inspected(capsys, *words)
    cut = found["rows"][3]
    assert len(cut["ids"]) == len(cut["trained"]) == 200
    assert cut["text"].endswith("xxx")
    assert len(found["ledger"]["cut_ends"]) == 1


def test_rows_that_cannot_be_rendered_are_all_named(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"},
                        {"role": "assistant", "content": "c"}]}
    with data.open("a") as opened:
        opened.write((json.dumps(bad) + "\n") * 2)
    words = ("--model", model, "--data", data, "--set", "prompt.style=plain")
    found = inspected(capsys, *words)
    assert len(found["ledger"]["refused_rows"]) == 2
    assert "Messages 1 and 2 are both user messages" in found["ledger"]["problems"][-1]
    assert "2 rows cannot be rendered" in output(capsys, *words)
    only = tmp_path / "only.jsonl"
    only.write_text(json.dumps(bad) + "\n")
    assert main(["inspect", "--model", str(model), "--data", str(only), "--set", "prompt.style=plain"]) == 2
    assert "None of 1 row can be rendered" in capsys.readouterr().err


def test_prompt_template_is_seen_rendered(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "ticket.yaml"
    template.write_text("system: You sort tickets.\nuser: 'Ticket: {ticket}'\nanswer: '{queue}'\n")
    data = tmp_path / "tickets.csv"
    data.write_text("ticket,queue\nMy llama is late,travel\n")
    found = inspected(capsys, "--model", model, "--data", data, "--template", template)
    assert found["rows"][0]["text"] == (
        "<|im_start|>system\nYou sort tickets.<|im_end|>\n<|im_start|>user\nTicket: My llama is late<|im_end|>\n"
        "<|im_start|>assistant\ntravel<|im_end|>"
    )


def test_a_subset_is_written_as_a_new_data_set(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "subset.jsonl"
    words = ("--model", model, "--data", data, "--num-rows", "2", "--seed", "3", "--write", out)
    found = inspected(capsys, *words, "--rows", "9")
    assert len(out.read_text().splitlines()) == 2
    again = inspected(capsys, "--model", model, "--data", out, "--rows", "9")
    assert [row["ids"] for row in again["rows"]] == [row["ids"] for row in found["rows"]]
    before = out.read_bytes()
    assert main(["inspect", *map(str, words)]) == 2  # nothing is overwritten, least of all the data themselves
    assert "exists already" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main(["inspect", *map(str, words[:-1]), str(tmp_path / "subset.parquet")]) == 2
    assert "only JSON lines" in capsys.readouterr().err
    out.unlink()
    assert "wrote 2 conversations" in output(capsys, *words)


def test_answers_labelled_undesirable_are_left_out_and_counted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kto.jsonl"
    file.write_text("".join(
        json.dumps({"prompt": f"Question {i}?", "completion": f"Answer {i}.", "label": i % 3 != 0}) + "\n"
        for i in range(6)
    ))
    found = inspected(capsys, "--model", model, "--data", file, "--rows", "9")
    assert len(found["rows"]) == 4
    assert found["data"]["dropped"] == {"labelled undesirable": 2}


def test_long_raw_text_is_shown_in_windows(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "story.txt"
    file.write_text("Once upon a time there was a chulengo. " * 40)
    words = ("--model", model, "--data", file, "--rows", "2")
    assert "training.overlong=split" in inspected(capsys, *words)["ledger"]["problems"][0]
    found = inspected(capsys, *words, "--set", "training.overlong=split")
    assert found["ledger"]["problems"] == []
    assert found["ledger"]["num_supervised_tokens"] > 100
    assert len(found["rows"]) == 2
    assert "part 1" in output(capsys, *words, "--set", "training.overlong=split")


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    shown = output(capsys, "--formats")
    assert "sharegpt" in shown
    assert "data.format=" in shown
    assert "strip_urls" in output(capsys, "--cleaning")


def test_mistakes_cost_one_message(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, what in (
        (["--rows", "-1"], "--rows is -1"),
        (["--set", "prompt.style=lama3"], "no chat style 'lama3'"),
        (["--set", "training.max_seq_tokens=500"], "positions end at 200"),
    ):
        assert main(["inspect", "--model", str(model), "--data", str(data), *words]) == 2
        captured = capsys.readouterr()
        assert what in captured.err
        assert captured.out == ""


def test_no_torch_is_imported(model: Path, data: Path) -> None:
    code = ("import sys; from chulengo.cli.main import main\n"
            f"assert main(['inspect', '--model', {str(model)!r}, '--data', {str(data)!r}]) == 0\n"
            "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'")
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)


def test_guanaco_llama2_1k_by_the_command(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow.parquet as pq
    import sentencepiece

    words = ("--model", shared_data / "llama2_tokenizer", "--data", shared_data / "guanaco-llama2-1k")
    found = inspected(capsys, *words, "--rows", "1000", "--set", "training.max_seq_tokens=2048")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(shared_data / "llama2_tokenizer" / "tokenizer.model"))
    (file,) = (shared_data / "guanaco-llama2-1k").glob("*.parquet")
    texts = pq.read_table(file)["text"].to_pylist()
    assert len(found["rows"]) == len(texts) == 1000
    multi_turn = 0
    for row, text in zip(found["rows"], texts, strict=True):
        ids, trained, spelled = [], [], ""
        for exchange in text.split("<s>")[1:]:
            user, answer = exchange.strip().removeprefix("[INST]").removesuffix("</s>").split("[/INST]", 1)
            prompt = f"[INST] {user.strip()} [/INST]"
            whole = oracle.encode(f"{prompt} {answer.strip()} ")
            ids += [1, *whole, 2]
            trained += [0] * (1 + len(oracle.encode(prompt))) + [1] * (len(whole) - len(oracle.encode(prompt)) + 1)
            spelled += f"<s>{prompt} {answer.strip()} </s>"
        assert row["ids"] == ids
        assert row["trained"] == trained
        assert row["text"] == spelled
        multi_turn += ids.count(2) > 1
    assert multi_turn == 353
    lengths = [len(row["ids"]) for row in found["rows"]]
    over = [(row["source"], len(row["ids"])) for row in found["rows"] if len(row["ids"]) > 2048]
    ledger = found["ledger"]
    assert [(row["source"], row["num_tokens"]) for row in ledger["long_rows"]] == over
    assert len(over) == 7
    assert ledger["num_tokens"] == sum(lengths)
