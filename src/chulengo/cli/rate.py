"""Ratings by people: blind sheets, and what comes back from them.

  chulengo rate sheet --results DIR --raters 3 --out study
  chulengo rate sheet --answers tuned.jsonl base.jsonl --raters anna ben --criteria helpful correct --out study
  chulengo rate score study
  chulengo rate score anna.csv ben.jsonl --key study/key.json --out scores.json --ratings ratings.csv

`sheet` freezes the answers and writes a CSV and a JSONL for every rater into OUT/sheets; OUT/key.json is the secret.
Every rater sees the share --overlap of the pairs (20 %), each other pair goes to one rater alone. `score` reads any
number of filled-in sheets or of --ratings files.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from chulengo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from chulengo.evaluate.human.outputs import Outputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `chulengo rate`."""
    actions = parser.add_subparsers(dest="action", metavar="{sheet,score}")
    sheet = actions.add_parser("sheet", help="make blind sheets of finished answers")
    source = sheet.add_mutually_exclusive_group(required=True)
    source.add_argument("--results", metavar="DIR", help="a results folder (or file): base against tuned")
    source.add_argument("--answers", nargs="+", metavar="FILE",
                        help="answers to the same prompts, one file a system (or one made with generate --both)")
    sheet.add_argument("--out", required=True, metavar="DIR", help="a new folder: key.json and sheets/")
    sheet.add_argument("--raters", nargs="+", default=["1"], metavar="N|NAME", help="how many, or their names (1)")
    sheet.add_argument("--overlap", type=float, default=0.2, metavar="SHARE",
                       help="share of the pairs that every rater rates; each other pair goes to one rater (0.2)")
    sheet.add_argument("--repeats", type=float, default=0.1, metavar="SHARE",
                       help="share of a rater's pairs shown again, sides swapped; 0 to 0.33 (0.1)")
    sheet.add_argument("--criteria", nargs="+", default=[], metavar="NAME", help="also ask for 1 to 5 on each of these")
    sheet.add_argument("--num-items", type=int, metavar="N", help="a random part of the items (all)")
    sheet.add_argument("--common", action="store_true", help="leave out items that a system did not answer")
    sheet.add_argument("--seed", type=int, default=0, metavar="N", help="of draw, deal, sides and order (0)")
    score = actions.add_parser("score", help="statistics of filled-in sheets")
    score.add_argument("sheets", nargs="+", metavar="SHEET", help="sheets, rating files, or folders of them")
    score.add_argument("--key", metavar="FILE", help="the key of the sheets (default: beside their folder)")
    score.add_argument("--draws", type=int, default=10_000, metavar="N", help="bootstrap draws (10000)")
    score.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap (0)")
    score.add_argument("--out", metavar="FILE", help="write the statistics as JSON")
    score.add_argument("--ratings", metavar="FILE", help="write the ratings with the systems named: .csv or .jsonl")
    score.add_argument("--json", action="store_true", help="print JSON instead of the table")
    # one --help tells all
    parser.epilog = f"{sheet.format_help()}\n{score.format_help()}"


def run(arguments: argparse.Namespace) -> int:
    """Runs `chulengo rate`; returns 0."""
    if arguments.action is None:
        raise ConfigError("rate needs an action.", allowed="sheet, score", next_step="chulengo rate score --help")
    return _sheet(arguments) if arguments.action == "sheet" else _score(arguments)


