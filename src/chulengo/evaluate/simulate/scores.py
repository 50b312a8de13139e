"""What a set of conversations says about the agent.

- `goal_reached`: share of conversations with a goal that reached it, with Wilson's interval.
- `turns`, `turns_to_goal`: how long the conversations were, and those that reached their goal.
- `agent_repetition`, `client_repetition`: how much of what a speaker says in a conversation it has said before. A
  client that repeats itself makes a simulation worthless however the agent does, so both are shown.
- where a real dialogue is behind it, overlap of each answer with what the real agent said at that turn. A turn that
  was due and not reached counts as an empty answer: an agent that ends conversations early gains nothing by it.

Intervals but the first are percentile bootstrap intervals over conversations. Several conversations of one scenario
count as independent ones: an interval says how sure a number is for these scenarios, not for others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from chulengo.errors import MissingPackageError
from chulengo.evaluate.metrics.metric import Metric, Outcome, mean_of
from chulengo.evaluate.metrics.texts import distinct_share
from chulengo.evaluate.results import Score, wilson_interval
from chulengo.evaluate.simulate.talk import ENDINGS, Conversation, Said

OVERLAP_METRICS = ("token_f1", "rougeL")
GOAL_VERSION = "simulation_goal_reached/1"
GOAL_DEFINITION = (
    "Share of the conversations with a goal that reached it: every condition of met_when was fulfilled by a turn of "
    "the agent (a fact: said as whole words, ignoring case and spacing; a regex: found; an answer: equal), or, where "
    "there is no met_when, the client said client_stop. Interval: Wilson, 95 %, conversations taken as independent."
)


def simulation_scores(conversations: Sequence[Conversation], *, max_turns: int, draws: int = 10_000) -> list[Score]:
    """Returns the scores of finished conversations.

    Args:
        conversations: one or more.
        max_turns: most turns of the agent, as the conversations were held with.
        draws: of the bootstrap.
    """
    from chulengo.evaluate.scoring import score_all

    with_goal = [each for each in conversations if each.reached is not None]
    scores = [goal_reached(with_goal)] if with_goal else []
    whole = [_whole(each) for each in conversations]
    for metric in (_turns(), _turns_to_goal(), _repetition("agent"), _repetition("client")):
        # n is to say how many conversations a number is over, so those it does not apply to are left out before
        applies = [outcome for outcome in whole if metric.count([outcome])[0, 1]]
        scores += score_all([metric], applies, draws=draws) if applies else []
    due = due_turns(conversations, max_turns)
    return scores + (score_all(_overlap_metrics(), due, draws=draws) if due else [])


def goal_reached(conversations: Sequence[Conversation]) -> Score:
    """Returns the share of conversations that reached their goal.

    Args:
        conversations: one or more, each with a goal.
    """
    from chulengo.evaluate.scoring import score

    reached = sum(bool(each.reached) for each in conversations)
    metric = mean_of("goal_reached", GOAL_VERSION, GOAL_DEFINITION, lambda outcome: float(outcome.fields["reached"]))
    found = score(metric, [_whole(each) for each in conversations], draws=0)
    return replace(
        found, interval=wilson_interval(reached, len(conversations)), interval_method="wilson",
        details={"reached": reached},
    )


def endings(conversations: Sequence[Conversation]) -> dict[str, int]:
    """Returns how many conversations ended in which way, in the order of `ENDINGS`."""
    counts = Counter(each.ended_by for each in conversations)
    return {ending: counts[ending] for ending in ENDINGS if counts[ending]}


def due_turns(conversations: Sequence[Conversation], max_turns: int) -> list[Outcome]:
    """Returns an outcome for every turn of a real agent that was due; "" where the simulated one did not get there."""
    found = []
    for each in conversations:
        scenario = each.asked.scenario
        asked = [*(said.text for said in each.client), *scenario.script[len(each.client) :]]
        for turn, real in enumerate(scenario.real_answers[:max_turns]):
            said = each.agent[turn] if turn < len(each.agent) else Said("")
            question = asked[turn] if turn < len(asked) else ""
            found.append(Outcome(
                id=f"{each.asked.id}#{turn + 1}", group=each.asked.id, question=question,
                references=(real,), answer=said.text, finish_reason=said.finish_reason or "",
            ))
    return found


def _whole(each: Conversation) -> Outcome:
    fields: dict[str, Any] = {"turns": len(each.agent), "reached": each.reached}
    for speaker in ("agent", "client"):
        # lines of a script are nobody's repetition
        fields[speaker] = "\n".join(said.text for said in getattr(each, speaker) if said.by_model)
    return Outcome(each.asked.id, each.asked.id, "", (), fields["agent"], fields=fields)


def _turns() -> Metric:
    return mean_of(
        "turns", "simulation_turns/1", "Mean number of the agent's turns in a conversation.",
        lambda outcome: float(outcome.fields["turns"]), unit="number", higher_is_better=None,
    )


def _turns_to_goal() -> Metric:
    return mean_of(
        "turns_to_goal", "simulation_turns_to_goal/1",
        "Mean number of the agent's turns in the conversations that reached their goal; the others are left out.",
        lambda outcome: float(outcome.fields["turns"]) if outcome.fields["reached"] else float("nan"), unit="number",
        higher_is_better=False,
    )


def _repetition(speaker: str) -> Metric:
    return mean_of(
        f"{speaker}_repetition", f"simulation_{speaker}_repetition/1",
        f"Mean over conversations of the share of 4-grams of words in all that the {speaker} model said that repeat an "
        "earlier one of the same conversation and speaker (turns joined); fewer than 4 words are left out.",
        lambda outcome: 1.0 - distinct_share(outcome.fields[speaker], 4), higher_is_better=False,
    )


def _overlap_metrics() -> list[Metric]:
    from chulengo.evaluate.metrics.registry import MetricOptions, make_metric

    found = []
    for name in OVERLAP_METRICS:
        try:
            found.append(make_metric(name, MetricOptions()))
        except MissingPackageError:  # the command line says so, see `missing_overlap`
            continue
    return found


def missing_overlap(scores: Sequence[Score]) -> list[str]:
    """Returns the overlap metrics that are not among the scores although others are: their package is missing."""
    names = {score.name for score in scores}
    return [name for name in OVERLAP_METRICS if name not in names] if names & set(OVERLAP_METRICS) else []
