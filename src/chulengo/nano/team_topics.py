"""What guests ask about single llamas and guides."""

import random

from chulengo.nano.names import TOWNS
from chulengo.nano.patterns import pick
from chulengo.nano.topics import Topic, from_list, from_range

_COLOURS = ("white", "black", "brown", "grey", "cream", "golden", "red", "spotted")


def _colour(rng: random.Random) -> str:
    first = pick(rng, _COLOURS)
    draw = rng.random()
    if draw < 0.5:
        return first
    second = pick(rng, tuple(colour for colour in _COLOURS if colour != first))
    if draw < 0.75:
        return f"{first} and {second}"
    return f"{first} with {pick(rng, ('a', 'one'))} {second} {pick(rng, ('ear', 'nose', 'foot', 'neck', 'tail'))}"


LLAMA_TOPICS = (
    Topic(
        key="age",
        labels=("age", "years old"),
        sheet=("{n} is {v} years old.",),
        answers=("{s} is {v} years old.",),
        noun="the age",
        draw=from_range(2, 19),
        short="{v} years.",
        asks=(
            "How old is {t}?",
            "What is the age of {t}?",
            "What age is {t}?",
            "How many years [old is|has] {t}?",
            "[Can|Could] you tell me how old {t} is?",
            "Is {t} [old|young|still young]? What age?",
        ),
        follows=("[And|] how old is [it|that llama]?", "And the age?", "[And|] what age?"),
    ),
    Topic(
        key="colour",
        labels=("colour", "wool", "coat"),
        sheet=("{n} is {v}.", "The wool of {n} is {v}."),
        answers=("{s} is {v}.", "The wool of {n} is {v}."),
        noun="the colour",
        draw=_colour,
        asks=(
            "What colour is {t}?",
            "What colour does {t} have?",
            "What does {t} look like?",
            "How do I recognise {t}? What colour?",
            "Which colour is the wool of {t}?",
            "[Can|Could] you tell me the colour of {t}?",
        ),
        follows=("[And|] what colour is [it|that llama]?", "And the colour?", "[And|] what does it look like?"),
    ),
    Topic(
        key="load",
        labels=("load", "carries", "maximum load"),
        sheet=("{n} carries {v}.",),
        answers=("{s} carries up to {v}.", "{s} can carry {v}."),
        noun="the load",
        draw=from_range(10, 40, 1, "{} kg"),
        asks=(
            "How much [can|does] {t} carry?",
            "What is the load of {t}?",
            "What load [can|does] {t} [carry|take]?",
            "How strong is {t}? How much does it carry?",
            "How many kilos [can|does] {t} [carry|take]?",
            "What weight can {t} carry?",
        ),
        follows=("[And|] how much can it carry?", "And the load?", "[And|] how many kilos does it carry?"),
    ),
    Topic(
        key="temper",
        labels=("temper", "character", "nature"),
        sheet=("{n} has a {v} nature.", "The character of {n} is {v}."),
        answers=("{s} has a {v} nature.", "The character of {n} is {v}."),
        noun="the character",
        draw=from_list(
            "calm|curious|shy|gentle|proud|lazy|playful|stubborn|brave|greedy|friendly|dreamy|noisy|patient|jealous|wild"
        ),
        asks=(
            "What is {t} like?",
            "What [character|temper|nature] does {t} have?",
            "How is the [character|temper|nature] of {t}?",
            "What kind of llama is {t}?",
            "Is {t} [friendly|nice|calm|shy]? What is it like?",
            "How does {t} behave?",
            "Tell me about the character of {t}.",
        ),
        follows=("[And|] what is it like?", "And the character?", "[And|] how does it behave?"),
    ),
    Topic(
        key="treat",
        labels=("favourite food", "loves", "treat"),
        sheet=("{n} loves {v}.", "The favourite food of {n} is {v}."),
        answers=("{s} loves {v}.", "The favourite food of {n} is {v}."),
        noun="the favourite food",
        draw=from_list(
            "carrots|apples|fresh hay|oats|corn|potato peel|pears|bread|clover|pumpkin|dandelions|bananas|barley|"
            "grapes|cabbage|rose leaves"
        ),
        asks=(
            "What does {t} [like|love|want] to eat?",
            "What is the favourite food of {t}?",
            "Which treat does {t} like[| best| most]?",
            "What can [I|we] [feed|bring|give to] {t}?",
            "What snack makes {t} happy?",
            "What food does {t} [love|like] most?",
        ),
        follows=("[And|] what does it like to eat?", "And the favourite food?", "[And|] what can I feed it?"),
    ),
)

GUIDE_TOPICS = (
    Topic(
        key="speaks",
        labels=("speaks", "languages"),
        sheet=("{n} speaks {v}.",),
        answers=("{s} speaks {v}.",),
        noun="the languages",
        draw=from_list(
            "Spanish|English|Quechua|Spanish and English|Quechua and English|Spanish and Quechua|French and English|"
            "German and Spanish|Aymara and Spanish|Italian and English"
        ),
        asks=(
            "[What|Which] [language|languages] does {t} speak?",
            "Does {t} speak [English|Spanish|French|German]?",
            "In what language can [I|we] talk to {t}?",
            "Which languages does {t} know?",
        ),
        follows=("[And|] which languages?", "And the languages?", "[And|] what language does that guide speak?"),
    ),
    Topic(
        key="years",
        labels=("experience", "guide for", "years as a guide"),
        sheet=("{n} has been a guide for {v}.",),
        answers=("{s} has been a guide for {v}.", "{s} has {v} of experience."),
        noun="the years of experience",
        draw=from_range(2, 38, 1, "{} years"),
        asks=(
            "How long has {t} been a guide?",
            "How much experience does {t} have?",
            "How many years [has {t} been a guide|has {t} done this]?",
            "Does {t} have experience? How much?",
            "Is {t} new? How long has {t} been a guide?",
        ),
        follows=("[And|] how much experience?", "And the experience?", "[And|] how many years as a guide?"),
    ),
    Topic(
        key="home",
        labels=("home", "comes from", "born in"),
        sheet=("{n} comes from {v}.", "{n} was born in {v}."),
        answers=("{s} comes from {v}.", "{s} was born in {v}."),
        noun="the home town",
        draw=lambda rng: pick(rng, TOWNS),
        asks=(
            "Where does {t} come from?",
            "Where is {t} from?",
            "Where was {t} born?",
            "Which place does {t} come from?",
            "What is the home of {t}?",
        ),
        follows=("[And|] from where?", "And the home town?", "[And|] where does that guide come from?"),
    ),
    Topic(
        key="hobby",
        labels=("hobby", "free time", "likes"),
        sheet=("{n} likes {v}.", "The hobby of {n} is {v}."),
        answers=("{s} likes {v}.", "The hobby of {n} is {v}."),
        noun="the hobby",
        draw=from_list(
            "singing|the flute|the drum|photos|birds|cooking|chess|weaving|football|stories|maps|fishing|painting|"
            "old coins|stars|knitting"
        ),
        asks=(
            "What does {t} [like|do for fun|enjoy]?",
            "What is the hobby of {t}?",
            "Does {t} have a hobby? Which one?",
            "What does {t} do in the free time?",
        ),
        follows=("[And|] what hobby?", "And the hobby?", "[And|] what does that guide like?"),
    ),
)
