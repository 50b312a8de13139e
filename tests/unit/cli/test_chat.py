"""`chulengo chat`: through a pipe, through a pseudo-terminal, and its loop with what a terminal would send."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_models as tiny
from chulengo.cli import chat
from chulengo.cli.main import main
from chulengo.data.load import load_examples
from chulengo.generate.conversation import ChatState
from chulengo.generate.settings import GenerationSettings
from chulengo.model.session import Session, open_session

GREEDY = GenerationSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model_folder(tmp_path_factory.mktemp("models") / "base", max_position_embeddings=256)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_adapter(base, tmp_path_factory.mktemp("run") / "adapter")


@pytest.fixture(scope="module")
def session(adapter: Path) -> Session:
    return open_session(None, str(adapter), device="cpu")


def talk(session: Session, *lines: str, **state: Any) -> tuple[ChatState, str, str]:
    screen = chat.Screen(io.StringIO(), io.StringIO(), terminal=False)
    first = ChatState(**{"settings": GREEDY, "has_adapter": True, "sides": ("tuned",), **state})
    last = chat.loop(first, session, iter(lines), screen)
    return last, screen.out.getvalue(), screen.notes.getvalue()  # type: ignore[attr-defined]


def piped(base: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, *words: str) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["chat", "--model", str(base), "--device", "cpu", "--max-new-tokens", "8", *words]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_a_pipe_gets_answers_and_nothing_else(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out, err = piped(base, "Hello\n/set temperature 0\nAnd?\n", monkeypatch, capsys, "--temperature", "0")
    assert "\033" not in out + err
    assert "you>" not in out
    main(["generate", "--model", str(base), "--device", "cpu", "--max-new-tokens", "8", "--prompt", "Hello"])
    first = capsys.readouterr().out
    assert out.startswith(first)
    assert out.count("\n") >= 2
    assert "greedy" in err


def test_the_history_reaches_the_model(session: Session) -> None:
    last, _, _ = talk(session, "Hello", "And you?")
    assert [e.question for e in last.exchanges] == ["Hello", "And you?"]
    alone, _, _ = talk(session, "And you?")
    assert alone.exchanges[0].answers != last.exchanges[1].answers
    with_system, _, _ = talk(session, "/system Be brief.", "Hello")
    assert with_system.exchanges[0].answers != last.exchanges[0].answers


def test_undo_and_retry(session: Session) -> None:
    once, _, _ = talk(session, "Hello")
    undone, _, _ = talk(session, "Hello", "More", "/undo")
    assert undone.exchanges == once.exchanges
    again, _, _ = talk(session, "Hello", "/retry")
    assert again.exchanges == once.exchanges  # greedy
    warm = GenerationSettings(max_new_tokens=8, temperature=1.5)
    first, _, _ = talk(session, "Hello", settings=warm)
    second, _, _ = talk(session, "Hello", "/retry", settings=warm)
    assert len(second.exchanges) == 1
    assert first.exchanges != second.exchanges


def test_both_sides_are_labelled(session: Session) -> None:
    last, out, _ = talk(session, "/both", "Hello")
    answers = dict(last.exchanges[0].answers)
    assert out == f"base> {answers['base']}\ntuned> {answers['tuned']}\n"
    assert answers["base"] != answers["tuned"]
    only_base, _, _ = talk(session, "/base", "Hello")
    assert only_base.exchanges[0].answers == (("base", answers["base"]),)


def test_save_is_training_data_and_load_goes_on(session: Session, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    _, _, notes = talk(session, "Hello", "And you?", f"/save {file}", "/undo", f"/save {file}")
    assert f"Appended 4 messages to {file}" in notes
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [len(row["messages"]) for row in rows] == [4, 2]
    examples, _ = load_examples(str(file))
    assert [len(example.messages) for example in examples] == [4, 2]
    loaded, _, notes = talk(session, f"/load {file}", "And you?")
    assert "1 exchanges from" in notes
    again, _, _ = talk(session, "Hello", "And you?")
    assert [e.answer("tuned") for e in loaded.exchanges] == [e.answer("tuned") for e in again.exchanges]


def test_a_file_that_cannot_be_loaded_or_saved_ends_nothing(session: Session, tmp_path: Path) -> None:
    broken = tmp_path / "b.jsonl"
    broken.write_text("{]")
    last, _, notes = talk(session, "/load missing.jsonl", f"/load {broken}", "Hello", f"/save {tmp_path}")
    assert "missing.jsonl cannot be read" in notes
    assert "is no conversation" in notes
    assert "cannot be saved" in notes
    assert len(last.exchanges) == 1


def test_a_history_over_the_context_is_noted(session: Session) -> None:
    last, _, notes = talk(session, *[f"A question of some words {n}" for n in range(12)])
    assert "(the oldest 1 of" in notes
    assert "context of 256 tokens" in notes
    assert len(last.exchanges) == 12


def test_a_question_over_the_context_is_refused_and_forgotten(session: Session) -> None:
    last, _, notes = talk(session, "word " * 300, "Hello")
    assert "too long" in notes
    assert [e.question for e in last.exchanges] == ["Hello"]


def test_an_answer_cut_by_its_limit_says_so(session: Session) -> None:
    assert "(cut at 8 tokens" in talk(session, "Hello")[2]


def test_ctrl_c_stops_the_answer_and_not_the_chat(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    from chulengo.generate import engine

    real = engine.stream
    calls = []

    def interrupted(*words: Any) -> Iterator[str]:
        calls.append(words)
        pieces = real(*words)
        yield next(pieces)
        if len(calls) == 1:
            raise KeyboardInterrupt
        yield from pieces

    monkeypatch.setattr(engine, "stream", interrupted)
    last, out, notes = talk(session, "Hello", "/retry", "More")
    assert "(stopped; /retry asks again" in notes
    assert len(last.exchanges) == 2
    assert len(out.splitlines()) >= 3


def test_text_of_several_lines() -> None:
    typed = io.StringIO('one\n"""\na\n\n b\n"""\nlast')
    assert list(chat.questions(typed, terminal=False)) == ["one", "a\n\n b", "last"]


def test_a_broken_byte_is_no_crash() -> None:
    typed = io.StringIO("a\udcffb\n")
    assert list(chat.questions(typed, terminal=False)) == ["a?b"]


def test_a_model_cannot_command_the_terminal() -> None:
    family = "👩\u200d🌾"  # joined by a character that is no letter and harmless
    assert chat.printable(f"a\033[2Jb\r\n\tç{family}\x9b") == f"a\\x1b[2Jb\\x0d\n\tç{family}\\x9b"


@pytest.mark.parametrize("words", [["--both"], ["--load", "missing.jsonl"], ["--adapter", "missing"]])
def test_mistakes_are_explained(base: Path, words: list[str], capsys: Any) -> None:
    assert main(["chat", "--model", str(base), "--device", "cpu", *words]) == 2
    assert "chulengo:" in capsys.readouterr().err


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        import pty

        # setsid --ctty: only a controlling terminal turns Ctrl-C into a signal
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", sys.executable, "-m", "chulengo", "chat", *words],
            stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"},
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, text: str, count: int = 1, seconds: float = 60) -> None:
        import select

        end = time.monotonic() + seconds
        while self.seen.count(text) < count:
            assert time.monotonic() < end, f"{text!r} did not appear in {self.seen!r}"
            if select.select([self._master], [], [], 0.5)[0]:
                try:
                    self.seen += os.read(self._master, 65536).decode(errors="replace")
                except OSError as error:
                    raise AssertionError(f"the chat ended: {self.seen!r}") from error

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def end(self) -> int:
        status = self._process.wait(30)
        os.close(self._master)
        return status


@pytest.mark.skipif(shutil.which("setsid") is None, reason="needs setsid (util-linux)")
def test_on_a_terminal_paste_streams_and_end(base: Path) -> None:
    terminal = Terminal("--model", str(base), "--device", "cpu", "--max-new-tokens", "8", "--temperature", "0")
    terminal.wait_for("you> ")
    terminal.send("Hello\r")
    terminal.wait_for("you> ", 2)
    assert "base>" in terminal.seen
    # a paste of two lines, as a terminal brackets it, is one question
    terminal.send("\033[200~first line\nsecond line\033[201~\r")
    terminal.wait_for("you> ", 3)
    terminal.send("/history\r")
    terminal.wait_for("user: first line")
    terminal.wait_for("you> ", 4)
    assert "second line\r\n" in terminal.seen.split("user: first line")[1]
    time.sleep(2)  # CPython's readline sleeps through a signal that comes between its prompt and its wait for input
    terminal.send("\x03")
    terminal.wait_for("Ctrl-D or /quit leaves")
    terminal.wait_for("you> ", 5)
    terminal.send("\x04")
    assert terminal.end() == 0
