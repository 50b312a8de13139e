"""Draws the names of the little world: companies, treks, llamas, guides, places and values.

Most names are combinations of ordinary words; one in five is made of random syllables, so that the model
learns to copy a name that it has never seen.
"""

import random
from collections.abc import Callable
from typing import TypeAlias

from chulengo.nano.patterns import choices, pick

Draw: TypeAlias = Callable[[random.Random], str]

TREK_FIRST = choices(
    "Condor|Eagle|Puma|Fox|Hawk|Owl|Heron|Viper|Swallow|Hummingbird|Moon|Sun|Star|Cloud|"
    "Storm|Thunder|Rainbow|Mist|Frost|Snow|Ice|Wind|Salt|Copper|Silver|Gold|Iron|Stone|"
    "Clay|Sand|Amber|Crystal|Red|Blue|Green|White|Black|Grey|Golden|Hidden|Silent|Lost|Old|"
    "Long|High|Broken|Twin|Lonely|Cactus|Orchid|Fern|Moss|Quinoa|Potato|Maize|Pepper|"
    "Shepherd|Weaver|Potter|Miner|Hermit|Pilgrim|Queen|King|Elder|Flute|Drum|Lantern|Feather"
)
TREK_SECOND = choices(
    "Ridge|Valley|Pass|Lake|Falls|Canyon|Peak|Summit|Meadow|Forest|River|Bridge|Gate|Trail|"
    "Path|Loop|Circle|Crossing|Terrace|Ruins|Temple|Cave|Spring|Glacier|Lagoon|Plain|Plateau|"
    "Hill|Steps|Corner|Garden|Mirror|Tower|Wall|Well|Hollow|Bend|Shore|Island|Camp"
)
COMPANY_FIRST = choices(
    "Andes|Altiplano|Inti|Killa|Pacha|Quinoa|Alpaca|Vicuna|Condor|Puna|Sierra|Highland|"
    "Mountain|Summit|Valley|Cloud|Sunrise|Sunset|Evening|Morning|Happy|Gentle|Slow|Brave|"
    "Friendly|Woolly|Wandering|Singing|Blue|Green|Red|Silver|Golden|Three|Seven|Twin|Little|"
    "Big|Old|New|Northern|Southern"
)
COMPANY_SECOND = choices(
    "Llama|Llamas|Hoof|Hooves|Path|Trail|Stone|Poncho|Saddle|Wool|Feather|River|Star|Lake|"
    "Peak|Horizon|Compass|Caravan|Herd|Footprint|Bell|Lantern"
)
COMPANY_LAST = ("Treks", "Trekking", "Trails", "Tours", "Walks", "Adventures", "Travel", "Journeys")
LLAMA_NAMES = choices(
    "Tika|Pancho|Coco|Mancha|Lola|Choco|Bruno|Paloma|Estrella|Canela|Lucero|Nina|Pepe|Rayo|"
    "Sol|Luna|Trueno|Perla|Miel|Tito|Chispa|Nieve|Oso|Bella|Max|Rocky|Daisy|Biscuit|Pepper|"
    "Cotton|Caramel|Domino|Pippin|Muffin|Ginger|Toffee|Velvet|Clover|Hazel|Juniper|Maple|"
    "Willow|Olive|Rufus|Otto|Felix|Hugo|Oscar|Zorro|Apu|Sumaq|Wayra|Illa|Urpi|Kusi|Amaru|"
    "Sonqo|Munay|Phuyu|Chaska"
)
PEOPLE = choices(
    "Rosa|Pablo|Maria|Juan|Elena|Carlos|Ana|Luis|Carmen|Jorge|Lucia|Miguel|Sofia|Diego|"
    "Isabel|Pedro|Marta|Andres|Julia|Tomas|Ines|Rafael|Clara|Mateo|Alba|Hector|Irene|Samuel|"
    "Teresa|Victor|Valeria|Ramon|Silvia|Oscar|Paula|Emilio|Gloria|Raul|Beatriz|Ernesto|Anna|"
    "David|Emma|Peter|Laura|Simon|Nora|Martin|Helen|Thomas|Kate|Leo|Mia|Ben|Amaya|Nayra|"
    "Inti|Sayri|Killari|Rumi"
)
TOWNS = choices(
    "Alta|Brava|Cerro|Dorado|Estero|Fuentes|Grande|Huerta|Isla|Jardines|Lomas|Molino|Nogal|"
    "Olmos|Piedra|Quebrada|Rioja|Salinas|Tambillo|Umbral|Verde|Yunga|Zapata|Marquez|Pampas|"
    "Ollanta|Urubas|Colqui|Antara|Sarita"
)
SPOTS = choices(
    "old mill|church square|bus station|train station|market hall|stone bridge|north gate|"
    "south gate|post office|village fountain|town hall|museum door|river bank|campsite gate|"
    "school yard|car park|lake pier|red barn|blue house|bakery|water tower|football field|"
    "corral gate|big cactus|signpost|flag pole|craft market|petrol station|hotel lobby|"
    "visitor centre"
)
CURRENCIES = ("soles", "dollars", "euros", "pesos", "bolivianos")
RESERVED_WORDS = ("Nube", "Ccori", "Ref:")
"""Words of the demo persona, company and answer format. The generator never writes them."""
RESERVED_TREKS = frozenset(
    {"Salt Mirror", "Weaver Steps", "Thunder Gate", "Amber Lagoon", "Lantern Cave", "Flute Terrace"}
)
"""Trek names that belong to the demo company. The generator never draws them."""

