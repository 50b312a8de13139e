"""The transcripts as one HTML file that needs no network, no script and no other file.

Everything that a model, a user or a data set wrote is escaped, and a content security policy allows nothing but the
file's own style besides. Light and dark follow the reader's setting. The first conversations are open, the others
unfold by a click; printed, all of them are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from chulengo.evaluate.results import Score
from chulengo.evaluate.simulate.page_style import STYLE
from chulengo.evaluate.simulate.talk import ENDINGS, Conversation, Said

OPEN_AT_FIRST = 20


def transcripts_page(
    conversations: Sequence[Conversation], scores: Sequence[Score], facts: Mapping[str, Any], *, title: str
) -> str:
    """Returns the whole page.

    Args:
        conversations: in the order in which they are to be shown.
        scores: shown as a table.
        facts: what the simulation was, by name: models, settings, versions.
        title: of the page.
    """
    body = [
        f"<header><h1>{escape(title)}</h1>{_facts(facts)}</header>",
        _scores(scores), _index(conversations),
        "<main>", *(_conversation(each, number) for number, each in enumerate(conversations, 1)), "</main>",
    ]
    return "\n".join([
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">""",
        f"<title>{escape(title)}</title>", f"<style>{STYLE}</style></head><body>", *body, "</body></html>", "",
    ])


def shown_value(score: Score) -> str:
    """Returns the score's value as a reader expects it: a share in percent."""
    return _number(score, score.value)


def shown_interval(score: Score) -> str:
    """Returns the 95 % interval, or nothing where there is none."""
    if score.interval is None:
        return ""
    return f"{_number(score, score.interval[0])} to {_number(score, score.interval[1])}"


def _number(score: Score, value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.1%}".replace("%", " %") if score.unit == "share" else f"{value:.3g}"


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return f"<dl class=facts>{rows}</dl>"


def _scores(scores: Sequence[Score]) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escape(each.name.replace('_', ' '))}</th><td class=number>{shown_value(each)}</td>"
        f"<td class=number>{shown_interval(each)}</td><td class=number>{each.num_items:,}</td>"
        f"<td class=definition>{escape(each.definition)} <code>{escape(each.version)}</code></td></tr>"
        for each in scores
    )
    return (
        "<section><h2>Scores</h2><div class=scroll><table><thead><tr><th>score</th><th>value</th>"
        f"<th>95 % interval</th><th>n</th><th>definition</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _index(conversations: Sequence[Conversation]) -> str:
    links = "".join(
        f'<a class="{_state(each)}" href="#c{number}" title="{escape(ENDINGS[each.ended_by])}">{_mark(each)} '
        f"{escape(each.asked.id)}</a>" for number, each in enumerate(conversations, 1)
    )
    counts = {ending: sum(each.ended_by == ending for each in conversations) for ending in ENDINGS}
    ended = "; ".join(f"{count:,} × {ENDINGS[ending]}" for ending, count in counts.items() if count)
    return f"<section><h2>Conversations</h2><p>{escape(ended)}.</p><nav>{links}</nav></section>"


def _state(each: Conversation) -> str:
    return "none" if each.reached is None else "good" if each.reached else "bad"


def _mark(each: Conversation) -> str:
    return {"good": "✓", "bad": "✗", "none": "·"}[_state(each)]


def _conversation(each: Conversation, number: int) -> str:
    scenario = each.asked.scenario
    state = {"good": "goal reached", "bad": "goal not reached", "none": ""}[_state(each)]
    pill = f'<span class="pill {_state(each)}">{_mark(each)} {state}</span>' if state else ""
    turns = f"{len(each.agent)} turn{'' if len(each.agent) == 1 else 's'}"
    about = [("Client", scenario.persona), ("Wants", scenario.goal), ("Agent's system prompt", scenario.system)]
    lines = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in about if text
    ) + _conditions(each)
    said = "".join(_turn(each, turn) for turn in range(len(each.client)))
    return (
        f'<details class=conversation id="c{number}"{" open" if number <= OPEN_AT_FIRST else ""}>'
        f"<summary><b>{escape(each.asked.id)}</b> {pill}<small>{turns}, ended: {escape(ENDINGS[each.ended_by])}"
        f"</small></summary>{f'<dl class=facts>{lines}</dl>' if lines else ''}<ol class=talk>{said}</ol></details>"
    )


def _conditions(each: Conversation) -> str:
    goal = each.asked.scenario.met_when
    if goal is None:
        return ""
    items = "".join(
        f'<li class="{"bad" if turn is None else "good"}">{"✗" if turn is None else "✓"} '
        f"{escape(condition.kind)}: {' or '.join(f'<q>{escape(text)}</q>' for text in condition.texts)}"
        f"{'' if turn is None else f' in turn {turn}'}</li>"
        for condition, turn in zip(goal.conditions, each.met, strict=True)
    )
    return f"<dt>To be said</dt><dd><ul>{items}</ul></dd>"


def _turn(each: Conversation, turn: int) -> str:
    client = each.client[turn]
    shown = f'<li class=client><span class=who>client{_how(client)}</span><p dir=auto>{escape(client.text)}</p></li>'
    real = each.asked.scenario.real_answers
    real_line = (
        f'<p class=real dir=auto><span class=who>real agent</span>{escape(real[turn])}</p>' if turn < len(real) else ""
    )
    if turn >= len(each.agent):
        return shown + (f"<li class=agent>{real_line}</li>" if real_line else "")
    agent = each.agent[turn]
    text = f"<p dir=auto>{escape(agent.text)}</p>" if agent.text else "<p class=empty>(nothing)</p>"
    return shown + f"<li class=agent><span class=who>agent{_how(agent)}</span>{text}{real_line}</li>"


def _how(said: Said) -> str:
    if not said.by_model:
        return " · script"
    return {"length": " · cut at the token limit", "context": " · cut: context full"}.get(said.finish_reason or "", "")
