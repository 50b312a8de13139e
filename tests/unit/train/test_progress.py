from __future__ import annotations

import io
import math
import os
import pty
import subprocess
import sys

import pytest
from rich.console import Console

from chulengo.train.progress import LiveProgress, count, duration, number, size, sparkline


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _train(step: int, **more: float) -> dict[str, object]:
    return {
        "kind": "train", "step": step, "epoch": step / 20, "loss": 2.0 - step / 100, "learning_rate": 2e-4,
        "grad_norm": 0.9123456, "tokens_per_s": 15120.3, "step_s": 0.5, "peak_bytes": 3 << 30, **more,
    }  # fmt: skip


def _plain(clock: Clock, **more: object) -> tuple[LiveProgress, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=False)
    return LiveProgress(console=console, clock=clock, memory_now=lambda: 1 << 30, **more), out  # type: ignore[arg-type]


def _terminal(clock: Clock, width: int) -> tuple[LiveProgress, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, width=width, height=30, force_terminal=True, legacy_windows=False)
    console._environ = {}  # type: ignore[assignment]  # a test runner's COLUMNS is not ours
    return LiveProgress(console=console, clock=clock, memory_now=lambda: 1 << 30), out


def test_plain_lines_first_last_and_every_ten_seconds() -> None:
    clock = Clock()
    progress, out = _plain(clock)
    with progress:
        progress.start(100, title="nano on demo")
        for step in range(1, 101):
            clock.now += 1.0
            progress.update(_train(step))
            if step == 50:
                progress.update({"kind": "validation", "step": 50, "loss": 1.25, "perplexity": math.exp(1.25)})
    lines = out.getvalue().splitlines()
    assert lines[0] == "nano on demo: 100 steps"
    assert [line.split()[1] for line in lines if line.startswith("step")] == [
        f"{step}/100" for step in (1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100)
    ]
    assert "validation at step 50: loss 1.2500 ppl 3.4903 (best)" in lines


def test_plain_lines_every_n_steps_and_the_last_one_even_when_it_stops_early() -> None:
    progress, out = _plain(Clock(), plain_every_steps=5)
    with progress:
        progress.start(100)
        for step in range(1, 13):
            progress.update(_train(step))
    steps = [line.split()[1] for line in out.getvalue().splitlines() if line.startswith("step")]
    assert steps == ["1/100", "5/100", "10/100", "12/100"]


def test_plain_lines_are_narrow_and_hold_no_control_characters() -> None:
    clock = Clock()
    progress, out = _plain(clock, plain_every_steps=1)
    with progress:
        progress.start(1_000_000, title="a model with a very long name indeed \x1b[31m on a data set with another one")
        for step in (999_997, 999_998, 999_999):
            clock.now += 50_000.0
            progress.update(_train(step, loss=1234.5678, grad_norm=1e-7, tokens_per_s=123456.0))
        progress.update({"kind": "validation", "step": 999_999, "loss": math.nan, "perplexity": math.inf})
        progress.message("a \x1b[2Jmessage")
    for line in out.getvalue().splitlines():
        assert len(line) <= 79
        assert all(character.isprintable() for character in line)
    assert "step 999999/1000000 loss 1.23e+03 lr 2e-04 123k/s grad 1e-07 3G 13h53m left" in out.getvalue()


def test_a_plain_line_holds_every_fact() -> None:
    clock = Clock()
    progress, out = _plain(clock, plain_every_steps=1)
    with progress:
        progress.start(1)
        progress.start(100)
        for step in (10, 11, 12):
            clock.now += 0.5
            progress.update(_train(step))
    lines = out.getvalue().splitlines()
    assert lines[0].endswith(": 1 step")
    assert lines[-1] == "step 12/100  loss 1.8800  lr 2e-04  15.1k tok/s  grad 0.91  3.00 GiB  44s left"


def test_time_left_excludes_the_first_step_and_counts_validation() -> None:
    clock = Clock()
    progress, _ = _plain(clock)
    progress.start(100)
    assert progress.seconds_left() is None
    clock.now += 10.0
    progress.update({"kind": "validation", "step": 0, "loss": 2.0, "seconds": 10.0})  # the base
    clock.now += 60.0  # compilation
    progress.update(_train(1))
    assert progress.seconds_left() is None
    for step in range(2, 11):
        clock.now += 2.0
        progress.update(_train(step))
    assert progress.seconds_left() == pytest.approx(90 * 2.0)
    clock.now += 30.0
    progress.update({"kind": "validation", "step": 10, "loss": 1.0, "seconds": 30.0})
    clock.now += 2.0
    progress.update(_train(11))
    # 9 more, as long as the two so far: at steps 20, 30 ... 100
    assert progress.seconds_left() == pytest.approx(89 * 2.0 + 9 * 20.0)
    progress.stop()


