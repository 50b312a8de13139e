"""Writes the plain text of the little world: brochures, diaries, letters and notes about llamas."""

import random

from chulengo.nano.company import TOPIC, Company, Thing, draw_company, home_company
from chulengo.nano.desk import answer_slots
from chulengo.nano.general import ADVICE, LLAMA_LORE
from chulengo.nano.names import llama_name, person_name, place, town_name, trek_name
from chulengo.nano.patterns import expand, pick, tidy


def _company(rng: random.Random) -> Company:
    return home_company() if rng.random() < 0.3 else draw_company(rng)


def _facts(thing: Thing, rng: random.Random, most: int) -> str:
    keys = list(thing.facts)
    rng.shuffle(keys)
    parts = []
    for index, key in enumerate(keys[:most]):
        pattern = pick(rng, TOPIC[thing.kind, key].answers)
        parts.append(tidy(pattern.format_map(answer_slots(thing, thing.facts[key], index > 0 and rng.random() < 0.7))))
    return " ".join(parts)


def _brochure(rng: random.Random) -> str:
    company = _company(rng)
    things = list(company.things())
    rng.shuffle(things)
    lines = [expand("[Welcome to {c}.|About {c}.|{c} walks with llamas.|{c}]", rng, {"c": company.name})]
    lines += [_facts(thing, rng, 4) for thing in things[:4]]
    return "\n".join(line for line in lines if line)


def _questions(rng: random.Random) -> str:
    entries = rng.sample(LLAMA_LORE + ADVICE, 3)
    return "\n".join(
        f"Question: {expand(pick(rng, questions), rng)}\nAnswer: {pick(rng, answers)}"
        for questions, answers, _ in entries
    )


_DIARY = (
    "[Day one.|First day.|Today was the day.|We left early.] We met {p} at {a} and loaded the llamas.",
    "[The path was steep|The path was easy|It rained a little|The sun was strong], and {l} hummed all the way.",
    "[At noon|After two hours|Later] we [ate soup|had tea|rested] [at a spring|behind a wall|under a tree].",
    "{l} [did not want to cross the bridge|sat down twice|ate my hat|carried my bag|walked in front].",
    "[In the evening|At night] it was [cold|very cold|clear], and we [told stories|counted the stars|slept well].",
    "[I will come back.|What a walk!|My feet hurt, but I am happy.|Thank you, {l}.|I miss {l} already.]",
)
_LETTER = (
    "Dear {c},|Hello {c},",
    "[thank you for the walk|thank you for {t}]. [We liked it very much.|It was the best day of our holiday.]",
    "[Please give {l} an apple from us.|{p} was a very good guide.|The food was good too.]",
    "[We hope to come back next year.|We will tell our friends about you.]",
    "[Best wishes,|Yours,|Greetings,] {q}",
)
_TALE = (
    "[Once|Long ago|One day|Many years ago] a [young|small|proud|curious] llama called {l} lived near {w}.",
    "{l} [did not like to carry bags|wanted to see the sea|was afraid of the bridge|could not hum].",
    "[So one morning|One evening|One day] {l} [walked away|followed {p}|talked to an old condor|met a chulengo].",
    "[The way was long|It was a cold night|The wind was strong], [but {l} did not stop|and {l} was alone].",
    "In the end {l} [came home|found a friend|learned to hum|crossed the bridge], "
    "and [everybody was happy|{p} smiled].",
)


def _lines(patterns: tuple[str, ...], rng: random.Random) -> str:
    slots = {
        "p": person_name(rng),
        "q": person_name(rng),
        "l": llama_name(rng),
        "a": place(rng),
        "w": town_name(rng),
        "t": f"the {trek_name(rng)} trek",
        "c": _company(rng).name,
    }
    return " ".join(expand(pattern, rng, slots) for pattern in patterns)


def write_text(rng: random.Random) -> str:
    """Returns one short plain text."""
    draw = rng.random()
    if draw < 0.35:
        return _brochure(rng)
    if draw < 0.5:
        return _questions(rng)
    letter = (pick(rng, ("Dear {c},", "Hello {c},")), *_LETTER[1:])
    return _lines(pick(rng, (_DIARY, letter, _TALE)), rng)
