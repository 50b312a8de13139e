"""One help desk conversation in the making: who speaks, what was last talked about, and the turns it can take.

Every function ``*_turn`` takes the desk and returns the (question, reply) pairs that it adds: usually one, more
where the exchange needs them (a clarifying question and its answer). An empty list means that the turn does not
fit this company.
"""

import random
from dataclasses import dataclass
from typing import TypeAlias

from chulengo.nano.company import TOPIC, TOPICS, Company, Thing
from chulengo.nano.manners import Reply
from chulengo.nano.names import trek_name
from chulengo.nano.patterns import expand, pick, pick_first, tidy
from chulengo.nano.topics import Topic

Pair: TypeAlias = tuple[str, Reply]


@dataclass
class Desk:
    """The state of one conversation: the company, the speaker's name (or none), the last thing and topic."""

    rng: random.Random
    company: Company
    speaker: str | None = None
    thing: Thing | None = None
    topic: Topic | None = None


def mention(thing: Thing, rng: random.Random) -> str:
    """Returns how a guest names `thing`."""
    if thing.kind != "trek":
        return thing.name if thing.kind == "guide" or rng.random() < 0.6 else f"the llama {thing.name}"
    draw = rng.random()
    if draw < 0.4:
        return thing.name
    if draw < 0.72:
        return f"the {thing.name} trek"
    return f"{'your' if draw > 0.92 else 'the'} {thing.name} {pick(rng, ('walk', 'tour', 'trip', 'route', 'hike'))}"


def answer_slots(thing: Thing, value: str, use_pronoun: bool) -> dict[str, str]:
    """Returns the slots of an answer about `thing` (see `chulengo.nano.topics`)."""
    slots = {"n": thing.name, "v": value}
    if thing.kind == "trek":
        slots |= (
            {"s": "It", "o": "it"} if use_pronoun else {"s": f"The {thing.name} trek", "o": f"the {thing.name} trek"}
        )
    else:
        slots |= {"s": thing.name, "o": thing.name}
    return slots


def fact_reply(desk: Desk, thing: Thing, topic: Topic, use_pronoun: bool = False) -> Reply:
    """Returns the answer to `topic` about `thing`, or that the desk does not know it."""
    value = thing.facts.get(topic.key)
    desk.thing, desk.topic = thing, topic
    if value is None:
        where = "" if thing.kind == "company" else f" of {answer_slots(thing, '', False)['o']}"
        return Reply(
            f"I do not know {topic.noun}{where}. Please ask the office.", "I do not know.", topic.key, thing.kind
        )
    slots = answer_slots(thing, value, use_pronoun)
    full = pick_first(desk.rng, topic.answers, 0.75).format_map(slots)
    return Reply(tidy(full), tidy(topic.short.format_map(slots)), topic.key, thing.kind)


def _choose(desk: Desk, known: float = 0.9) -> tuple[Thing, Topic] | None:
    """Returns something to ask about; with probability `known` the desk knows the answer."""
    rng, company = desk.rng, desk.company
    groups = [company.treks] * 5 + [company.llamas, company.guides] + [(company.rules,)] * 2
    groups = [group for group in groups if group and any(thing.facts for thing in group)]
    if not groups:
        return None
    thing = pick(rng, pick(rng, tuple(groups)))
    if thing.facts and (company.is_home or rng.random() < known):
        return thing, TOPIC[thing.kind, pick(rng, tuple(thing.facts))]
    return thing, pick(rng, TOPICS[thing.kind])


def fact_turn(desk: Desk) -> list[Pair]:
    """A question that names the thing and asks for one fact."""
    chosen = _choose(desk)
    if chosen is None:
        return []
    thing, topic = chosen
    name = mention(thing, desk.rng)
    only_trek = thing.kind == "trek" and len(desk.company.treks) == 1
    if only_trek and desk.rng.random() < 0.3:
        name = pick(desk.rng, ("the trek", "your trek", "the walk"))
    question = expand(pick(desk.rng, topic.asks), desk.rng, {"t": name})
    if thing.kind in ("trek", "llama") and desk.rng.random() < 0.08:
        question = f"{expand(pick(desk.rng, _ASIDES), desk.rng, {'t': mention(thing, desk.rng)})} " + expand(
            pick(desk.rng, topic.follows), desk.rng
        )
    return [(question, fact_reply(desk, thing, topic))]


_ASIDES = (
    "[I am|We are] interested in {t}.",
    "[I|We] [want to know|have a question] about {t}.",
    "It is about {t}.",
    "I have heard of {t}.",
    "{t} sounds [nice|good].",
)


def follow_turn(desk: Desk) -> list[Pair]:
    """A question that leaves out what the last one was about: "And how long is it?"."""
    thing = desk.thing
    if thing is None or not thing.facts:
        return fact_turn(desk)
    known = [key for key in thing.facts if desk.topic is None or key != desk.topic.key]
    if known and (desk.company.is_home or desk.rng.random() < 0.92):
        topic = TOPIC[thing.kind, pick(desk.rng, tuple(known))]
    else:
        topic = pick(desk.rng, TOPICS[thing.kind])
    question = expand(pick(desk.rng, topic.follows), desk.rng)
    return [(question, fact_reply(desk, thing, topic, use_pronoun=desk.rng.random() < 0.85))]


