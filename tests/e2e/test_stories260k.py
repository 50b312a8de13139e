"""Really trained weights: the text that their author published, token for token."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    folder = shared_data / "stories260K"
    if not folder.is_dir():
        pytest.skip("no stories260K among the shared data")
    return folder


def chulengo(*words: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "chulengo", *map(str, words)], input=text, capture_output=True, text=True, timeout=300,
        check=False,
    )


def test_greedy_equals_the_published_text(stories: Path) -> None:
    expected = (stories / "expected_greedy_200.txt").read_text(encoding="utf-8")
    done = chulengo("generate", "--model", stories, "--raw", "--prompt", "", "--max-new-tokens", 200,
                    "--temperature", 0, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected + "\n"


def test_greedy_from_any_beginning_equals_the_published_text(stories: Path, tmp_path: Path) -> None:
    # prompts of different lengths in one batch: padding, positions and cache are right
    expected = (stories / "expected_greedy_200.txt").read_text(encoding="utf-8")
    beginnings = ["Once upon a time,", expected[: expected.index(" She loved")], expected[: expected.index("\nLily's")]]
    file, out = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"prompt": beginning}) + "\n" for beginning in beginnings))
    done = chulengo("generate", "--model", stories, "--raw", "--prompts", file, "--max-new-tokens", 40, "--out", out,
                    "--device", "cpu")
    assert done.returncode == 0, done.stderr
    for beginning, line in zip(beginnings, out.read_text(encoding="utf-8").splitlines(), strict=True):
        answer = json.loads(line)["answer"]
        assert len(answer) > 60
        assert expected.startswith(beginning + answer)


def test_chat_through_a_pipe(stories: Path) -> None:
    done = chulengo("chat", "--model", stories, "--style", "plain", "--device", "cpu", "--max-new-tokens", 20,
                    text="Once upon a time\n/undo\nOnce upon a time\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2
    assert "\033" not in done.stdout + done.stderr


def test_perplexity_of_its_own_world(stories: Path, shared_data: Path, tmp_path: Path) -> None:
    sample = shared_data / "tinystories" / "tinystories_sample_2MiB.txt"
    if not sample.is_file():
        pytest.skip("no tinystories sample among the shared data")
    texts = sample.read_text(encoding="utf-8", errors="replace").split("<|endoftext|>")
    file = tmp_path / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": text.strip()}) + "\n" for text in texts[1:60] if len(text) < 800))
    done = chulengo("eval", "--model", stories, "--data", file, "--set", "training.overlong=drop", "--json",
                    "--device", "cpu")
    assert done.returncode == 0, done.stderr
    score = json.loads(done.stdout)["scores"]["base"][0]
    # published with the weights: mean loss 1.254 nats on a sample of the same corpus
    assert score["details"]["loss"] == pytest.approx(1.254, abs=0.12)
