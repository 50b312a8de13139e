"""How `eval`, `score` and `compare` show scores: one table, the items behind it, and numbers on a scale of 0 to 100."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from chulengo.data.wording import counted, four_digits

if TYPE_CHECKING:
    from chulengo.evaluate.comparison import Comparison
    from chulengo.evaluate.results import Score

ALIASES = {"squad_exact_match": "exact_match", "squad_f1": "f1"}  # the names that the official script prints
HEADLINE = "*"
SHOWN_ITEMS = 5


def score_cell(score: Score, *, interval: bool = True) -> str:
    """Returns a score as a table shows it: a share as a percentage, anything else as a number, with its interval."""
    if score.value != score.value:
        return _undefined(score.name)
    if score.interval is None or not interval:
        return number(score.value, score.unit)
    low, high = (number(end, score.unit) for end in score.interval)
    return f"{number(score.value, score.unit)} ({low} to {high})"


def number(value: float, unit: str) -> str:
    """Returns one number in its unit; NaN is what the items do not define."""
    if value != value:
        return "undefined"
    if unit == "share":
        return f"{value:.1%}"
    return f"{value:.2f}" if unit == "points" else four_digits(value)


def difference_cell(comparison: Comparison) -> str:
    """Returns the difference with its interval; of shares in percentage points."""
    def signed(value: float) -> str:
        if comparison.unit == "share":
            return f"{100 * value:+.1f}"
        return f"{value:+.2f}" if comparison.unit == "points" else four_digits(value, "+")

    if comparison.difference != comparison.difference:
        return _undefined(comparison.name)
    unit = " pp" if comparison.unit == "share" else ""
    if comparison.interval_95 is None:
        return signed(comparison.difference) + unit
    low, high = comparison.interval_95
    return f"{signed(comparison.difference)}{unit} ({signed(low)} to {signed(high)})"


def _undefined(name: str) -> str:
    from chulengo.evaluate.metrics.registry import why_undefined

    return f"undefined: {why_undefined(name)}"


def verdict_cell(comparison: Comparison) -> str:
    """Returns what the interval says, and McNemar's p where there is one."""
    if comparison.higher_is_better is None:
        return ""
    p = "" if comparison.p_mcnemar is None else f", McNemar p {max(comparison.p_mcnemar, 1e-99):.2g}"
    return comparison.verdict + p


def comparisons_from(rows: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """Returns the comparisons that `Comparison.to_dict` wrote."""
    from chulengo.evaluate.comparison import Comparison

    made = []
    for row in rows:
        numbers = {key: math.nan if row[key] is None else row[key] for key in ("base", "tuned", "difference")}
        interval = None if row["interval_95"] is None else tuple(row["interval_95"])
        made.append(Comparison(**{**row, **numbers, "interval_95": interval}))
    return made


def one_side(scores: Sequence[Score], headline: str | None, not_computed: Mapping[str, str]) -> list[list[str]]:
    """Returns the table of one set of answers: metric, value with interval, n."""
    rows = [["metric", "value (95% interval)", "n"]]
    rows += [[_name(s.name, headline), score_cell(s), _count(s.num_items, s.num_groups)] for s in scores]
    return rows + [[name, f"not computed: {why}", ""] for name, why in not_computed.items()]


def two_sides(
    names: tuple[str, str], comparisons: Sequence[Comparison], headline: str | None, not_computed: Mapping[str, str]
) -> list[list[str]]:
    """Returns the table of two sets of answers: metric, both values, difference with interval, verdict, n."""
    rows = [["metric", *names, "difference (95% interval)", "verdict", "n"]]
    rows += [
        [_name(c.name, headline), number(c.base, c.unit), number(c.tuned, c.unit), difference_cell(c),
         verdict_cell(c), _count(c.num_items, c.num_groups)]
        for c in comparisons
    ]
    return rows + [[name, f"not computed: {why}", "", "", "", ""] for name, why in not_computed.items()]


def _name(name: str, headline: str | None) -> str:
    return name + HEADLINE if name == headline else name


def _count(items: int, groups: int) -> str:
    return f"{items:,}" if groups in (0, items) else f"{items:,} in {counted(groups, 'group')}"


def item_lines(comparisons: Sequence[Comparison], headline: str | None) -> list[str]:
    """Returns, for the headline metric, on how many items the second side is better and worse, and on which most.

    Where an item is right or wrong no gain is larger than another, so some are named instead.
    """
    from chulengo.evaluate.metrics.registry import is_of_labels

    chosen = next((c for c in comparisons if c.name == headline), None)
    if chosen is None:
        return []
    on = "such as" if chosen.p_mcnemar is not None or is_of_labels(chosen.name) else "most on"
    lines = []
    for word, count, ids in (("better", chosen.num_better, chosen.better_items),
                             ("worse", chosen.num_worse, chosen.worse_items)):
        named = f", {on} {', '.join(ids[:SHOWN_ITEMS])}{' …' if count > SHOWN_ITEMS else ''}" if ids else ""
        lines.append(f"{chosen.name}: {word} on {count:,} of {counted(chosen.num_items, 'item')}{named}")
    return lines


def show_one_answer(stored: Mapping[str, Any] | None, side: str) -> None:
    """Prints how one side compares with always giving the most frequent answer; nothing where that was not computed."""
    if not stored:
        return
    print(f"\nagainst {said_of_one_answer(stored)}, the most frequent answer:")
    show_table(two_sides(("always", side), comparisons_from(stored["comparisons"]), None, {}))


def said_of_one_answer(stored: Mapping[str, Any]) -> str:
    """Returns what the stored comparison with one answer is a comparison with."""
    return f"always answering '{stored['answer']}'"


def show_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints a table, drawn on a terminal and plain elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        drawn = Table(*rows[0])
        for row in rows[1:]:
            drawn.add_row(*row)
        Console().print(drawn)
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def hundreds(scores: Sequence[Score]) -> dict[str, Any]:
    """Returns each score by name, shares on the scale 0 to 100, under the official script's names too; None: undefined.
    """
    flat: dict[str, Any] = {}
    for score in scores:
        value = None if score.value != score.value else score.value * (100 if score.unit == "share" else 1)
        flat[score.name] = value
        if score.name in ALIASES:
            flat[ALIASES[score.name]] = value
    return flat
