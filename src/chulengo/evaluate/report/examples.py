"""Which examples a report shows, and how much of each: the best, the worst, and where the tuned model got worse.

Chosen by the headline metric's value of each item, never by eye. Nothing is shown twice. Of equal items a hash of the
id chooses: in the order of the file, five that are all right would be five on one subject, and a random choice would
make another page each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from chulengo.evaluate.report.inputs import Json, Results
from chulengo.evaluate.report.verdict import Row, inline, item_values, pairs
from chulengo.evaluate.report.wording import change, score, visible
from chulengo.evaluate.task_scores import main_side

PER_GROUP = 6
OPEN = 3  # of a group; the others unfold
FOLDED_FROM = 900  # characters; longer texts show their beginning and unfold
FOLDED_LINES = 14
MOST_CHARACTERS = 40_000  # of one text; the results file has the rest


@dataclass(frozen=True, slots=True)
class Passage:
    """A text as a page shows it.

    Attributes:
        beginning: what is always shown.
        whole: the text to unfold; "" when the beginning is all of it.
        length: of the whole text, in characters.
        cut: characters that not even the unfolded text has.
    """

    beginning: str
    whole: str
    length: int
    cut: int


@dataclass(frozen=True, slots=True)
class Reply:
    """One side's answer; `name` is what the page calls it, `read` what the task took from it where not the whole."""

    side: str
    name: str
    text: Passage
    finish_reason: str
    value: str
    verdict: str
    read: Passage | None


@dataclass(frozen=True, slots=True)
class Shown:
    """One example."""

    id: str
    question: Passage
    references: tuple[Passage, ...]
    num_references: int
    replies: tuple[Reply, ...]
    change: str


@dataclass(frozen=True, slots=True)
class Group:
    """Examples that were chosen for one reason."""

    title: str
    why: str
    shown: tuple[Shown, ...]

    @property
    def parts(self) -> tuple[tuple[Shown, ...], tuple[Shown, ...]]:
        """What is shown at once, and what unfolds."""
        return self.shown[:OPEN], self.shown[OPEN:]


def groups_of(results: Results, row: Row | None) -> list[Group]:
    """Returns the examples to show, chosen by the headline row; without values of single items, the first ones.

    A row against another evaluation shows both evaluations' answers, where the other's are still there.
    """
    if row is not None and row.names and results.other is not None:
        results = _side_by_side(results, results.other)
    examples = {str(example.get("id")): example for example in results.examples}
    values = {} if row is None else {item: pair for item, pair in _values(results, row).items() if item in examples}
    if row is None or not values:
        first = tuple(_shown(example, None, row) for example in list(examples.values())[:PER_GROUP])
        why = "The first of the data; no score of single items chooses among them."
        return [Group("Examples", why, first)] if first else []
    groups: list[Group] = []
    taken: set[str] = set()
    for reason in _reasons(row, values, both=len(results.scores) > 1, named=row.names):
        left = [item for item in values if item not in taken and reason.wanted(*values[item])]
        chosen = sorted(left, key=lambda item: (reason.key(*values[item]), _lot(item)))[:PER_GROUP]
        taken.update(chosen)
        if chosen:
            shown = tuple(_shown(examples[item], values[item], row) for item in chosen)
            groups.append(Group(reason.title, reason.why, shown))
    return groups


def _side_by_side(results: Results, other: Results) -> Results:
    """Returns the answers of two evaluations as base and tuned of one; of items that both have."""
    mine, theirs = main_side(results.content), main_side(other.content)
    answers = {str(example.get("id")): _answer(example, theirs) for example in other.examples}
    merged = [
        {**example, "answers": {"base": answers[str(example.get("id"))], "tuned": _answer(example, mine)}}
        for example in results.examples if answers.get(str(example.get("id")))
    ]
    scores = {"base": other.scores[theirs], "tuned": results.scores[mine]}
    return replace(results, sides=("base", "tuned"), scores=scores, examples=merged)


@dataclass(frozen=True, slots=True)
class _Reason:
    """Why items are shown: those that are `wanted`, the lowest `key` first; both take (base, tuned)."""

    title: str
    why: str
    key: Callable[[float, float], float]
    wanted: Callable[[float, float], bool]


