"""What a person sees while a run goes: a live panel on a terminal, plain lines everywhere else.

`metrics.jsonl` is the truth; nothing here computes what is not in its rows, except two things. *Loss, smoothed* is a
moving average of the rows. *Time left* is the honest one: the mean of the recent steps (not of all, so a change of
speed shows), without the first step after the start (which pays for allocation, compilation and caches), plus the
validations to come, once two were seen. Until two steps are done there is no estimate, and none is shown.

Plain lines hold no control characters and at most 79 columns, so that a log file, CI or `tee` stays readable.
The panel is put away in `stop`, in `__exit__`, and at the end of the process, whichever comes first: a terminal
without a cursor is a bug.
"""

from __future__ import annotations

import atexit
import itertools
import math
import sys
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from chulengo.data.wording import counted, four_digits

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

RECENT_STEPS = 50  # the window of the time-left estimate, in logged rows
SPARK_POINTS = 32
SPARK_BARS = "▁▂▃▄▅▆▇█"
PLAIN_COLUMNS = 79
PLAIN_SECONDS = 10.0  # a plain line at most this often, so a day's log stays under 10,000 lines
UNKNOWN = "–"


class LiveProgress:
    """Shows metric rows as they come. Use as a context manager, or call `start` and `stop`."""

    def __init__(
        self,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        memory_now: Callable[[], int] | None = None,
        plain_every_steps: int | None = None,
    ) -> None:
        """Shows nothing before `start`.

        Args:
            console: a rich console; None: standard error (standard output stays free for results).
            clock: seconds, for elapsed time and time left.
            memory_now: returns the bytes in use now; None: the GPU's when one is in use, else this process's.
            plain_every_steps: without a terminal, a line every so many steps; None: one every 10 seconds.
        """
        from rich.console import Console

        self._console = console or Console(stderr=True)
        self._live_wanted = self._console.is_terminal and not self._console.is_dumb_terminal
        self._clock = clock
        self._memory_now = memory_now or memory_in_use
        self._plain_every_steps = plain_every_steps
        self._live: Any = None
        self._running = False

    def start(self, total_steps: int, *, first_step: int = 0, title: str = "training") -> Self:
        """Begins to show; returns itself.

        Args:
            total_steps: optimiser steps of the whole run.
            first_step: steps done before this process (a resumed run).
            title: what is trained, in a few words.
        """
        self._total, self._step, self._first_step, self._title = total_steps, first_step, first_step, title
        self._train: dict[str, Any] = {}
        self._validation: dict[str, Any] = {}
        self._best: dict[str, Any] = {}
        self._memory_peak = 0
        self._loss_sum = self._loss_weight = 0.0
        self._history: deque[float] = deque(maxlen=400)  # smoothed losses, for the sparkline
        self._marks: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS + 1)  # (step, busy seconds)
        self._validation_seconds = 0.0
        self._validation_steps: list[int] = []
        self._started = self._clock()
        self._last_line_at, self._last_line_step = -math.inf, -1
        self._running = True
        if self._live_wanted:
            from rich.live import Live

            self._live = Live(
                get_renderable=self._panel, console=self._console, refresh_per_second=4, transient=False
            )
            atexit.register(self.stop)
            self._live.start()
        else:
            resumed = f", resumed at {first_step}" if first_step else ""
            steps = f": {counted(total_steps, 'step')}{resumed}"
            room = PLAIN_COLUMNS - len(steps)  # a long title is cut, the numbers are not
            self._print((title if len(title) <= room else f"{title[: room - 1]}…") + steps)
        return self

    def update(self, row: Mapping[str, Any]) -> None:
        """Shows one metric row (kind "train" or "validation"); rows of other kinds change nothing."""
        if row.get("kind") == "train":
            self._take_train(row)
        elif row.get("kind") == "validation":
            self._take_validation(row)

    def message(self, text: str) -> None:
        """Prints a line above the panel (or between the plain lines)."""
        for line in text.splitlines() or [""]:
            self._print(line, whole=True)

    def stop(self) -> None:
        """Ends the display and gives the terminal back; may be called twice."""
        if not self._running:
            return
        self._running = False
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()
            atexit.unregister(self.stop)
        elif self._train and self._last_line_step != self._step:
            self._plain_line()

    def seconds_left(self) -> float | None:
        """Returns the estimated seconds to the last step, or None before there is anything to go by."""
        remaining = self._total - self._step
        if remaining <= 0:
            return 0.0
        if len(self._marks) < 2 or self._marks[-1][0] <= self._marks[0][0]:
            return None
        (first, since), (last, until) = self._marks[0], self._marks[-1]
        return remaining * (until - since) / (last - first) + self._validation_left()

    def _validation_left(self) -> float:
        """Returns the seconds of validation to come: as often as the last two were apart, as long as the mean of all.

        Spreading what was spent over the steps done would make the score before step 1 look like hours.
        """
        if len(self._validation_steps) < 2:
            return 0.0
        before, last = self._validation_steps[-2:]
        to_come = (self._total - last) // (last - before) if last > before else 0
        return max(0, to_come) * self._validation_seconds / len(self._validation_steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _take_train(self, row: Mapping[str, Any]) -> None:
        self._train = dict(row)
        self._step = int(row.get("step", self._step))
        loss = row.get("loss")
        if loss is not None and math.isfinite(loss):
            self._loss_sum, self._loss_weight = 0.9 * self._loss_sum + loss, 0.9 * self._loss_weight + 1.0
            self._history.append(self._loss_sum / self._loss_weight)
        self._memory_peak = max(self._memory_peak, int(row.get("peak_bytes") or 0))
        # the clock stands still while validation runs; the first mark is set *after* the first, slow step
        self._marks.append((self._step, self._clock() - self._started - self._validation_seconds))
        if self._live is None and self._running:
            self._plain_line_if_due()

    def _take_validation(self, row: Mapping[str, Any]) -> None:
        self._validation = dict(row)
        self._validation_seconds += float(row.get("seconds") or 0.0)
        self._validation_steps.append(int(row.get("step", self._step)))
        loss = row.get("loss", math.nan)
        best = math.isfinite(loss) and loss < self._best.get("loss", math.inf)
        if best:
            self._best = dict(row)
        if self._live is None and self._running:
            mark = " (best)" if best else ""
            text = f"validation at step {row.get('step', self._step)}: loss {number(loss)}"
            self._print(f"{text} ppl {number(row.get('perplexity'))}{mark}")

    def _plain_line_if_due(self) -> None:
        every = self._plain_every_steps
        by_step = every is not None and self._step % every == 0
        by_time = every is None and self._clock() - self._last_line_at >= PLAIN_SECONDS
        if by_step or by_time or self._last_line_step < 0 or self._step >= self._total:
            self._plain_line()

    def _plain_line(self) -> None:
        self._last_line_at, self._last_line_step = self._clock(), self._step
        line = "  ".join(self._facts_in_words())
        # the same facts in fewer characters rather than fewer facts
        self._print(line if len(line) <= PLAIN_COLUMNS else " ".join(self._facts_in_short()))

    def _facts_in_words(self) -> list[str]:
        row, left = self._train, self.seconds_left()
        facts = [f"step {self._step}/{self._total}", f"loss {number(row.get('loss'))}"]
        facts += [f"lr {row['learning_rate']:.0e}"] if row.get("learning_rate") is not None else []
        facts += [f"{count(row['tokens_per_s'])} tok/s"] if row.get("tokens_per_s") else []
        facts += [f"grad {row['grad_norm']:.2g}"] if row.get("grad_norm") is not None else []
        facts += [size(row["peak_bytes"])] if row.get("peak_bytes") else []
        return facts + ([f"{duration(left)} left"] if left else [])

    def _facts_in_short(self) -> list[str]:
        """Returns at most 77 characters with the spaces between, up to a million steps of a week."""
        row, left = self._train, self.seconds_left()
        facts = [f"step {self._step}/{self._total}"]
        facts += [f"loss {row['loss']:.3g}"] if row.get("loss") is not None else []
        facts += [f"lr {row['learning_rate']:.0e}"] if row.get("learning_rate") is not None else []
        facts += [f"{count(row['tokens_per_s'])}/s"] if row.get("tokens_per_s") else []
        facts += [f"grad {row['grad_norm']:.2g}"] if row.get("grad_norm") is not None else []
        facts += [f"{row['peak_bytes'] / 2**30:.3g}G"] if row.get("peak_bytes") else []
        return facts + ([f"{duration(left)} left"] if left else [])

    def _print(self, text: str, *, whole: bool = False) -> None:
        text = "".join(" " if unicodedata.category(character) == "Cc" else character for character in text)
        if self._live is not None:
            self._console.print(text, markup=False, highlight=False)
            return
        if not whole and len(text) > PLAIN_COLUMNS:
            text = text[: PLAIN_COLUMNS - 1] + "…"
        try:
            self._console.file.write(text + "\n")
        except UnicodeEncodeError:  # LC_ALL=C
            self._console.file.write(text.encode("ascii", "replace").decode() + "\n")
        self._console.file.flush()

    def _panel(self) -> RenderableType:
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        row, left = self._train, self.seconds_left()
        done = self._step / self._total if self._total else 0.0
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(ratio=1, min_width=8)
        head.add_column(no_wrap=True)
        epoch = f"  epoch {row['epoch']:.2f}" if row.get("epoch") is not None else ""
        bar = ProgressBar(total=max(1, self._total), completed=self._step)
        head.add_row(bar, Text(f"{done:4.0%}  step {self._step}/{self._total}{epoch}", style="bold"))

        body = Table.grid(padding=(0, 2))
        body.add_column(style="dim", no_wrap=True, min_width=13)
        body.add_column(overflow="ellipsis", no_wrap=True)
        for name, value in self._facts(row, left):
            body.add_row(name, value)
        grid = Table.grid(expand=True)
        grid.add_row(head)
        grid.add_row(body)
        return Panel(grid, title=Text(self._title), title_align="left", border_style="cyan", padding=(0, 1))

    def _facts(self, row: Mapping[str, Any], left: float | None) -> list[tuple[str, Any]]:
        from rich.text import Text

        loss = Text(f"{number(self._smoothed())} smoothed, {number(row.get('loss'))} now  ")
        if "utf" in (self._console.encoding or "").lower():
            room = min(SPARK_POINTS, max(0, self._console.width - 54))  # what label, numbers and frame leave
            loss.append(sparkline(list(self._history), room), style="cyan")
        rate = row.get("learning_rate")
        speed = f"{count(row['tokens_per_s'])} tokens/s" if row.get("tokens_per_s") else UNKNOWN
        if row.get("step_s"):
            speed += f", {row['step_s']:.3g} s a step"
        memory = int(row.get("memory_bytes") or self._memory_now())
        self._memory_peak = max(self._memory_peak, memory)
        facts: list[tuple[str, Any]] = [
            ("loss", loss),
            ("learning rate", f"{rate:.3e}" if rate is not None else UNKNOWN),
            ("gradient norm", number(row.get("grad_norm"))),
            ("speed", speed),
            ("memory", f"{size(memory)} now, {size(self._memory_peak)} peak"),
            ("time", f"{duration(self._clock() - self._started)} elapsed, {duration(left)} left"),
        ]
        if self._validation:
            facts.append(("validation", self._validation_text()))
        return facts

    def _validation_text(self) -> Any:
        from rich.text import Text

        last, best = self._validation, self._best
        text = Text(f"loss {number(last.get('loss'))}, perplexity {number(last.get('perplexity'))}")
        if best.get("step") == last.get("step"):
            text.append("  ★ best" if "utf" in (self._console.encoding or "").lower() else "  best", style="green")
        elif best:
            text.append(f"  (best {number(best['loss'])} at step {best.get('step')})", style="dim")
        return text

    def _smoothed(self) -> float | None:
        return self._loss_sum / self._loss_weight if self._loss_weight else None


def memory_in_use() -> int:
    """Returns the bytes in use: by tensors on the GPU when this process uses one, else of the process (resident)."""
    torch = sys.modules.get("torch")  # loaded by whoever trains; showing memory is no reason to load it
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.memory_allocated())
    import psutil

    return int(psutil.Process().memory_info().rss)


def sparkline(values: list[float], points: int = SPARK_POINTS) -> str:
    """Returns the values as a line of bars, the lowest the smallest; means of stretches when there are many."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or points < 1:
        return ""
    stretch = max(1.0, len(finite) / points)
    edges = [round(i * stretch) for i in range(min(points, len(finite)) + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges) if b > a]
    low, high = min(means), max(means)
    spread = (high - low) or 1.0
    return "".join(SPARK_BARS[min(7, int((mean - low) / spread * 8))] for mean in means)


def number(value: float | None) -> str:
    """Returns four significant digits, `nan` as it is, a dash for None."""
    if value is None:
        return UNKNOWN
    return four_digits(value) if not 0.1 <= abs(value) < 100 else f"{value:.4f}"[:6]


def count(value: float) -> str:
    """Returns a count in three digits: 950, 5.12k, 16.5k, 1.2M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def size(num_bytes: float) -> str:
    """Returns bytes in MiB or GiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def duration(seconds: float | None) -> str:
    """Returns seconds as 8s, 3m20s, 2h05m or 3d04h; a dash for None."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
