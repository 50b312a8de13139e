"""What a person sees while a search runs: a line a trial, a line that moves on a terminal, a table at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from chulengo.evaluate.search.space import short
from chulengo.evaluate.search.study import Trial, best_of
from chulengo.train.progress import duration, number

if TYPE_CHECKING:
    from rich.console import Console

MARKS = {"complete": "complete", "pruned": "pruned", "failed": "failed", "interrupted": "interrupted"}
SHOWN_IN_TABLE = 10


class SearchProgress:
    """Shows the trials of one search, or the runs of one curve, as they come. Use as a context manager."""

    def __init__(self, *, num_points: int, console: Console | None = None) -> None:
        """Shows nothing before the first line.

        Args:
            num_points: evaluation points of a trial.
            console: a rich console; None: standard error (standard output stays free for results).
        """
        from rich.console import Console

        self._console = console or Console(stderr=True, highlight=False)
        self._num_points = num_points
        self._status: Any = None
        self._title = ""
        self._best: float | None = None
        self._said: set[str] = set()

    def __enter__(self) -> SearchProgress:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._status = self._console.status("")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def start(self, title: str) -> None:
        """Names what runs now."""
        self._title = title
        self._move("base")

    def report(self, point: int, step: int, loss: float) -> None:
        """Shows one validation of what runs now."""
        where = f"point {point} of {self._num_points}" if point else f"step {step}"
        self._move(f"{where}, validation loss {number(loss)}")

    def trial(self, trial: Trial, note: str = "") -> None:
        """Prints the line of a trial that ended."""
        better = trial.value is not None and (self._best is None or trial.value < self._best)
        if better:
            self._best = trial.value
        last = trial.points[max(trial.points)] if trial.points else None
        value = number(trial.value if trial.value is not None else last)
        where = f" at point {max(trial.points)}/{self._num_points}" if trial.state == "pruned" and trial.points else ""
        words = [
            f"trial {trial.number:>3}  {MARKS.get(trial.state, trial.state) + where:<20}  {value:>7}"
            f"  {duration(trial.seconds):>6}  {settings_text(trial.params)}"
        ]
        words += ["(best so far)"] if better else []
        words += [f"({note})"] if note else []
        self.line("  ".join(words))
        if trial.failure:
            self.line(f"           {trial.failure}")

    def line(self, text: str) -> None:
        """Prints a line of its own."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def message(self, text: str) -> None:
        """Prints a sentence of a run, once: every trial would say the same."""
        if text not in self._said:
            self._said.add(text)
            self.line(text)

    def _move(self, text: str) -> None:
        if self._status is not None:
            from rich.markup import escape

            best = f" · best {number(self._best)}" if self._best is not None else ""
            self._status.update(escape(f"{self._title} · {text}{best}"))


@contextlib.contextmanager
def search_progress(num_points: int) -> Iterator[SearchProgress]:
    """Gives a display on standard error, put away when the block ends."""
    with SearchProgress(num_points=num_points) as shown:
        yield shown


def settings_text(params: Mapping[str, Any]) -> str:
    """Returns settings as `learning_rate 0.0002, rank 16`."""
    return ", ".join(f"{short(key)} {setting_text(value)}" for key, value in params.items())


def setting_text(value: Any) -> str:
    """Returns one value as it is shown: floats in three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def trial_table(trials: Sequence[Trial]) -> list[list[str]]:
    """Returns the best trials as rows of a table, the heading first."""
    complete = sorted((t for t in trials if t.value is not None), key=lambda t: (t.value, t.number))
    keys = list(dict.fromkeys(key for trial in complete for key in trial.params))
    rows = [["trial", "validation loss", *(short(key) for key in keys), "time"]]
    for trial in complete[:SHOWN_IN_TABLE]:
        rows.append([str(trial.number), number(trial.value), *(setting_text(trial.params.get(key)) for key in keys),
                     duration(trial.seconds)])  # fmt: skip
    return rows


def counts_text(trials: Sequence[Trial]) -> str:
    """Returns how the trials ended, in words, and which was best."""
    counts = {state: sum(each.state == state for each in trials) for state in MARKS}
    said = ", ".join(f"{count} {MARKS[state]}" for state, count in counts.items() if count)
    best = best_of(trials)
    return f"{said}." + (f" Best: trial {best.number}, validation loss {number(best.value)}." if best else "")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows to standard output: a drawn table on a terminal, aligned columns everywhere else."""
    import sys

    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*rows[0])
        for row in rows[1:]:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
