"""Longer-range turns of the help desk: comparisons, yes-or-no checks, bookings, small talk and refusals."""

from chulengo.nano.company import HOME_SPEAKER, TOPIC
from chulengo.nano.desk import Desk, Pair, answer_slots, fact_turn, mention
from chulengo.nano.general import (
    ADVICE,
    LLAMA_LORE,
    OFF_TOPIC_ANSWERS,
    OFF_TOPIC_QUESTIONS,
    OFF_TOPIC_SHORT,
    SMALL_TALK,
    Exchange,
)
from chulengo.nano.manners import Reply
from chulengo.nano.names import trek_name
from chulengo.nano.patterns import choices, expand, pick, pick_first, tidy

_EXTREMES = (
    ("price", min, "cheapest", ("cheapest", "least expensive")),
    ("price", max, "most expensive", ("most expensive",)),
    ("distance", min, "shortest", ("shortest",)),
    ("distance", max, "longest", ("longest",)),
    ("altitude", max, "highest", ("highest",)),
    ("altitude", min, "lowest", ("lowest",)),
)


def _number(text: str) -> int:
    return int("".join(letter for letter in text if letter.isdigit()))


def extreme_turn(desk: Desk) -> list[Pair]:
    """A question for the cheapest, longest or highest trek."""
    key, best, word, words = pick(desk.rng, _EXTREMES)
    treks = [trek for trek in desk.company.treks if key in trek.facts]
    values = [_number(trek.facts[key]) for trek in treks]
    if len(treks) < 2 or len(set(values)) < len(values) or len(treks) < len(desk.company.treks):
        return fact_turn(desk)
    thing = treks[values.index(best(values))]
    patterns = (
        "[Which|What] is [the|your] {w} trek?",
        "Which trek is the {w}?",
        "[I am|We are] looking for the {w} trek.",
    )
    question = expand(pick(desk.rng, patterns), desk.rng, {"w": pick(desk.rng, words)})
    topic = TOPIC["trek", key]
    detail = tidy(topic.answers[0].format_map(answer_slots(thing, thing.facts[key], True)))
    desk.thing, desk.topic = thing, topic
    return [(question, Reply(f"The {word} trek is {thing.name}. {detail}", f"{thing.name}.", "trek", "trek"))]


def check_turn(desk: Desk) -> list[Pair]:
    """A yes-or-no question with a number in it: the size of a group or the age of a child."""
    key = pick(desk.rng, ("min_age", "group"))
    treks = tuple(trek for trek in desk.company.treks if key in trek.facts)
    if not treks:
        return fact_turn(desk)
    thing = pick(desk.rng, treks)
    limit = _number(thing.facts[key])
    number = max(2, limit + int(desk.rng.random() * 9) - 4)
    name = mention(thing, desk.rng)
    topic = TOPIC["trek", key]
    if key == "min_age":
        patterns = (
            "My [son|daughter|child|nephew|niece] is {k}. [Can the child|Can we] [join|come on|do] {t}?",
            "Is {k} years old enough for {t}?",
            "Can a child of {k} years join {t}?",
        )
        fits = number >= limit
    else:
        patterns = (
            "We are {k} people. Can we [all|] join {t}?",
            "Is there room for {k} people on {t}?",
            "Can {k} of us come on {t}?",
        )
        fits = number <= limit
    question = expand(pick(desk.rng, patterns), desk.rng, {"k": str(number), "t": name})
    detail = topic.answers[0].format_map(answer_slots(thing, thing.facts[key], False))
    detail = detail[:1].lower() + detail[1:]
    desk.thing, desk.topic = thing, topic
    return [(question, Reply(f"{'Yes' if fits else 'No'}, {detail}", f"{'Yes' if fits else 'No'}.", key, "trek"))]


_COUNTS = choices("two|three|four|five|six|seven|eight|nine|ten|2|3|4|5|6|8|11|12")
_MONTHS = choices("January|March|April|May|June|July|August|September|October|November")

_WISHES = (
    "[I'd|I would|We would] like to [book|reserve] {t}[|, please].",
    "[I|We] want to [book|reserve] {t}.",
    "Please book {t} for [me|us].",
    "[Can|Could] [I|we] book {t}?",
    "We want to do {t}. Can you book it?",
)


