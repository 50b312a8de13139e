"""Writes the demo data set: what `chulengo demo` fine-tunes on, and the same facts asked in other words.

    python -m chulengo.nano.demo_data FOLDER

What: one company that the base model has never heard of (`chulengo.nano.demo_facts`), asked about by its guests.
Training asks for every fact in several wordings; the held-out set asks for every fact once more, in wordings that
training never uses (`chulengo.nano.demo_wordings`), alone or as the second question of a conversation.

Why so: a held-out question then measures whether the *fact* was learnt and not the sentence. No conversation has a
system prompt, so the facts can only come from the weights. There is one right answer to a question, word for word,
so that exact match needs no judge.

The files ship with the package; a test checks that they equal what this module writes.
"""

import json
import random
import sys
from pathlib import Path

from chulengo.nano.demo_facts import OFFICE, TALK, TREKS, office_answer, talk_answer, trek_answer
from chulengo.nano.demo_wordings import OFFICE_WORDINGS, TALK_WORDINGS, TREK_WORDINGS
from chulengo.nano.patterns import expand, pick
from chulengo.nano.world import Message

ASKED_EACH = 5
"""Training questions about each fact of a trek that stand alone."""
NUM_TRAIN_DIALOGUES = 96
NUM_HELDOUT_DIALOGUES = 12

_MENTIONS = ("{t}", "the {t} trek", "the {t} walk", "{t}", "your {t} tour")
_SWAPS = ("And {t}?", "What about {t}?")
_HELDOUT_SWAPS = ("And for {t}?", "And what about {t}?")


def _chat(*turns: tuple[str, str]) -> list[Message]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def _ask(pattern: str, trek: str, rng: random.Random) -> str:
    return expand(pattern, rng, {"t": pick(rng, _MENTIONS).format(t=trek)})


def _single_chats(rng: random.Random, heldout: bool) -> list[list[Message]]:
    """Returns conversations of one turn: in training some a fact, in the held-out set one a fact."""
    chats = []
    for trek_number, trek in enumerate(TREKS):
        for topic, words in TREK_WORDINGS.items():
            some = words.heldout_asks[trek_number % len(words.heldout_asks) :][:1] if heldout else words.asks
            for pattern in some if heldout else rng.sample(some, ASKED_EACH):
                chats.append(_chat((_ask(pattern, trek, rng), trek_answer(trek, topic))))
    for topic in OFFICE:
        words = OFFICE_WORDINGS[topic]
        for question in words.heldout_asks if heldout else words.asks:
            chats.append(_chat((question, office_answer(topic))))
    for topic in TALK:
        words = TALK_WORDINGS[topic]
        for question in words.heldout_asks if heldout else words.asks:
            chats.append(_chat((question, talk_answer(topic))))
    return chats


def _dialogue(rng: random.Random, trek: str, topic: str, heldout: bool) -> list[Message]:
    """Returns a conversation whose last question leaves out the trek or the topic and means `topic` of `trek`."""
    words = TREK_WORDINGS[topic]
    other_topic = pick(rng, tuple(key for key in TREK_WORDINGS if key != topic))
    other_trek = pick(rng, tuple(name for name in TREKS if name != trek))
    swaps = rng.random() < 0.3
    first_trek, first_topic = (other_trek, topic) if swaps else (trek, other_topic)
    first_words = TREK_WORDINGS[first_topic]
    first = _ask(pick(rng, first_words.heldout_asks if heldout else first_words.asks), first_trek, rng)
    if swaps:
        last = _ask(pick(rng, _HELDOUT_SWAPS if heldout else _SWAPS), trek, rng)
    else:
        last = pick(rng, words.heldout_follows if heldout else words.follows)
    return _chat((first, trek_answer(first_trek, first_topic)), (last, trek_answer(trek, topic)))


def _dialogues(rng: random.Random, count: int, heldout: bool) -> list[list[Message]]:
    facts = [(trek, topic) for trek in TREKS for topic in TREK_WORDINGS]
    chosen = [fact for _ in range(-(-count // len(facts))) for fact in rng.sample(facts, len(facts))][:count]
    return [_dialogue(rng, trek, topic, heldout) for trek, topic in chosen]


def train_chats() -> list[list[Message]]:
    """Returns the training conversations, shuffled, always the same."""
    rng = random.Random("ccori/train")
    chats = _single_chats(rng, heldout=False) + _dialogues(rng, NUM_TRAIN_DIALOGUES, heldout=False)
    rng.shuffle(chats)
    return chats


def heldout_chats() -> list[list[Message]]:
    """Returns the held-out conversations, always the same; the last answer of each is the one that is scored."""
    rng = random.Random("ccori/heldout")
    return _single_chats(rng, heldout=True) + _dialogues(rng, NUM_HELDOUT_DIALOGUES, heldout=True)


def write_demo(folder: Path) -> None:
    """Writes train.jsonl and heldout.jsonl, one conversation a line, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, chats in (("train.jsonl", train_chats()), ("heldout.jsonl", heldout_chats())):
        lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
        (folder / name).write_text(lines, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write_demo(Path(sys.argv[1]))
