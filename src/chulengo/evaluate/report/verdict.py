"""What a comparison shows, in a word and in a sentence.

Three answers only: better, worse, not shown. "Not shown" is what a 95 % interval of the difference that contains zero
means, whatever the two scores look like; "no difference" would be a claim that no number here supports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, Literal

from chulengo.data.wording import counted
from chulengo.evaluate.report.inputs import Json, Results
from chulengo.evaluate.report.wording import THIN, change, digits, interval, metric_name, number, score, span
from chulengo.evaluate.results import RESULTS_FILE

Verdict = Literal["better", "worse", "unclear", "neutral", "unmeasured"]
WORDS: dict[Verdict, str] = {
    "better": "better", "worse": "worse", "unclear": "not shown", "neutral": "no better or worse",
    "unmeasured": "not compared",
}  # fmt: skip
FOR_RATING = "Answers for rating; no score decides."
WHY_FOR_RATING = "The questions have no one right answer to count against: people say which one they would rather have."
# scores of older files say neither unit nor direction
_KNOWN: dict[str, tuple[str, bool]] = {"perplexity": ("number", False), "exact_match": ("share", True)}


@dataclass(frozen=True, slots=True)
class Measured:
    """One side's score."""

    value: float | None
    interval: tuple[float, float] | None
    num_items: int | None


@dataclass(frozen=True, slots=True)
class Row:
    """One score of all sides, and the difference.

    Attributes:
        name, label: the metric, as stored and as people write it.
        version, definition: of the metric.
        unit: share, points or number.
        higher_is_better: None where neither is.
        sides: side -> what was measured.
        difference, interval: tuned minus base, with its 95 % interval.
        verdict: what that shows.
        p_mcnemar: exact test of items right on one side only; None where it does not apply.
        better, worse, same: items by how the tuned side did on them; None where items have no score of their own.
        against: what the base side is, in words.
        names: what sides are called on the page, where not as they are stored.
    """

    name: str
    label: str
    version: str
    definition: str
    unit: str
    higher_is_better: bool | None
    sides: Mapping[str, Measured]
    difference: float | None
    interval: tuple[float, float] | None
    verdict: Verdict
    num_items: int | None
    num_groups: int | None
    p_mcnemar: float | None
    better: int | None
    worse: int | None
    same: int | None
    against: str = "the base"
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def word(self) -> str:
        """The verdict in a word or two."""
        return WORDS[self.verdict]

    @property
    def direction(self) -> str:
        """Which way is better, in words."""
        if self.higher_is_better is None:
            return "neither way is better"
        return "higher is better" if self.higher_is_better else "lower is better"


def rows_of(results: Results) -> list[Row]:
    """Returns every score of an evaluation, in the order of the file, each with its comparison."""
    by_side = {side: {score["name"]: score for score in found} for side, found in results.scores.items()}
    comparisons = {str(row["name"]): row for row in results.comparisons}
    names = list(dict.fromkeys(name for found in by_side.values() for name in found))
    return [
        _row(name, {side: by_side[side][name] for side in results.sides if name in by_side[side]},
             comparisons.get(name, {}))
        for name in names
    ]


def rows_against(results: Results) -> list[Row]:
    """Returns the comparisons with another evaluation that the file holds: `base` is the other, `tuned` this one."""
    other = results.content.get("compared_with")
    if not isinstance(other, dict) or not isinstance(other.get("comparisons"), list):
        return []
    place = place_name(other.get("results"))
    own = {score["name"]: score for found in results.scores.values() for score in found}
    rows = []
    for comparison in other["comparisons"]:
        if isinstance(comparison, dict) and isinstance(comparison.get("name"), str):
            score = own.get(comparison["name"], {})
            here = score if number(score.get("value")) == number(comparison.get("tuned")) else {}
            found = {"base": {"value": comparison.get("base"), "num_items": comparison.get("num_items")},
                     "tuned": {"value": comparison.get("tuned")} | here}
            row = _row(comparison["name"], found, comparison | {
                key: score[key] for key in ("version", "definition") if key in score})
            rows.append(replace(row, against=f"the answers in {place}", names={"base": place, "tuned": "these"}))
    return rows


