"""The shape of a topic: one kind of fact, how people ask for it and how the help desk answers.

Slots: ``{t}`` the thing asked about, as the guest names it; ``{s}`` the same as the subject of an answer ("The
Moon Lake trek", "It"); ``{o}`` the same as an object ("the Moon Lake trek", "it"); ``{n}`` its bare name; ``{v}``
the value of the fact.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from chulengo.nano.patterns import choices, pick

DrawValue: TypeAlias = Callable[[random.Random], str]


@dataclass(frozen=True)
class Topic:
    """One kind of fact, with its phrase patterns (see the module docstring for the slots).

    Attributes:
        key: The topic's name, also its key in JSON answers.
        labels: How a fact sheet of labels and values calls it.
        sheet: Sentences of a fact sheet in prose.
        answers: Full answers; the first is the usual one.
        noun: How "I do not know ..." calls it, with its article.
        draw: Draws a value.
        asks: Questions that name the thing.
        follows: Questions that leave the thing out ("And how long is it?").
        short: The answer in as few words as possible.
    """

    key: str
    labels: tuple[str, ...]
    sheet: tuple[str, ...]
    answers: tuple[str, ...]
    noun: str
    draw: DrawValue
    asks: tuple[str, ...]
    follows: tuple[str, ...]
    short: str = "{v}."


def from_list(text: str) -> DrawValue:
    """Returns a function that draws one of the choices in `text`, separated by ``|``."""
    values = choices(text)
    return lambda rng: pick(rng, values)


def from_range(low: int, high: int, step: int = 1, form: str = "{}") -> DrawValue:
    """Returns a function that draws a number from `low` to `high` inclusive and writes it into `form`."""
    num_choices = (high - low) // step + 1
    return lambda rng: form.format(low + step * int(rng.random() * num_choices))