def test_time_left_follows_a_change_of_speed() -> None:
    clock = Clock()
    progress, _ = _plain(clock)
    progress.start(1000)
    for step in range(1, 201):
        clock.now += 10.0 if step <= 100 else 1.0
        progress.update(_train(step))
    assert progress.seconds_left() == pytest.approx(800.0)


def test_resumed_runs_do_not_count_steps_of_another_process() -> None:
    clock = Clock()
    progress, out = _plain(clock)
    progress.start(100, first_step=50)
    for step in (51, 52, 53):
        clock.now += 3.0
        progress.update(_train(step))
    assert progress.seconds_left() == pytest.approx(47 * 3.0)
    progress.stop()
    assert "resumed at 50" in out.getvalue()


@pytest.mark.parametrize("width", [60, 100])
def test_the_panel_shows_everything_and_fits(width: int) -> None:
    clock = Clock()
    progress, out = _terminal(clock, width)
    with progress:
        progress.start(40, title="nano on demo")
        for step in range(1, 17):
            clock.now += 2.0
            progress.update(_train(step))
        progress.update({"kind": "validation", "step": 16, "loss": 1.5, "perplexity": 4.4817})
        console = Console(file=io.StringIO(), width=width, record=True, force_terminal=True)
        console.print(progress._panel())
        text = console.export_text()
    for part in ("nano on demo", "step 16/40", "epoch 0.80", "learning rate", "2.000e-04", "gradient norm", "0.9123",
                 "15.1k tokens/s", "1.00 GiB now, 3.00 GiB peak", "32s elapsed, 48s left", "perplexity 4.4817",
                 "best", "█"):  # fmt: skip
        assert part in text
    assert max(map(len, text.splitlines())) <= width
    assert out.getvalue().rstrip("\n").endswith("\x1b[?25h") or "\x1b[?25h" in out.getvalue()[-40:]


def test_the_best_validation_is_remembered() -> None:
    progress, _ = _terminal(Clock(), 100)
    with progress:
        progress.start(40)
        progress.update({"kind": "validation", "step": 10, "loss": 1.0, "perplexity": 2.7})
        progress.update({"kind": "validation", "step": 20, "loss": 1.5, "perplexity": 4.5})
        assert "(best 1.0000 at step 10)" in progress._validation_text().plain


SCRIPT = """
import sys
from chulengo.train.progress import LiveProgress
progress = LiveProgress()
progress.start(10)
progress.update({"kind": "train", "step": 1, "loss": 1.0})
if sys.argv[1] == "raise":
    raise RuntimeError("boom")
sys.exit(0)
"""


@pytest.mark.parametrize("how", ["raise", "exit"])
def test_the_terminal_gets_its_cursor_back_without_stop(how: str) -> None:
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    subprocess.run([sys.executable, "-c", SCRIPT, how], stderr=follower, env=environment, check=False, timeout=30)
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 65536):
            shown += chunk
    except OSError:
        pass  # Linux reports the closed other end so
    os.close(leader)
    assert b"\x1b[?25l" in shown
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l")


def test_a_pipe_with_an_ascii_locale() -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "exit"], stderr=subprocess.PIPE, env=environment, check=True, timeout=30
    )
    assert done.stderr.decode("ascii").splitlines()[1] == "step 1/10  loss 1.0000"


def test_numbers_by_hand() -> None:
    assert sparkline([1.0, 2.0, 3.0, 8.0]) == "▁▂▃█"
    assert sparkline([math.nan]) == ""
    assert len(sparkline([float(i) for i in range(1000)])) == 32
    assert [duration(s) for s in (None, 8, 200, 7500, 270000)] == ["–", "8s", "3m20s", "2h05m", "3d03h"]
    assert [count(v) for v in (950, 5120, 16543, 1_200_000)] == ["950", "5.12k", "16.5k", "1.2M"]
    assert [size(v) for v in (1 << 20, 3 << 29)] == ["1 MiB", "1.50 GiB"]
    assert [number(v) for v in (None, 1.23456, 0.00012345, 12345.6, math.nan)] == [
        "–", "1.2346", "0.0001234", "12,346", "nan",
    ]  # fmt: skip
