"""The files that raters fill in: a CSV for spreadsheet programs and a JSONL with the same rows for programs.

A row has the question, the answers A and B, empty cells for the choice and the criteria, and at the end two columns
for the machine: `entry`, which only the key maps back, and `outputs`, which names the frozen answers. No system is
named anywhere, a hidden repeat looks like any row. The key lies outside of the folder that is handed out.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chulengo.errors import DataError
from chulengo.evaluate.human.cells import MAX_CELL_CHARS, protected
from chulengo.evaluate.human.study import Entry, Item, Study, write_key

KEY_NAME, SHEETS_NAME, GUIDE_NAME = "key.json", "sheets", "how-to-rate.txt"
NO_ANSWER = "(no answer)"  # an empty cell would look like a mistake of the sheet
CHOICES = {"left": "A", "right": "B", "tie": "tie", "both bad": "both bad"}
_TEXT_COLUMNS = ("question", "answer_A", "answer_B", "answer")


def write_study(folder: Path, study: Study) -> list[Path]:
    """Writes `key.json`, and in `sheets/` two files a rater and a guide; returns the sheets for spreadsheet programs.

    The folder is whole or not there.

    Raises:
        DataError: the folder is there and not empty, or cannot be written.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"{folder} is there already, perhaps with sheets that are filled in.",
                            next_step="--out with another folder")
        unfinished = folder.resolve().with_name(f"{folder.resolve().name}.unfinished")
        try:
            (unfinished / SHEETS_NAME).mkdir(parents=True)
            write_key(unfinished / KEY_NAME, study)
            _write_sheets(unfinished / SHEETS_NAME, study)
            os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise DataError(f"The sheets cannot be written to {folder}: {error.strerror or error}.",
                        next_step="--out with a folder that can be written to and has room") from error
    return [folder / SHEETS_NAME / f"{rater}.csv" for rater in study.raters]


def _write_sheets(folder: Path, study: Study) -> None:
    (folder / GUIDE_NAME).write_text(_guide(study), encoding="utf-8")
    for rater in study.raters:
        rows = sheet_rows(study, rater)
        write_jsonl(folder / f"{rater}.jsonl", rows)
        write_csv(folder / f"{rater}.csv", sheet_columns(study), rows)


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows as CSV that spreadsheet programs read as UTF-8 and as nothing but text and whole numbers."""
    # the byte-order mark is how Excel knows UTF-8
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow([_cell(row.get(column)) for column in columns])


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return protected(value) if isinstance(value, str) else value


def criterion_columns(study: Study) -> list[str]:
    """Returns the names of the columns that hold 1 to 5."""
    if len(study.systems) == 1:
        return list(study.criteria)
    return [f"{name}_{side}" for name in study.criteria for side in "AB"]


def sheet_columns(study: Study) -> list[str]:
    """Returns the columns of a sheet: for people first, for the machine last."""
    alone = len(study.systems) == 1
    shown = ["answer"] if alone else ["answer_A", "answer_B", "choice"]
    return ["row", "question", *shown, *criterion_columns(study), "comment", "entry", "outputs"]


def sheet_rows(study: Study, rater: str) -> list[dict[str, Any]]:
    """Returns one rater's empty rows in order."""
    items = {item.id: item for item in study.items}
    rows = []
    for number, entry in enumerate((entry for entry in study.entries if entry.rater == rater), 1):
        blanks: dict[str, Any] = dict.fromkeys(["choice"] if entry.right else [])
        blanks |= dict.fromkeys(criterion_columns(study))
        machine = {"comment": "", "entry": entry.id, "outputs": study.mark}
        rows.append({"row": number, **shown_texts(items[entry.item], entry), **blanks, **machine})
    return rows


def shown_texts(item: Item, entry: Entry) -> dict[str, str]:
    """Returns the texts of a row by column, as the rater sees them."""
    if not entry.right:
        return {"question": item.question, "answer": item.answers[entry.left] or NO_ANSWER}
    return {
        "question": item.question,
        "answer_A": item.answers[entry.left] or NO_ANSWER,
        "answer_B": item.answers[entry.right] or NO_ANSWER,
    }


def num_over_long(study: Study) -> int:
    """Returns how many rows hold a text that Excel would cut."""
    items = {item.id: item for item in study.items}
    return sum(
        any(len(text) > MAX_CELL_CHARS for text in shown_texts(items[entry.item], entry).values())
        for entry in study.entries
    )


def _guide(study: Study) -> str:
    lines = ["Open the file with your name: the .csv in a spreadsheet program. If all of it stands in one column,",
             "import it instead (delimiter comma, UTF-8). Save it as CSV (UTF-8) again.",
             "Rate the rows from top to bottom, each on its own. Talk to other raters about them only at the end."]
    if len(study.systems) > 1:
        lines += ["", "choice: which answer would you rather have got?",
                  "  A         the answer in the column answer_A", "  B         the answer in the column answer_B",
                  "  tie       both are equally good", "  both bad  neither is of any use"]
    if study.criteria:
        lines += ["", f"{', '.join(study.criteria)}: for every answer a whole number from 1 (worst) to 5 (best)."]
    lines += ["", "Leave a row empty that you cannot rate. comment is yours. Change nothing else: the last two columns",
              "are needed to read the sheet back."]
    return "\n".join(lines) + "\n"
