"""The report as Markdown for a model card: what the adapter is, what was shown of it, and how to make it again.

Only what a reader of a card needs, in text and tables that every Markdown reader shows; pictures and examples are in
the HTML page. Foreign text is escaped so that it stays text in CommonMark and in the HTML that a hub makes of it. The
front matter says what is known: no licence and no language are guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from chulengo.data.wording import counted
from chulengo.evaluate.report import again, facts
from chulengo.evaluate.report.inputs import Results, Run
from chulengo.evaluate.report.page import subtitle, title
from chulengo.evaluate.report.verdict import (
    FOR_RATING,
    WHY_FOR_RATING,
    Row,
    beyond_one_answer,
    claim,
    headline,
    is_for_rating,
    rows_against,
    rows_against_one_answer,
    rows_of,
    sentence,
)
from chulengo.evaluate.report.wording import ABSENT, UNDEFINED, change, score, span, visible

AWAY_NOTE = "`PATH` stands for the folder in which that file or folder lies on your machine."
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SPECIAL = re.compile(r"([\\`*_\[\]|~$])")
_AT_START = re.compile(r"^([-+#=]|\d+[.)](?=\s|$))")


def model_card(run: Run | None, evaluations: Sequence[Results], defaults: Mapping[str, Any]) -> str:
    """Returns the card; see `page.report_html` for the arguments."""
    parts = [_front_matter(run), f"# {plain(title(run, evaluations))}", plain(subtitle(run))]
    parts += _result(evaluations)
    for results in evaluations:
        parts += _scores(results)
    if run is not None:
        parts += _training(run, defaults)
    commands = again.commands(run, evaluations)
    if commands:
        away = [AWAY_NOTE] if any(again.AWAY in line for line in commands) else []
        parts += ["## Do it again", *away, _fenced("\n".join(commands))]
    made = facts.versions(run or Run(evaluations[0].path), evaluations)
    if made:
        parts += ["## Versions", _table(("what", "version"), [(plain(name), code(value)) for name, value in made])]
    return "\n\n".join(part for part in parts if part) + "\n"


def plain(text: str) -> str:
    """Returns foreign text that stays one line of plain text in Markdown."""
    line = " ".join(visible(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("://", "&#58;//")
    line = _SPECIAL.sub(r"\\\1", line)
    return _AT_START.sub(lambda found: f"{found[0][:-1]}\\{found[0][-1]}", line)


def code(text: str) -> str:
    """Returns foreign text as a code span, whatever backticks it has, fit for a table's cell."""
    line = " ".join(visible(text).split()).replace("|", "\\|")
    if not line:
        return ""
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if line[0] == "`" or line[-1] == "`" else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _front_matter(run: Run | None) -> str:
    if run is None:
        return ""
    lines = ["---", "library_name: peft"]
    name = str(run.config.get("model.name") or "")
    if _HUB_NAME.fullmatch(name):  # a folder's path means nothing to a hub, which refuses the card then
        lines.append(f"base_model: {json.dumps(name)}")
    data = str(run.config.get("data.train") or "")
    if _HUB_NAME.fullmatch(data) and "." not in data.rpartition("/")[2]:
        lines.append(f"datasets: [{json.dumps(data)}]")
    tags = ["chulengo", "lora"] + ([] if run.config.get("model.quantization") == "none" else ["qlora"])
    return "\n".join([*lines, f"tags: {json.dumps(tags)}", "---"])


def _result(evaluations: Sequence[Results]) -> list[str]:
    for results in evaluations:
        if is_for_rating(results):
            continue
        row = headline(results, rows_against(results) or rows_of(results))
        if row is not None:
            always = [plain(beyond_one_answer(each)) for each in rows_against_one_answer(results)
                      if each.name == row.name]
            return [" ".join([f"**{plain(claim(row))}**", plain(sentence(row)), *always])]
    if evaluations:
        return [f"**{FOR_RATING}** {WHY_FOR_RATING}"]
    return ["It has not been evaluated: no score was measured, before or after."]


def _scores(results: Results) -> list[str]:
    against = rows_against(results)
    rows = against or rows_of(results)
    sides = ("base", "tuned") if against else results.sides
    both = any(row.difference is not None for row in rows)
    head = ["score", *(rows[0].names.get(side, side) if rows else side for side in sides)]
    head += ["difference", "95 % interval", "shown"] if both else []
    lines = [[plain(row.label), *(_cell(row, side) for side in sides), *(_compared(row) if both else ())]
             for row in rows]
    over = next((row.num_items for row in rows if row.num_items), 0)
    note = f"{counted(over, 'item')}; in brackets 95 % intervals." if over else ""
    definitions = "\n".join(
        f"- {plain(row.label)} ({code(row.version)}): {plain(row.definition)}" for row in rows if row.definition
    )
    return [f"## Scores: {plain(results.task)}", _table([plain(name) for name in head], lines), note, definitions]


def _cell(row: Row, side: str) -> str:
    found = row.sides.get(side)
    if found is None:
        return ABSENT
    if found.value is None:
        return UNDEFINED
    bounds = f" ({span(found.interval, row.unit)})" if found.interval is not None else ""
    return f"{score(found.value, row.unit)}{bounds}"


def _compared(row: Row) -> tuple[str, str, str]:
    bounds = span(row.interval, row.unit, signed=True) if row.interval is not None else ABSENT
    return change(row.difference, row.unit), bounds, "" if row.verdict == "neutral" else row.word


def _training(run: Run, defaults: Mapping[str, Any]) -> list[str]:
    parts = ["## Training", _table(("", ""), [(plain(what), plain(value)) for what, value in facts.cost(run)])]
    ledgers = facts.ledgers_of(run)
    if ledgers:
        parts += ["## Data", _table(("counted before step 1", *map(plain, ledgers)), [
            (plain(what), *map(plain, cells)) for what, cells in facts.ledger_table(ledgers)])]
    said = facts.settings_said(run, defaults)
    if said:
        parts += ["## Settings", "Those that are not at their defaults, or were decided when the run began.", _table(
            ("setting", "value", "default"), [tuple(map(code, row)) for row in said])]
    return parts


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}sh\n{visible(text)}\n{fence}"
