"""People who rate, made of random numbers, and the files they hand in."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chulengo.evaluate.human.ratings import Choice, Rating
from chulengo.evaluate.human.study import Item


def items(count: int, systems: Sequence[str] = ("tuned", "base")) -> list[Item]:
    """Returns items with a different answer of every system."""
    return [Item(f"q{n}", f"What about {n}?", {name: f"{name[::-1]} says {n}" for name in systems})
            for n in range(count)]


def rating(
    item: object, choice: Choice | None, rater: str = "anna", left: str = "tuned", right: str = "base", **more: Any
) -> Rating:
    """Returns one rating; tuned is on the left."""
    return Rating(rater, str(item), left, right, choice, more.pop("scores", {}), **more)


def sheet_rows(file: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV sheet as a spreadsheet program sees them."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return list(csv.DictReader(lines))


def save_csv(file: Path, rows: Sequence[dict[str, Any]], delimiter: str = ",") -> Path:
    """Writes rows as a spreadsheet program would."""
    with file.open("w", encoding="utf-8-sig", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return file


def save_jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def fill_in(file: Path, says: Callable[[dict[str, str]], dict[str, Any]], delimiter: str = ",") -> Path:
    """Fills a CSV sheet in: `says` gets a row and returns the cells to write."""
    return save_csv(file, [{**row, **says(row)} for row in sheet_rows(file)], delimiter)


def taste_for(system: str, seed: int, *, strength: float = 0.8, left: float = 0.0, tie: float = 0.1
              ) -> Callable[[dict[str, str]], dict[str, Any]]:
    """Returns a rater who knows the system by its spelling (see `items`) and likes it, or the left side, so much."""
    random_ = random.Random(seed)

    def says(row: dict[str, str]) -> dict[str, Any]:
        if random_.random() < left:
            return {"choice": "A"}
        if random_.random() < tie:
            return {"choice": random_.choice(["tie", "both bad"])}
        on_the_left = row["answer_A"].lstrip("'").startswith(system[::-1])
        likes = random_.random() < strength
        return {"choice": "A" if on_the_left == likes else "B"}

    return says