def _sheet(arguments: argparse.Namespace) -> int:
    from chulengo.data.wording import counted
    from chulengo.evaluate.human.sheets import KEY_NAME, num_over_long, write_study
    from chulengo.evaluate.human.study import make_study
    from chulengo.evaluate.human.win_rate import votes_needed

    outputs = _outputs(arguments)
    study = make_study(
        outputs.items, outputs.systems, _raters(arguments.raters), overlap=arguments.overlap,
        repeats=arguments.repeats, num_items=arguments.num_items, criteria=arguments.criteria, seed=arguments.seed,
    )
    folder = Path(arguments.out)
    files = write_study(folder, study)
    first = [entry for entry in study.entries if entry.showing == 1]
    num_pairs = len({(entry.item, frozenset((entry.left, entry.right))) for entry in first})
    what = ("pair of answers", "pairs of answers") if len(study.systems) > 1 else ("answer", "answers")
    print(f"{' against '.join(study.systems)}: {counted(num_pairs, *what)}, answers frozen as {study.mark}")
    for file in files:
        own = [entry for entry in study.entries if entry.rater == file.stem]
        repeats = sum(entry.showing == 2 for entry in own)
        said = f"{repeats} of them {'a hidden repeat' if repeats == 1 else 'hidden repeats'}"
        print(f"  {file}: {counted(len(own), 'row')}, {said}")
    if study.num_equal_pairs:
        print(f"  left out: {counted(study.num_equal_pairs, 'pair')} with equal answers")
    if outputs.num_left_out:
        print(f"  left out: {counted(outputs.num_left_out, 'item')} that not every system answered")
    if over_long := num_over_long(study):
        print(f"  {counted(over_long, 'row')} with a text that Excel would cut: rate those sheets in LibreOffice, "
              "or as JSONL")
    if len(study.systems) > 1:
        print(f"To find 60:40, {votes_needed(0.6)} decisive votes are needed, each on an item of its own; "
              f"for 55:45, {votes_needed(0.55)}.")
    print(f"Hand out the files of {files[0].parent}. Keep {folder / KEY_NAME} to yourself.")
    print(f"Then: chulengo rate score {folder}")
    return 0


def _outputs(arguments: argparse.Namespace) -> Outputs:
    from chulengo.evaluate.human.outputs import read_answers, read_results

    if arguments.results is not None:
        return read_results(Path(arguments.results), common=arguments.common)
    return read_answers(arguments.answers, common=arguments.common)


def _raters(given: list[str]) -> list[str]:
    if len(given) == 1 and given[0].lstrip("-").isdigit():
        number = int(given[0])
        if not 1 <= number <= 1000:
            raise ConfigError(f"--raters is {number}.", allowed="1 to 1000, or names")
        return [f"rater-{place}" for place in range(1, number + 1)]
    return given


def _spare_sheets(place: Path, sheets: list[str]) -> None:
    """Refuses to write over what raters filled in."""
    from chulengo.evaluate.human.ratings import rating_files
    from chulengo.evaluate.human.sheets import KEY_NAME

    read = {file.resolve() for file in rating_files(sheets)}
    if place.resolve() in read or (place.exists() and place.name == KEY_NAME):
        raise DataError(f"{place} is one of the files that are read.", next_step="name a new file")


def _score(arguments: argparse.Namespace) -> int:
    from chulengo.evaluate.human.ratings import read_ratings, write_ratings
    from chulengo.evaluate.human.summary import summarise, table
    from chulengo.evaluate.results import write_results

    if arguments.draws < 100:
        raise ConfigError(f"--draws is {arguments.draws}.", allowed="100 or more; 10000 gives steady intervals")
    if arguments.ratings and Path(arguments.ratings).suffix.lower() not in (".csv", ".jsonl"):
        raise DataError(f"--ratings is {arguments.ratings}.", allowed="a name that ends with .csv or .jsonl")
    for place in filter(None, (arguments.out, arguments.ratings)):
        _spare_sheets(Path(place), arguments.sheets)
    collected = read_ratings(arguments.sheets, Path(arguments.key) if arguments.key else None)
    summary = summarise(collected, draws=arguments.draws, seed=arguments.seed)
    if arguments.out:
        write_results(Path(arguments.out), summary)
    if arguments.ratings:
        write_ratings(Path(arguments.ratings), collected)
    print(json.dumps(summary, ensure_ascii=False, indent=1) if arguments.json else table(summary))
    for path in (arguments.out, arguments.ratings):
        if path:
            print(f"wrote {path}", file=sys.stderr)
    return 0
