"""What of a generated text is the answer: the rules that a task may name.

A model talks around its answer, and a score that does not say how the answer was found in the talk cannot be repeated.
The rules are few and blunt on purpose: clever ones find what they want to find.

  text         all of it
  first_line   the first line that is not blank
  label        the label that is mentioned first: whole words, any case, the longest where two start at one place
  number       the last number: "so 3 + 4 = 7." gives 7; thousands commas, a plus sign and zeros at the end go
  json         the value of one field of the first JSON object in the text

Before the rule, `after` cuts away everything up to the last time that a given text occurs ("Answer:"), where it does.
White space at both ends goes. An answer in which a rule finds nothing is unread: wrong, counted, never left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

RULES = ("text", "first_line", "label", "number", "json")
Reader = Callable[[str], str | None]

_NUMBER = re.compile(r"[-+−]?\d[\d,]*(?:\.\d+)?|[-+−]?\.\d+")


@dataclass(frozen=True, slots=True)
class Reading:
    """How a task reads answers.

    Attributes:
        rule: one of `RULES`.
        after: what stands before the answer; "" for nothing.
        labels: label -> every way to say it, for the rule `label`; the label's own name always counts.
        field: of the JSON object, for the rule `json`.
    """

    rule: str = "text"
    after: str = ""
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    field: str = ""


def reader(reading: Reading) -> Reader:
    """Returns the function from a generated text to the answer in it, or None where there is none."""
    rules: dict[str, Reader] = {
        "text": str.strip, "first_line": _first_line, "number": _last_number,
        "label": label_reader(reading.labels), "json": lambda text: _json_field(text, reading.field),
    }
    find = rules[reading.rule]

    def read(text: str) -> str | None:
        if reading.after and reading.after in text:
            text = text.rpartition(reading.after)[2]
        return find(text)

    return read


def label_reader(labels: Mapping[str, tuple[str, ...]]) -> Reader:
    """Returns the function from a text to the label that it mentions first, or None."""
    meanings = {said.casefold(): label for label, ways in labels.items() for said in (label, *ways)}
    longest_first = sorted(meanings, key=lambda said: -len(said))
    mention = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)")

    def read(text: str) -> str | None:
        found = mention.search(text.casefold()) if meanings else None
        return None if found is None else meanings[found.group()]

    return read


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _last_number(text: str) -> str | None:
    found = _NUMBER.findall(text)
    if not found:
        return None
    sign, digits = ("-", found[-1][1:]) if found[-1][0] in "-−" else ("", found[-1].lstrip("+"))
    whole, _, part = digits.replace(",", "").partition(".")
    part = part.rstrip("0")
    whole = whole.lstrip("0") or "0"
    sign = "" if whole == "0" and not part else sign
    return sign + whole + (f".{part}" if part else "")


def _json_field(text: str, name: str) -> str | None:
    decoder = json.JSONDecoder()
    for start in (match.start() for match in re.finditer(r"\{", text)):
        try:
            value, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        said = value.get(name)
        if isinstance(said, str):
            return said.strip()
        return None if said is None else json.dumps(said, ensure_ascii=False)
    return None
