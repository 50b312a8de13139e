"""What to type to get the numbers of a report again, in order: versions, training, evaluations.

Every line can be typed as it stands where the report was made, but for files that lay outside of the working folder:
of those a page tells the name and no folder of somebody's disk, so they are written `PATH/name`. What is made again
goes to `runs/again`, the old run is only read: an evaluation with the old --out would find its finished answers there
and make none.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath

from chulengo.evaluate.report.facts import data_name, versions
from chulengo.evaluate.report.inputs import Results, Run

PINNED = ("chulengo", "torch", "transformers", "peft", "bitsandbytes")
AGAIN = "runs/again"
AWAY = "PATH/"  # stands for a folder that only the reader knows
SETTING = re.compile(r"([\w.-]+=)(.*)", re.DOTALL)


def commands(run: Run | None, evaluations: Sequence[Results]) -> list[str]:
    """Returns what to type to get the same numbers again, in order."""
    lines = []
    made = dict(versions(run, [])) if run is not None else {}
    pins = [f"{name}=={made[name]}" for name in PINNED if name in made]
    if pins:
        lines.append("pip install " + " ".join(pins))
    if run is not None:
        folder = f"{AWAY}{run.name}" if run.folder.is_absolute() else run.folder
        lines.append(f"chulengo train --config {shlex.quote(f'{folder}/config.yaml')} --out {AGAIN}")
    taken: set[str] = set()
    for results in evaluations:
        said = results.content.get("command")
        if isinstance(said, list) and said:
            lines.append(shlex.join(_evaluated_again([str(word) for word in said], results, run, taken)))
    return lines


def started_with(run: Run) -> str:
    """Returns the command line that started the run, as its manifest has it (secrets masked), folders of that machine
    left out; "" for none."""
    said = run.manifest.get("command")
    if not isinstance(said, list) or not said:
        return ""
    return shlex.join(["chulengo", *(typed(str(word)) for word in said[1:])])


def place(name: str) -> str:
    """Returns what stands for a file or folder outside of the working folder."""
    return AWAY + (data_name(name) or "DIR")


def typed(word: str) -> str:
    """Returns a word of a command line without the folders that only one machine has."""
    setting = SETTING.fullmatch(word)
    head, value = setting.groups() if setting else ("", word)
    return head + (place(value) if data_name(value) != value else value)


def _evaluated_again(words: list[str], results: Results, run: Run | None, taken: set[str]) -> list[str]:
    words = [part for word in words for part in (word.split("=", 1) if re.match(r"--[\w-]+=", word) else [word])]
    found = [typed(word if run is None else _made_again(word, run)) for word in words]
    if run is not None and "--adapter" in found[:-1]:
        found[found.index("--adapter") + 1] = AGAIN
    if "--out" in found[:-1]:
        task = re.sub(r"[^\w.-]+", "-", results.task).strip("-.") or "task"
        name = next(each for each in (task, *(f"{task}-{number}" for number in range(2, 10_000))) if each not in taken)
        taken.add(name)
        found[found.index("--out") + 1] = f"{AGAIN if run is not None else 'results/again'}/" + (
            f"results/{name}" if run is not None else name)
    return found


def _made_again(word: str, run: Run) -> str:
    """Returns a path in the old run as the path that it has in the new one, any other word as it is."""
    setting = SETTING.fullmatch(word)
    head, value = setting.groups() if setting else ("", word)
    path = PurePath(value)
    for old in dict.fromkeys((str(run.config.get("out") or ""), str(run.folder), str(run.folder.resolve()))):
        # a run folder that is the working folder itself has no name that its files could be told by
        if PurePath(old).name and path.is_relative_to(old):
            return head + str(PurePath(AGAIN) / path.relative_to(old))
    return word


def rate_command(results: Results) -> str:
    """Returns what makes sheets of these results for people to rate."""
    folder = Path(results.path).parent
    return f"chulengo rate sheet --results {shlex.quote(typed(str(folder)))} --raters 3 --out study"
