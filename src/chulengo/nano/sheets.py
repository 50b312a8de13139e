"""Writes the facts of a company as the fact sheet of a system prompt, in many layouts."""

import random

from chulengo.nano.company import TOPIC, Company, Thing
from chulengo.nano.patterns import pick


def _label(thing: Thing, key: str, rng: random.Random, steady: bool) -> str:
    labels = TOPIC[thing.kind, key].labels
    return labels[0] if steady else pick(rng, labels)


def _pairs(thing: Thing, rng: random.Random, steady: bool) -> list[tuple[str, str]]:
    return [(_label(thing, key, rng, steady), value) for key, value in thing.facts.items()]


def _title(thing: Thing) -> str:
    return {"llama": f"{thing.name} (llama)", "guide": f"{thing.name} (guide)", "company": "Company"}.get(
        thing.kind, thing.name
    )


def _inline(thing: Thing, rng: random.Random, steady: bool) -> str:
    return f"{_title(thing)}: " + ", ".join(f"{label} {value}" for label, value in _pairs(thing, rng, steady)) + "."


def _bullets(thing: Thing, rng: random.Random, steady: bool) -> str:
    lines = "\n".join(f"- {label}: {value}" for label, value in _pairs(thing, rng, steady))
    return f"{_title(thing)}\n{lines}"


def _pipes(thing: Thing, rng: random.Random, steady: bool) -> str:
    return f"{_title(thing)} | " + " | ".join(f"{label}: {value}" for label, value in _pairs(thing, rng, steady))


def _semicolons(thing: Thing, rng: random.Random, steady: bool) -> str:
    return f"- {_title(thing)}: " + "; ".join(f"{label} = {value}" for label, value in _pairs(thing, rng, steady))


def _prose(thing: Thing, rng: random.Random, steady: bool) -> str:
    sentences = []
    for index, (key, value) in enumerate(thing.facts.items()):
        name = "it" if index and thing.kind == "trek" and rng.random() < 0.3 else thing.name
        if thing.kind == "llama" and index == 0:
            name = f"The llama {thing.name}"
        sentence = pick(rng, TOPIC[thing.kind, key].sheet).format(n=name, v=value)
        sentences.append(sentence[:1].upper() + sentence[1:])
    return " ".join(sentences)


_LAYOUTS = ((_inline, " "), (_bullets, "\n"), (_pipes, "\n"), (_semicolons, "\n"), (_prose, " "), (_prose, "\n"))
_HEADINGS = ("", "", "Facts:", "Our facts:", "What you know:", "Use these facts:", "Fact sheet:", "Information:")


def write_sheet(company: Company, rng: random.Random) -> str:
    """Returns the facts of `company` as text; the order of the things is random."""
    layout, separator = pick(rng, _LAYOUTS)
    things = list(company.things())
    rng.shuffle(things)
    steady = rng.random() < 0.5
    body = separator.join(layout(thing, rng, steady) for thing in things)
    heading = pick(rng, _HEADINGS)
    return f"{heading}\n{body}" if heading else body