def _reasons(
    row: Row, values: Mapping[str, tuple[float, float]], *, both: bool, named: Mapping[str, str]
) -> list[_Reason]:
    sign = -1.0 if row.higher_is_better is False else 1.0
    by, up, down = inline(row.label), "highest", "lowest"
    if sign < 0:
        up, down = down, up
    found = [sign * tuned for _, tuned in values.values()]
    low, high = min(found), max(found)
    compared = [
        _Reason("Where it gained most", f"The largest improvements of {by} against {row.against}.",
                lambda base, tuned: sign * (base - tuned), lambda base, tuned: sign * (tuned - base) > 0),
        _Reason("Where these answers are worse" if named else "Where the tuned model got worse",
                f"Where {by} fell back most against {row.against}.",
                lambda base, tuned: sign * (tuned - base), lambda base, tuned: sign * (tuned - base) < 0),
    ] if both else [
        _Reason("The best answers", f"The {up} {by}.", lambda _, tuned: -sign * tuned,
                lambda _, tuned: sign * tuned > low),
    ]
    if low == high and not any(base != tuned for base, tuned in values.values()):
        return [_Reason("Examples", f"All items have the same {by}.", lambda _, tuned: 0.0, lambda _, tuned: True)]
    whose = "these answers" if named else "the tuned model"
    weak = f"The {down} {by} of {whose} among the rest." if both else f"The {down} {by}."
    return [*compared, _Reason("The weakest answers", weak, lambda _, tuned: sign * tuned,
                               lambda _, tuned: sign * tuned < high)]


def _values(results: Results, row: Row) -> dict[str, tuple[float, float]]:
    """Returns item id -> (base, tuned) for the row; of one side alone, its value twice."""
    found = {side: score for side, scores in results.scores.items() for score in scores if score["name"] == row.name}
    if len(found) == 1:
        return {item: (value, value) for item, value in item_values(next(iter(found.values()))).items()}
    return pairs(found)


def passage(text: object) -> Passage:
    """Returns a text cut into what is shown and what unfolds."""
    whole = visible(text if isinstance(text, str) else "" if text is None else str(text))
    beginning = "\n".join(whole[:FOLDED_FROM].split("\n")[:FOLDED_LINES])
    if len(beginning) == len(whole):
        return Passage(whole, "", len(whole), 0)
    return Passage(beginning, whole[:MOST_CHARACTERS], len(whole), max(0, len(whole) - MOST_CHARACTERS))


def answer_words(results: Results) -> dict[str, list[float]]:
    """Returns the number of words of every answer by side, and of every first reference."""
    counts: dict[str, list[float]] = {side: [] for side in results.sides}
    references: list[float] = []
    for example in results.examples:
        for side, counted in counts.items():
            text = _answer(example, side).get("text")
            if isinstance(text, str):
                counted.append(len(text.split()))
        first = next((text for text in _texts(example.get("references"))), None)
        if first is not None:
            references.append(len(first.split()))
    return counts | {"references": references}


def _lot(item: str) -> bytes:
    return hashlib.blake2b(item.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _shown(example: Json, values: tuple[float, float] | None, row: Row | None) -> Shown:
    references = _texts(example.get("references"))
    answers = example.get("answers")
    sides = list(answers) if isinstance(answers, dict) else []
    sides.sort(key=lambda side: {"base": 0, "tuned": 1}.get(side, 2))
    one = sides if len(sides) == 1 else ["base", "tuned"]
    by_side = dict(zip(one, values, strict=False)) if values is not None else {}
    unit = row.unit if row is not None else "number"
    names = row.names if row is not None and sides == ["base", "tuned"] else {}
    replies = tuple(
        Reply(
            side, names.get(side, side), passage(_answer(example, side).get("text")),
            str(_answer(example, side).get("finish_reason") or ""),
            score(by_side[side], unit) if side in by_side else "", _reply_verdict(side, values, row),
            passage(_answer(example, side)["read"]) if "read" in _answer(example, side) else None,
        )
        for side in sides
    )
    return Shown(
        str(example.get("id")), passage(example.get("question")), tuple(passage(text) for text in references[:1]),
        len(references), replies, change(values[1] - values[0], unit) if values is not None and len(sides) > 1 else "",
    )


def _reply_verdict(side: str, values: tuple[float, float] | None, row: Row | None) -> str:
    if values is None or row is None or side != "tuned" or values[0] == values[1]:
        return ""
    return "better" if (values[1] > values[0]) == (row.higher_is_better is not False) else "worse"


def _answer(example: Json, side: str) -> Json:
    answers = example.get("answers")
    found = answers.get(side) if isinstance(answers, dict) else None
    return found if isinstance(found, dict) else {}


def _texts(value: object) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, Sequence) and not isinstance(
        value, str) else []
