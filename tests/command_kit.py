"""The command line as a user types it: refusals that are looked at closely, and runs that are broken off."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chulengo.cli.main import main

Capture = pytest.CaptureFixture[str]


def write_lines(path: Path, *rows: dict[str, Any]) -> Path:
    """Writes rows as jsonl and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def conversation(question: str, answer: str | None) -> dict[str, Any]:
    """Returns one row in the messages format; without an answer when it is None."""
    turns = [{"role": "user", "content": question}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    return {"messages": turns}


def conversations(count: int) -> list[dict[str, Any]]:
    """Returns rows of different lengths that a tiny model of 128 positions can hold."""
    return [conversation(f"What is {i}?", f"It is {'a llama and ' * (i % 3)}{i}.") for i in range(count)]


def refused(capsys: Capture, *words: object, unmade: Path | None = None) -> str:
    """Returns the one message of a command that is to be refused: status 2, what to type next, no traceback.

    Args:
        words: the command line.
        unmade: a path that must not be there afterwards, such as the run folder that was asked for.
    """
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    message = said[said.rindex("chulengo: ") :] if "chulengo: " in said else said
    assert said.count("chulengo: ") == 1, said
    assert "Traceback" not in said
    assert "\n  try:     " in message, "it does not say what to type next"
    if unmade is not None:
        assert not unmade.exists(), f"left behind: {sorted(unmade.rglob('*'))}"
    return message


def done(capsys: Capture, *words: object) -> tuple[str, str]:
    """Returns what a command that succeeds prints: standard output and standard error."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out, captured.err


def next_command(message: str) -> list[str]:
    """Returns the arguments of the `chulengo …` command that a message says to type."""
    import shlex

    line = next(line for line in message.splitlines() if line.startswith("  try:"))
    words = shlex.split(line[line.index("chulengo ") :])
    return words[1:]


@contextlib.contextmanager
def started(*words: object) -> Iterator[subprocess.Popen[str]]:
    """Gives a running `python -m chulengo`, with as many threads as this process has; ended with the block."""
    import torch

    threads = str(torch.get_num_threads())
    env = {
        **os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "chulengo", *map(str, words)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(30)


def wait_for(process: subprocess.Popen[str], path: Path, lines: int = 0) -> None:
    """Returns once a path is there (and has this many lines); fails when the process ends before."""
    deadline = time.monotonic() + 120
    while not path.exists() or (lines and path.read_bytes().count(b"\n") < lines):
        if process.poll() is not None:
            raise AssertionError(f"it ended before {path}: {process.communicate()}")
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.002)


def adapter_tensors(run: Path) -> dict[str, Any]:
    """Returns the tensors of a run's finished adapter."""
    from safetensors.torch import load_file

    return load_file(run / "adapter" / "adapter_model.safetensors")
