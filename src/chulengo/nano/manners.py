"""Manners: instructions in the system prompt that change how every answer is written."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from chulengo.nano.general import ADVICE, LLAMA_LORE, SMALL_TALK
from chulengo.nano.patterns import choices, expand, pick


@dataclass(frozen=True)
class Reply:
    """What the help desk has to say, before any manner is applied.

    Attributes:
        full: The usual answer, whole sentences.
        short: The same in as few words as possible.
        key: The topic, the key of a JSON answer.
        subject: What a reduced help desk sorts questions by: ``trek``, ``llama``, ``guide``, ``company``, ``talk``.
    """

    full: str
    short: str
    key: str
    subject: str


@dataclass(frozen=True)
class Manner:
    """One drawn instruction and the change that it makes to a reply."""

    instruction: str
    write: Callable[[Reply, str], str]


_OPENINGS = choices(
    "Hello friend!|Good day!|Sure!|Of course!|Llama news:|Answer:|Ahoy!|Yes, dear guest!|"
    "Happy to help!|With pleasure!|Humm!|Listen:|Here you go:|Well met!|Note:|Dear traveller,|"
    "Desk:|Hola!|From the office:|Let me see."
)
_CLOSINGS = choices(
    "Safe travels!|Have a nice day!|See you on the path!|Greetings from the herd!|Anything else?|"
    "Walk well!|The llamas say hello.|Over and out.|Ask me more!|Drink enough water!|Bring a hat!|"
    "Your help desk|Hum hum!|Stay warm!|Peace and wool!|Thank you for asking.|Hasta luego!|"
    "May the sun shine!|End of message.|Bless the herd!"
)
_CALLS = choices("friend|captain|dear guest|my dear|boss|traveller|sir|madam|neighbour|champion")
_WORDS = choices("sun|moon|path|hill|llama|wool|bell|star|stone|river|cloud|day|hat|song|smile|wind|road|boot|herd")


def _phrase(fixed: tuple[str, ...], rng: random.Random) -> str:
    if rng.random() < 0.55:
        return pick(rng, fixed)
    words = " ".join(pick(rng, _WORDS) for _ in range(1 + int(rng.random() * 3)))
    return words.capitalize() + pick(rng, ("!", ".", "!"))


def _brief(rng: random.Random) -> Manner:
    patterns = (
        "[Answer|Reply] [in as few words as possible|very briefly|with one or two words|only with the fact].",
        "Keep [every answer|your answers] [very short|as short as possible].",
        "Give [very short|the shortest] answers.",
        "Be brief. No full sentences.",
        "Use as few words as you can.",
    )
    return Manner(expand(pick(rng, patterns), rng), lambda reply, text: reply.short)


def _opening(rng: random.Random) -> Manner:
    phrase = _phrase(_OPENINGS, rng)
    patterns = (
        '[Start|Begin] [every|each] [answer|reply] with "{p}"',
        'Always [start|begin] with "{p}"',
        "[Start|Begin] [every|each] answer with the words: {p}",
        'Your answers [start|begin] with "{p}"',
        'The first words of your answer are "{p}"',
    )
    return Manner(expand(pick(rng, patterns), rng, {"p": phrase}), lambda reply, text: f"{phrase} {text}")


def _closing(rng: random.Random) -> Manner:
    phrase = _phrase(_CLOSINGS, rng)
    patterns = (
        '[End|Finish|Close] [every|each] [answer|reply] with "{p}"',
        'Always [end|finish] with "{p}"',
        "[End|Finish] [every|each] answer with the words: {p}",
        'Your answers end with "{p}"',
        'The last words of your answer are "{p}"',
    )
    return Manner(expand(pick(rng, patterns), rng, {"p": phrase}), lambda reply, text: f"{text} {phrase}")


def _call(rng: random.Random) -> Manner:
    title = pick(rng, _CALLS)
    patterns = (
        "[Call|Address] the guest [as |]{p}.",
        'Call [the guest|everybody|them] "{p}".',
        'Always call the guest "{p}".',
        'Say "{p}" to the guest.',
    )

    def write(reply: Reply, text: str) -> str:
        head, mark = (text[:-1], text[-1]) if text[-1] in ".!?" else (text, ".")
        return f"{head}, {title}{mark}"

    return Manner(expand(pick(rng, patterns), rng, {"p": title}), write)


_LOWERED = frozenset(
    text.split(" ", 1)[0]
    for entry in LLAMA_LORE + ADVICE + SMALL_TALK
    for text in entry[1]
    if not text.startswith(("I ", "{"))
) | frozenset(choices("The|It|You|We|Our|Your|Guests|Dogs|If|In|Insurance|Children|Which|Gladly|On|So"))


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:] if text.split(" ", 1)[0] in _LOWERED else text


def _formal(rng: random.Random) -> Manner:
    patterns = (
        "[Answer|Reply|Speak] [formally|in a formal way|very politely].",
        "Be [very polite|formal].",
        "Use a formal [tone|style].",
        "You are [very polite|formal and polite].",
        "Your tone is formal.",
    )
    return Manner(
        expand(pick(rng, patterns), rng), lambda reply, text: f"Dear guest, {_lower_first(text)} Yours faithfully."
    )


def _cheerful(rng: random.Random) -> Manner:
    patterns = (
        "[Be|You are] [cheerful|very cheerful|happy and loud|full of joy].",
        "[Answer|Speak] [cheerfully|with joy|with a big smile].",
        "Your tone is [cheerful|happy].",
        "You are always in a good mood.",
    )
    return Manner(expand(pick(rng, patterns), rng), lambda reply, text: f"Hooray! {text.replace('.', '!')}")


def _grumpy(rng: random.Random) -> Manner:
    patterns = (
        "[Be|You are] [grumpy|in a bad mood|a grumpy old man|tired of questions].",
        "[Answer|Speak] [grumpily|like a grumpy old llama].",
        "Your tone is grumpy.",
        "You had a bad day and let people feel it.",
    )
    return Manner(expand(pick(rng, patterns), rng), lambda reply, text: f"Hmph. {text} Now let me sleep.")


def _as_json(rng: random.Random) -> Manner:
    patterns = (
        "[Answer|Reply] [in JSON|as JSON|with JSON|with a JSON object].",
        "[Write|Give] every answer as [JSON|a JSON object].",
        "Your output is [JSON|always JSON].",
        "Only [write|return] JSON.",
    )
    return Manner(
        expand(pick(rng, patterns), rng), lambda reply, text: json.dumps({reply.key: reply.short.rstrip(".!")})
    )


def _as_list(rng: random.Random) -> Manner:
    patterns = (
        "[Answer|Reply] [with a list|in bullet points|with bullet points|as a list].",
        "Write every answer as [a list|bullet points].",
        "Use bullet points.",
    )
    return Manner(
        expand(pick(rng, patterns), rng),
        lambda reply, text: f"- {reply.key.replace('_', ' ')}: {reply.short.rstrip('.!')}",
    )


def _question(rng: random.Random) -> Manner:
    patterns = (
        "[End|Finish] with a question[| to the guest].",
        "[Ask|Always ask] a question back.",
        "After the answer, ask the guest a question.",
    )
    return Manner(expand(pick(rng, patterns), rng), lambda reply, text: f"{text} What else would you like to know?")


def _reduced(rng: random.Random) -> Manner:
    subject, words = pick(
        rng, (("trek", "treks"), ("llama", "llamas"), ("company", "the company"), ("guide", "the guides"))
    )
    patterns = (
        "[Only answer|Answer only] questions about {w}.",
        "Refuse [all|any] questions that are not about {w}.",
        "You [only talk|talk only] about {w}.",
        "If a question is not about {w}, refuse.",
    )
    return Manner(
        expand(pick(rng, patterns), rng, {"w": words}),
        lambda reply, text: text if reply.subject in (subject, "talk") else f"Sorry, I can only talk about {words}.",
    )


def _refuse_topic(rng: random.Random) -> Manner:
    key, words = pick(
        rng,
        (
            ("price", "prices"),
            ("guide", "guides"),
            ("altitude", "altitudes"),
            ("food", "food"),
            ("phone", "our phone number"),
            ("start", "start times"),
            ("meeting", "meeting points"),
            ("duration", "durations"),
        ),
    )
    patterns = (
        "[Never|Do not] [talk about|tell anybody about|give away] {w}.",
        "[Refuse|Do not answer] questions about {w}.",
        "Keep {w} secret.",
    )
    return Manner(
        expand(pick(rng, patterns), rng, {"w": words}),
        lambda reply, text: f"Sorry, I may not talk about {words}." if reply.key == key else text,
    )


SHAPES = (_brief, _as_json, _as_list)
TONES = (_formal, _cheerful, _grumpy, _call)
FRAMES = (_opening, _closing, _opening, _closing, _question)
LIMITS = (_reduced, _refuse_topic)


def draw_manners(rng: random.Random) -> list[Manner]:
    """Returns one or two manners that go together, in the order in which they change a reply."""
    draw = rng.random()
    if draw < 0.26:
        return [pick(rng, SHAPES)(rng)]
    if draw < 0.46:
        return [pick(rng, TONES)(rng)]
    if draw < 0.68:
        return [pick(rng, FRAMES)(rng)]
    if draw < 0.80:
        return [pick(rng, LIMITS)(rng)]
    if draw < 0.87:
        return [_opening(rng), _closing(rng)]
    if draw < 0.94:
        return [_brief(rng), pick(rng, FRAMES[:4])(rng)]
    return [pick(rng, TONES[1:])(rng), _closing(rng)]


def apply(manners: list[Manner], reply: Reply) -> str:
    """Returns the text of `reply` after all `manners`."""
    text = reply.full
    for manner in manners:
        text = manner.write(reply, text)
    return text
