"""Two evaluations of the same items: the difference of every metric, with its interval; needs no model.

  chulengo compare results/first results/second
  chulengo compare runs/a/results/squad runs/b/results/squad --json

Of each the tuned side is taken where there is one. The items, the metrics' versions and definitions must be the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from chulengo.cli.task_options import check_task_arguments


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
    from chulengo.evaluate.task_scores import compared, stored_side

    check_task_arguments(arguments)
    first = read_results(Path(arguments.first))
    base = stored_side(first, first["task"], arguments.first)
    tuned = stored_side(read_results(Path(arguments.second)), first["task"], arguments.second)
    comparisons = compared(base[1], tuned[1], draws=arguments.draws, seed=arguments.seed)
    if not comparisons:
        raise DataError("The two have no metric in common.", next_step="evaluate both with the same task")
    if arguments.json:
        print(json.dumps({
            "task": first["task"], "first": arguments.first, "second": arguments.second,
            "comparisons": [comparison.to_dict() for comparison in comparisons],
        }, ensure_ascii=False, allow_nan=False))
        return 0
    headline = first.get("headline")
    show_table(two_sides((arguments.first, arguments.second), comparisons, headline, {}))
    print("\n".join(item_lines(comparisons, headline)))
    return 0
