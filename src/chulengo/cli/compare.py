"""Two evaluations of the same items: the difference of every metric, with its interval; needs no model.

  chulengo compare results/first results/second
  chulengo compare runs/a/results/squad runs/b/results/squad --json

Of each the tuned side is taken where there is one. The items, the metrics' versions and definitions must be the same.
Two simulations are compared over the conversations that both have; what is left out is said.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chulengo.cli.task_options import check_task_arguments

if TYPE_CHECKING:
    from chulengo.evaluate.comparison import Comparison
    from chulengo.evaluate.results import Score

SIMULATION = "simulation"  # the task of what `simulate` writes
SHOWN = 5  # conversations named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `chulengo compare`."""
    parser.add_argument("first", metavar="RESULTS_A", help="a folder that eval --task or score wrote")
    parser.add_argument("second", metavar="RESULTS_B", help="another one; the difference is B less A")
    parser.add_argument("--draws", type=int, default=10_000, metavar="N", help="resampled sets (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the comparisons as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Runs `chulengo compare`; returns 0."""
    from chulengo.cli.score_view import item_lines, show_table, two_sides
    from chulengo.errors import DataError
    from chulengo.evaluate.results import read_results
    from chulengo.evaluate.task_scores import stored_side

    check_task_arguments(arguments)
    first, second = (read_results(Path(given)) for given in (arguments.first, arguments.second))
    base = stored_side(first, first["task"], arguments.first)[1]
    tuned = stored_side(second, first["task"], arguments.second)[1]
    comparisons, left_out = _compared(first, second, base, tuned, arguments)
    if not comparisons and first["task"] == SIMULATION and not set(first["scenarios"]) & set(second["scenarios"]):
        said = "; ".join(f"{where} has {_some([*results['scenarios']])}"
                         for where, results in ((arguments.first, first), (arguments.second, second)))
        raise DataError(f"The two simulations have no conversation in common: {said}.",
                        next_step="simulate both with the same --scenarios, or the same --replay and --num-rows")
    if not comparisons:
        raise DataError("The two have no metric in common.", next_step="evaluate both with the same task")
    for note in left_out:
        print(f"note: {note}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({
            "task": first["task"], "first": arguments.first, "second": arguments.second,
            "comparisons": [comparison.to_dict() for comparison in comparisons], "left_out": left_out,
        }, ensure_ascii=False, allow_nan=False))
        return 0
    headline = first.get("headline")
    show_table(two_sides((arguments.first, arguments.second), comparisons, headline, {}))
    if lines := item_lines(comparisons, headline):
        print("\n".join(lines))
    return 0


def _compared(
    first: dict[str, Any], second: dict[str, Any], base: list[Score], tuned: list[Score], arguments: argparse.Namespace
) -> tuple[list[Comparison], list[str]]:
    """Returns the comparisons, and in sentences what only one of the two has."""
    from chulengo.data.wording import counted
    from chulengo.evaluate.simulate.stored import check_same_scenarios, compare_shared
    from chulengo.evaluate.task_scores import compared

    notes = []
    for one, other, where in ((base, tuned, arguments.first), (tuned, base, arguments.second)):
        alone = sorted({score.name for score in one} - {score.name for score in other})
        if alone:
            notes.append(f"only {where} has {', '.join(alone)}")
    if first["task"] != SIMULATION:
        return compared(base, tuned, draws=arguments.draws, seed=arguments.seed), notes
    check_same_scenarios(first, second)
    comparisons, left_out = compare_shared(base, tuned, draws=arguments.draws, seed=arguments.seed)
    done = {comparison.name for comparison in comparisons}
    alike: dict[tuple[Any, ...], list[str]] = {}
    for each in left_out:
        alike.setdefault((each.name in done, each.only_first, each.only_second), []).append(each.name)
    for (is_compared, *ids), names in alike.items():
        parts = [f"{counted(len(some), 'conversation')} only in {where} ({_some(some)})"
                 for some, where in zip(ids, (arguments.first, arguments.second), strict=True) if some]
        what = "compared without" if is_compared else "not compared, for nothing is in common:"
        notes.append(f"{', '.join(names)}: {what} {' and '.join(parts)}")
    return comparisons, notes


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (", …" if len(ids) > SHOWN else "")