def booking_turn(desk: Desk) -> list[Pair]:
    """A booking: which trek, how many people, which day, and a summary of all three."""
    rng = desk.rng
    name = pick(rng, desk.company.treks).name if desk.company.treks else trek_name(rng)
    if desk.thing is not None and desk.thing.kind == "trek":
        name = desk.thing.name
    people, day = pick(rng, _COUNTS), f"{1 + int(rng.random() * 28)} {pick(rng, _MONTHS)}"
    pairs: list[Pair] = []
    opening = pick(rng, _WISHES)
    how_many = Reply("Gladly. For how many people?", "How many people?", "question", "talk")
    if rng.random() < 0.4:
        question = expand(opening, rng, {"t": pick(rng, ("a trek", "a tour", "a walk"))})
        pairs.append((question, Reply("Gladly. Which trek would you like?", "Which trek?", "question", "talk")))
        pairs.append((pick(rng, (name, f"{name}, please.", f"The {name} trek.", f"We want {name}.")), how_many))
    else:
        pairs.append((expand(opening, rng, {"t": f"the {name} trek" if rng.random() < 0.5 else name}), how_many))
    pairs.append(
        (
            expand(
                pick(rng, ("{k}.", "{k} people.", "We are {k}.", "For {k}[|, please].", "{k} of us")),
                rng,
                {"k": people},
            ),
            Reply("On which day would you like to start?", "Which day?", "question", "talk"),
        )
    )
    summary = f"So that is the {name} trek for {people} people on {day}. Is that right?"
    pairs.append(
        (
            expand(
                pick(rng, ("On {d}.", "{d}[|, please].", "We arrive on {d}.", "{d} would be good.")), rng, {"d": day}
            ),
            Reply(summary, f"{name}, {people} people, {day}?", "booking", "talk"),
        )
    )
    if rng.random() < 0.85:
        yes = expand("[Yes|Yes, please|Yes, that is right|That is right|Right|Perfect][.|!|]", rng)
        pairs.append((yes, Reply("Thank you. The office will write to you soon.", "Thank you.", "booking", "talk")))
    else:
        no = expand("[No|No, sorry|No, that is wrong][.|, I changed my mind.|. Forget it.]", rng)
        pairs.append((no, Reply("No problem. I have not booked anything.", "Not booked.", "booking", "talk")))
    return pairs


def _exchange(desk: Desk, exchange: Exchange, key: str, subject: str) -> list[Pair]:
    questions, answers, short = exchange
    question = expand(pick(desk.rng, questions), desk.rng)
    slots = {"name": desk.speaker or "the help desk", "company": desk.company.name}
    if desk.speaker is None and "{name}" in answers[0]:
        answers = ("I am the help desk of {company}.",)
        short = "The help desk."
    full = pick_first(desk.rng, answers).format_map(slots)
    return [(question, Reply(full, short.format_map(slots), key, subject))]


def lore_turn(desk: Desk) -> list[Pair]:
    """A question about llamas in general."""
    return _exchange(desk, pick(desk.rng, LLAMA_LORE), "answer", "llama")


def advice_turn(desk: Desk) -> list[Pair]:
    """A question about walking in the mountains in general."""
    return _exchange(desk, pick(desk.rng, ADVICE), "answer", "trek")


def talk_turn(desk: Desk) -> list[Pair]:
    """Small talk."""
    return _exchange(desk, pick(desk.rng, SMALL_TALK), "answer", "talk")


def introduce_turn(desk: Desk) -> list[Pair]:
    """The guest asks who is speaking, or for which company."""
    entries = tuple(entry for entry in SMALL_TALK if "{name}" in entry[1][0] or "This is {company}." in entry[1])
    return _exchange(desk, pick(desk.rng, entries), "name", "talk")


def off_topic_turn(desk: Desk) -> list[Pair]:
    """A question that a help desk for llama treks does not answer."""
    question = expand(pick(desk.rng, OFF_TOPIC_QUESTIONS), desk.rng)
    return [(question, Reply(pick_first(desk.rng, OFF_TOPIC_ANSWERS), OFF_TOPIC_SHORT, "error", "off"))]


def home_speaker(name: str | None) -> str:
    """Returns who speaks for the home company."""
    return name or HOME_SPEAKER
