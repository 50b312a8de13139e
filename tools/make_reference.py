"""Writes docs/reference: every setting, every command's help. `--check` fails when the files are not up to date."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from pathlib import Path

from chulengo.cli.main import VERBS, main
from chulengo.config.describe import as_markdown

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"


def pages() -> dict[str, str]:
    """Returns file name -> content."""
    os.environ["COLUMNS"] = "100"
    commands = ["# Commands", "", "Made by `make docs` from the commands themselves.", ""]
    for verb in VERBS:
        commands += [f"## chulengo {verb}", "", "```", _help(verb), "```", ""]
    settings = ["# Settings", "", "Made by `make docs` from `chulengo.config.schema`. Given in a recipe (YAML) or by "
                "`--set section.key=value`.", "", as_markdown(), ""]
    return {"commands.md": "\n".join(commands), "settings.md": "\n".join(settings)}


def _help(verb: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([verb, "--help"])
    return text.getvalue().rstrip()


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page would change")
    check = parser.parse_args().check
    stale = []
    for name, content in pages().items():
        file = FOLDER / name
        if not file.is_file() or file.read_text(encoding="utf-8") != content:
            stale.append(name)
            if not check:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(content, encoding="utf-8")
    print(f"{'out of date' if check else 'written'}: {', '.join(stale) or 'nothing'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(run())
