"""A rating study: which answers, frozen; who rates which of them, in which order, on which side.

Four choices that decide whether ratings can be believed:

* The answers are frozen. The study holds their texts and a SHA-256 over them; every sheet row carries the hash, so
  ratings of other answers are found out.
* The side is an independent fair coin for every rater and item. A person who likes the left side then chooses it no
  more often than half of the time *by content*, whatever the answers are worth, and however alike several raters
  vote. That makes the binomial test of position bias exact. Exactly balanced sides would lower its power and gain
  little.
* Overlap: `ceil(overlap * pairs)` pairs are rated by every rater, each other pair by exactly one. The shared ones
  measure agreement, the others buy items: for a win rate, ten votes on ten items say more than ten votes on one.
* Hidden repeats: `ceil(repeats * pairs of the rater)` pairs (at most a third) come a second time to the same rater,
  with the sides swapped and nothing to show it. They are taken from the first third of the sheet and come back in the
  last third, so that at least a third lies between. They measure the rater and never count as votes.

Pairs whose two answers are letter for letter equal are not shown (nobody could choose); they are counted.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chulengo.errors import ConfigError, DataError

KEY_FORMAT = "chulengo-rating-key/1"
MAX_REPEATS = 1 / 3
_NAME = re.compile(r"[A-Za-z]\w*")
_RATER = re.compile(r"\w[\w.-]*")
_TAKEN = {"row", "question", "answer", "choice", "comment", "entry", "outputs"}
_HASH_CHARS = 12  # of the SHA-256, on every row of a sheet
_HEX_AS_LETTERS = str.maketrans("0123456789abcdef", "abcdefghijklmnop")
_ENTRY_LETTERS = 12


@dataclass(frozen=True, slots=True)
class Item:
    """One question and what every system answered, by the system's name."""

    id: str
    question: str
    answers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of one rater's sheet.

    Attributes:
        id: says nothing about the sides; unique in the study.
        rater: whose sheet.
        item: the item's id.
        left: the system shown as A (or alone).
        right: the system shown as B; "" where one answer is shown alone.
        showing: 1, or 2 for a hidden repeat.
    """

    id: str
    rater: str
    item: str
    left: str
    right: str
    showing: int


@dataclass(frozen=True, slots=True)
class Study:
    """Everything that maps sheets back; it is the secret.

    Attributes:
        outputs: SHA-256 over the answers.
        systems: names; win rates are of the earlier against the later one.
        criteria: names of the 1 to 5 ratings, perhaps none.
        items: every frozen item, shown or not.
        entries: the rows of all sheets, in their order.
        num_equal_pairs: pairs left out since both answers are equal.
        settings: what `make_study` was told.
    """

    outputs: str
    systems: tuple[str, ...]
    criteria: tuple[str, ...]
    items: tuple[Item, ...]
    entries: tuple[Entry, ...]
    num_equal_pairs: int
    settings: Mapping[str, Any]

    @property
    def mark(self) -> str:
        """The short form of the hash that every row carries, in letters: programs take digits for numbers."""
        return self.outputs[:_HASH_CHARS].translate(_HEX_AS_LETTERS)

    @property
    def raters(self) -> tuple[str, ...]:
        """The raters, in the order of their sheets."""
        return tuple(dict.fromkeys(entry.rater for entry in self.entries))


def make_study(
    items: Sequence[Item], systems: Sequence[str], raters: Sequence[str], *, overlap: float = 0.2, repeats: float = 0.1,
    num_items: int | None = None, criteria: Sequence[str] = (), seed: int = 0,
) -> Study:
    """Returns who rates what; the same arguments give the same study.

    Args:
        items: every item has an answer of every system.
        systems: two or more are compared in pairs, each with each; one is rated alone by criteria.
        raters: their names; each gets a sheet.
        overlap: 0 to 1, share of the pairs that every rater rates (rounded up); each other pair goes to one rater.
        repeats: 0 to 1/3, share of a rater's pairs that come a second time (rounded up, at most a third).
        num_items: so many items, drawn at random from those with something to rate; None: all.
        criteria: names of 1 to 5 ratings asked for every answer shown.
        seed: of the draw, the deal, the sides and the order.

    Raises:
        ConfigError: a setting that is not allowed.
        DataError: nothing to rate.
    """
    _check(systems, raters, overlap, repeats, num_items, criteria)
    by_item, num_equal = _pairs(items, systems)
    if not by_item:
        raise DataError(
            f"There is nothing to rate: all {num_equal} pairs of answers are letter for letter equal." if items
            else "There are no answers to rate.",
            next_step="rate answers of two different models",
        )
    random_ = random.Random(f"{seed}/deal")
    drawn = by_item if num_items is None else random_.sample(by_item, min(num_items, len(by_item)))
    pairs = [pair for of_item in drawn for pair in of_item]
    random_.shuffle(pairs)
    outputs = outputs_hash(systems, items)
    ids = _entry_ids(f"{seed}/{outputs}")
    entries = [
        Entry(next(ids), rater, *shown)
        for rater, own in zip(raters, _deal(pairs, len(raters), overlap), strict=True)
        for shown in _sheet(own, repeats, random.Random(f"{seed}/sheet/{rater}"))
    ]
    settings = {"overlap": overlap, "repeats": repeats, "num_items": num_items, "seed": seed}
    return Study(outputs, tuple(systems), tuple(criteria), tuple(items), tuple(entries), num_equal, settings)


def outputs_hash(systems: Sequence[str], items: Sequence[Item]) -> str:
    """Returns the SHA-256 over every id, question and answer, as hexadecimal digits."""
    content = [list(systems), [[item.id, item.question, [item.answers[name] for name in systems]] for item in items]]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def _check(
    systems: Sequence[str], raters: Sequence[str], overlap: float, repeats: float, num_items: int | None,
    criteria: Sequence[str],
) -> None:
    if not 0 <= overlap <= 1:
        raise ConfigError(f"The overlap is {overlap}.", allowed="0 to 1: the share that every rater rates")
    if not 0 <= repeats <= MAX_REPEATS:
        raise ConfigError(f"The share of repeats is {repeats}.", allowed="0 to 0.33, so that they stay hidden")
    if num_items is not None and num_items < 1:
        raise ConfigError(f"The number of items is {num_items}.", allowed="1 or more")
    if not raters or len({name.casefold() for name in raters}) < len(raters):
        raise ConfigError(f"The raters are {', '.join(raters) or 'nobody'}.", allowed="one or more different names")
    for rater in raters:
        if not _RATER.fullmatch(rater):
            raise ConfigError(f"A sheet cannot be named after {rater!r}.", allowed="letters, digits, . - _")
    for name in criteria:
        if not _NAME.fullmatch(name) or name.casefold() in _TAKEN or name[-2:] in ("_A", "_B"):
            raise ConfigError(
                f"A criterion cannot be named {name!r}.",
                allowed=f"one word of letters and digits, such as helpful; not {', '.join(sorted(_TAKEN))}",
            )
    if len({name.casefold() for name in criteria}) < len(criteria):
        raise ConfigError(f"A criterion is named twice: {', '.join(criteria)}.")
    if len(set(systems)) < len(systems):
        raise ConfigError(f"Two systems have one name: {', '.join(systems)}.")
    if len(systems) == 1 and not criteria:
        raise ConfigError("One system alone has nothing to be compared with.",
                          next_step="name a second file of answers, or --criteria helpful correct")


Pair = tuple[str, str, str]  # item, one system, the other or ""


def _pairs(items: Sequence[Item], systems: Sequence[str]) -> tuple[list[list[Pair]], int]:
    """The pairs of every item that has any, and how many were left out as equal."""
    if len(systems) == 1:
        return [[(item.id, systems[0], "")] for item in items], 0
    by_item: list[list[Pair]] = []
    num_equal = 0
    for item in items:
        every = list(itertools.combinations(systems, 2))
        differing = [(item.id, a, b) for a, b in every if item.answers[a] != item.answers[b]]
        num_equal += len(every) - len(differing)
        if differing:
            by_item.append(differing)
    return by_item, num_equal


def _deal(pairs: Sequence[Pair], num_raters: int, overlap: float) -> list[list[Pair]]:
    # 0.2 * 15 is 3.0000000000000004 in floating point: not four
    shared = math.ceil(overlap * len(pairs) - 1e-9) if num_raters > 1 else 0
    return [[*pairs[:shared], *pairs[shared + place :: num_raters]] for place in range(num_raters)]


def _sheet(pairs: Sequence[Pair], repeats: float, random_: random.Random) -> list[tuple[str, str, str, int]]:
    """One rater's rows in order: (item, left, right, showing)."""
    order = random_.sample(pairs, len(pairs))
    shown = []
    for item, one, other in order:
        swap = other != "" and random_.random() < 0.5
        shown.append((item, other, one, 1) if swap else (item, one, other, 1))
    third = len(shown) // 3
    num_repeats = min(third, math.ceil(repeats * len(shown) - 1e-9))
    again = [
        (item, right or left, left if right else "", 2)
        for item, left, right, _ in random_.sample(shown[:third], num_repeats)
    ]
    last = shown[len(shown) - third :] + again
    random_.shuffle(last)
    return shown[: len(shown) - third] + last


