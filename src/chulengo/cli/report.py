"""A run's report: one HTML file to read, print and send on; also Markdown for a model card.

  chulengo report runs/demo --out report.html
  chulengo report runs/support --results results/squad results/chat --out report.html --markdown card.md
  chulengo report --results results/squad --out squad.html

The file needs nothing else: no network, no script, pictures inside. What was not measured says so.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from chulengo.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `chulengo report`."""
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run folder; left out: a report of --results alone")
    parser.add_argument("--results", nargs="+", action="extend", default=[], metavar="DIR",
                        help="what `chulengo eval --task … --out DIR` or `chulengo score` wrote; the first gives the "
                        "headline (default: those in RUN/results)")
    parser.add_argument("--out", metavar="FILE.html", help="where the page goes (default: RUN/report.html)")
    parser.add_argument("--markdown", metavar="FILE.md", help="also write a model card")


def run(arguments: argparse.Namespace) -> int:
    """Runs `chulengo report`; returns 0."""
    if not arguments.run and not arguments.results:
        raise ConfigError("Nothing to report on.", allowed="a run folder, --results, or both",
                          next_step="chulengo report runs/<name>")
    if not arguments.run and not arguments.out:
        raise ConfigError("Nothing says where the report goes.", next_step="--out report.html")
    from chulengo.config import RunConfig
    from chulengo.config.load import flatten
    from chulengo.evaluate.report.card import model_card
    from chulengo.evaluate.report.inputs import check_same_run, read_results, read_run, results_in
    from chulengo.evaluate.report.page import report_html

    source = read_run(Path(arguments.run)) if arguments.run else None
    evaluations = [read_results(Path(folder)) for folder in arguments.results]
    if source is not None and not evaluations:
        evaluations = results_in(source)
    if source is not None:
        for results in evaluations:
            check_same_run(source, results)
    pages = {Path(arguments.out) if arguments.out else Path(arguments.run) / "report.html":
             report_html(source, evaluations, flatten(RunConfig()))}
    if arguments.markdown:
        pages[Path(arguments.markdown)] = model_card(source, evaluations, flatten(RunConfig()))
    for path, text in pages.items():
        write_page(path, text)
        print(f"written to {path}")
    return 0


def write_page(path: Path, text: str) -> None:
    """Writes the text as UTF-8; the file is whole or not there.

    Raises:
        ConfigError: there can be no file of that name.
        OSError: the place may not be written to, or is full.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder.", allowed="a file", next_step=f"--out {path / 'report.html'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ConfigError(f"{path.parent} is a file.", allowed="a folder", next_step="--out report.html") from error
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        unfinished.write_bytes(text.encode("utf-8"))
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
