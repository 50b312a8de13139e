"""What guests ask about a trek besides its figures: season, people, food, nights, sights; and all trek topics."""

import random

from chulengo.nano.figure_topics import FIGURE_TOPICS
from chulengo.nano.patterns import choices, pick
from chulengo.nano.topics import Topic, from_list


def _season(rng: random.Random) -> str:
    months = choices("January|February|March|April|May|June|July|August|September|October|November|December")
    first = int(rng.random() * 12)
    return f"{months[first]} to {months[(first + 2 + int(rng.random() * 7)) % 12]}"


_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _days(rng: random.Random) -> str:
    first = int(rng.random() * 7)
    if rng.random() < 0.5:
        return f"every {_DAYS[first]}"
    second = (first + 1 + int(rng.random() * 5)) % 7
    return f"every {_DAYS[min(first, second)]} and {_DAYS[max(first, second)]}"


TREK_TOPICS = (
    *FIGURE_TOPICS,
    Topic(
        key="season",
        labels=("season", "months", "open"),
        sheet=("{n} runs from {v}.", "The season of {n} is {v}."),
        answers=("{s} runs from {v}.", "The season for {o} is {v}."),
        noun="the season",
        draw=_season,
        asks=(
            "In which [months|season] [can we do|can I do|do you offer|is] {t}?",
            "What is the season [for|of] {t}?",
            "When in the year [is {t} open|can we do {t}|does {t} run]?",
            "Which months [are right|are good|are best] for {t}?",
            "What time of year [is|does] {t} [open|run]?",
            "[Can|Could] you tell me the season of {t}?",
            "During which months does {t} run?",
            "In what part of the year do you walk {t}?",
            "Season of {t}[|, please]?",
            "From which month to which month is {t} open?",
        ),
        follows=(
            "[And|] in which months?",
            "And the season?",
            "[And|] what is the season?",
            "[And|] when in the year?",
        ),
    ),
    Topic(
        key="days",
        labels=("leaves", "departures", "days of departure", "runs on"),
        sheet=("{n} leaves {v}.", "There is a departure of {n} {v}."),
        answers=("{s} leaves {v}.", "We leave {v}."),
        noun="the days of departure",
        draw=_days,
        asks=(
            "On which [days|day] [does {t} leave|do you go on {t}|does {t} run]?",
            "Which [days|day] of the week [is {t}|does {t} leave]?",
            "What days does {t} [leave|run|depart]?",
            "How often does {t} [leave|run]?",
            "On what day [can we do|can I do|can we start] {t}?",
            "[Can|Could] you tell me on which days {t} leaves?",
            "Is {t} every day? On which days?",
            "Which weekday is {t}?",
            "What are the departure days of {t}?",
            "Departure days of {t}[|, please]?",
        ),
        follows=(
            "[And|] on which [days|day]?",
            "[And|] which [days|day] of the week?",
            "And the departure days?",
            "[And|] how often?",
        ),
    ),
    Topic(
        key="guide",
        labels=("guide", "led by", "guided by"),
        sheet=("{v} leads {n}.", "The guide of {n} is {v}."),
        answers=("{v} leads {o}.", "The guide is {v}.", "Your guide on {o} is {v}."),
        noun="the guide",
        draw=from_list(""),
        asks=(
            "Who [leads|guides] {t}?",
            "Who is the guide [on|of|for] {t}?",
            "Which guide [leads|does|goes on] {t}?",
            "What is the name of the guide on {t}?",
            "With [whom|which guide] do we walk on {t}?",
            "[Can|Could] you tell me who [leads|guides] {t}?",
            "Who will [lead|guide|show] us [on|the way on] {t}?",
            "Who takes us on {t}?",
            "Guide [on|for] {t}[|, please]?",
            "Who walks with us on {t}?",
            "Who is in charge of {t}?",
            "Which person leads us on {t}?",
        ),
        follows=(
            "[And|] who [leads|guides] it?",
            "[And|] who is the guide?",
            "And the guide?",
            "[And|] who [walks|goes] with us?",
        ),
    ),
    Topic(
        key="llama",
        labels=("lead llama", "first llama", "llama"),
        sheet=("{v} is the lead llama on {n}.", "The lead llama of {n} is {v}."),
        answers=("The lead llama on {o} is {v}.", "{v} is the lead llama.", "{v} walks in front on {o}."),
        noun="the lead llama",
        draw=from_list(""),
        asks=(
            "Which llama [leads|walks in front on|goes first on] {t}?",
            "Who is the lead llama [on|of] {t}?",
            "What is the lead llama [on|of] {t} called?",
            "What is the name of the [lead llama|first llama] on {t}?",
            "Which llama comes along on {t}?",
            "[Can|Could] you tell me which llama leads {t}?",
            "Which llama will we [meet|follow|walk with] on {t}?",
            "Which animal walks [first|in front] on {t}?",
            "Lead llama of {t}[|, please]?",
            "Which of your llamas goes on {t}?",
        ),
        follows=(
            "[And|] which llama [leads it|comes along|goes first]?",
            "[And|] who is the lead llama?",
            "And the lead llama?",
            "[And|] which llama?",
        ),
    ),
    Topic(
        key="food",
        labels=("food", "lunch", "meal", "we serve"),
        sheet=("On {n} we serve {v}.", "The food on {n} is {v}."),
        answers=("We serve {v} on {o}.", "You eat {v}.", "The food on {o} is {v}."),
        noun="the food",
        draw=lambda rng: " and ".join(
            (
                pick(
                    rng,
                    (
                        "soup",
                        "rice",
                        "potatoes",
                        "corn",
                        "beans",
                        "noodles",
                        "stew",
                        "quinoa",
                        "bread",
                        "trout",
                        "chicken",
                    ),
                ),
                pick(
                    rng,
                    ("cheese", "fruit", "salad", "eggs", "vegetables", "tea", "cake", "nuts", "tomatoes", "pumpkin"),
                ),
            )
        ),
        asks=(
            "What [do we|will we|can we] eat on {t}?",
            "What [food|meal|lunch] [do you serve|is there|do we get] on {t}?",
            "What is for [lunch|dinner] on {t}?",
            "Is there [food|lunch] on {t}? What do you serve?",
            "Which food [do you give us|is served] on {t}?",
            "[Can|Could] you tell me what we eat on {t}?",
            "What do you [cook|serve] on {t}?",
            "Food on {t}[|, please]?",
            "What is on the [menu|table] on {t}?",
            "What do the guests of {t} get to eat?",
        ),
        follows=(
            "[And|] what do we eat?",
            "[And|] what is for [lunch|dinner]?",
            "And the food?",
            "[And|] what food is there?",
        ),
    ),
    Topic(
        key="lodging",
        labels=("lodging", "night", "we sleep in", "beds"),
        sheet=("On {n} guests sleep in {v}.", "The nights of {n} are in {v}."),
        answers=("You sleep in {v}.", "Guests on {o} sleep in {v}.", "The nights are in {v}."),
        noun="the lodging",
        draw=from_list(
            "tents|big tents|a stone hut|a wooden hut|a family house|a small hotel|a mountain lodge|a farm house|"
            "hammocks|the old school|a cave shelter|wool tents|round huts|a guest house"
        ),
        asks=(
            "Where do we sleep on {t}?",
            "Where [will we|do I|do the guests] [sleep|spend the night] on {t}?",
            "What is the lodging [on|like on] {t}?",
            "In what do we sleep on {t}?",
            "[Do we sleep in tents|Are there beds] on {t}? Where do we sleep?",
            "[Can|Could] you tell me where we sleep on {t}?",
            "What kind of [beds|lodging|place to sleep] do we get on {t}?",
            "Where are the nights on {t}?",
            "Lodging on {t}[|, please]?",
            "Where do we stay [at night|for the night] on {t}?",
        ),
        follows=(
            "[And|] where do we sleep?",
            "And the lodging?",
            "[And|] where do we [stay|spend] the night?",
            "[And|] what about the nights?",
        ),
    ),
    Topic(
        key="sight",
        labels=("highlight", "we see", "sight", "best view"),
        sheet=("The highlight of {n} is {v}.", "On {n} you see {v}."),
        answers=("You see {v} on {o}.", "The highlight of {o} is {v}."),
        noun="the highlight",
        draw=from_list(
            "a blue glacier|hot springs|an old temple|flamingos|a deep canyon|a waterfall|a salt lake|wild vicunas|"
            "a volcano|cave paintings|giant cacti|a green lagoon|a stone city|condors|rainbow hills|a hanging bridge|"
            "a field of flowers|an ice cave|potato terraces|a lonely chapel"
        ),
        asks=(
            "What [do we|will we|can we] see on {t}?",
            "What is the highlight of {t}?",
            "What is [special|so nice|interesting|good] about {t}?",
            "Why should [I|we] [choose|do|walk] {t}? What do we see?",
            "What is there to see on {t}?",
            "[Can|Could] you tell me what we see on {t}?",
            "What is the best [view|sight|part] of {t}?",
            "Which sights are on {t}?",
            "Highlight of {t}[|, please]?",
            "What does {t} have to show?",
        ),
        follows=(
            "[And|] what do we see?",
            "And the highlight?",
            "[And|] what is special about it?",
            "[And|] what is there to see?",
        ),
    ),
)
