"""The results file of a simulation, in the form that reports and comparisons read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
        "examples": [example for each in conversations for example in _examples(each, side)],
    }


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
