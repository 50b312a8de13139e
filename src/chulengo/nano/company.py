"""Draws trekking companies: treks, llamas, guides and rules, each with its facts."""

import random
from dataclasses import dataclass
from functools import lru_cache

from chulengo.nano.company_topics import COMPANY_TOPICS
from chulengo.nano.names import CURRENCIES, company_name, distinct, llama_name, person_name, trek_name
from chulengo.nano.patterns import pick
from chulengo.nano.team_topics import GUIDE_TOPICS, LLAMA_TOPICS
from chulengo.nano.topics import Topic
from chulengo.nano.trek_topics import TREK_TOPICS

TOPICS: dict[str, tuple[Topic, ...]] = {
    "trek": TREK_TOPICS,
    "llama": LLAMA_TOPICS,
    "guide": GUIDE_TOPICS,
    "company": COMPANY_TOPICS,
}
TOPIC: dict[tuple[str, str], Topic] = {(kind, topic.key): topic for kind, some in TOPICS.items() for topic in some}
HOME_NAME = "Tambo Trails"
HOME_SPEAKER = "Nano"


@dataclass(frozen=True)
class Thing:
    """A trek, llama, guide or the company itself, with those of its facts that the help desk knows."""

    kind: str
    name: str
    facts: dict[str, str]


@dataclass(frozen=True)
class Company:
    """A company and everything that its help desk knows."""

    name: str
    treks: tuple[Thing, ...]
    llamas: tuple[Thing, ...]
    guides: tuple[Thing, ...]
    rules: Thing
    is_home: bool = False

    def things(self) -> tuple[Thing, ...]:
        """Returns the treks, llamas and guides, and the company's rules when it has any."""
        rules = (self.rules,) if self.rules.facts else ()
        return self.treks + self.llamas + self.guides + rules


def _facts(kind: str, topics: tuple[Topic, ...], rng: random.Random, currency: str) -> dict[str, str]:
    facts = {}
    for topic in topics:
        value = topic.draw(rng)
        if topic.key == "price":
            value = f"{value} {currency}"
        elif topic.key == "guide" and kind == "trek":
            value = person_name(rng)
        elif topic.key == "llama" and kind == "trek":
            value = llama_name(rng)
        facts[topic.key] = value
    return facts


def _some(topics: tuple[Topic, ...], low: int, high: int, rng: random.Random) -> tuple[Topic, ...]:
    count = min(len(topics), low + int(rng.random() * (high - low + 1)))
    return tuple(rng.sample(topics, count))


def draw_company(rng: random.Random) -> Company:
    """Returns a company small enough for a system prompt: about 8 to 25 facts."""
    currency = pick(rng, CURRENCIES)
    num_treks = rng.choices((0, 1, 2, 3, 4, 5), (5, 25, 32, 22, 12, 4))[0]
    most = {0: 0, 1: 10, 2: 7, 3: 5, 4: 4, 5: 3}[num_treks]
    shared = _some(TREK_TOPICS, 2, max(2, most), rng) if rng.random() < 0.7 else None
    treks = tuple(
        Thing("trek", name, _facts("trek", shared or _some(TREK_TOPICS, 2, max(2, most), rng), rng, currency))
        for name in distinct(trek_name, rng, num_treks)
    )
    num_llamas = rng.choices((0, 1, 2, 3), (70, 12, 12, 6))[0] if num_treks else 2
    llamas = tuple(
        Thing("llama", name, _facts("llama", _some(LLAMA_TOPICS, 1, 4, rng), rng, currency))
        for name in distinct(llama_name, rng, num_llamas)
    )
    num_guides = rng.choices((0, 1, 2), (80, 12, 8))[0]
    guides = tuple(
        Thing("guide", name, _facts("guide", _some(GUIDE_TOPICS, 1, 3, rng), rng, currency))
        for name in distinct(person_name, rng, num_guides)
    )
    rules: dict[str, str] = {}
    if rng.random() < 0.5 or not num_treks:
        rules = _facts("company", _some(COMPANY_TOPICS, 1, 6, rng), rng, currency)
    name = company_name(rng)
    return Company(name, treks, llamas, guides, Thing("company", name, rules))


@lru_cache(maxsize=1)
def home_company() -> Company:
    """Returns the company that the base model knows by heart: eight treks, ten llamas, six guides, all rules."""
    rng = random.Random("tambo")
    trek_names: tuple[str, ...] = (
        "Fox Valley",
        "Copper Falls",
        "Pilgrim Pass",
        "Quinoa Loop",
        "Hidden Lake",
        "Puma Canyon",
    )
    trek_names = (*trek_names, "Old Bridge", "Star Plateau")
    llama_names = ("Tika", "Pancho", "Biscuit", "Estrella", "Wayra", "Bruno", "Cotton", "Amaru", "Daisy", "Rocky")
    guide_names = ("Rosa", "Mateo", "Killari", "Samuel", "Teresa", "Rumi")
    treks = []
    for index, name in enumerate(trek_names):
        facts = _facts("trek", TREK_TOPICS, rng, "soles")
        facts["guide"] = guide_names[index % len(guide_names)]
        facts["llama"] = llama_names[index]
        treks.append(Thing("trek", name, facts))
    llamas = tuple(Thing("llama", name, _facts("llama", LLAMA_TOPICS, rng, "soles")) for name in llama_names)
    guides = tuple(Thing("guide", name, _facts("guide", GUIDE_TOPICS, rng, "soles")) for name in guide_names)
    rules = Thing("company", HOME_NAME, _facts("company", COMPANY_TOPICS, rng, "soles"))
    return Company(HOME_NAME, tuple(treks), llamas, guides, rules, is_home=True)