def swap_turn(desk: Desk) -> list[Pair]:
    """The same question about another thing: "And for Moon Lake?"."""
    if desk.thing is None or desk.topic is None or desk.thing.kind == "company":
        return fact_turn(desk)
    group = {"trek": desk.company.treks, "llama": desk.company.llamas, "guide": desk.company.guides}[desk.thing.kind]
    others = tuple(thing for thing in group if thing.name != desk.thing.name)
    if not others:
        return follow_turn(desk)
    thing = pick(desk.rng, others)
    patterns: tuple[str, ...] = (
        "And {t}?",
        "What about {t}?",
        "And [for|on] {t}?",
        "And [what about|how is it with] {t}?",
        "{t}?",
    )
    question = expand(pick(desk.rng, patterns), desk.rng, {"t": mention(thing, desk.rng)})
    return [(question, fact_reply(desk, thing, desk.topic))]


def _names(things: tuple[Thing, ...], last: str) -> str:
    names = [thing.name for thing in things]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def clarify_turn(desk: Desk) -> list[Pair]:
    """A question about "the trek" where there are several: the desk asks which one."""
    treks = desk.company.treks
    if len(treks) < 2 or desk.thing is not None:
        return fact_turn(desk)
    thing = pick(desk.rng, treks)
    topic = TOPIC["trek", pick(desk.rng, tuple(thing.facts))]
    name = pick(desk.rng, ("the trek", "a trek", "your trek", "the tour", "the walk"))
    question = expand(pick(desk.rng, topic.asks), desk.rng, {"t": name})
    which = "Which trek do you mean?" if desk.company.is_home else f"Which trek do you mean, {_names(treks, 'or')}?"
    answer = expand(
        pick(desk.rng, ("{t}.", "I mean {t}.", "{t}, please.", "The one called {n}.", "{t}")),
        desk.rng,
        {"t": mention(thing, desk.rng), "n": thing.name},
    )
    first = Reply(which, "Which trek?", "question", "talk")
    return [(question, first), (answer, fact_reply(desk, thing, topic))]


def unknown_turn(desk: Desk) -> list[Pair]:
    """A question about a trek that the company does not have."""
    treks = desk.company.treks
    name = trek_name(desk.rng)
    if not treks or any(trek.name == name for trek in treks):
        return fact_turn(desk)
    topic = pick(desk.rng, TOPICS["trek"])
    question = expand(pick(desk.rng, topic.asks), desk.rng, {"t": mention(Thing("trek", name, {}), desk.rng)})
    ours = f"Our treks are {_names(treks, 'and')}." if len(treks) > 1 else f"Our only trek is {treks[0].name}."
    return [(question, Reply(f"We have no trek called {name}. {ours}", "No such trek.", "error", "talk"))]


def list_turn(desk: Desk) -> list[Pair]:
    """A question for everything that the company offers."""
    kinds = [(treks, word) for treks, word in ((desk.company.treks, "trek"), (desk.company.llamas, "llama")) if treks]
    if not kinds:
        return []
    things, word = pick(desk.rng, tuple(kinds))
    patterns: tuple[str, ...] = (
        "[Which|What] {w}s do you have?",
        "What are your {w}s called?",
        "[Can you list|Please list|Name] your {w}s.",
        "Tell me the names of your {w}s.",
        "[Which|What] {w}s are there?",
        "Show me all {w}s.",
    )
    patterns += (
        ("What do you offer?", "Where can we walk with you?", "Which walks can I book?") if word == "trek" else ()
    )
    question = expand(pick(desk.rng, patterns), desk.rng, {"w": word})
    names = _names(things, "and")
    full = f"We have {names}." if word == "trek" else f"Our llamas are {names}."
    return [(question, Reply(full, f"{names}.", f"{word}s", word))]


def about_turn(desk: Desk) -> list[Pair]:
    """A question for anything about a trek: the desk tells its first two facts."""
    things = tuple(trek for trek in desk.company.treks if len(trek.facts) > 1)
    if not things:
        return fact_turn(desk)
    thing = pick(desk.rng, things)
    patterns: tuple[str, ...] = (
        "Tell me [more|something|] about {t}.",
        "What can you tell me about {t}?",
        "What is {t}?",
        "{t}?",
    )
    patterns += ("I would like to know more about {t}.", "Give me some information about {t}.")
    question = expand(pick(desk.rng, patterns), desk.rng, {"t": mention(thing, desk.rng)})
    topics = [TOPIC["trek", key] for key in tuple(thing.facts)[:2]]
    parts = [
        tidy(topic.answers[0].format_map(answer_slots(thing, thing.facts[topic.key], index > 0)))
        for index, topic in enumerate(topics)
    ]
    desk.thing, desk.topic = thing, None
    short = ", ".join(thing.facts[topic.key] for topic in topics)
    return [(question, Reply(" ".join(parts), tidy(f"{short}."), "about", "trek"))]


def reverse_turn(desk: Desk) -> list[Pair]:
    """A question from a guide or llama back to the trek that it leads."""
    key = pick(desk.rng, ("guide", "llama"))
    things = tuple(trek for trek in desk.company.treks if key in trek.facts)
    if not things:
        return fact_turn(desk)
    thing = pick(desk.rng, things)
    value = thing.facts[key]
    if sum(trek.facts.get(key) == value for trek in desk.company.treks) > 1:
        return fact_turn(desk)
    patterns: tuple[str, ...] = (
        "[Which|What] trek does {v} lead?",
        "On which trek do [I|we] meet {v}?",
        "Where does {v} walk?",
    )
    patterns += ("Which of your treks is led by {v}?", "I want to walk with {v}. Which trek [is that|do I book]?")
    question = expand(pick(desk.rng, patterns), desk.rng, {"v": value})
    desk.thing, desk.topic = thing, None
    return [(question, Reply(f"{value} leads the {thing.name} trek.", f"{thing.name}.", "trek", key))]
