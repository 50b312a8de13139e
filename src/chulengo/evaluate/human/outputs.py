"""Finished answers to items that can be rated: a results folder, or files of answers.

A results file holds both sides of an evaluation already. Files of answers are what `chulengo generate --out` writes,
or any rows with an id and an answer; each file is a system, named after the file. A file with `base` beside `answer`
(`generate --both`) is two systems by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chulengo.data.sources import read_records
from chulengo.data.types import Record
from chulengo.errors import DataError
from chulengo.evaluate.human.study import Item
from chulengo.evaluate.results import RESULTS_FORMAT

ANSWER_COLUMNS = ("answer", "prediction", "output", "text")
_SHOWN = 5  # ids in a message
_HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Outputs:
    """Answers of one or more systems to the same items.

    Attributes:
        systems: their names, the one of interest first.
        items: those that every system answered.
        num_left_out: items that some system lacks.
    """

    systems: tuple[str, ...]
    items: tuple[Item, ...]
    num_left_out: int = 0


def read_results(path: Path, *, common: bool = False) -> Outputs:
    """Returns the answers of a results file, or of the one results file in a folder; `tuned` comes first.

    Args:
        path: file or folder.
        common: leave out items that a side lacks, instead of refusing them.

    Raises:
        DataError: no results, several, or answers missing.
    """
    file = _results_file(path)
    content = _json(file)
    answers: dict[str, dict[str, str]] = {}
    questions: dict[str, str] = {}
    try:
        for row in content["examples"]:
            name = str(row["id"])
            if name in questions:
                raise DataError(f"{file}: the id {name!r} occurs twice.")
            questions[name] = str(row.get("question") or "")
            for side, said in row["answers"].items():
                if said is not None and said.get("finish_reason") != "missing":
                    answers.setdefault(side, {})[name] = str(said["text"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} has no answers to rate (examples with answers): {error!r}.") from error
    order = sorted(answers, key=lambda side: (side != "tuned", list(answers).index(side)))
    return _together({side: answers[side] for side in order}, questions, common)


def read_answers(paths: Sequence[str], *, common: bool = False) -> Outputs:
    """Returns the answers of files; the systems are named after them, in their order.

    Args:
        paths: one file a system, or one file with `answer` and `base`.
        common: leave out items that a file lacks, instead of refusing them.

    Raises:
        DataError: a file without answers, an id twice, ids missing, or other questions under the same ids.
    """
    answers: dict[str, dict[str, str]] = {}
    questions: dict[str, str] = {}
    for path, name in zip(paths, _names(paths), strict=True):
        if not Path(path).exists():
            raise DataError(f"There is no file {path}.",
                            next_step="chulengo generate --prompts FILE --out ANSWERS.jsonl")
        own: dict[str, str] = {}
        base: dict[str, str] = {}
        for number, record in enumerate(read_records(path), 1):
            id_ = str(record.fields.get("id", number))
            if id_ in own:
                raise DataError(f"{record.source}: the id {id_!r} occurs twice.",
                                next_step="give every row an id of its own")
            own[id_] = _answer(record)
            beside = record.fields.get("base")
            if isinstance(beside, dict) and isinstance(beside.get("answer"), str):
                base[id_] = beside["answer"]
            question = _question(record.fields)
            if question and questions.setdefault(id_, question) != question:
                raise DataError(
                    f"{record.source}: the id {id_!r} asks something else than in the files before it.",
                    allowed="answers to the same prompts", next_step="answer one prompts file with every model",
                )
        if not own:
            raise DataError(f"{path} has no answers.")
        if base and len(paths) == 1:
            answers["tuned"], answers["base"] = own, base
        else:
            answers[name] = own
    return _together(answers, questions, common)


def _names(paths: Sequence[str]) -> list[str]:
    """File names without suffix; with their folder where two are equal."""
    stems = [Path(path).name.split(".")[0] or Path(path).name for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    longer = [f"{Path(path).resolve().parent.name}/{stem}" for path, stem in zip(paths, stems, strict=True)]
    if len(set(longer)) < len(longer):
        raise DataError(f"Two files have one name: {', '.join(map(str, paths))}.",
                        next_step="rename one: systems are named after their files")
    return longer


def _answer(record: Record) -> str:
    for column in ANSWER_COLUMNS:
        if isinstance(value := record.fields.get(column), str):
            return value
    raise DataError(f"{record.source} has no answer (its columns: {', '.join(record.fields) or 'none'}).",
                    allowed=f"a text in one of {', '.join(ANSWER_COLUMNS)}")


def _question(fields: Mapping[str, Any]) -> str:
    messages = fields.get("messages")
    if messages is None and isinstance(fields.get("prompt"), list):
        messages = fields["prompt"]
    if isinstance(messages, list):
        turns = [(str(turn.get("role")), str(turn.get("content"))) for turn in messages if isinstance(turn, dict)]
        if len(turns) == 1:
            return turns[0][1]
        return "\n".join(f"{role}: {content}" for role, content in turns)
    for column in ("question", "prompt"):
        if isinstance(value := fields.get(column), str):
            return value
    return ""


def _together(answers: Mapping[str, Mapping[str, str]], questions: Mapping[str, str], common: bool) -> Outputs:
    if not answers:
        raise DataError("There are no answers to rate.")
    every = list(dict.fromkeys(id_ for own in answers.values() for id_ in own))
    lacking = {name: [id_ for id_ in every if id_ not in own] for name, own in answers.items()}
    incomplete = {id_ for missing in lacking.values() for id_ in missing}
    kept = [id_ for id_ in every if id_ not in incomplete]
    if incomplete and (not common or not kept):
        said = "; ".join(
            f"{name} lacks {len(missing)} ({', '.join(missing[:_SHOWN])}{', …' if len(missing) > _SHOWN else ''})"
            for name, missing in lacking.items() if missing
        )
        raise DataError(
            f"Not every system answered all {len(every)} items: {said}.",
            next_step=f"--common rates the {len(kept)} items that all of them answered" if kept
            else "answer one prompts file with every model",
        )
    items = [
        Item(_whole(id_), _whole(questions.get(id_, "")), {name: _whole(own[id_]) for name, own in answers.items()})
        for id_ in kept
    ]
    return Outputs(tuple(answers), tuple(items), len(incomplete))


def _whole(text: str) -> str:
    """The text with half surrogate pairs, which no file can hold, as what a screen would show for them."""
    return _HALF_PAIR.sub("\ufffd", text)


def _results_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"There are no results at {path}.", next_step="chulengo eval --out DIR writes them")
    found = [file for file in sorted(path.glob("*.json")) if _is_results(file)]
    if len(found) != 1:
        given = f"{len(found)} results files: {', '.join(file.name for file in found)}" if found else "no results file"
        raise DataError(f"{path} has {given}.", allowed="one", next_step="name the file itself")
    return found[0]


def _is_results(path: Path) -> bool:
    try:
        return _json(path).get("format") == RESULTS_FORMAT
    except DataError:
        return False


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a results file.")
    return content
