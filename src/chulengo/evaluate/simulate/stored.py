"""The results file of a simulation, in the form that reports and comparisons read, and two of them compared.

Some scores of a simulation are not over all conversations: the turns to a goal are of those that reached it, what a
speaker repeats of those in which it said four words. So two simulations are compared, score by score, over the
conversations that both have, and what is left out is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chulengo.errors import DataError
from chulengo.evaluate.comparison import Comparison, compare_all, shared_items
from chulengo.evaluate.results import RESULTS_FORMAT, Score
from chulengo.evaluate.simulate.scores import endings
from chulengo.evaluate.simulate.talk import Conversation


def results_of(
    conversations: Sequence[Conversation], scores: Sequence[Score], made_with: Mapping[str, Any], *, source: str,
    seconds: float, command: Sequence[str],
) -> dict[str, Any]:
    """Returns the results as a JSON-able dictionary; every turn of the agent is an example.

    Args:
        conversations: all of them, in order.
        scores: what they gave.
        made_with: models and settings.
        source: scenarios or dialogues, as given.
        seconds: wall time of this command's conversations.
        command: what was typed, without secrets.
    """
    from chulengo import __version__

    side = "base" if made_with["agent"]["adapter"] is None else "tuned"
    return {
        "format": RESULTS_FORMAT, "task": "simulation", "data": {"source": source, "rows": len(conversations)},
        "sides": {side: {"model": made_with["model"], "adapter": made_with["agent"]["adapter"]}},
        "settings": dict(made_with), "versions": {"chulengo": __version__}, "seconds": {side: round(seconds, 3)},
        "command": list(command),
        "scores": {side: [score.to_dict() for score in scores]}, "comparisons": [],
        "endings": endings(conversations),
        "scenarios": {each.asked.id: each.asked.scenario.fingerprint() for each in conversations},
        "examples": [example for each in conversations for example in _examples(each, side)],
    }


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The conversations of one score that only one of two simulations has."""

    name: str
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def compare_shared(
    first: Sequence[Score], second: Sequence[Score], *, draws: int, seed: int
) -> tuple[list[Comparison], list[LeftOut]]:
    """Returns the comparisons of the scores that both simulations have, and what is left out of each.

    A score without a conversation in common is not compared; it is among what is left out all the same.
    """
    others = {score.name: score for score in second}
    pairs, left_out = [], []
    for score in first:
        if score.name not in others:
            continue
        base, tuned, only_first, only_second = shared_items(score, others[score.name])
        if base.items:
            pairs.append((base, tuned))
        if only_first or only_second:
            left_out.append(LeftOut(score.name, only_first, only_second))
    return compare_all(pairs, draws=draws, seed=seed), left_out


def check_same_scenarios(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Raises `DataError` where conversations of one name are of different scenarios in the two results."""
    one, other = first.get("scenarios", {}), second.get("scenarios", {})
    changed = [name for name in one if other.get(name, one[name]) != one[name]]
    if changed:
        raise DataError(
            "Conversations of the same name are of other scenarios in the two: "
            f"{', '.join(changed[:5])}{', …' if len(changed) > 5 else ''}.",
            next_step="simulate both with the same --scenarios or --replay, then compare",
        )


def _examples(each: Conversation, side: str) -> list[dict[str, Any]]:
    real = each.asked.scenario.real_answers
    return [
        {
            "id": f"{each.asked.id}#{turn + 1}", "group": each.asked.id, "question": each.client[turn].text,
            "references": list(real[turn : turn + 1]),
            "answers": {side: {"text": said.text, "finish_reason": said.finish_reason}},
        }
        for turn, said in enumerate(each.agent)
    ]
