"""The scores that `chulengo demo` leaves in a run folder, in the form of an evaluation's results.

They hold right or wrong for every question on both sides, which is all that a paired comparison needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from chulengo.evaluate.comparison import compare
from chulengo.evaluate.results import RESULTS_FORMAT, Score

SIDES = ("base", "tuned")
TASK = "held-out questions"


def as_results(scores: Mapping[str, Any], data: str | None) -> dict[str, Any] | None:
    """Returns the results that scores.json holds; None when it is of another form.

    Args:
        scores: side -> the exact-match score with its items.
        data: what the questions are from.
    """
    found = {side: scores.get(side) for side in SIDES}
    if not all(isinstance(score, dict) and _complete(score) for score in found.values()):
        return None
    made = {side: _score(score) for side, score in found.items() if isinstance(score, dict)}
    if [item["id"] for item in made["base"].items] != [item["id"] for item in made["tuned"].items]:
        return None
    return {
        "format": RESULTS_FORMAT, "task": TASK, "headline": "exact_match", "data": {"source": data or ""},
        "command": ["chulengo", "eval", "--adapter", "runs/again", "--data", data or "FILE", "--exact-match"],
        "sides": {}, "scores": {side: [score.to_dict()] for side, score in made.items()},
        "comparisons": [compare(made["base"], made["tuned"]).to_dict()],
        "examples": [_example(base, tuned) for base, tuned in zip(
            *(score["items"] for score in found.values() if isinstance(score, dict)), strict=True)],
    }


def _complete(score: Mapping[str, Any]) -> bool:
    items = score.get("items")
    needed = {"source", "question", "accepted", "answer", "correct", "finish_reason"}
    return (score.get("name") == "exact_match" and isinstance(items, list) and bool(items)
            and all(isinstance(item, dict) and needed <= item.keys() for item in items))


def _score(score: Mapping[str, Any]) -> Score:
    items = tuple(
        {"id": _id(item), "group": _id(item), "value": float(bool(item["correct"])),
         "counts": [float(bool(item["correct"])), 1.0]} for item in score["items"]
    )
    low_high = score.get("interval_95")
    return Score(
        "exact_match", str(score.get("version")), str(score.get("definition")), score["value"], len(items),
        None if low_high is None else (low_high[0], low_high[1]), items=items, unit="share", higher_is_better=True,
        columns=("sum", "items"), num_groups=len(items), interval_method="wilson", combine="ratio",
    )


def _example(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
    answers = zip(SIDES, (base, tuned), strict=True)
    return {
        "id": _id(base), "group": _id(base), "question": base["question"], "references": base["accepted"],
        "answers": {side: {"text": item["answer"], "finish_reason": item["finish_reason"]} for side, item in answers},
    }


def _id(item: Mapping[str, Any]) -> str:
    return PurePath(str(item["source"])).name
