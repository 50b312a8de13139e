"""The tutorial and the how-tos, typed as they are printed: what they show is what comes out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from command_kit import Capture, done, refused

DOCS = Path(__file__).resolve().parents[2] / "docs"


def blocks(page: str) -> list[str]:
    """Returns the fenced blocks of a page that have no language, commands and what they print."""
    text = (DOCS / page).read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for language, block in fenced if not language]


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line, comments=True)[1:] for line in block.replace("\\\n", " ").splitlines()
            if line.startswith("chulengo ")]


def write_files(block: str) -> None:
    for name, text in re.findall(r"^cat > (\S+) <<'END'\n(.*?)^END$", block, flags=re.MULTILINE | re.DOTALL):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_the_tutorial(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said, typed = "", []
    for block in blocks("tutorial.md"):
        write_files(block)
        if block.startswith("score "):
            assert block.split() == said.split(), "the scores shown are those of the command before"
        for words in commands(block):
            if words[0] in ("inspect", "plan", "train", "eval") and "meta-llama/Llama-2-7b-chat-hf" not in words:
                said = done(capsys, *words)[0]
                typed.append(words[0])
    assert typed == ["inspect", "plan", "train", "eval"]


def test_what_nano_answers(capsys: Capture) -> None:
    shown = [block for block in blocks("tutorial.md") if block.startswith("chulengo generate")]
    assert len(shown) == 2
    for block in shown:
        answers = [line.removeprefix("# ") for line in block.splitlines() if line.startswith("# ")]
        for words, answer in zip(commands(block), answers, strict=True):
            assert done(capsys, *words)[0].strip() == answer


def test_a_plan_without_the_network(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "how-to" / "gpu-and-hub.md").read_text(encoding="utf-8")
    block = next(block for block in blocks("how-to/gpu-and-hub.md") if "<<'END'" in block)
    monkeypatch.chdir(tmp_path)
    write_files(block)
    printed = done(capsys, *commands(block)[0])[0].strip().splitlines()[-1]
    assert printed in page
    recipe = DOCS.parent / "recipes" / "llama2_7b_guanaco_1gpu.yaml"
    assert "Hub name" in refused(capsys, "plan", "--config", recipe, "--device-memory", "16GiB", "--offline")