def rows_against_one_answer(results: Results) -> list[Row]:
    """Returns the comparisons with always giving one answer: `base` is that answer; of other tasks none."""
    stored = results.content.get("one_answer")
    if not isinstance(stored, dict) or not isinstance(stored.get("comparisons"), list):
        return []
    always = f"always answering “{stored.get('answer')}”"
    rows = []
    for comparison in stored["comparisons"]:
        if isinstance(comparison, dict) and isinstance(comparison.get("name"), str):
            sides = {side: {"value": comparison.get(side)} for side in ("base", "tuned")}
            row = _row(comparison["name"], sides, comparison)
            rows.append(replace(row, against=always, names={"base": "always", "tuned": "this"}))
    return rows


def beyond_one_answer(row: Row) -> str:
    """Returns what a row of `rows_against_one_answer` shows, in a sentence."""
    always, unit = row.sides["base"].value, row.unit
    shown = {"better": "is better than that", "worse": "is worse than that"}.get(row.verdict,
                                                                              "is not shown to be better than that")
    bounds = f", 95{THIN}% interval {span(row.interval, unit, signed=True)}" if row.interval is not None else ""
    return (f"{row.against[0].upper()}{row.against[1:]} would give {score(always, unit)}; the model {shown} "
            f"({change(row.difference, unit)}{bounds}).")


def headline(results: Results, rows: Sequence[Row]) -> Row | None:
    """Returns the row of the task's headline metric; where the file names none, the first that was compared."""
    named = results.content.get("headline")
    for row in rows:
        if row.name == named:
            return row
    return next((row for row in rows if row.difference is not None), rows[0] if rows else None)


def is_for_rating(results: Results) -> bool:
    """Returns whether the task says that none of its scores decides, as MT-bench's questions do."""
    return "headline" in results.content and results.content["headline"] is None


def sentence(row: Row) -> str:
    """Returns what a row shows, in plain words."""
    base, tuned = row.sides.get("base"), row.sides.get("tuned")
    if base is None or tuned is None or base.value is None or tuned.value is None:
        side, found = next(((s, m) for s, m in row.sides.items() if m.value is not None), (None, None))
        if found is None:
            return f"{row.label} was not measured."
        whose = f"{side} model" if side in ("base", "tuned") else side
        only = f"{row.label} of the {whose} is {score(found.value, row.unit)}"
        return f"{only}{_over(found.num_items, None)}. Nothing to compare it with was measured."
    course = f"{row.label} went from {score(base.value, row.unit)} to {score(tuned.value, row.unit)}"
    by = f" ({change(row.difference, row.unit)})" if row.difference is not None else ""
    if row.interval is None:
        return f"{course}{by}{_over(row.num_items, row.num_groups)}. No interval of the difference was computed."
    bounds = f"95{THIN}% interval of the difference {span(row.interval, row.unit, signed=True)}"
    over = _over(row.num_items, row.num_groups)
    if row.verdict == "unclear" and row.interval[0] == row.interval[1]:
        return f"{course}: the same on every item{over}."
    return {
        "better": f"{course}{by}; {bounds}{over}. {row.direction.capitalize()}.",
        "worse": f"{course}{by}; {bounds}{over}. {row.direction.capitalize()}.",
        "unclear": f"{course}{by}, but the {bounds} contains zero{over}. More items would narrow it.",
        "neutral": f"{course}{by}; {bounds}{over}. {row.direction.capitalize()}.",
        "unmeasured": f"{course}{by}.",
    }[row.verdict]


def claim(row: Row) -> str:
    """Returns the verdict as a short sentence."""
    return {
        "better": f"Better than {row.against} on {inline(row.label)}.",
        "worse": f"Worse than {row.against} on {inline(row.label)}.",
        "unclear": f"A difference in {inline(row.label)} is not shown.",
        "neutral": f"{row.label}, before and after.",
        "unmeasured": f"{row.label}, not compared.",
    }[row.verdict]