def _entry_ids(seed: str) -> Iterator[str]:
    random_ = random.Random(f"{seed}/entries")
    used: set[str] = set()
    while True:
        name = "".join(random_.choices(string.ascii_lowercase, k=_ENTRY_LETTERS))
        if name not in used:
            used.add(name)
            yield name


def write_key(path: Path, study: Study) -> None:
    """Writes the study as JSON that only its owner may read."""
    content = {"format": KEY_FORMAT, **asdict(study)}
    with path.open("x", encoding="utf-8") as file:
        path.chmod(0o600)
        json.dump(content, file, ensure_ascii=False, indent=1)
        file.write("\n")


def read_key(path: Path) -> Study:
    """Returns the study that `write_key` wrote.

    Raises:
        DataError: no key file, or one that was changed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"The key {path} cannot be read: {error}.", next_step="--key with the key.json of the sheets"
                        ) from error
    if not isinstance(content, dict) or content.get("format") != KEY_FORMAT:
        raise DataError(f"{path} is not a key of rating sheets.", allowed=KEY_FORMAT, next_step="--key key.json")
    try:
        study = Study(
            content["outputs"], tuple(content["systems"]), tuple(content["criteria"]),
            tuple(Item(**item) for item in content["items"]), tuple(Entry(**entry) for entry in content["entries"]),
            content["num_equal_pairs"], content["settings"],
        )
        intact = study.outputs == outputs_hash(study.systems, study.items)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is a broken key: {error}.", next_step="take it from your copy") from error
    if not intact:
        raise DataError(f"The answers in {path} are not the ones that were handed out: their hash differs.",
                        next_step="take the key from your copy, or make new sheets")
    return study
