"""The documents: links lead somewhere, generated pages are up to date, commands and settings named exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from chulengo.cli.main import VERBS
from chulengo.config import RunConfig, load_config
from chulengo.config.describe import as_markdown
from chulengo.config.load import flatten

# files and modules that look like settings
NOT_SETTINGS = {"model.safetensors", "data.renderer", "data.md", "lora.py", "model.loss"}
ROOT = Path(__file__).resolve().parents[1]
PAGES = [p for p in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")] if p.name != "CHANGELOG.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_settings_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for verb in re.findall(r"(?:^|`|&& )chulengo ([a-z]+)", text, flags=re.MULTILINE):
        assert verb in VERBS, verb
    known = set(flatten(RunConfig()))
    for key in re.findall(r"\b((?:model|data|prompt|lora|training)\.[a-z_]+)\b", text):
        assert key in known or key in NOT_SETTINGS or key.startswith("data.columns."), key


def test_set_options_are_valid() -> None:
    for page in PAGES:
        for option in re.findall(r"--set ([a-z_.]+=[^\s`]+)", page.read_text(encoding="utf-8")):
            if not option.startswith(("data.streaming", "section.")):  # needs more than itself; a placeholder
                load_config(None, [option])


def test_settings_page_is_up_to_date() -> None:
    assert as_markdown() in (ROOT / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")


def test_reference_maker_runs() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "make_reference.py"), "--check"],
        capture_output=True, text=True, timeout=60, check=False,
    )
    assert "commands.md" in done.stdout or done.returncode == 0, done.stderr