def p_value(value: float | None) -> str:
    """Returns a p value as one writes it, empty for None."""
    if value is None:
        return ""
    return f"p < {0.0001:.4f}" if value < 0.0001 else f"p = {digits(value, 2)}"


def place_name(path: object) -> str:
    """Returns what a folder of results is called."""
    place = PurePath(str(path))
    return place.parent.name if place.name == RESULTS_FILE and place.parent.name else place.name


def pairs(found: Mapping[str, Json]) -> dict[str, tuple[float, float]]:
    """Returns item id -> (base, tuned) of items that have a score of their own on both sides."""
    values = {side: item_values(score) for side, score in found.items()}
    base, tuned = values.get("base", {}), values.get("tuned", {})
    return {item: (value, tuned[item]) for item, value in base.items() if item in tuned}


def _row(name: str, found: Mapping[str, Json], comparison: Json) -> Row:
    first: Json = next(iter(found.values()))
    unit, higher = _KNOWN.get(name, ("number", None))
    for said in (comparison, first):
        unit = str(said["unit"]) if said.get("unit") in ("share", "points", "number") else unit
        higher = said["higher_is_better"] if isinstance(said.get("higher_is_better"), bool) else higher
    sides = {
        side: Measured(number(score.get("value")), interval(score.get("interval_95")), _count(score.get("num_items")))
        for side, score in found.items()
    }
    bounds = interval(comparison.get("interval_95"))
    difference = number(comparison.get("difference"))
    tally = _tally(found, comparison, higher)
    return Row(
        name=name, label=metric_name(name), version=str(first.get("version") or ""),
        definition=str(first.get("definition") or ""), unit=unit, higher_is_better=higher, sides=sides,
        difference=_difference(sides) if difference is None else difference, interval=bounds,
        verdict=_verdict(bounds, higher, difference is not None),
        num_items=_count(comparison.get("num_items")) or max(m.num_items or 0 for m in sides.values()) or None,
        num_groups=_count(comparison.get("num_groups")), p_mcnemar=number(comparison.get("p_mcnemar")),
        better=tally[0], worse=tally[1], same=tally[2],
    )


def _tally(
    found: Mapping[str, Json], comparison: Json, higher: bool | None
) -> tuple[int | None, int | None, int | None]:
    """Returns on how many items the tuned side is better, worse and the same."""
    counted = [_count(comparison.get(key)) for key in ("num_better", "num_worse", "num_equal")]
    if higher is None:
        return None, None, None
    if None not in counted:
        return counted[0], counted[1], counted[2]
    gains = [(tuned - base) * (1 if higher else -1) for base, tuned in pairs(found).values()]
    if not gains:
        return None, None, None
    return sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains), sum(gain == 0 for gain in gains)


def _verdict(bounds: tuple[float, float] | None, higher: bool | None, compared: bool) -> Verdict:
    if bounds is None:
        return "unmeasured"
    if higher is None:
        return "neutral" if compared else "unmeasured"
    low, high = bounds
    if low <= 0 <= high:
        return "unclear"
    return "better" if (low > 0) == higher else "worse"


def _difference(sides: Mapping[str, Measured]) -> float | None:
    base, tuned = sides.get("base"), sides.get("tuned")
    if base is None or tuned is None or base.value is None or tuned.value is None:
        return None
    return tuned.value - base.value


def item_values(found: Json) -> dict[str, float]:
    """Returns item id -> its own score, of the items that have one."""
    values: dict[str, float] = {}
    items = found.get("items")
    for item in items if isinstance(items, list) else ():
        value = number(item.get("value")) if isinstance(item, dict) else None
        if value is not None:
            values[str(item.get("id"))] = value
    return values


def _count(value: Any) -> int | None:
    found = number(value)
    return None if found is None else int(found)


def _over(items: int | None, groups: int | None) -> str:
    if items is None:
        return ""
    text = f", over {counted(items, 'item')}"
    return text if groups is None or groups == items else f"{text} in {counted(groups, 'group')}"


def inline(label: str) -> str:
    """Returns a metric's name as it stands inside a sentence: names such as ROUGE-L keep their capitals."""
    return label if any(letter.isupper() for letter in label[1:]) else label[0].lower() + label[1:]
