"""Expands phrase patterns such as ``"[How much|What] does {t} cost?"``.

A pattern is text with alternatives in square brackets (they nest, and an empty one is allowed) and named
slots in braces. One pattern of five alternatives stands for five wordings, which is how a page of patterns
becomes the thousands of different sentences that the embedded model learns to read.
"""

import random
import re
from collections.abc import Mapping
from functools import cache
from typing import TypeAlias, TypeVar

Node: TypeAlias = "str | tuple[tuple[Node, ...], ...]"

T = TypeVar("T")

_SPACES = re.compile(r"  +")


@cache
def parse(pattern: str) -> tuple[Node, ...]:
    """Returns the nodes of `pattern`: plain strings, and a tuple of options for each bracket."""
    nodes, end = _parse_option(pattern, 0)
    if end != len(pattern):
        raise ValueError(f"unbalanced brackets in pattern: {pattern!r}")
    return nodes


def _parse_option(pattern: str, start: int) -> tuple[tuple[Node, ...], int]:
    nodes: list[Node] = []
    text_start = position = start
    while position < len(pattern) and pattern[position] not in "|]":
        if pattern[position] != "[":
            position += 1
            continue
        if position > text_start:
            nodes.append(pattern[text_start:position])
        options: list[tuple[Node, ...]] = []
        while pattern[position] != "]":
            option, position = _parse_option(pattern, position + 1)
            options.append(option)
            if position >= len(pattern):
                raise ValueError(f"unbalanced brackets in pattern: {pattern!r}")
        nodes.append(tuple(options))
        position += 1
        text_start = position
    if position > text_start:
        nodes.append(pattern[text_start:position])
    return tuple(nodes), position


def _draw(nodes: tuple[Node, ...], rng: random.Random, parts: list[str]) -> None:
    for node in nodes:
        if isinstance(node, str):
            parts.append(node)
        else:
            _draw(node[int(rng.random() * len(node))], rng, parts)


def tidy(text: str) -> str:
    """Returns `text` without doubled spaces and with a capital first letter."""
    text = _SPACES.sub(" ", text.strip())
    return text[:1].upper() + text[1:]


def expand(pattern: str, rng: random.Random, slots: Mapping[str, str] | None = None) -> str:
    """Returns one wording of `pattern`, its slots filled from `slots`."""
    parts: list[str] = []
    _draw(parse(pattern), rng, parts)
    text = "".join(parts)
    return tidy(text.format_map(slots) if slots else text)


def choices(text: str) -> tuple[str, ...]:
    """Returns the parts of `text` between its ``|`` signs: a long tuple of short strings, written short."""
    return tuple(text.split("|"))


def pick(rng: random.Random, items: tuple[T, ...]) -> T:
    """Returns one of `items`, each equally likely."""
    return items[int(rng.random() * len(items))]


def pick_first(rng: random.Random, items: tuple[T, ...], first: float = 0.6) -> T:
    """Returns `items[0]` with probability `first`, else one of the others."""
    if len(items) == 1 or rng.random() < first:
        return items[0]
    return items[1 + int(rng.random() * (len(items) - 1))]
