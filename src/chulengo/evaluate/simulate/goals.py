"""When a conversation has reached its goal, as data.

A goal is a list of conditions on what the agent said; it is reached at the first turn of the agent after which all of
them hold. Four kinds, the narrowest that does the job being the best:

- a fact: a text that the agent must have said in some turn, or a list of texts of which one is enough;
- `text`: one fact;
- `regex`: a regular expression found in some turn;
- `answer`: a turn that is this text (or one of these), letter for letter after white space at its ends is stripped.

A fact is compared after Unicode composition, case folding and with runs of white space as one blank, and as whole
words: `165` is in "costs 165 soles", not in "1,165" or "165.50". The alternative, a judge model, would have an opinion
about paraphrases too, and an error rate of its own that nobody knows; what a fact list cannot see is a denial ("it does
not cost 165 soles"), so a scenario should ask for facts that nobody has a reason to deny.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chulengo.errors import ConfigError, nearest

KINDS = ("text", "facts", "regex", "answer")
_FIRST, _LAST = r"(?<!\w)", r"(?!\w)"
_FIRST_DIGIT, _LAST_DIGIT = r"(?<!\w)(?<!\d[.,:])", r"(?!\w)(?![.,:]\d)"


@dataclass(frozen=True, slots=True)
class Condition:
    """One thing that the agent must have said.

    Attributes:
        kind: fact, regex or answer.
        texts: what counts: any one of them.
    """

    kind: str
    texts: tuple[str, ...]

    def holds(self, said: str) -> bool:
        """Returns whether one turn of the agent fulfils it."""
        if self.kind == "answer":
            return said.strip() in (text.strip() for text in self.texts)
        if self.kind == "regex":
            return any(re.search(text, said) for text in self.texts)
        return any(says(said, text) for text in self.texts)


@dataclass(frozen=True, slots=True)
class Goal:
    """Conditions that must all hold, each in some turn of the agent."""

    conditions: tuple[Condition, ...]

    def met_in(self, turns: Sequence[str]) -> list[int | None]:
        """Returns for each condition the first turn of the agent (from 1) that fulfils it, or None."""
        return [
            next((number for number, said in enumerate(turns, 1) if condition.holds(said)), None)
            for condition in self.conditions
        ]

    def to_dict(self) -> list[dict[str, Any]]:
        """Returns the conditions as JSON-able data."""
        return [{"kind": each.kind, "texts": list(each.texts)} for each in self.conditions]


def says(said: str, text: str) -> bool:
    """Returns whether a turn has the text in it, as whole words; see the top of this file."""
    wanted = _plain(text)
    before = _FIRST_DIGIT if wanted[0].isdigit() else _FIRST if _is_word(wanted[0]) else ""
    after = _LAST_DIGIT if wanted[-1].isdigit() else _LAST if _is_word(wanted[-1]) else ""
    return re.search(before + re.escape(wanted) + after, _plain(said)) is not None


def read_goal(given: Any, where: str) -> Goal:
    """Returns the goal of a scenario's `met_when`.

    Args:
        given: what YAML made of it: a mapping with one or more of text, facts, regex, answer.
        where: for error messages, such as `scenarios.yaml, scenario 'late'`.

    Raises:
        ConfigError: anything else, an empty text, or a regular expression that does not compile.
    """
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(
            f"{where}: met_when is {type(given).__name__} {given!r:.60}.", allowed="a mapping with " + ", ".join(KINDS),
            next_step='met_when: {facts: ["165 soles"]}',
        )
    for key in given:
        if key not in KINDS:
            close = nearest(str(key), KINDS)
            raise ConfigError(
                f"{where}: met_when has no kind '{key}'.", allowed=", ".join(KINDS),
                next_step=f"met_when: {{{close or 'facts'}: …}}",
            )
    conditions: list[Condition] = []
    for key in KINDS:
        if key not in given:
            continue
        value = given[key]
        if key == "facts":
            facts = value if isinstance(value, list) else [value]
            conditions += [Condition("fact", _texts(fact, f"{where}: a fact of met_when")) for fact in facts]
        else:
            kind = "fact" if key == "text" else key
            conditions.append(Condition(kind, _texts(value, f"{where}: met_when.{key}")))
    if not conditions:
        raise ConfigError(f"{where}: met_when.facts is an empty list.", next_step='met_when: {facts: ["165 soles"]}')
    for condition in conditions:
        if condition.kind == "regex":
            _check_regex(condition, where)
    return Goal(tuple(conditions))


def _texts(value: Any, what: str) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    for text in texts or [None]:
        # a number is refused rather than spelled: YAML has already read 5:30 as 330
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(
                f"{what} is {text!r:.60}.", allowed="a text that is not empty, or a list of such texts (one is enough)",
                next_step='put it in quotation marks: "5:30"   (YAML reads 5:30 without them as the number 330)',
            )
    return tuple(texts)


def _check_regex(condition: Condition, where: str) -> None:
    for text in condition.texts:
        try:
            re.compile(text)
        except re.error as error:
            raise ConfigError(
                f"{where}: the regular expression {text!r} does not compile: {error}.",
                next_step="write it in single quotation marks, and a literal ( as \\(",
            ) from error


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"
