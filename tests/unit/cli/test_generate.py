"""`chulengo generate` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_models as tiny
from chulengo.cli.main import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model_folder(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_adapter(base, tmp_path_factory.mktemp("run") / "adapter")


def generate(*words: object) -> int:
    return main(["generate", "--device", "cpu", "--max-new-tokens", "8", *map(str, words)])


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def prompts_file(folder: Path, count: int = 5) -> Path:
    file = folder / "prompts.txt"
    file.write_text("".join(f"Question number {'x' * (7 * n % 5)}{n}?\n" for n in range(count)))
    return file


def test_one_prompt_prints_the_answer_alone(base: Path, capsys: Capture) -> None:
    assert generate("--model", base, "--prompt", "Hello") == 0
    out = capsys.readouterr().out
    assert generate("--model", base, "--prompt", "Hello", "--json") == 0
    row = json.loads(capsys.readouterr().out)
    assert out == row["answer"] + "\n"
    assert row["num_tokens"] <= 8
    assert row["model"] == str(base)
    assert row["settings"]["temperature"] == 0
    assert row["prompt"] == [{"role": "user", "content": "Hello"}]
    assert len(row["renderer"]) == 64


def test_raw_goes_on_from_the_text(base: Path, capsys: Capture) -> None:
    import torch

    from chulengo.data.tokenizer import load_tokenizer
    from chulengo.model.load import load_base

    assert generate("--model", base, "--raw", "--prompt", "Once upon") == 0
    out = capsys.readouterr().out
    tokenizer = load_tokenizer(base)
    ids = [1, *tokenizer.encode("Once upon")[0]]
    model = load_base(base, quantization="none", device="cpu")
    new = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()
    assert out == tokenizer.decode(new).removeprefix("Once upon").rstrip("\ufffd") + "\n"


def test_a_file_is_answered_in_order_and_batches_change_nothing(base: Path, tmp_path: Path) -> None:
    file = prompts_file(tmp_path)
    for size in (1, 2, 5):
        assert generate("--model", base, "--prompts", file, "--out", tmp_path / f"{size}.jsonl",
                        "--batch-size", size, "--temperature", 0.9, "--seed", 3) == 0
    one = rows_of(tmp_path / "1.jsonl")
    assert [row["prompt"][0]["content"] for row in one] == file.read_text().splitlines()
    assert [row["id"] for row in one] == ["1", "2", "3", "4", "5"]
    for size in (2, 5):
        assert [row["answer"] for row in rows_of(tmp_path / f"{size}.jsonl")] == [row["answer"] for row in one]


def test_an_interrupted_file_is_finished(base: Path, tmp_path: Path, capsys: Capture) -> None:
    file, whole, part = prompts_file(tmp_path), tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    words = ["--model", base, "--prompts", file, "--temperature", 0.9, "--batch-size", 2]
    assert generate(*words, "--out", whole) == 0
    lines = whole.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:2]) + lines[2][:40])  # the third row was torn
    assert generate(*words, "--out", part) == 0
    assert "2 of 5 answers are there" in capsys.readouterr().err
    kept = [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(part)]
    assert kept == [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(whole)]
    assert part.read_text().splitlines(keepends=True)[:2] == lines[:2]
    before = part.read_bytes()
    assert generate(*words, "--out", part) == 0  # nothing is left to do
    assert part.read_bytes() == before


def test_no_finished_answer_is_generated_twice(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chulengo.generate import engine

    asked: list[tuple[int, ...]] = []
    limit = 4
    real = engine.complete_all

    def counting(model: Any, prompts: Any, *rest: Any) -> Any:
        if len(asked) >= limit:
            raise KeyboardInterrupt
        asked.extend(prompt.ids for prompt in prompts)
        return real(model, prompts, *rest)

    file, out = prompts_file(tmp_path, 7), tmp_path / "out.jsonl"
    words = ["--model", base, "--prompts", file, "--batch-size", 2, "--temperature", 0.9, "--out"]
    monkeypatch.setattr(engine, "complete_all", counting)
    assert generate(*words, out) == 2  # interrupted before the third batch
    assert len(rows_of(out)) == 4
    early, limit = list(asked), 7
    asked.clear()
    assert generate(*words, out) == 0
    assert not set(early) & set(asked)
    assert len(early) + len(asked) == 7
    assert [row["id"] for row in rows_of(out)] == [str(n) for n in range(1, 8)]
    monkeypatch.undo()
    assert generate(*words, tmp_path / "whole.jsonl") == 0
    timeless = [[{**row, "seconds": 0} for row in rows_of(each)] for each in (out, tmp_path / "whole.jsonl")]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--seed", "9"], "settings"), (["--style", "plain"], "renderer"), (["--system", "s"], "prompts")],
)
def test_answers_of_another_command_are_left_alone(
    base: Path, tmp_path: Path, capsys: Capture, words: list[str], says: str
) -> None:
    file, out = prompts_file(tmp_path, 2), tmp_path / "out.jsonl"
    assert generate("--model", base, "--prompts", file, "--out", out) == 0
    before = out.read_bytes()
    assert generate("--model", base, "--prompts", file, "--out", out, *words) == 2
    assert says in capsys.readouterr().err
    assert out.read_bytes() == before


def test_a_prompt_that_occurs_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from chulengo.generate import engine

    file = tmp_path / "p.txt"
    file.write_text("Hello\nWho spits?\nHello\nHello\n")
    asked = []
    real = engine.complete_all
    monkeypatch.setattr(engine, "complete_all", lambda m, p, *rest: (asked.append(len(p)), real(m, p, *rest))[1])
    greedy, drawn = tmp_path / "greedy.jsonl", tmp_path / "drawn.jsonl"
    assert generate("--model", base, "--prompts", file, "--out", greedy) == 0
    assert "2 rows repeat an earlier prompt" in capsys.readouterr().err
    assert asked == [2]
    rows = rows_of(greedy)
    assert [(row["id"], row.get("same_as")) for row in rows] == [("1", None), ("2", None), ("3", "1"), ("4", "1")]
    assert rows[0]["answer"] == rows[2]["answer"] == rows[3]["answer"] != rows[1]["answer"]
    assert len({row["seed"] for row in rows}) == 4
    lines = greedy.read_text().splitlines(keepends=True)
    greedy.write_text("".join(lines[:3]))  # the last repetition is missing: taken over, not generated
    assert generate("--model", base, "--prompts", file, "--out", greedy) == 0
    assert asked == [2]
    assert greedy.read_text() == "".join(lines)
    assert generate("--model", base, "--prompts", file, "--out", drawn, "--temperature", 5) == 0
    assert asked == [2, 4]
    assert len({rows_of(drawn)[place]["answer"] for place in (0, 2, 3)}) == 3


def test_answers_are_a_data_set(base: Path, tmp_path: Path) -> None:
    from chulengo.data.load import load_examples

    chats, raw = tmp_path / "chats.jsonl", tmp_path / "raw.jsonl"
    assert generate("--model", base, "--prompts", prompts_file(tmp_path), "--out", chats, "--system", "Be kind.") == 0
    examples, report = load_examples(str(chats))
    assert report.format == "messages"
    assert [[message.role for message in example.messages] for example in examples] == [
        ["system", "user", "assistant"]] * 5
    assert [example.answer for example in examples] == [row["answer"] for row in rows_of(chats)]
    assert main(["inspect", "--model", str(base), "--data", str(chats), "--rows", "1"]) == 0
    assert generate("--model", base, "--prompts", prompts_file(tmp_path), "--out", raw, "--raw") == 0
    texts, report = load_examples(str(raw))
    assert report.format == "text"
    assert texts[0].messages[0].content == rows_of(raw)[0]["prompt"] + rows_of(raw)[0]["answer"]
    # and a file of prompts for the next model
    again = tmp_path / "again.jsonl"
    assert generate("--model", base, "--prompts", chats, "--out", again) == 0
    assert [row["answer"] for row in rows_of(again)] == [row["answer"] for row in rows_of(chats)]


def test_an_adapter_that_was_trained_again_does_not_go_on(base: Path, tmp_path: Path, capsys: Capture) -> None:
    folder, file = tiny.write_adapter(base, tmp_path / "adapter"), prompts_file(tmp_path, 2)
    words = ["--adapter", folder, "--prompts", file, "--out", tmp_path / "o.jsonl"]
    assert generate(*words) == 0
    tiny.write_adapter(base, tmp_path / "adapter", seed=5)
    assert generate(*words) == 2
    assert "other adapter_weights" in capsys.readouterr().err


def test_a_file_that_is_something_else_is_left_alone(base: Path, tmp_path: Path, capsys: Capture) -> None:
    for content in ("my notes\nin two lines\n", "my notes", '{"other": 1}\n'):
        out = tmp_path / "notes.txt"
        out.write_text(content)
        assert generate("--model", base, "--prompt", "a", "--out", out) == 2
        assert "chulengo:" in capsys.readouterr().err
        assert out.read_text() == content


def test_base_beside_tuned(base: Path, adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    assert generate("--adapter", adapter, "--prompt", "Hello", "--both", "--json") == 0
    both = json.loads(capsys.readouterr().out)
    assert generate("--adapter", adapter, "--prompt", "Hello", "--json") == 0
    tuned = json.loads(capsys.readouterr().out)
    assert generate("--model", base, "--prompt", "Hello", "--json") == 0
    alone = json.loads(capsys.readouterr().out)
    assert both["answer"] == tuned["answer"]
    assert both["base"]["answer"] == alone["answer"]
    assert tuned["answer"] != alone["answer"]
    assert generate("--adapter", adapter, "--prompt", "Hello", "--both") == 0
    assert capsys.readouterr().out == f"base:  {alone['answer']}\ntuned: {tuned['answer']}\n"


def test_a_prompt_beyond_the_context(base: Path, tmp_path: Path, capsys: Capture) -> None:
    assert generate("--model", base, "--prompt", "word " * 200) == 2
    assert "context of 128 tokens" in capsys.readouterr().err
    file, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("short", "word " * 200, "also short")))
    for _ in range(2):  # a second call does not hide it
        assert generate("--model", base, "--prompts", file, "--out", out) == 2
        error = capsys.readouterr().err
        assert "1 of 3 prompts" in error
        assert "The other 2 are in" in error
    answers = rows_of(out)
    assert [row["finish_reason"] == "context" for row in answers] == [False, True, False]
    assert answers[0]["answer"]
    assert answers[1]["answer"] == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "Neither --prompt nor --prompts"),
        (["--prompt", "a", "--prompts", "b"], "Both --prompt and --prompts"),
        (["--prompt", " "], "The prompt is empty"),
        (["--prompt", "a", "--both"], "there is none"),
        (["--prompt", "a", "--raw", "--system", "s"], "--system has no place"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size is 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "a", "--adapter", "missing"], "no adapter folder 'missing'"),
        (["--prompts", "missing.txt"], "missing.txt"),
        (["--prompt", "a", "--out", "missing/o.jsonl"], "no folder missing"),
        (["--prompt", "a", "--style", "lama2"], "llama2"),
        (["--prompt", "a", "--tempreature", "1"], "--temperature"),
    ],
)
def test_mistakes_are_explained(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate("--model", base, *words) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_an_empty_prompts_file(base: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "p.txt").write_text("")
    assert generate("--model", base, "--prompts", tmp_path / "p.txt") == 2
    assert "no prompts" in capsys.readouterr().err


def test_a_changed_renderer_is_refused(base: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tiny.write_adapter(base, tmp_path / "adapter")
    assert generate("--adapter", folder, "--prompt", "a", "--style", "plain") == 2
    assert "was trained with prompt.style" in capsys.readouterr().err
    (folder / "tokenizer.model").unlink()
    other = tiny.write_model_folder(tmp_path / "other", num_hidden_layers=1)
    assert generate("--adapter", folder, "--model", other, "--prompt", "a") == 2
    assert "cannot be put on this model" in capsys.readouterr().err