_ONSETS = choices("b|c|ch|d|f|g|h|j|k|l|ll|m|n|p|qu|r|s|t|v|w|y|z")
_VOWELS = ("a", "e", "i", "o", "u", "a", "o")
_CODAS = ("", "", "", "", "n", "s", "r", "l")


def invented(rng: random.Random) -> str:
    """Returns a made-up name of two or three syllables."""
    num_syllables = 2 if rng.random() < 0.6 else 3
    text = "".join(pick(rng, _ONSETS) + pick(rng, _VOWELS) + pick(rng, _CODAS) for _ in range(num_syllables))
    text = text.capitalize()
    return invented(rng) if any(text.startswith(word) for word in RESERVED_WORDS) else text


def trek_name(rng: random.Random) -> str:
    """Returns a trek name that is not reserved for the demo."""
    first = invented(rng) if rng.random() < 0.2 else pick(rng, TREK_FIRST)
    name = f"{first} {pick(rng, TREK_SECOND)}"
    return trek_name(rng) if name in RESERVED_TREKS else name


def company_name(rng: random.Random) -> str:
    """Returns a company name."""
    first = invented(rng) if rng.random() < 0.2 else pick(rng, COMPANY_FIRST)
    middle = f" {pick(rng, COMPANY_SECOND)}" if rng.random() < 0.6 else ""
    return f"{first}{middle} {pick(rng, COMPANY_LAST)}"


def llama_name(rng: random.Random) -> str:
    """Returns the name of a llama."""
    return invented(rng) if rng.random() < 0.2 else pick(rng, LLAMA_NAMES)


def person_name(rng: random.Random) -> str:
    """Returns a first name."""
    return invented(rng) if rng.random() < 0.1 else pick(rng, PEOPLE)


def town_name(rng: random.Random) -> str:
    """Returns the name of a town."""
    return invented(rng) if rng.random() < 0.2 else pick(rng, TOWNS)


def place(rng: random.Random) -> str:
    """Returns a place to meet, with its article."""
    spot = f"the {pick(rng, SPOTS)}"
    return f"{spot} in {town_name(rng)}" if rng.random() < 0.3 else spot


def distinct(draw: Draw, rng: random.Random, count: int) -> list[str]:
    """Returns `count` different names from `draw`."""
    names: list[str] = []
    while len(names) < count:
        name = draw(rng)
        if name not in names:
            names.append(name)
    return names
